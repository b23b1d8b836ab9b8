"""What every worker process of the replay benchmark speaks: a JSON object a line on stdin, one back on stdout.

The harness asks `{"do": NAME, ...}`; the answer is what the function of that name returned, or `{"error": ...}`.
Needs nothing but the standard library and numpy: each peer runs it in an environment of its own.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np


@functools.cache
def answers() -> TextIO:
    """Where answers go. From the first call on, what libraries print goes to stderr."""
    file = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return file


def serve(**functions: Callable[..., Any]) -> None:
    """Answer requests with `functions` until stdin ends."""
    answers().write('{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = functions[request.pop("do")](**request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers().write(json.dumps(answer or {}) + "\n")


def load(path: str) -> list[dict[str, np.ndarray]]:
    """The workload's segments: `cam0`, `cam1` (51, 128, 128, 3) uint8 where there are images, `state` (51, S),
    `action` (50, 4, 7), `reward` (50,) float32, `flags` (50, 4) bool.
    """
    with np.load(Path(path)) as file:
        columns = {name: file[name] for name in file.files}
    count = len(columns["reward"])
    return [{name: column[n] for name, column in columns.items()} for n in range(count)]


def repeat(
    do: Callable[[], int], seconds: float, finish: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Call `do`, which returns how many transitions it moved, for `seconds` s; `finish` counts as well."""
    times, count = [], 0
    start = before = time.perf_counter()
    while before - start < seconds:
        count += do()
        now = time.perf_counter()
        times.append(now - before)
        before = now
    if finish is not None:
        finish()
    return {"transitions": count, "seconds": time.perf_counter() - start, "times": times}
