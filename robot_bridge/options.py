"""KEY=VALUE on a command line."""

from __future__ import annotations

from typing import Any

from twinrl.core.errors import ConfigError


def options_of(pairs: list[str]) -> dict[str, Any]:
    """What `pairs` of the form KEY=VALUE say, numbers as numbers."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"option {pair!r} is not of the form KEY=VALUE")
        try:
            options[key.replace("-", "_")] = float(text) if "." in text else int(text)
        except ValueError:
            options[key.replace("-", "_")] = text
    return options
