"""What stands in for sink and reporter where a learner publishes and reports nothing."""

from __future__ import annotations

from typing import Any


class NoSink:
    """Takes no weights: of a rank that publishes nothing, or where nobody waits for them."""

    def publish(self, version: int, arrays: Any) -> None:
        """Take nothing."""

    def flush(self, timeout: float = 60.0) -> None:
        """Nothing is under way."""

    def newest(self) -> int:
        """None was handed out."""
        return -1

    def close(self) -> None:
        """Nothing to close."""


class SilentReporter:
    """Of a rank that reports nothing: rank 0 says the same."""

    def event(self, level: str, text: str, **fields: Any) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Nothing to close."""


def silent_reporter(name: str, stats: Any) -> SilentReporter:
    """What a helper's `make_reporter` makes."""
    return SilentReporter()
