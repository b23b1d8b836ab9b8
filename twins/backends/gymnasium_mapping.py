"""How a gymnasium environment's own observations and actions become the Env seam's, and back.

Python 3.8 and any gymnasium from 0.29 on: a worker in an environment of its own imports this.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from twinrl.env import ACTION_DIM

WHOLE = "observation"  # key of an observation that is no dictionary
GRIPPER = 6  # the seam's seventh number, 0 closed to 1 open
SUCCESS_KEYS = ("is_success", "success", "succeed")  # of info, as environments call it
RENDER = "render"  # camera that is the environment's render()
NOTHING = np.zeros(0, np.float32)
COUNTED = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def unknown(what: str, name: Any, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist: it tells the nearest one, and all."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {what} {name!r}; {hint}known: {', '.join(names) or 'none'}")


def leaves(space: spaces.Space) -> dict[str, spaces.Space]:
    """{"group.key": space} of everything in an observation space."""
    found = {}
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            for path, leaf in leaves(part).items():
                found[key if path == WHOLE else f"{key}.{path}"] = leaf
    elif isinstance(space, spaces.Tuple):
        return leaves(spaces.Dict({str(i): part for i, part in enumerate(space.spaces)}))
    else:
        found[WHOLE] = space
    return found


def is_image(space: spaces.Space) -> bool:
    """A picture: height, width and 1 or 3 colours in either order, in bytes or between 0 and 1."""
    if not isinstance(space, spaces.Box) or len(space.shape) != 3:
        return False
    colours = space.shape[-1] in (1, 3) or space.shape[0] in (1, 3)
    unit = space.dtype.kind == "f" and space.low.min() == 0 and space.high.max() == 1
    return colours and (space.dtype == np.uint8 or unit)


class Numbers:
    """Some leaves of an observation as one vector of float32."""

    def __init__(self, space: spaces.Space, keys: Sequence[str], what: str) -> None:
        every = leaves(space)
        self._parts: list[tuple[str, spaces.Space]] = []
        for key in keys:
            chosen = [path for path in every if path == key or path.startswith(key + ".")]
            if not chosen:
                raise unknown(f"observation key of {what}", key, every)
            for path in chosen:
                leaf = every[path]
                if not isinstance(leaf, (spaces.Box, *COUNTED)):
                    raise ValueError(f"observation {path!r} is {leaf}, not numbers for {what}")
                self._parts.append((path, leaf))
        self.keys = [path for path, _ in self._parts]
        self.names = tuple(name for path, leaf in self._parts for name in _names(path, leaf))
        self._counted = any(isinstance(leaf, COUNTED) for _, leaf in self._parts)

    def __call__(self, raw: Any) -> np.ndarray:
        """(S,) float32 of one environment's observation."""
        if len(self._parts) <= 1 and not (self.names and self._counted):  # most environments
            found = _at(raw, self._parts[0][0]) if self._parts else NOTHING
            found = np.asarray(found).reshape(-1)
            if found.dtype == np.float32:
                return found
        parts = []
        for path, leaf in self._parts:
            value = _at(raw, path)
            if isinstance(leaf, COUNTED):  # a choice as zeros and a one
                value = spaces.utils.flatten(leaf, value)
            parts.append(np.asarray(value, np.float64).reshape(-1))
        with np.errstate(over="ignore"):  # too large for float32 is infinite, which the caller sees
            return np.concatenate([np.zeros(0), *parts]).astype(np.float32)


def numeric_keys(space: spaces.Space) -> list[str]:
    """Keys of everything that is numbers and no picture."""
    kinds = (spaces.Box, *COUNTED)
    return [k for k, s in leaves(space).items() if isinstance(s, kinds) and not is_image(s)]


