#!/bin/sh
# Stable-Baselines3 beside the project's own torch, numpy, gymnasium and MuJoCo, which it finds through a .pth file, and imageio,
# without which gymnasium's MuJoCo tasks cannot be imported. Both sides of experiments/baselines.py run on this interpreter.
set -e
cd "$(dirname "$0")"
project=$("$PROJECT_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
[ -x venv/bin/python ] || "$PROJECT_PYTHON" -m venv venv
echo "$project" > "$(venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements.txt
venv/bin/python -c 'import stable_baselines3, gymnasium.envs.mujoco'
