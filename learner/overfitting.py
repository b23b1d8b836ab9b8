"""When training goes on getting better at what it is shown, and worse at what it is not."""

from __future__ import annotations

from typing import Any

MARGIN = 1.02  # of the best validation loss: less is noise


class Overfitting:
    """Follows training and validation loss; `warning` is a sentence once they have parted for `patience` looks.

    They have parted when the validation loss is above its best by a margin, has not improved for so long, and the
    training loss, averaged since the last look, is below what it was at the best look.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.warning = ""
        self.best, self.best_step = float("inf"), 0
        self._training_then = float("inf")
        self._looks = 0  # since the best one
        self._total, self._count = 0.0, 0

    def trained(self, loss: float) -> None:
        """A training loss, of one step."""
        self._total += loss
        self._count += 1

    def look(self, step: int, validation: float) -> None:
        """A validation loss, after `step` steps."""
        training = self._total / max(1, self._count)
        self._total, self._count = 0.0, 0
        if validation < self.best:
            self.best, self.best_step = validation, step
            self._training_then, self._looks = training, 0
            return
        self._looks += 1
        parted = validation > MARGIN * self.best and training < self._training_then
        if self._looks >= self.patience and parted and not self.warning:
            self.warning = (
                f"overfitting: the validation loss was best after {self.best_step} steps "
                f"({self.best:.4g}) and is {validation:.4g} after {step}, while the training loss fell from "
                f"{self._training_then:.4g} to {training:.4g}; take fewer steps or more demonstrations"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        vars(self).update(state)
