"""The accounts of several replay services as one."""

from __future__ import annotations

import collections
from typing import Any


def merge(accounts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One account of several: numbers are summed, the rest is the first one's."""
    first = next(iter(accounts.values()))
    sizes: dict[str, collections.Counter[str]] = {}
    sums = {name: collections.Counter() for name in ("counters", "stats", "capacity")}
    cursors: dict[str, collections.Counter[str]] = {}
    written: collections.Counter[str] = collections.Counter()  # segments of each writer
    for account in accounts.values():
        for key, size in account["sizes"].items():
            sizes.setdefault(key, collections.Counter()).update(size)
        for name, total in sums.items():
            total.update({k: v for k, v in account[name].items() if isinstance(v, (int, float))})
        written.update({writer: last + 1 for writer, last in account["writers"].items()})
        for name, values in account["cursors"].items():
            cursors.setdefault(name, collections.Counter()).update(values)
    waiting = [
        f"shard {number}: {text}"
        for number, account in accounts.items()
        for text in account["waiting"]
    ]
    return {
        **first,
        **{name: dict(total) for name, total in sums.items()},
        "sizes": {key: dict(size) for key, size in sizes.items()},
        "writers": {writer: count - 1 for writer, count in written.items()},
        "cursors": {
            name: dict(total) | {"position": first["cursors"].get(name, {}).get("position", 0)}
            for name, total in cursors.items()
        },
        "waiting": waiting,
        "shards": accounts,
    }
