"""Kill -9 of service, Redis, writers and readers in random order under load: nothing acknowledged is lost.

This file is also the program of the writers and readers, which are processes of their own. TWINRL_LONG=1 kills
for 5 minutes instead of 15 s; TWINRL_SEED repeats a sequence of kills.
"""

import collections
import contextlib
import json
import os
import random
import secrets
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from buffer_service.client import Cursor, Reader, Writer
from buffer_service.testing import SCHEMA, segment
from deploy import processes
from deploy.processes import Supervisor
from twinrl.core.errors import DeadlineError, TwinRLError
from twinrl.core.keys import Keys
from twinrl.core.sockets import wait_until

LONG = bool(os.environ.get("TWINRL_LONG"))
SECONDS = 300 if LONG else 15  # for each form of the store
STEPS, SEGMENTS = 8, 4  # of an episode
# Every writer's path and codec. Values say who wrote them: f(writer, episode, step).
WRITERS = ((True, "raw"), (False, "raw"), (True, "zstd"), (False, "zstd"))
READERS = (True, False)  # mapping the files, or fetching

pytestmark = pytest.mark.timeout(SECONDS + 240)


def make(writer: int, episode: int, first: int):
    """Header and columns of a segment: step t of the episode has values f(writer, episode, t)."""
    end = "truncated" if first == STEPS * (SEGMENTS - 1) else ""
    header, columns = segment(first, STEPS, end=end, episode=f"{writer} {episode}")
    for name in ("action", "observation.state"):
        columns[name][:, 1:3] = writer, episode
    for name in ("observation.images.front", "observation.images.wrist"):
        columns[name] += np.uint8((7 * writer + episode) % 251)
    return header, columns


def check(found) -> tuple[int, int, int]:
    """Bit for bit what `make` made; returns (writer, episode, first step)."""
    writer, episode = (int(each) for each in found.header["episode"].split())
    first = found.header["first_step"]
    _, columns = make(writer, episode, first)
    if found.header["last"]:  # or closed because its writer was killed
        columns["truncated"][-1] = True
    assert set(found.columns) == set(columns)
    for name, column in columns.items():
        assert found.columns[name].dtype == column.dtype
        np.testing.assert_array_equal(found.columns[name], column, f"{found.header}: {name}")
    return writer, episode, first


def connection(run_dir: Path):
    return (run_dir / "replay/address").read_text(), Keys.load(run_dir / "keys/cluster.key")


def write(run_dir: Path, number: int) -> None:
    """Write until `run_dir/stop` is there, and log what was acknowledged: a line each, on disk."""
    direct, codec = WRITERS[number]
    name, log = f"writer {number}", run_dir / f"acknowledged-{number}"
    # Numbers from the clock: no two processes of a writer use the same ones.
    episode = int(time.monotonic() * 100) % (1 << 22)
    pending: collections.deque[list] = collections.deque()
    writer = Writer(
        *connection(run_dir), name, schema=SCHEMA, direct=direct, codec=codec, window=8, deadline=90
    )
    assert writer.direct == direct
    done = 0

    def note() -> None:
        nonlocal done
        acknowledged = writer.stats()["writer/acknowledged"]
        if acknowledged > done:
            lines = [json.dumps(pending.popleft()) + "\n" for _ in range(acknowledged - done)]
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
            done = acknowledged

    with log.open("a") as file:
        while not (run_dir / "stop").exists():
            for first in range(0, SEGMENTS * STEPS, STEPS):
                sequence = writer.write(*make(number, episode, first))
                pending.append([name, sequence, number, episode, first])
                note()
                time.sleep(0.005)
            episode += 1
        writer.flush()
        note()
        assert not pending
        writer.close()


def read(run_dir: Path, number: int) -> None:
    """Draw batches and follow with a cursor until `run_dir/stop` is there; ends with an error at a wrong value."""
    folder = None if READERS[number] else run_dir / "nowhere"
    reader = Reader(*connection(run_dir), folder, name=f"reader {number}", deadline=90)
    cursor = Cursor(reader, f"cursor {number}", source=None)
    last: dict[str, int] = {}
    while not (run_dir / "stop").exists():
        batch = reader.sample(32, chunk=4)
        now, after = batch["observation.state"], batch["next.observation.state"]
        assert (now[:, 1:] == after[:, 1:]).all() and (
            after[:, 0] - now[:, 0] == batch["steps"]
        ).all()
        made = np.where(batch["step_mask"][:, :, None], now[:, None, 1:3], 0)
        assert (batch["action"][:, :, 1:3] == made).all()
        image = (now[:, 0] % 251 + (7 * now[:, 1] + now[:, 2]) % 251).astype(np.int64) % 256
        assert (batch["observation.images.front"] == image[:, None, None, None]).all()
        with contextlib.suppress(DeadlineError):
            for each in cursor.take(timeout=0.1):
                check(each)
                name, sequence = each.header["writer"], each.header["sequence"]
                assert sequence > last.get(name, -1), f"{name}: {sequence} after {last[name]}"
                last[name] = sequence
            cursor.commit()
    reader.close()


