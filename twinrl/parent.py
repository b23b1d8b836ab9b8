"""A supervised process ends with its launcher, also when that is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "TWINRL_PARENT"  # environment variable: the launcher's process id


def die_with_parent() -> None:
    """End this process by SIGTERM when the launcher that started it dies, however it died (Linux only)."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)
