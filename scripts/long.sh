#!/usr/bin/env bash
# The longer checks, in parts of at most 45 minutes. A part that passed on this commit is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN="${VENV:-.venv}/bin"
done_folder=runs/long/$(git rev-parse --short HEAD 2>/dev/null || echo none)
mkdir -p "$done_folder"

part() {  # NAME COMMAND...
    local name=$1; shift
    if [ -e "$done_folder/$name" ]; then echo "long: $name passed before on this commit"; return; fi
    echo "long: $name"
    "$@"
    touch "$done_folder/$name"
}

part fuzz env TWINRL_LONG=1 "$BIN/python" -m pytest tests/test_replay_fuzz.py tests/test_bridge_fuzz.py
part crash env TWINRL_LONG=1 "$BIN/python" -m pytest tests/test_replay_crash.py tests/test_buffer_shards.py tests/test_replay_hostile.py
part resets env TWINRL_LONG=1 "$BIN/python" -m pytest -s tests/test_twins_recovery.py
part link "$BIN/python" -m benchmarks.rough_link --minutes "${LINK_MINUTES:-10}"
part seeds "$BIN/python" -m experiments.demo_seeds "$@"  # goes on with the seeds that are not done
