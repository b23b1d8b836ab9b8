"""Weights in the cluster: shared-memory files on the learner's host (twinrl.weights_slots), Ray's object store elsewhere.

The weight store, a Ray actor on the launcher's host, knows which versions there are. Processes of the learner's host
do not ask it: they see new versions in shared memory. For others it puts a version into Ray's object store, once, when
the first of them asks; Ray maps it into the actors of a node without a copy. Where the learner runs on another host
than the store, the learner puts every version, and the store writes it to its own host's shared memory, for the
gateway and the actors there.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray

from twinrl.core.errors import DeadlineError, TwinRLError
from twinrl.weights import Weights, compare
from twinrl.weights import checksum as checksum_of
from twinrl.weights_publisher import KEEP, Publisher
from twinrl.weights_slots import SlotReader, owned, slots_folder

STORE = "weights"  # the store's name in the run's namespace
ANSWER = 60.0  # s for the store
LOOK = 1.0  # s between looks whether the learner lives on this host


class WeightStore:
    """A Ray actor that knows the versions: the newest `keep`, and those that are to be evaluated."""

    def __init__(self, run_dir: str, keep: int = KEEP, folder: str = "") -> None:
        self._folder = Path(folder or slots_folder(run_dir))
        self._record = Path(run_dir) / "weights.json"
        saved = json.loads(self._record.read_text()) if self._record.exists() else {}
        self._keep = keep
        self._slots = SlotReader(self._folder)
        self._mirror: Publisher | None = None
        self._checksums: dict[int, int] = {}
        self._objects: dict[int, Any] = {}
        # A store that was brought back finds what is in shared memory; a resumed run nothing but the number.
        self._last = int(saved.get("newest", -1))
        if owned(self._folder):
            found = [self._slots.look(version) for version in self._slots.versions()]
            self._checksums = {w.version: w.checksum for w in found if w is not None}
        self._kept = {v for v in saved.get("kept", []) if v in self._checksums}

    def publish(self, version: int, checksum: int) -> tuple[list[int], bool]:
        """Announce a version -> the versions that must stay, and whether this host's memory has this one."""
        self._checksums[version] = checksum
        self._last = max(self._last, version)
        newest = set(sorted(self._checksums)[-self._keep :])
        self._checksums = {
            v: c for v, c in self._checksums.items() if v in newest or v in self._kept
        }
        self._objects = {v: box for v, box in self._objects.items() if v in self._checksums}
        self._save()
        return list(self._checksums), self._here(version) is not None

    def attach(self, version: int, boxed: list[Any]) -> None:
        """The object of a version that this host's memory has not (a list, so that Ray hands over the reference)."""
        arrays = ray.get(boxed[0], timeout=ANSWER)
        compare(version, checksum_of(arrays), self._checksums[version])
        self._objects[version] = boxed
        if self._mirror is None:
            self._mirror = Publisher(self._folder, announce=lambda *_: list(self._checksums))
        self._mirror.publish(version, arrays)

    def keep(self, version: int, kept: bool) -> None:
        """Hold on to a version that is to be evaluated, or let it go."""
        if not kept:
            self._kept.discard(version)
        else:
            self._kept.add(self.exactly(version)[0])
        self._save()

    def exactly(self, version: int) -> tuple[int, int]:
        """(version, checksum); KeyError when it is gone."""
        if version not in self._checksums:
            raise KeyError(f"policy version {version} is gone; there are {sorted(self._checksums)}")
        return version, self._checksums[version]

    def newest(self, newer_than: int) -> tuple[int, int] | None:
        """(version, checksum) if there is one above `newer_than`."""
        newest = max(self._checksums, default=-1)
        return None if newest <= newer_than else self.exactly(newest)

    def last(self) -> int:
        """The newest version of the run, also of one that was resumed; -1 for none."""
        return self._last

    def boxed(self, version: int) -> list[Any]:
        """[object] of a version, for another host; KeyError when it is gone."""
        _, checksum = self.exactly(version)
        if version not in self._objects:
            found = self._here(version)
            if found is None:
                raise KeyError(f"policy version {version} (checksum {checksum:016x}) is gone")
            self._objects[version] = [ray.put(found.arrays)]
        return self._objects[version]

    def _here(self, version: int) -> Weights | None:
        found = self._slots.look(version)
        return found if found and found.checksum == self._checksums.get(version) else None

    def _save(self) -> None:
        temporary = self._record.with_suffix(".tmp")
        temporary.write_text(json.dumps({"newest": self._last, "kept": sorted(self._kept)}))
        os.replace(temporary, self._record)


