"""`twinrl attach --systemd`: a systemd service that runs the same attach.

A stop is latched in the process that was told to stop. Whoever starts another process releases it, so nobody but a
person may do that once the arm could have moved: not systemd after a crash, and not the PC after it was switched on.
The service therefore has no [Install] section, and is started again by itself only while no gateway has answered.
"""

from __future__ import annotations

import getpass
import re
import sys
from pathlib import Path

NOT_REACHED = (
    75  # exit status while nothing has been asked of the arm yet; EX_TEMPFAIL of sysexits.h
)

_UNIT = """\
# Written by `twinrl attach --systemd`. Start it by hand, at the arm, with the hardware stop within reach:
#   sudo systemctl start twinrl-{name}
[Unit]
Description=TwinRL robot {name}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=1h
StartLimitBurst=60

[Service]
User={user}
WorkingDirectory={folder}
ExecStart={command}
# A latched stop ends with the process that holds it. So only a start that found no gateway is repeated; after
# anything else, a crash too, a person looks at the arm first.
Restart=no
RestartForceExitStatus={not_reached}
RestartSec=10
KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec=30
Environment=OMP_NUM_THREADS=1

# Without [Install], on purpose: `systemctl enable` would let the arm move after a power cut.
"""


def service(name: str, argv: list[str]) -> str:
    """The service's file for `twinrl attach` with `argv`, for this user, this Python and this folder."""
    program = [sys.executable, "-m", "twinrl.main"]
    script = Path(sys.executable).parent / "twinrl"
    if script.exists():
        program = [str(script)]
    words = [*program, "attach", *(word for word in argv if not word.startswith("--sy"))]
    return _UNIT.format(
        name=name,
        user=getpass.getuser(),
        folder=str(Path.cwd()).replace("%", "%%"),
        command=" ".join(map(_quoted, words)),
        not_reached=NOT_REACHED,
    )


def _quoted(word: str) -> str:
    """As systemd reads it: % and $ stand for themselves, blanks do not end the word."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return word if re.fullmatch(r"[\w./:=,@%$+\-]+", word) else f'"{word}"'
