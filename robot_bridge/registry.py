"""What can be had by a name: built in, or the entry point of another package (`[project.entry-points."GROUP"]`)."""

from __future__ import annotations

import difflib
import importlib
from typing import Any, Dict

from twinrl.core.errors import ConfigError
from twinrl.installed import cure


def find(what: str, kind: str, built_in: Dict[str, str], group: str) -> Any:
    """The class called `kind`; of `built_in` ("module:class" by name) first. ConfigError names what there is, and what is
    not installed; `what` is the noun of its sentence."""
    others = _brought(group) if kind not in built_in else {}
    if kind not in built_in and kind not in others:
        known = [*built_in, *sorted(others)]
        close = difflib.get_close_matches(kind, known, 1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"unknown {what} {kind!r}, not one of {', '.join(known)}{hint}")
    try:
        if kind in others:
            return others[kind].load()
        module, _, attribute = built_in[kind].partition(":")
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} {kind!r} needs {error.name}, which is not installed: {cure(error.name)}"
        ) from None
    except (AttributeError, ImportError) as error:
        raise ConfigError(f"{what} {kind!r} cannot be loaded: {error}") from None


def _brought(group: str) -> Dict[str, Any]:
    """Entry points by name."""
    from importlib import metadata  # late: it takes a tenth of the command's start

    points: Any = metadata.entry_points()
    # Python 3.8 and 3.9 have a dictionary.
    brought = points.select(group=group) if hasattr(points, "select") else points.get(group, ())
    return {point.name: point for point in brought}
