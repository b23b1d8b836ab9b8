"""One optimiser step for every algorithm: gradients, clipping, schedule, and what happens to a loss that is no number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.core.errors import TwinRLError


class NonFiniteLossError(TwinRLError):
    """Too many losses or gradients in a row were not finite."""


class Optimiser:
    """AdamW on `parameters`; `step(loss)` computes gradients, clips, applies them and moves the schedule on.

    A loss or gradient that is not finite changes nothing and is counted in `skipped`; `patience` of them in a row raise
    NonFiniteLossError.
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
        self._optimiser = torch.optim.AdamW(
            self.parameters, learning_rate, weight_decay=weight_decay, fused=True
        )
        self._schedule = (
            torch.optim.lr_scheduler.LambdaLR(self._optimiser, schedule) if schedule else None
        )

    def step(self, loss: Tensor) -> float:
        """Apply the gradient of `loss` (a scalar); -> its norm before clipping."""
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        if norm == norm and norm != float("inf"):
            self._optimiser.step()
            self._in_a_row = 0
        else:
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row >= self.patience:
                raise NonFiniteLossError(
                    f"{self._in_a_row} updates in a row had a loss or gradient that is not finite "
                    f"(loss {float(loss.detach())})"
                )
        if self._schedule is not None:
            self._schedule.step()
        return norm

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
