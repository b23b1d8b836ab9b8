#!/bin/sh
# Builds the environment of every peer that needs one and is not built yet; says what could not be had.
# PROJECT_PYTHON: the project's own interpreter.
cd "$(dirname "$0")" || exit 1
for setup in */setup.sh; do
    peer=$(dirname "$setup")
    wanted=$(cat "$peer/requirements.txt" "$setup" | cksum)
    if [ "$(cat "$peer/venv/.installed" 2>/dev/null)" = "$wanted" ]; then
        echo "peers: $peer is there"
        continue
    fi
    echo "peers: installing $peer; this can take minutes"
    if sh "$setup"; then
        echo "$wanted" > "$peer/venv/.installed"
        echo "peers: $peer is there"
    else
        echo "peers: $peer could not be had, see above; benchmarks leave its rows out"
    fi
done
