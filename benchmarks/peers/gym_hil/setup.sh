#!/bin/sh
# gym-hil pins a MuJoCo older than ours: an environment of its own, about 0.4 GB. It has what a worker needs too
# (docs/simulators.md), and draws without a display through EGL or OSMesa (Debian: libegl1 or libosmesa6).
set -e
cd "$(dirname "$0")"
[ -x venv/bin/python ] || "$PROJECT_PYTHON" -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements.txt
venv/bin/python -c 'import gym_hil'
