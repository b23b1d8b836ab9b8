"""One optimiser step for every algorithm: gradients, clipping, schedule, and what happens to a loss that is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from learner import distributed
from twinrl.core.errors import TwinRLError


class NonFiniteLossError(TwinRLError):
    """Too many losses or gradients in a row were not finite.

    `batch`: the last one, {name: array}, as far as the algorithm told; `parameters`: those that were trained.
    """

    def __init__(self, text: str, batch: Mapping[str, Any], parameters: list[nn.Parameter]) -> None:
        super().__init__(text)
        self.batch, self.parameters = batch, parameters


class Optimiser:
    """AdamW on `parameters`; `step(loss)` computes gradients, clips, applies them and moves the schedule on.

    A loss or gradient that is not finite changes nothing and is counted in `skipped`; `patience` of them in a row raise
    NonFiniteLossError. With several ranks (learner/distributed.py) gradients are averaged before they are clipped, so
    that all ranks make the same step, or skip the same.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        *,
        weight_decay: float = 0.0,
        clip: float = float("inf"),
        schedule: Callable[[int], float] | None = None,
        patience: int = 10,
    ) -> None:
        """`clip`: largest gradient norm; `schedule(step)` -> factor of the learning rate."""
        self.parameters = list(parameters)
        self.clip, self.patience = clip, patience
        self.skipped = self._in_a_row = 0
        self._loss = 0.0  # of what was accumulated since the last step
        self._fresh = True
        distributed.broadcast(self.parameters)
        self._optimiser = torch.optim.AdamW(
            self.parameters, learning_rate, weight_decay=weight_decay, fused=True
        )
        self._schedule = (
            torch.optim.lr_scheduler.LambdaLR(self._optimiser, schedule) if schedule else None
        )

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (a scalar) to the next step's: a large batch in parts that fit in memory.

        The step's loss is the sum of all that were given, so a part of a mean is its sum over the whole batch's count.
        """
        if self._fresh:
            self._optimiser.zero_grad(set_to_none=True)
            self._fresh, self._loss = False, 0.0
        with torch.autocast(
            loss.device.type, enabled=False
        ):  # gradients have their forward's dtype
            loss.backward()
        self._loss += float(loss.detach())

    def step(self, loss: Tensor, batch: Callable[[], Mapping[str, Any]] | None = None) -> float:
        """Apply the gradient of `loss` (a scalar) and of what was accumulated; -> its norm before clipping.

        `batch()` -> {name: tensor or array} is asked for what a NonFiniteLossError carries, to be looked at.
        """
        self.accumulate(loss)
        self._fresh = True
        total = distributed.average_gradients(self.parameters, self._loss)
        norm = float(distributed.full(nn.utils.clip_grad_norm_(self.parameters, self.clip)))
        if math.isfinite(total) and math.isfinite(norm):
            self._optimiser.step()
            self._in_a_row = 0
        else:
            self._skip(total, norm, batch)
        if self._schedule is not None:
            self._schedule.step()
        return norm

    def _skip(
        self, loss: float, norm: float, batch: Callable[[], Mapping[str, Any]] | None
    ) -> None:
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.patience:
            raise NonFiniteLossError(
                f"{self._in_a_row} updates in a row had a loss or gradient that is not finite "
                f"(loss {loss:g}, gradient norm {norm:g})",
                batch() if batch else {},
                self.parameters,
            )

    @property
    def learning_rate(self) -> float:
        """The present one."""
        return self._optimiser.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._optimiser.param_groups[0]["lr"] = value

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters."""
        return {
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict() if self._schedule else None,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._optimiser.load_state_dict(state["optimiser"])
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])
        self.skipped = state["skipped"]


def warm_cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """Schedule: linear from 0 to 1 in `warmup` steps, times a cosine from 1 to 0 in `steps`."""

    def factor(step: int) -> float:
        progress = min(1.0, step / steps)
        return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def one_cycle(steps: int, rise: float = 0.1, start: float = 25.0, end: float = 1e4) -> Callable:
    """Schedule: by cosines from 1 / `start` to 1 in the share `rise` of `steps`, then to 1 / (start * end) (Smith 2018)."""
    top = max(rise * steps - 1.0, 1e-9)

    def between(low: float, high: float, progress: float) -> float:
        return high + (low - high) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def factor(step: int) -> float:
        if step <= top:
            return between(1.0 / start, 1.0, step / top)
        return between(
            1.0, 1.0 / (start * end), min(1.0, (step - top) / max(steps - 1 - top, 1e-9))
        )

    return factor