class Run:
    """A run under a supervisor, as the launcher has it."""

    def __init__(self, run_dir: Path, options: list[str]) -> None:
        self.run_dir, self.events = run_dir, []
        logs = run_dir / "logs"
        logs.mkdir(parents=True)
        self.supervisor = Supervisor(logs, lambda level, text: self.events.append((level, text)))
        python, here = sys.executable, str(Path(__file__))
        command = [python, "-m", "buffer_service.service", "--run-dir", str(run_dir), *options]
        self.supervisor.run("service", [*command, "--schema", json.dumps(list(SCHEMA))])
        wait_until((run_dir / "replay/address").exists, 60, "the service")
        self.workers = [f"write {n}" for n in range(len(WRITERS))]
        self.workers += [f"read {n}" for n in range(len(READERS))]
        for name in self.workers:
            words = [python, here, name.split()[0], str(run_dir), name.split()[1]]
            self.supervisor.run(name, words, may_leave=True)

    def kill(self, victim: str) -> None:
        """SIGKILL, to the process that has the name now."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError, KeyError):
            if victim == "redis":
                pid = int((self.run_dir / "redis/redis.pid").read_text())
            else:
                pid = self.supervisor.pids()[victim]
            os.kill(pid, signal.SIGKILL)

    def finish(self) -> None:
        """The workers end in order; the service goes on."""
        (self.run_dir / "stop").touch()

        def left() -> bool:
            self.supervisor.check()
            return not set(self.supervisor.pids()) & set(self.workers)

        wait_until(left, 120, f"the end of {', '.join(self.workers)}; events: {self.events[-6:]}")

    def acknowledged(self) -> list[list]:
        """What the writers were told: [writer's name, sequence, writer, episode, first step]."""
        lines = []
        for number in range(len(WRITERS)):
            path = self.run_dir / f"acknowledged-{number}"
            lines += path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MAX_RESTARTS", 1 << 30)
    runs = []

    def start(*options: str) -> Run:
        runs.append(Run(tmp_path / "run", list(options)))
        return runs[-1]

    yield start
    for run in runs:
        run.supervisor.close()


@pytest.mark.parametrize("form", ["files", "redis"])
def test_what_was_acknowledged_is_there_once_and_in_order_whoever_is_killed(supervised, form):
    seed = int(os.environ.get("TWINRL_SEED", secrets.randbelow(1 << 30)))
    print(f"TWINRL_SEED={seed}")
    generator = random.Random(seed)
    run = supervised("--store", form)
    wait_until(lambda: len(run.acknowledged()) > 100, 60, "the first acknowledgements")
    killed: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        time.sleep(generator.uniform(0.1, 2.0))
        kinds = [["service"], ["redis"], ["service", "redis"], *([each] for each in run.workers)]
        for victim in generator.choice([*kinds[:3] * 2, *kinds]):
            run.kill(victim)
            killed[victim] += 1
    run.finish()
    deaths = sum("was killed by SIGKILL" in text for _, text in run.events)
    assert deaths > 0.7 * (killed.total() - killed["redis"]) > 3, (deaths, killed)
    wrong = [text for _, text in run.events if "AssertionError" in text]
    assert not wrong, wrong[0]
    address, keys = connection(run.run_dir)
    for elsewhere in (None, run.run_dir / "nowhere"):
        with Reader(address, keys, elsewhere, deadline=60) as reader:
            reader.sync()
            verify(reader, run.acknowledged())
    assert "lost:" not in (run.run_dir / "logs/service.log").read_text(errors="replace")
    print(f"killed {dict(killed)}; {len(run.acknowledged())} segments acknowledged")


def verify(reader: Reader, acknowledged: list[list]) -> None:
    """Everything acknowledged is stored; everything stored is there once, in order, bit for bit."""
    entries, numbers = reader.entries(), collections.defaultdict(list)
    stored, steps = {}, collections.defaultdict(list)
    for entry, each in zip(entries, reader.segments(), strict=True):
        place = check(each)
        assert (entry.writer, entry.sequence) == (each.header["writer"], each.header["sequence"])
        assert (entry.writer, entry.sequence) not in stored, f"twice: {entry}"
        stored[entry.writer, entry.sequence] = place
        numbers[entry.writer].append(entry.sequence)
        steps[entry.episode].append(entry.first_step)
    for name, found in numbers.items():
        assert found == list(range(len(found))), f"{name}: {found}"
    for episode, found in steps.items():
        assert found == list(range(0, len(found) * STEPS, STEPS)), f"episode {episode}: {found}"
    assert len(acknowledged) > 500
    for name, sequence, *place in acknowledged:
        assert stored.get((name, sequence)) == tuple(place), f"{name} number {sequence}"


if __name__ == "__main__":
    try:
        {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    except TwinRLError as stopped:  # its service was away for too long: to be started again
        sys.exit(f"{type(stopped).__name__}: {stopped}")
