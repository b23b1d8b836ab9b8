#!/bin/sh
# TorchRL beside the project's own torch and numpy, which it finds through a .pth file: about 60 MB instead of 1 GB.
# Its compiled extension is for prioritised sampling and wants another torch; nothing here uses it.
set -e
cd "$(dirname "$0")"
project=$("$PROJECT_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
[ -x venv/bin/python ] || "$PROJECT_PYTHON" -m venv venv
echo "$project" > "$(venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements.txt
venv/bin/python -c 'from torchrl.data import LazyMemmapStorage'
