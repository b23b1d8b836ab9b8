"""Which robot plays which start, who waits for one, and how episodes ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from robot_bridge.leases import Robot
from robot_bridge.starts import Starts

KEPT = 5000  # results


class Episodes:
    """Hands out `starts` and collects results. Not thread-safe: its owner locks."""

    def __init__(self, saved: dict[str, Any], why_not: Callable[[Robot], str]) -> None:
        """`why_not(robot)` says why the robot must not begin an episode now, "" when it may."""
        self.starts = Starts(saved.get("starts"))
        self.results: list[dict[str, Any]] = saved.get("results", [])
        self._why_not = why_not
        self._asking: list[tuple[Robot, Future, float]] = []

    def ask(self, robot: Robot, timeout: float) -> Future:
        """The Future gives {"start": ...} or {"wait": reason}."""
        self.drop(robot)
        for entry in [entry for entry in self._asking if entry[0] is robot]:
            self._asking.remove(entry)
            entry[1].set_result({"wait": "a newer request took its place"})
        future: Future = Future()
        self._asking.append((robot, future, time.monotonic() + timeout))
        self.tick()
        return future

    def tick(self) -> None:
        """Hand out what can be handed out."""
        now, left = time.monotonic(), []
        for robot, future, deadline in self._asking:
            reason, start = self._why_not(robot), None
            if not reason:
                start = self.starts.draw()
                reason = "" if start else "each start configuration has been played"
            if start is not None:
                robot.start = start
                future.set_result({"start": start})
            elif now > deadline or not robot.attached:
                future.set_result({"wait": reason})
            else:
                left.append((robot, future, deadline))
        self._asking = left

    def finish(self, robot: Robot, finished: Any) -> None:
        """A robot tells how its episode ended; it may tell twice. The start of one that counts for nothing goes back."""
        if not finished or any(r["episode"] == finished["episode"] for r in self.results[-200:]):
            return
        if robot.start is not None and robot.start["id"] != finished.get("start"):
            self.drop(
                robot
            )  # it asked twice and played what it was given first: this one is free again
        robot.start = None
        number = self.results[-1]["number"] + 1 if self.results else 1
        start, counts = str(finished.get("start")), not finished.get("invalid")
        item = self.starts.done(start) if counts else self.starts.give_back(start)
        self.results.append({**finished, "number": number, "robot": robot.name, "item": item})
        del self.results[:-KEPT]
        if counts and not finished.get("discarded"):
            robot.results.append(bool(finished.get("success")))
            robot.count_interventions(finished)
        robot.count_episode(int(str(finished["episode"]).rpartition("-")[2]))

    def drop(self, robot: Robot) -> None:
        """The robot does not play its start to the end: another may have it."""
        if robot.start is not None:
            self.starts.give_back(robot.start["id"])
        robot.start = None

    def since(self, number: int) -> list[dict[str, Any]]:
        """Results after the one with `number`."""
        return [result for result in self.results if result["number"] > number]

    def saved(self) -> dict[str, Any]:
        """For the disk."""
        return {"starts": self.starts.state(), "results": self.results}
