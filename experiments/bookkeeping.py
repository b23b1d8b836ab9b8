"""What experiments in one process share: settings from the command line, core-seconds of their parts, lines of JSON."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any


def overlaid(
    defaults: dict[str, dict[str, Any]],
    changes: dict[str, dict[str, Any]],
    overrides: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Copy of `defaults`, overlaid with `changes` and then with `section.option=value` overrides.

    A value is a Python literal, or else a word. SystemExit names the sections where an override has none of them.
    """
    settings = deepcopy(defaults)
    for section, options in changes.items():
        settings[section] |= options
    for override in overrides:
        name, _, text = override.partition("=")
        section, _, option = name.partition(".")
        if section not in settings or not option or not text:
            known = ", ".join(settings)
            raise SystemExit(f"{override!r} is not section.option=value with a section of {known}")
        try:
            settings[section][option] = ast.literal_eval(text)
        except (ValueError, SyntaxError):  # a word
            settings[section][option] = text
    return settings


class Bookkeeping:
    """What each part of an experiment costs, and a line for each result."""

    def __init__(self) -> None:
        self.core_seconds: dict[str, float] = {}

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Count the core-seconds of the body."""
        began = time.process_time()
        yield
        spent = time.process_time() - began
        self.core_seconds[part] = self.core_seconds.get(part, 0.0) + spent

    def report(self, row: dict[str, Any]) -> None:
        """Print one JSON line."""
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps(rounded), flush=True)
