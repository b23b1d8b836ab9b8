"""Where episodes on the arms start: what the cluster wants to see practised or evaluated."""

from __future__ import annotations

import random
from typing import Any

from twinrl.core.errors import WireError

ORDERS = ("random", "each")
ANYWHERE: dict[str, Any] = {"configuration": None, "region": "id", "parameters": {}}


class Starts:
    """A list of start configurations. `random`: drawn for ever; `each`: every one once, by whichever arm is free.

    Without a list the robot draws its own from the ID region.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.version = int(state.get("version", 0))
        self._order = state.get("order", "random")
        self._items: list[dict[str, Any]] = state.get("items", [])
        self._waiting: list[int] = state.get("waiting", [])  # of `each`
        self._given: dict[str, int] = state.get("given", {})  # start id: item
        self._number = int(state.get("number", 0))

    def replace(self, items: list[Any], order: str, parameters: dict[str, Any]) -> int:
        """From now on these; the number that names this list in results."""
        if order not in ORDERS:
            raise WireError(f"order {order!r} is none of {', '.join(ORDERS)}")
        checked = [self._checked(item, parameters) for item in items]
        self.version += 1
        self._order, self._items, self._given = order, checked, {}
        self._waiting = list(range(len(checked))) if order == "each" else []
        return self.version

    def draw(self) -> dict[str, Any] | None:
        """The next start; None when each was given already."""
        if self._order == "each":
            if not self._waiting:
                return None
            index = self._waiting.pop(0)
        else:
            index = random.randrange(len(self._items)) if self._items else -1
        self._number += 1
        name = f"{self.version}.{self._number}"
        self._given[name] = index
        return {"id": name, "item": index, **(self._items[index] if index >= 0 else ANYWHERE)}

    def done(self, name: str) -> int:
        """The start was played; its index in the present list, -1 if it is not from there."""
        return self._given.pop(name, -1)

    def give_back(self, name: str) -> int:
        """The start was not played: its robot left, or a fault spoilt it. Another may have it; as `done`."""
        index = self._given.pop(name, -1)  # -1: of an older list
        if self._order == "each" and index >= 0:
            self._waiting.insert(0, index)
        return index

    def state(self) -> dict[str, Any]:
        """For the disk."""
        return {
            "version": self.version,
            "order": self._order,
            "items": self._items,
            "waiting": self._waiting,
            "given": self._given,
            "number": self._number,
        }

    @staticmethod
    def _checked(item: Any, parameters: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(item, dict):
            raise WireError(f"a start is a dict, not {item!r}")
        if "configuration" not in item and not set(item) <= set(ANYWHERE):
            # A bare configuration, as Env.configurations() gives them.
            item = {"configuration": item}
        configuration = item.get("configuration")
        region = item.get("region") or (configuration or {}).get("region") or "id"
        return {
            "configuration": configuration,
            "region": str(region),
            "parameters": {**parameters, **item.get("parameters", {})},
        }
