"""`python scripts/config_docs.py`: writes docs/configuration.md from twinrl/config.py; `--check` only compares."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from twinrl.config import Config, Section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

Written by `scripts/config_docs.py` from `twinrl/config.py`: change the descriptions there, then run
`python scripts/config_docs.py`.

A job is one YAML file. What it does not say has the default below. Settings may also be given on the command line;
values are YAML, and all of them stand before the options:

```sh
twinrl launch configs/demo.yaml seed=3 name=seed3 twin_rl.steps=100000
twinrl launch configs/tiny.yaml 'real_rl.mix={demo: 0.3, twin: 0.2, real: 0.5}' --dry-run
```

- An unknown setting or a value out of range is refused before anything starts, with the nearest known name.
- The resolved configuration is written to `runs/NAME/config.yaml`; a resumed run takes it from there.
- `configs/demo.yaml` is the main job, `configs/tiny.yaml` the whole ring in miniature.
- `options` are passed on to an algorithm's settings, and `policy` to the policy's class:
  [algorithms](algorithms.md), [policies](policies.md). They are checked when their stage starts.
"""


def page() -> str:
    """The page's text."""
    return "\n".join([HEAD, *_section("Top level", "", Config), *_parts("", Config)])


def _parts(prefix: str, model: type[Section]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _section(f"`{prefix}{name}`", f"{prefix}{name}.", kind)
            yield from _parts(f"{prefix}{name}.", kind)


def _section(title: str, prefix: str, model: type[Section]) -> Iterator[str]:
    rows = [
        f"| `{prefix}{name}` | {_code(field.default)} | {_allowed(field)} | {field.description} |"
        for name, field in model.model_fields.items()
        if not isinstance(field.default, Section)
    ]
    yield f"## {title}\n"
    yield f"{(model.__doc__ or '').strip()}\n"
    yield "| setting | default | allowed | what it is |"
    yield "| --- | --- | --- | --- |"
    yield "\n".join(rows) + "\n"


def _code(value: Any) -> str:
    """A default as it would stand in YAML."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{key}: {each}' for key, each in value.items())}}}`"
    return f"`{value}`"


def _allowed(field: FieldInfo) -> str:
    kind = field.annotation
    if str(get_origin(kind)) == "typing.Literal":
        return ", ".join(f"`{value}`" for value in get_args(kind))
    names = [_name(part) for part in get_args(kind) or (kind,) if part not in (..., type(None))]
    if get_origin(kind) is tuple:
        text = f"list of {names[0]}"
    elif get_origin(kind) is dict:
        text = f"mapping of {names[0]} to {names[1]}"
    else:
        text = names[0]
    bounds = [_bound(rule) for rule in field.metadata]
    return " ".join([text, ", ".join(filter(None, bounds))]).strip()


def _name(kind: Any) -> str:
    known = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything"}
    return known.get(kind, str(kind))


def _bound(rule: Any) -> str:
    for kind, attribute, sign in (
        (Ge, "ge", "≥"),
        (Gt, "gt", ">"),
        (Le, "le", "≤"),
        (Lt, "lt", "<"),
    ):
        if isinstance(rule, kind):
            return f"{sign} {getattr(rule, attribute)}"
    pattern = getattr(rule, "pattern", None)
    return f"matching `{re.sub(r'[|]', '&#124;', pattern)}`" if pattern else ""


def main(argv: list[str] | None = None) -> int:
    """Write the page, or with --check say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when old")
    arguments = parser.parse_args(argv)
    current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
    if arguments.check:
        print(f"{PAGE.name} is {'current' if current else 'old: run scripts/config_docs.py'}")
        return int(not current)
    if not current:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
