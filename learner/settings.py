"""An algorithm's settings from plain options: wrong names and values are refused in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from twinrl.core.errors import ConfigError

Kind = TypeVar("Kind")


def make_settings(kind: type[Kind], options: Mapping[str, Any], where: str) -> Kind:
    """`kind` (a dataclass) with `options`; ConfigError names the nearest setting of one that does not exist.

    `where` is the section that the options were given in, for the message.
    """
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
            raise ConfigError(f"{where} has no setting {name!r}; {hint}")
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
