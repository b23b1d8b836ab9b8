#!/bin/sh
# Installs twinrl-robot from this folder, without internet: sh install.sh [FOLDER]. PYTHON names another interpreter.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
case "${1:-}" in
    "") target=$HOME/twinrl-robot ;;
    /*) target=$1 ;;
    *) echo "install.sh: FOLDER is '$1', should be an absolute path" >&2; exit 1 ;;
esac

sha256sum --quiet -c SHA256SUMS || { echo "install.sh: the bundle is damaged, copy it again" >&2; exit 1; }
found="$("$python" -c 'import platform; print(".".join(platform.python_version_tuple()[:2]), platform.machine())')"
if [ "$found" != "@PYTHON@ @MACHINE@" ]; then
    echo "install.sh: this bundle is for Python @PYTHON@ on @MACHINE@, $python is $found: set PYTHON, or make another" \
        "with  make robot-bundle ARGS='--python ${found% *} --machine ${found#* }'" >&2
    exit 1
fi
# Without pip: the bundle brings its own, and Debian's Python has no ensurepip unless python3-venv is installed.
[ -x "$target/bin/python" ] || "$python" -m venv --without-pip "$target"
pip=$(echo wheels/pip-*.whl)
"$target/bin/python" "$pip/pip" install -q --disable-pip-version-check --no-index --find-links wheels \
    --upgrade pip twinrl-robot
"$target/bin/twinrl" --version
echo "installed; run $target/bin/twinrl attach --help"
