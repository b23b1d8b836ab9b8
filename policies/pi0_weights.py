"""Published pi0 weights: finding them, mapping their names onto ours, loading all of them or nothing.

Names that are understood, each with and without a leading "model.":

- openpi's PyTorch port, and LeRobot from 0.4 on: `paligemma_with_expert.paligemma.model.language_model.layers...`;
- LeRobot 0.1 to 0.3: `paligemma_with_expert.paligemma.language_model.model.layers...`, with the statistics of states
  and actions as buffers beside them;
- `transformers`' PI0ForConditionalGeneration: `model.vlm...`, `model.dit...`.

The table of words is stored under its own name, under that of the tied output layer, or under both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from policies.hub import NotFetchedError, local_path
from policies.lora import adapted_layers
from policies.pi0_statistics import apply_statistics
from policies.weights import WeightsError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
WANTED = ("*.safetensors", "*.json", "tokenizer.model")
WORDS = "trunk.language_model.embed_tokens.weight"
TIED = "trunk.lm_head.weight"
PROJECTIONS = "state_proj|action_in_proj|action_out_proj|action_time_mlp_in|action_time_mlp_out"

# Applied in this order to a published name.
RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.(?=paligemma_with_expert\.|vlm\.|dit\.|(action_|state_|time_)\w+\.)", ""),
        (rf"^(embed_action_time\.)?({PROJECTIONS})\.", r"flow.\2."),
        (r"^(paligemma_with_expert\.gemma_expert\.model|dit)\.", "flow.gemma."),
        (r"^(paligemma_with_expert\.paligemma(\.model)?|vlm)\.", "trunk."),
        (r"^trunk\.language_model\.lm_head\.", "trunk.lm_head."),
        (r"^trunk\.language_model\.model\.", "trunk.language_model."),
        (r"^trunk\.vision_tower\.vision_model\.", "trunk.vision_tower."),
    )
)
# The expert reads and writes no words; its tables are stored because of the class that they were trained in.
UNUSED = re.compile(r"^(paligemma_with_expert\.gemma_expert\.lm_head|flow\.gemma\.embed_tokens)\.")
STATISTICS = re.compile(r"^(normalize_inputs|normalize_targets|unnormalize_outputs)\.")
# What of ours is in every checkpoint: neither LoRA nor what FlowExpert and padding add.
SHARED = re.compile(rf"^(trunk|flow\.gemma|flow\.({PROJECTIONS}))\.(?!.*\.lora_[ab]$)")
PI05 = re.compile(r"(^|\.)time_mlp_(in|out)\.|layernorm\.dense\.|norm\.dense\.")


def our_name(published: str) -> str:
    """A published parameter's name in Pi0, or its name unchanged where it is none of the known kinds."""
    for pattern, replacement in RENAMES:
        published = pattern.sub(replacement, published)
    return published


def published_name(ours: str) -> str:
    """The name that openpi's PyTorch port and LeRobot (behind "model.") give to one of Pi0's parameters."""
    tower = "paligemma_with_expert.paligemma.model."
    for mine, theirs in (
        ("trunk.vision_tower.", tower + "vision_tower.vision_model."),
        ("trunk.", tower),
        ("flow.gemma.", "paligemma_with_expert.gemma_expert.model."),
        ("flow.", ""),
    ):
        if ours.startswith(mine):
            return theirs + ours.removeprefix(mine)
    raise ValueError(f"{ours!r} is no parameter of trunk or expert")


