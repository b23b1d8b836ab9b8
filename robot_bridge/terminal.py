"""Keys pressed in the terminal that `twinrl attach` runs in. What everybody there may say:

escape     emergency stop (latched)          U  release it        u  rearm after any stop
enter      success     backspace  failure    x  discard the episode
"""

from __future__ import annotations

import os
import re
import select
import sys
from typing import Any

from twinrl.core.errors import ConfigError

ESTOP = "estop"
KEYS = {
    **{"\x1b": ESTOP, "U": "release", "u": "rearm", "c": "confirm"},
    **{"\n": "success", "\r": "success", "\x7f": "failure", "x": "discard"},
}
# What terminals send for F1 to F12. A foot pedal is a keyboard with such a key.
NUMBERS = (*("OP", "OQ", "OR", "OS"), *(f"[{n}~" for n in (15, 17, 18, 19, 20, 21, 23, 24)))
NAMED = {
    **{f"f{i}": f"\x1b{code}" for i, code in enumerate(NUMBERS, 1)},
    **{"escape": "\x1b", "space": " ", "tab": "\t"},
}
# An arrow key sends an escape and more at once: that is no person's emergency stop, it is one key.
KEY = re.compile(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)


class Terminal:
    """Reads keys without waiting for a line's end; `close` leaves the terminal as it was.

    `estop`: further keys that are an emergency stop, as in "b,f9": characters, f1 to f12, space, tab.
    """

    def __init__(self, stream: Any = None, estop: str = "") -> None:
        import termios
        import tty

        self.keys = {**KEYS, **{_key(name): ESTOP for name in estop.split(",") if name}}
        self.ended = False  # nothing will come any more
        self._stream = stream or sys.stdin
        self._file = self._stream.fileno()
        self._before = termios.tcgetattr(self._file)
        tty.setcbreak(self._file)

    @staticmethod
    def at_hand(stream: Any = None) -> bool:
        """There is a terminal to read from."""
        return (stream or sys.stdin).isatty()

    def pressed(self) -> list[str]:
        """Keys since the last call; one that sends several characters is one string."""
        text = ""
        # From the file itself: a stream reads ahead, and a key that it holds back is not seen until the next one.
        while not self.ended and select.select([self._file], [], [], 0)[0]:
            try:
                data = os.read(self._file, 1024)
            except OSError:  # the window was closed
                data = b""
            self.ended = not data
            text += data.decode("latin-1")
        return KEY.findall(text)

    def said(self) -> list[str]:
        """What the keys since the last call mean, of those that mean something."""
        return [self.keys[key] for key in self.pressed() if key in self.keys]

    def close(self) -> None:
        """Give the terminal back."""
        import contextlib
        import termios

        with contextlib.suppress(termios.error):  # it has gone
            termios.tcsetattr(self._file, termios.TCSADRAIN, self._before)


def _key(name: str) -> str:
    key = NAMED.get(name, name)
    if len(name) > 1 and name not in NAMED:
        raise ConfigError(f"key {name!r} is neither one character nor one of {', '.join(NAMED)}")
    return key