def image_keys(space: spaces.Space) -> dict[str, str]:
    """{camera: key} of the pictures: a camera is named by the last part of its key."""
    paths = [path for path, leaf in leaves(space).items() if is_image(leaf)]
    short = [path.rpartition(".")[2] for path in paths]
    alone = {path: s if short.count(s) == 1 else path for path, s in zip(paths, short)}
    return {alone[path]: path for path in paths}


def picture(raw: Any, key: str, size: int) -> np.ndarray:
    """(size, size, 3) uint8 of the picture at `key` of one environment's observation."""
    return resized(_at(raw, key), size)


def resized(image: Any, size: int) -> np.ndarray:
    """A picture (H, W), (H, W, 1 or 3) or (1 or 3, H, W) as (size, size, 3) uint8; proportions are not kept."""
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3:
        raise ValueError(f"a picture has shape {image.shape}, not (H, W, 3)")
    if image.shape[-1] not in (1, 3, 4):
        image = np.moveaxis(image, 0, -1)
    image = (
        np.broadcast_to(image[..., :3], (*image.shape[:2], 3)) if image.shape[-1] != 3 else image
    )
    if image.shape[:2] == (size, size) and image.dtype == np.uint8:
        return image
    values = image.astype(np.float32) * (255.0 if image.dtype.kind == "f" else 1.0)
    rows, columns = _sampling(image.shape[0], size), _sampling(image.shape[1], size)
    values = np.einsum("ih,hwc,jw->ijc", rows, values, columns, optimize=True)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


_samplings: dict[tuple[int, int], np.ndarray] = {}


def _sampling(given: int, wanted: int) -> np.ndarray:
    """(wanted, given) weights: each pixel is the mean of what it covers (smaller) or interpolated (larger)."""
    if (given, wanted) not in _samplings:
        scale = given / wanted
        if scale >= 1:
            edges = np.arange(wanted + 1) * scale
            pixel = np.arange(given)
            above = np.minimum(edges[1:, None], pixel + 1)
            weights = np.maximum(0.0, above - np.maximum(edges[:-1, None], pixel))
        else:
            centre = np.clip((np.arange(wanted) + 0.5) * scale - 0.5, 0, given - 1)
            weights = np.maximum(0.0, 1.0 - np.abs(centre[:, None] - np.arange(given)))
        weights /= weights.sum(1, keepdims=True)
        _samplings[given, wanted] = weights.astype(np.float32)
    return _samplings[given, wanted]


class Mapped(NamedTuple):
    """Actions in the environment's own form, and what of the seam's was executed."""

    own: list  # n actions
    executed: np.ndarray  # (n, 7) float32


