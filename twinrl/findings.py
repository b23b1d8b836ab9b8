"""What the checks of `twinrl doctor` find, and how it is told."""

from __future__ import annotations

import json
from typing import Callable, NamedTuple

OK, WARNING, FAILED = "ok", "warning", "failed"
MARKS = {OK: "  ok    ", WARNING: "  warn  ", FAILED: "  FAIL  "}


class Finding(NamedTuple):
    """What a check found, and what to do about it."""

    level: str
    text: str
    cure: str = ""


def examine(checks: dict[str, Callable[[], Finding]], as_json: bool, install: str) -> int:
    """Run and tell `checks` by name; 1 when one failed. `install` mends what cannot be imported."""
    findings = {}
    for name, check in checks.items():
        try:
            findings[name] = check()
        except Exception as error:  # a check that breaks is a finding, the others still run
            cure = install if isinstance(error, ImportError) else ""
            findings[name] = Finding(FAILED, f"{type(error).__name__}: {error}", cure)
        if not as_json:
            finding = findings[name]
            print(f"{MARKS[finding.level]}{name:10} {finding.text}", flush=True)
            if finding.cure:
                print(f"{'':19}-> {finding.cure}", flush=True)
    if as_json:
        print(json.dumps({name: finding._asdict() for name, finding in findings.items()}))
    return int(any(finding.level == FAILED for finding in findings.values()))
