"""Which of our two distributions is installed: `twinrl`, all of it, or `twinrl-robot`, the robot PC's part of it."""

from __future__ import annotations

import functools

from twinrl.core.errors import ConfigError

WHOLE, ROBOT = "twinrl", "twinrl-robot"
OURS = (
    "twinrl", "twins", "policies", "buffer_service", "actors", "learner", "robot_bridge", "dashboard", "deploy",
)  # fmt: skip


def distribution() -> str:
    """What to name to pip. A checkout that nobody installed is the whole."""
    return ROBOT if _installed(ROBOT) and not _installed(WHOLE) else WHOLE


def refuse_both() -> None:
    """They hold the same files: uninstalling one of the two would take them from the other."""
    if _installed(WHOLE) and _installed(ROBOT):
        raise ConfigError(
            f"{WHOLE} and {ROBOT} are both installed here and hold the same files: run  "
            f"pip uninstall -y {WHOLE} {ROBOT}  and install the one that you need"
        )


def cure(module: str | None) -> str:
    """What to do about a module that is not here."""
    ours = (module or "").partition(".")[0] in OURS
    if ours and distribution() == ROBOT:
        return (
            f"{ROBOT} is the robot PC's part only; install {WHOLE} (Python 3.11 or newer) in a virtual "
            "environment of its own"
        )
    return f"pip install {'--force-reinstall ' + WHOLE if ours else module}"


@functools.lru_cache(maxsize=None)
def _installed(name: str) -> bool:
    # Late: it takes a tenth of the command's start. What a build leaves in a checkout (an egg-info folder) has
    # no list of installed files.
    from importlib import metadata

    found = metadata.distributions(name=name)
    return any(each.read_text("RECORD") is not None for each in found)
