"""What a request's arguments must be: one function a kind, each a WireError for what it is not.

Peers are not believed: a NaN would be a deadline that never comes, an integer beyond 64 bits an answer that
cannot be sent, an endless name memory that is never given back.
"""

from __future__ import annotations

import math
from typing import Any

from twinrl.core.errors import WireError

HIGHEST = (1 << 63) - 1
LONGEST_TEXT = 1000  # characters
_REQUIRED: Any = object()


def integer(
    args: dict[str, Any], name: str, default: Any = _REQUIRED, low: int = 0, high: int = HIGHEST
) -> int:
    """args[name], an integer within `low` .. `high`."""
    value = _get(args, name, default)
    if type(value) is not int or not low <= value <= high:
        raise _wrong(name, value, f"an integer from {low} to {high}")
    return value


def number(
    args: dict[str, Any],
    name: str,
    default: Any = _REQUIRED,
    low: float = -math.inf,
    high: float = math.inf,
) -> float:
    """args[name], a finite number within `low` .. `high`."""
    value = _get(args, name, default)
    if not is_number(value) or not low <= value <= high:
        raise _wrong(name, value, f"a finite number from {low:g} to {high:g}")
    return float(value)


def seconds(args: dict[str, Any], name: str, default: float, most: float) -> float:
    """args[name] as a time to wait: cut to 0 .. `most` s."""
    value = _get(args, name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:  # NaN
        raise _wrong(name, value, "a number of seconds")
    return float(min(max(value, 0), most))


def text(
    args: dict[str, Any],
    name: str,
    default: Any = _REQUIRED,
    longest: int = LONGEST_TEXT,
    shortest: int = 0,
) -> str:
    """args[name], a string of `shortest` to `longest` characters."""
    value = _get(args, name, default)
    if not isinstance(value, str) or not shortest <= len(value) <= longest:
        raise _wrong(name, value, f"a string of {shortest} to {longest} characters")
    return value


def integers(
    args: dict[str, Any], name: str, most: int, low: int = 0, high: int = HIGHEST
) -> list[int]:
    """args[name], a list of at most `most` integers within `low` .. `high`."""
    value = _get(args, name, _REQUIRED)
    if not isinstance(value, list) or len(value) > most:
        raise _wrong(name, value, f"a list of at most {most} integers")
    for each in value:
        if type(each) is not int or not low <= each <= high:
            raise _wrong(name, each, f"integers from {low} to {high}")
    return value


def mapping(args: dict[str, Any], name: str) -> dict[str, Any]:
    """args[name], a map with strings as keys."""
    value = _get(args, name, _REQUIRED)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _wrong(name, value, "a map with strings as keys")
    return value


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int (as far as a float reaches) or float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _get(args: dict[str, Any], name: str, default: Any) -> Any:
    value = args.get(name, default)
    if value is _REQUIRED:
        raise WireError(f"the request lacks {name!r}")
    return value


def _wrong(name: str, value: Any, right: str) -> WireError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:80] + "..."
    return WireError(f"{name!r} is {shown}, should be {right}")
