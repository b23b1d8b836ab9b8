"""pi0 (Black et al. 2024): a PaliGemma trunk and a Gemma action expert that share their attention.

Three blocks of tokens: the prefix (images, instruction) sees itself; the state sees prefix and itself; the actions see
all. So the prefix's keys and values are computed once (`Pi0.encode`: the features), the state's once for all
integration steps (`Pi0Expert.condition`), and S points of a flow are evaluated side by side (`Pi0Expert.field`).

Published weights (openpi, LeRobot) mirror our time: there t = 1 is noise and the velocity is eps - A. The expert is
given 1 - t and its answer is negated, which makes their weights ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from policies.flow import FlowExpert
from policies.lora import adapted_layers, apply_lora
from policies.pi0_layers import (
    Cache,
    Pi0Sizes,
    PrefixLayout,
    autocast,
    fill_up,
    make_expert,
    make_sizes,
    make_trunk,
    parameters_on_meta,
    resize_with_pad,
    run_layers,
    time_embedding,
)
from policies.pi0_weights import load_published, open_published
from policies.policy import Policy
from policies.tokenizer import make_tokenizer
from policies.weights import to_arrays
from twinrl.env import ACTION_DIM, STATE, image_key
from twinrl.weights import checksum

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATE_LIMIT = (
    5.0  # standard deviations: a number that hardly moved in the data must not overwhelm the rest
)


class Condition(NamedTuple):
    """What all integration steps share: keys and values of prefix and state, M tokens."""

    cache: Cache
    visible: Tensor  # (B, M) bool
    next_position: Tensor  # (B, 1)


class Pi0Expert(FlowExpert):
    """The action expert: one token for the state and one for each action, over the prefix's keys and values."""

    def __init__(
        self,
        sizes: Pi0Sizes,
        layout: PrefixLayout,
        chunk: int,
        action_dim: int,
        noisy_steps: int = 0,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        published: bool = False,
    ) -> None:
        """`dtype`: what the layers compute in; `recompute`: activations again for the gradient, which saves memory;
        `published`: parameters have no values until they are loaded."""
        super().__init__(chunk * action_dim, layout.width + layout.padded, noisy_steps)
        if action_dim > sizes.padded:
            raise ValueError(f"{action_dim} numbers of an action; pi0 takes at most {sizes.padded}")
        self.layout, self.chunk, self.action_dim = layout, chunk, action_dim
        self.compute, self.recompute = dtype, recompute
        width = sizes.expert_width
        with parameters_on_meta(published):
            self.gemma = make_expert(sizes)
            self.state_proj = nn.Linear(sizes.padded, width)
            self.action_in_proj = nn.Linear(sizes.padded, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
            self.action_out_proj = nn.Linear(width, sizes.padded)
        # pi0's actions have `padded` numbers, of which those that a robot lacks are trained to go from noise to
        # zero on the straight path (1 - t) eps. They follow that path from one fixed draw of eps.
        draw = torch.Generator().manual_seed(0)
        self.register_buffer(
            "filling", torch.randn(chunk, sizes.padded - action_dim, generator=draw, device="cpu")
        )

    def summary(self, features: Tensor) -> Tensor:
        """The mean of the prefix's last hidden states, and the state: (B, width + padded)."""
        _, mean, state, _ = self.layout.unpack(features)
        return torch.cat([mean, state], dim=1)

    def condition(self, features: Tensor) -> Condition:
        """Runs the state's token."""
        cache, _, state, valid = self.layout.unpack(features)
        position = valid.sum(1, keepdim=True)
        visible = nn.functional.pad(valid, (0, 1), value=True)  # (B, P + 1)
        token = self.state_proj(state)[:, None]
        with autocast(self.compute, features.device):
            _, own = run_layers(
                self.gemma,
                token.to(self.compute),
                position,
                visible[:, None],
                cache,
                self.recompute,
            )
        pairs = zip(cache, own, strict=True)
        joined = [
            tuple(
                torch.cat([a.to(b.dtype), b], dim=2)
                for a, b in zip(before, state_pair, strict=True)
            )
            for before, state_pair in pairs
        ]
        return Condition(joined, visible, position + 1)

    def field(self, condition: Condition, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, S, D) in our direction of time."""
        batch, points = x.shape[:2]
        actions = x.unflatten(2, (self.chunk, self.action_dim))
        filling = (1 - t)[..., None] * self.filling  # (B, S, C, padded - A)
        tokens = self.action_in_proj(torch.cat([actions, filling], dim=-1))
        time = time_embedding(1 - t, tokens.shape[-1]).expand_as(
            tokens
        )  # (B, S, 1, W) for each action
        tokens = self.action_time_mlp_in(torch.cat([tokens, time], dim=-1))
        tokens = self.action_time_mlp_out(nn.functional.silu(tokens)).flatten(1, 2)
        steps = torch.arange(self.chunk, device=x.device).repeat(points)
        # The actions of one point see each other, not those of another.
        point = torch.arange(points, device=x.device).repeat_interleave(self.chunk)
        block = (point[:, None] == point).expand(batch, -1, -1)  # (B, S C, S C)
        before = condition.visible[:, None].expand(-1, len(point), -1)
        with autocast(self.compute, x.device):
            hidden, _ = run_layers(
                self.gemma,
                tokens.to(self.compute),
                condition.next_position + steps,
                torch.cat([before, block], dim=2),
                condition.cache,
                self.recompute,
            )
        theirs = self.action_out_proj(hidden.float()).unflatten(1, (points, self.chunk))
        return -theirs[..., : self.action_dim].flatten(2)


class Pi0(Policy):
    """Images of any size, an instruction and up to 32 numbers of state to chunks of up to 32 numbers an action.

    The trunk is frozen but for LoRA (`lora_rank`; 0 trains all of it); the expert is trained in full. With `weights`
    the frozen part is not published: every process loads it from there, and `base` tells one from another.
    """

    def __init__(
        self,
        *,
        state_dim: int,
        cameras: Sequence[str],
        chunk: int,
        pose_dim: int = 0,
        image_size: int = 224,
        action_dim: int = ACTION_DIM,
        integration_steps: int = 10,
        noisy_steps: int = 0,
        critics: int = 5,
        critic_hidden: int = 256,
        sizes: str | Mapping[str, int] = "pi0",
        weights: str = "",
        lora_rank: int = 32,
        lora_alpha: float = 0.0,
        lora_layers: Sequence[str] = ("",),
        tokenizer: str = "",
        prompt_tokens: int = 48,
        dtype: str = "float32",
        recompute: bool = False,
        **heads: bool,
    ) -> None:
        """`pose_dim` and `image_size` are not used: pi0 predicts no poses and resizes what it sees.

        weights: a folder or file of published safetensors, or a name on the Hugging Face hub; empty for random ones.
        lora_rank, lora_alpha (0: the rank), lora_layers: ends of names of the layers that get LoRA, all by default.
        tokenizer: a folder or name; empty for the one beside `weights`, else PaliGemma's; "hashed" for random weights.
        dtype: float32 or bfloat16, of the frozen weights and of all layers' arithmetic; trained weights are float32.
        recompute: activations are computed again for the gradient, which saves memory. **heads: see Policy.
        """
        if dtype not in DTYPES:
            raise ValueError(f"policy.dtype is {dtype!r}, should be one of {sorted(DTYPES)}")
        if not cameras:
            raise ValueError("pi0 was trained to see: it needs at least one camera")
        net = make_sizes(sizes)
        layout = PrefixLayout(
            net.layers,
            net.kv_heads,
            len(cameras) * net.image_tokens + prompt_tokens,
            net.head_dim,
            net.width,
            net.padded,
        )
        fill_up(torch.zeros(state_dim), net.padded, "state")
        published = open_published(weights) if weights else None
        super().__init__(
            expert=Pi0Expert(
                net,
                layout,
                chunk,
                action_dim,
                noisy_steps,
                DTYPES[dtype],
                recompute,
                published is not None,
            ),
            state_dim=state_dim,
            cameras=cameras,
            chunk=chunk,
            action_dim=action_dim,
            integration_steps=integration_steps,
            critics=critics,
            critic_hidden=critic_hidden,
            **heads,
        )
        self.sizes, self.layout = net, layout
        self.feature_shape = (sum(layout.parts),)
        self.tokenizer = make_tokenizer(
            tokenizer or (published.tokenizer if published else "") or "google/paligemma-3b-pt-224",
            net.vocabulary,
            prompt_tokens,
        )
        with parameters_on_meta(published is not None):
            self.trunk = make_trunk(net)
        self.register_buffer("base", torch.zeros((), dtype=torch.int64))
        if published is not None:
            load_published(self, published, DTYPES[dtype] if lora_rank else torch.float32)
        self.fixed = frozenset[str]()
        if lora_rank:
            self._freeze(lora_rank, lora_alpha or lora_rank, lora_layers, DTYPES[dtype])
            if published is not None:
                self._keep_base()
        if recompute:
            self.trunk.vision_tower.activation_checkpointing_enable({"use_reentrant": False})

    def _freeze(self, rank: int, alpha: float, suffixes: Sequence[str], dtype: torch.dtype) -> None:
        self.trunk.to(dtype)
        apply_lora(self.trunk, rank, alpha, suffixes)

    def _keep_base(self) -> None:
        """Leave what is frozen out of what is published, and remember what it is."""
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        arrays = to_arrays(self)
        digest = checksum({name: arrays[name] for name in frozen})
        self.base.fill_(digest - (1 << 63))  # of 64 bits, as int64
        self.fixed = frozenset(frozen)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """LoRA's matrices, or all of the trunk where it has none."""
        adapted = [
            p for _, layer in adapted_layers(self.trunk) for p in (layer.lora_a, layer.lora_b)
        ]
        return adapted or list(self.trunk.parameters())

    def encode(self, observation: Mapping[str, Tensor], instruction: str | Sequence[str]) -> Tensor:
        """`observation.images.<camera>` (B, H, W, 3) uint8, `observation.state` (B, S) -> (B, F), see PrefixLayout."""
        state = self.state_normaliser(observation[STATE]).clamp(-STATE_LIMIT, STATE_LIMIT)
        state = fill_up(state, self.sizes.padded, "state")
        images = [
            resize_with_pad(observation[image_key(name)], self.sizes.image) for name in self.cameras
        ]
        tokens, spoken = (part.to(state.device) for part in self.tokenizer(instruction, len(state)))
        text = self.trunk.language_model
        with autocast(self.flow.compute, state.device):
            seen = self.trunk.vision_tower(pixel_values=torch.cat(images)).last_hidden_state
            seen = self.trunk.multi_modal_projector(seen)
            words = nn.functional.embedding(tokens, text.embed_tokens.weight)
            words = words * math.sqrt(self.sizes.width)
            # One camera's tokens after the other's, then the words.
            hidden = torch.cat([*seen.chunk(len(images)), words.to(seen.dtype)], dim=1)
            valid = nn.functional.pad(spoken, (hidden.shape[1] - spoken.shape[1], 0), value=True)
            hidden, cache = run_layers(
                text, hidden, valid.cumsum(1) - 1, valid[:, None], recompute=self.flow.recompute
            )
        mean = (hidden.float() * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        return self.layout.pack(cache, mean, state, valid)