class Actions:
    """From actions (n, 7) float32 to a Box of up to 7 numbers, or to a Discrete of up to 7 choices.

    `dims` says which of the 7 are used, one for each number (default: the first ones). A bounded number's
    range is reached by `low` .. `high` of the seam (a number, or one for each; default -1 .. 1, and 0 .. 1 for the
    seventh, the gripper), beyond it is clipped; an unbounded one is taken as it is. Of choices the largest number wins, and a one at its place is what was
    executed.
    """

    def __init__(
        self,
        space: spaces.Space,
        dims: Sequence[int] | None = None,
        low: float | Sequence[float] | None = None,
        high: float | Sequence[float] = 1.0,
    ) -> None:
        self._space = space
        self.discrete = isinstance(space, spaces.Discrete)
        if self.discrete:
            size = int(space.n)
        elif isinstance(space, spaces.Box):
            size = int(np.prod(space.shape, dtype=int))
        else:
            raise ValueError(f"actions are {space}; those of a Box or Discrete can be mapped")
        if not 1 <= size <= ACTION_DIM:
            kind = "choices" if self.discrete else "numbers"
            raise ValueError(
                f"actions are {space}: {size} {kind}, and {ACTION_DIM} are what we send"
            )
        self.dims = list(range(size)) if dims is None else [int(d) for d in dims]
        wrong = [d for d in self.dims if not 0 <= d < ACTION_DIM]
        if len(set(self.dims)) != size or len(self.dims) != size or wrong:
            raise ValueError(
                f"action.dims is {self.dims}; {space} needs {size} different ones of 0 .. {ACTION_DIM - 1}"
            )
        self.low, self.high = np.full((2, ACTION_DIM), [[-1.0], [1.0]], np.float32)
        self.low[GRIPPER] = 0.0
        if self.discrete:
            return
        low = self.low[self.dims] if low is None else low
        self._low = np.broadcast_to(np.asarray(low, np.float64), size)
        self._high = np.broadcast_to(np.asarray(high, np.float64), size)
        if not (self._low < self._high).all():
            raise ValueError(f"action.low {low} is not below action.high {high}")
        bottom = space.low.reshape(-1).astype(np.float64)
        top = space.high.reshape(-1).astype(np.float64)
        self._bounded = np.isfinite(bottom) & np.isfinite(top)
        self.low[self.dims] = np.where(self._bounded, self._low, -np.inf)
        self.high[self.dims] = np.where(self._bounded, self._high, np.inf)
        self._bottom = np.where(self._bounded, bottom, 0.0)
        self._top = np.where(self._bounded, top, 1.0)

    def __call__(self, actions: np.ndarray) -> Mapped:
        """Actions (n, 7) of n environments."""
        used = actions[:, self.dims].astype(np.float64)
        executed = np.zeros((len(actions), ACTION_DIM), np.float32)
        if self.discrete:
            choice = used.argmax(1)
            executed[np.arange(len(actions)), np.asarray(self.dims)[choice]] = 1.0
            start = int(getattr(self._space, "start", 0))
            return Mapped([np.int64(start + c) for c in choice], executed)
        taken = np.where(self._bounded, np.clip(used, self._low, self._high), used)
        share = (taken - self._low) / (self._high - self._low)
        values = np.where(self._bounded, self._bottom + share * (self._top - self._bottom), taken)
        executed[:, self.dims] = taken
        space = self._space
        if space.dtype.kind in "iu":
            values = np.rint(values)
        values = values.astype(space.dtype)
        if self._bounded.all():  # rounding must not carry a float32 over its bound
            values = np.clip(values, space.low.reshape(-1), space.high.reshape(-1))
        return Mapped([row.reshape(space.shape) for row in values], executed)

    @property
    def neutral(self) -> Any:
        """An action for an environment whose results nobody looks at."""
        return self(np.zeros((1, ACTION_DIM), np.float32)).own[0]


class Success:
    """Success as the environment says in its info, or by an episode's return, which is known at its end only."""

    def __init__(self, rule: dict[str, Any] | None, threshold: float | None) -> None:
        """`rule` is {info: key} or {return: number}; without one, SUCCESS_KEYS and then `threshold` decide."""
        keys: Sequence[Any] = SUCCESS_KEYS
        if rule is not None:
            if len(rule) != 1 or not {"info", "return"}.issuperset(rule):
                raise ValueError(
                    f"success is {rule!r}, must be {{info: key}} or {{return: number}}"
                )
            keys = [rule["info"]] if "info" in rule else []
            threshold = float(rule["return"]) if "return" in rule else None
        self._keys, self._threshold = keys, threshold

    def __call__(self, info: dict[str, Any], total: float, ended: bool) -> bool:
        """`total` is the sum of the rewards so far."""
        for key in self._keys:
            if key in info:
                return bool(info[key])
        return bool(ended and self._threshold is not None and total >= self._threshold)


def _at(raw: Any, path: str) -> Any:
    if path == WHOLE and not isinstance(raw, dict):
        return raw
    for key in path.split("."):
        raw = raw[int(key)] if isinstance(raw, tuple) else raw[key]
    return raw


def _names(path: str, leaf: spaces.Space) -> list[str]:
    size = int(spaces.utils.flatdim(leaf))
    return [path] if size == 1 else [f"{path}_{i}" for i in range(size)]
