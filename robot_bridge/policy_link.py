"""The cluster's end of the gateway: for the robot actor, for deploy and for the dashboard."""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import numpy as np

from twinrl.core.keys import Keys
from twinrl.core.sockets import Client


class ChunkRequest(NamedTuple):
    """An arm's observation that waits for a chunk."""

    id: str
    robot: str
    episode: str
    step: int  # control steps since the reset
    instruction: str
    parameters: dict[str, Any]  # of the episode's start, as given to `set_configurations`
    observation: dict[
        str, np.ndarray
    ]  # without a batch axis; images are the decoded, stored frames

    @property
    def explore(self) -> bool:
        """Whether the policy should explore: `parameters["explore"]`, True unless said otherwise."""
        return bool(self.parameters.get("explore", True))


class PolicyLink:
    """Takes observations, gives chunks, and steers the arms. Thread-safe; `keys` of role `cluster`."""

    def __init__(self, address: str, keys: Keys, timeout: float = 10.0) -> None:
        self._client = Client("the gateway", address, keys, timeout)
        self._timeout = timeout

    def take(self, timeout: float) -> ChunkRequest | None:
        """The next observation that waits for a chunk; None if there is none within `timeout` s."""
        requests = self.take_batch(timeout, 1)
        return requests[0] if requests else None

    def take_batch(self, timeout: float, limit: int) -> list[ChunkRequest]:
        """Up to `limit` observations, at least one unless `timeout` s pass. An absent gateway gives none."""
        future = self._client.submit("policy_take", {"timeout": timeout, "limit": limit})
        try:
            result, arrays = future.result(timeout + 2.0)
        except TimeoutError:  # a gateway that restarts: arms ask again, and so does our caller
            return []
        finally:
            self._client.forget(future)
        return [_request(i, header, arrays) for i, header in enumerate(result["requests"])]

    def give(
        self,
        request: ChunkRequest,
        actions: np.ndarray,
        info: dict[str, np.ndarray] | None,
        version: int,
    ) -> bool:
        """The chunk (C, 7) for `request` and its `policy.*` arrays; whether the arm still waited for it."""
        arrays = {"action": np.ascontiguousarray(actions, "<f4")}
        for name, array in (info or {}).items():
            arrays[name if name.startswith("policy.") else f"policy.{name}"] = np.asarray(array)
        args = {"request": request.id, "version": int(version)}
        return bool(self._client.call("policy_give", args, arrays)[0]["used"])

    def refuse(self, request: ChunkRequest, reason: str) -> None:
        """No chunk for `request`: the arm holds, tells `reason`, and asks again."""
        self._client.call("policy_give", {"request": request.id, "refused": reason})

    def set_configurations(
        self,
        configurations: Sequence[dict[str, Any]],
        order: str = "random",
        parameters: dict[str, Any] | None = None,
    ) -> int:
        """Where episodes start from now on; the number that names this list.

        An entry is a configuration as Env.configurations() gives it, or {"configuration": dict or None (the robot
        draws), "region": "id" | "ood" | "all", "parameters": {...}}. `order`: "random" draws for ever, "each"
        plays every one once. Known parameters: explore (True), record (True: segments go to replay); others are
        handed through to `ChunkRequest.parameters`, the segments' headers and `results`. An empty list: robots
        draw their own.
        """
        args = {"configurations": list(configurations), "order": order}
        return self._client.call("set_configurations", {**args, "parameters": parameters or {}})[0][
            "version"
        ]

    def results(self, since: int = 0) -> list[dict[str, Any]]:
        """Finished episodes with `number` above `since`: robot, item (index in the list, -1 for none), start
        ("LIST.NUMBER"), success, steps, return, takeovers, seconds, version, truncated, configuration, ...

        Where `invalid` is not empty it says what cut the episode that was no fault of the policy (a camera, a reflex, a stop):
        it is no failure and must not be counted; in a list of order "each" its start is played again.
        """
        return self._client.call("results", {"since": since})[0]["results"]

    def robots(self) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        """Every robot's row, and the last frames as JPEG by "ROBOT/CAMERA"."""
        result, arrays = self._client.call("robots")
        frames = {name[len("frame/") :]: array.tobytes() for name, array in arrays.items()}
        return result["robots"], frames

    def command(self, robot: str, action: str) -> None:
        """`action`: hold, release, detach (after the episode), or estop (a request: the robot's PC latches)."""
        self._client.call("command", {"action": action, "target": robot})

    def pause(self) -> None:
        """All arms hold, and no episode begins."""
        self._client.call("pause")

    def resume(self) -> None:
        """Go on after `pause`."""
        self._client.call("resume")

    def run_state(self) -> dict[str, Any]:
        """{"paused": bool, "checkpoints": how many were asked for from the page}: for whoever runs the job."""
        return self._client.call("run_state")[0]

    def close(self) -> None:
        """Hang up."""
        self._client.close()


def _request(i: int, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> ChunkRequest:
    prefix = f"{i}/"
    observation = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
    return ChunkRequest(**header, observation=observation)


__all__ = ["ChunkRequest", "PolicyLink"]