class RayWeightSink:
    """The learner's end; made anywhere, used in one process."""

    def __init__(self, run_dir: str, folder: str = "") -> None:
        self._folder = Path(folder or slots_folder(run_dir))

    @cached_property
    def _store(self) -> Any:
        return ray.get_actor(STORE)

    @cached_property
    def _publisher(self) -> Publisher:
        return Publisher(self._folder, announce=self._announce)

    def publish(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy `arrays`, which may change as soon as this returns, and hand them out in the background."""
        self._publisher.publish(version, arrays)

    def flush(self, timeout: float = ANSWER) -> None:
        """Return when everything published is announced, or raise why it could not be."""
        if "_publisher" in self.__dict__:
            self._publisher.flush(timeout)

    def newest(self) -> int:
        """The newest published version of the run, -1 for none."""
        return ray.get(self._store.last.remote(), timeout=ANSWER)

    def close(self) -> None:
        """Announce what was published and end."""
        if "_publisher" in self.__dict__:
            self._publisher.close()

    def _announce(self, version: int, checksum: int, views: dict[str, np.ndarray]) -> list[int]:
        stay, here = ray.get(self._store.publish.remote(version, checksum), timeout=ANSWER)
        if not here:
            ray.get(self._store.attach.remote(version, [ray.put(views)]), timeout=ANSWER)
        return stay


class RayWeightSource:
    """An actor's end. `poll` never waits: on another host, the question is asked in the background, one at a time."""

    def __init__(self, run_dir: str, folder: str = "") -> None:
        self._folder = Path(folder or slots_folder(run_dir))
        self._slots = SlotReader(self._folder)
        self._asked: Any = None
        self._look, self._local = -LOOK, False

    def __reduce__(self) -> tuple[Any, ...]:
        return RayWeightSource, ("", str(self._folder))

    @cached_property
    def _store(self) -> Any:
        return ray.get_actor(STORE)

    def _here(self) -> bool:
        """The learner publishes on this host, so that shared memory has everything."""
        if time.monotonic() - self._look > LOOK:
            self._look, self._local = time.monotonic(), owned(self._folder)
        return self._local

    def poll(self, newer_than: int) -> Weights | None:
        """The newest weights above `newer_than` if they are at hand."""
        if self._here():
            return self._slots.poll(newer_than)
        if self._asked is None:
            self._asked = self._store.newest.remote(newer_than)
        if not ray.wait([self._asked], timeout=0)[0]:
            return None
        asked, self._asked = self._asked, None
        try:
            answer = ray.get(asked)
        except ray.exceptions.RayActorError:  # the store died with our question; it will be back
            return None
        if not answer or answer[0] <= newer_than:
            return None
        with contextlib.suppress(ray.exceptions.RayTaskError):  # gone: there are newer ones by now
            return self._fetch(*answer)
        return None

    def wait(self, newer_than: int, timeout: float) -> Weights:
        """The newest weights above `newer_than`; DeadlineError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            weights = self.poll(newer_than)
            if weights is not None:
                return weights
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"waited {timeout:g} s for a policy version above {newer_than}: "
                    "the learner has published none"
                )
            time.sleep(0.002 if self._local else 0.02)

    def get(self, version: int) -> Weights:
        """Exactly `version`."""
        try:
            version, checksum = ray.get(self._store.exactly.remote(version), timeout=ANSWER)
            found = self._slots.look(version)
            if found is not None and found.checksum == checksum:
                return self._slots.get(version)
            return self._fetch(version, checksum)
        except ray.exceptions.RayTaskError as error:
            raise TwinRLError(str(error.cause)) from None

    def _fetch(self, version: int, checksum: int) -> Weights:
        (reference,) = ray.get(self._store.boxed.remote(version), timeout=ANSWER)
        arrays = ray.get(reference, timeout=ANSWER)
        compare(version, checksum_of(arrays), checksum)
        return Weights(version, arrays, checksum, verified=True)
