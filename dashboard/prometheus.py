"""The figures of a snapshot as Prometheus metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import CollectorRegistry

from dashboard.record import as_number

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Names inside a figure's key become labels, so that one metric can be summed and compared over them.
PATTERNS = (
    (re.compile(r"^robot/(?P<robot>[^/]+)/(?P<rest>.+)$"), "robot/{rest}"),
    (re.compile(r"^replay/transitions/(?P<source>[^/]+)$"), "replay/transitions"),
    (re.compile(r"^replay/waited_s/(?P<client>.+)$"), "replay/waited_s"),
    (
        re.compile(
            r"^eval/(?P<stage>[^/]+)/(?P<world>[^/]+)/(?P<region>[^/_]+)(?P<rest>_low|_high|_n|)$"
        ),
        "eval/success{rest}",
    ),
    (re.compile(r"^loss/(?P<loss>.+)$"), "loss"),
    (re.compile(r"^env/success_(?P<region>id|ood)$"), "env/success"),
)


def exposition(snapshot: dict[str, Any]) -> bytes:
    """Prometheus' text format of `snapshot`: gauges named twinrl_*, labelled by run, role and name."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(snapshot))
    return generate_latest(registry)


class _Snapshot:
    def __init__(self, snapshot: dict[str, Any]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        metrics: dict[str, Metric] = {}
        for process in self._snapshot["processes"]:
            labels = {
                "run": self._snapshot["run"],
                "role": process["role"],
                "name": process["name"],
            }
            alive = float(process["status"] == "running")
            _add(metrics, "up", "1 while the process reports", labels, alive)
            _add(metrics, "last_report_timestamp_seconds", "", labels, process["time"])
            for key, value in process["data"].items():
                self._add_figure(metrics, key, value, labels)
        yield from metrics.values()

    def _add_figure(
        self, metrics: dict[str, Metric], key: str, value: Any, labels: dict[str, str]
    ) -> None:
        original = key
        for pattern, template in PATTERNS:
            if match := pattern.match(key):
                groups = match.groupdict()
                key = template.format(rest=groups.pop("rest", ""))
                # A label of the process must not be hidden by one of the figure.
                labels = {**groups, **labels}
                break
        name = re.sub(r"[^a-zA-Z0-9_]", "_", key)
        number = as_number(value)
        if number is not None:
            _add(metrics, name, original, labels, number)
        elif isinstance(value, str):
            _add(metrics, f"{name}_info", original, {**labels, "value": value}, 1.0)


def _add(
    metrics: dict[str, Metric], name: str, text: str, labels: dict[str, str], value: float
) -> None:
    name = f"twinrl_{name}"
    if name not in metrics:
        metrics[name] = Metric(name, text or name, "gauge")
    metrics[name].add_sample(name, labels, value)
