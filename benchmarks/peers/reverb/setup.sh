#!/bin/sh
# dm-reverb needs Python 3.11 at most, TensorFlow 2.15 and numpy 1: an environment of its own, about 1.3 GB.
set -e
cd "$(dirname "$0")"
python=$(command -v python3.11 || command -v python3.10) || {
    echo "dm-reverb needs Python 3.10 or 3.11, and there is none"; exit 1; }
[ -x venv/bin/python ] || "$python" -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements.txt
venv/bin/python -c 'import reverb'