@dataclass
class Published:
    """A checkpoint that is open: where each tensor lies, and what lies beside it."""

    source: str
    files: list[Path]
    folder: Path  # what lies beside the weights: tokenizer, statistics
    names: dict[str, Path] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in self.files:
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118
                    self.names[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer, empty where it has none."""
        names = ("tokenizer.json", "tokenizer.model")
        found = any((self.folder / name).exists() for name in names)
        return str(self.folder) if found else ""

    def read(self, names: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
        """(name, tensor) of each, one file after the other; a tensor is in memory only while it is used."""
        wanted = set(names)
        for path in self.files:
            here = [name for name in wanted if self.names[name] == path]
            with _open(path) as file:
                for name in here:
                    yield name, file.get_tensor(name)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from None


def open_published(weights: str) -> Published:
    """The checkpoint in a folder, a file, or under a name on the Hugging Face hub."""
    try:
        path = local_path(weights, WANTED)
    except NotFetchedError as error:
        raise WeightsError(f"policy.weights: {error}") from None
    if path.is_file():
        return Published(weights, [path], path.parent)
    if (path / INDEX).exists():
        shards = json.loads((path / INDEX).read_text())["weight_map"].values()
        files = [path / name for name in sorted(set(shards))]
    else:
        files = [path / FILE]
    if missing := [str(file) for file in files if not file.exists()]:
        raise WeightsError(f"no weights in {weights!r}: {missing} are missing")
    return Published(weights, files, path)


def load_published(policy: nn.Module, published: Published, dtype: torch.dtype) -> None:
    """Load the trunk (as `dtype`) and the expert (as float32) of a Pi0 whole, then the statistics of states and actions where they fit.

    Raises WeightsError, which lists the names, where one is missing, unknown, there twice or of another shape; nothing
    is loaded then.
    """
    wanted = {name: tensor for name, tensor in policy.state_dict().items() if SHARED.search(name)}
    places = _places(published, wanted)
    loaded = {
        # A copy: what safetensors gives is mapped, and would change with its file.
        places[name]: tensor.to(
            dtype if places[name].startswith("trunk.") else torch.float32, copy=True
        )
        for name, tensor in published.read(places)
    }
    policy.load_state_dict(loaded, strict=False, assign=True)
    apply_statistics(
        policy.state_normaliser, policy.action_normaliser, published.files, published.folder
    )


def published_state(policy: nn.Module) -> dict[str, Tensor]:
    """Trunk and expert under openpi's names, LoRA merged: what openpi and, behind "model.", LeRobot load."""
    merged = {
        f"trunk.{name}.weight": layer.merged_weight()
        for name, layer in adapted_layers(policy.trunk)
    }
    state = {
        published_name(name): merged.get(name, tensor)
        for name, tensor in policy.state_dict().items()
        if SHARED.search(name)
    }
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def _places(published: Published, wanted: dict[str, Tensor]) -> dict[str, str]:
    """Published name -> ours, for what is to be read."""
    if sample := sorted(name for name in published.shapes if PI05.search(name))[:3]:
        raise WeightsError(
            f"{published.source} holds a pi0.5, which is another network (it has {sample}); Pi0 loads pi0"
        )
    places: dict[str, str] = {}
    taken: dict[str, str] = {}
    surplus, twice, shapes = [], [], []
    tied = {our_name(name): name for name in published.shapes}
    for name, shape in published.shapes.items():
        ours = our_name(name)
        if UNUSED.search(ours) or STATISTICS.search(name):
            continue
        if ours == TIED:
            if WORDS in tied:
                continue  # the same table again
            ours = WORDS
        if ours not in wanted:
            surplus.append(name)
        elif ours in taken:
            twice.append(f"{name} and {taken[ours]}")
        elif shape != tuple(wanted[ours].shape):
            shapes.append(f"{name} {shape}, should be {tuple(wanted[ours].shape)}")
        else:
            places[name] = ours
        taken[ours] = name
    missing = [published_name(name) for name in wanted if name not in taken]
    found = [("missing", missing), ("unknown", surplus), ("twice", twice), ("shapes", shapes)]
    if problems := [f"{kind}: {_listed(names)}" for kind, names in found if names]:
        raise WeightsError(
            f"{published.source} is not loaded, not even in part. {'; '.join(problems)}"
        )
    return places


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more
