#!/usr/bin/env bash
# Creates the virtual environment and installs what constraints.txt pins. Needs Python 3.11 or newer, no root.
set -euo pipefail
cd "$(dirname "$0")/.."

"$PYTHON" - <<'PY' || { echo "TwinRL needs Python 3.11 or newer; try: make PYTHON=python3.11 setup"; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || {
    echo "python3-venv is missing; on Debian/Ubuntu: apt install python3-venv"; exit 1; }
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ "$TORCH" = auto ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then TORCH=cuda; else TORCH=cpu; fi
fi
torch=$(grep -E '^torch==' constraints.txt)
echo "setup: $torch ($TORCH build) and the pinned dependencies into $VENV; this can take some minutes"
case "$TORCH" in
    # A wheel that this machine is told to use comes first; else uv, which knows where each build is published;
    # and where that cannot be reached, the pinned version in whatever build there is.
    cpu) pip install -q --no-index "$torch" >/dev/null 2>&1 \
             || { pip install -q uv && "$VENV/bin/uv" pip install -q --python "$VENV/bin/python" \
                      --torch-backend=cpu "$torch" >/dev/null 2>&1; } \
             || pip install -q "$torch" ;;
    cuda) pip install -q "$torch" ;;
    *) echo "TORCH is '$TORCH', should be auto, cpu or cuda"; exit 1 ;;
esac
pip install -q -c constraints.txt -e ".[dev]"
echo "setup: compiling simulation and rendering kernels"
"$VENV/bin/python" -m twins.warm
