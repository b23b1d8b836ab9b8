"""LoRA (Hu et al. 2021): a frozen linear layer plus a trained product of two narrow matrices.

y = W x + b + (alpha / r) B A x, with A (r, inputs) random and B (outputs, r) zero at the start.

Our own hundred lines rather than `peft`: a layer keeps its place and its parameters' names, so that published weights
load the same with and without LoRA, and what is added is two parameters a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A linear layer whose own weights are frozen; `lora_a` and `lora_b` are float32 and trained."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        """Takes over the parameters of `base`."""
        if not 0 < rank <= min(base.in_features, base.out_features):
            raise ValueError(
                f"a LoRA rank of {rank}; of a layer from {base.in_features} to {base.out_features} "
                f"it is 1 to {min(base.in_features, base.out_features)}"
            )
        # nn.Linear's constructor would allocate and draw weights that are replaced at once.
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.scale = alpha / rank
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self._unmerged: Tensor | None = None

    @property
    def merged(self) -> bool:
        """Whether the product is part of `weight` at present."""
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.merged:
            return y
        added = nn.functional.linear(
            nn.functional.linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b
        )
        return y + (self.scale * added).to(y.dtype)

    def merge(self) -> None:
        """Add the product to `weight`, which makes acting and exporting as cheap as without LoRA."""
        if not self.merged:
            merged = self.merged_weight()
            self._unmerged, self.weight.data = self.weight.data, merged

    def unmerge(self) -> None:
        """Back to the frozen weight, bit for bit."""
        if self.merged:
            self.weight.data, self._unmerged = self._unmerged, None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + (alpha / r) B A (outputs, inputs) in the dtype of `weight`."""
        if self.merged:
            return self.weight.data
        product = self.lora_b @ self.lora_a
        return (self.weight.float() + self.scale * product).to(self.weight.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        # Whoever loads it would add the product a second time.
        if self.merged:
            raise RuntimeError(f"{prefix}weight is merged: unmerge before saving or publishing")
        super()._save_to_state_dict(destination, prefix, keep_vars)


def apply_lora(
    module: nn.Module, rank: int, alpha: float, suffixes: Sequence[str] = ("",)
) -> list[str]:
    """Freeze `module` and put LoRA on its linear layers whose names end in one of `suffixes`; -> their names.

    ("",) takes all of them. `alpha` scales what is added: alpha = rank leaves it as it is.
    """
    module.requires_grad_(False)
    chosen = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith(tuple(suffixes))
    ]
    if not chosen:
        found = sorted(
            {n.rpartition(".")[2] for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        )
        raise ValueError(f"no linear layer ends in one of {list(suffixes)}; there are {found}")
    for name in chosen:
        parent, _, own = name.rpartition(".")
        layer = module.get_submodule(name)
        setattr(module.get_submodule(parent), own, LoRALinear(layer, rank, alpha))
    return chosen


def adapted_layers(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Names and layers that have LoRA."""
    for name, layer in module.named_modules():
        if isinstance(layer, LoRALinear):
            yield name, layer


def merge(module: nn.Module) -> None:
    """Merge all LoRA layers of `module`; their state can not be saved until `unmerge`."""
    for _, layer in adapted_layers(module):
        layer.merge()


def unmerge(module: nn.Module) -> None:
    """Undo `merge`, bit for bit."""
    for _, layer in adapted_layers(module):
        layer.unmerge()
