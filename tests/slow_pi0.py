"""pi0 once more, from the formulas: loops, an explicit mask, no cache, float64, openpi's names and direction of time."""

import math

import torch

from policies.pi0_layers import resize_with_pad
from policies.pi0_weights import published_state


class Slow:
    """pi0's velocity u = eps - A for one row, from the formulas; the sequence holds no padding at all."""

    def __init__(self, policy):
        self.sizes = policy.sizes
        self.weights = {name: w.double() for name, w in published_state(policy).items()}
        self.filling = policy.flow.filling.double()
        self.action_dim = policy.action_dim

    def w(self, name):
        return self.weights[name]

    def linear(self, name, x):
        return x @ self.w(name + ".weight").T + self.w(name + ".bias")

    def image(self, pixels):
        """(3, H, W) in [-1, 1] -> tokens (T, width): SigLIP and its projection."""
        s = self.sizes
        tower = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
        kernel = self.w(tower + "embeddings.patch_embedding.weight")
        rows = []
        for top in range(0, s.image, s.patch):
            for left in range(0, s.image, s.patch):
                patch = pixels[:, top : top + s.patch, left : left + s.patch]
                rows.append((kernel * patch).sum((1, 2, 3)))
        x = torch.stack(rows) + self.w(tower + "embeddings.patch_embedding.bias")
        x = x + self.w(tower + "embeddings.position_embedding.weight")
        for i in range(s.vision_layers):
            layer = f"{tower}encoder.layers.{i}."
            h = self.layer_norm(layer + "layer_norm1", x)
            q, k, v = (self.linear(f"{layer}self_attn.{p}_proj", h) for p in "qkv")
            out, d = torch.zeros_like(q), s.vision_width // s.vision_heads
            for head in range(s.vision_heads):
                part = slice(head * d, (head + 1) * d)
                scores = q[:, part] @ k[:, part].T / math.sqrt(d)
                out[:, part] = scores.softmax(-1) @ v[:, part]
            x = x + self.linear(layer + "self_attn.out_proj", out)
            h = self.linear(layer + "mlp.fc1", self.layer_norm(layer + "layer_norm2", x))
            x = x + self.linear(layer + "mlp.fc2", gelu(h))
        x = self.layer_norm(tower + "post_layernorm", x)
        return self.linear("paligemma_with_expert.paligemma.model.multi_modal_projector.linear", x)

    def layer_norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.w(name + ".weight") + self.w(name + ".bias")

    def rms_norm(self, name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + self.w(name))

    def rope(self, x):
        """Rotate the pairs (i, i + D / 2) of row p by p / 10000^(2 i / D)."""
        turned, half = torch.zeros_like(x), x.shape[1] // 2
        for p in range(len(x)):
            for i in range(half):
                angle = p / 10000 ** (2 * i / x.shape[1])
                a, b = x[p, i], x[p, i + half]
                turned[p, i] = a * math.cos(angle) - b * math.sin(angle)
                turned[p, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    def velocity(self, prefix, state, actions, tau, allowed=None):
        """u (C, padded) for tokens `prefix` (P, width), `state` (padded,), noisy `actions` (C, padded), time `tau`."""
        s = self.sizes
        angles = []
        for i in range(s.expert_width // 2):
            period = 0.004 * (4.0 / 0.004) ** (i / (s.expert_width // 2 - 1))
            angles.append(2 * math.pi * tau / period)
        time = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        time = time.double().expand(len(actions), -1)
        h = torch.cat([self.linear("action_in_proj", actions), time], dim=1)
        h = self.linear("action_time_mlp_in", h)
        h = self.linear("action_time_mlp_out", h * torch.sigmoid(h))
        streams = [prefix, torch.cat([self.linear("state_proj", state)[None], h])]
        blocks = [0] * len(prefix) + [1] + [2] * len(actions)
        allowed = allowed or (lambda query, key: key <= query)
        total = len(blocks)
        mask = torch.zeros(total, total, dtype=torch.float64)
        for i in range(total):
            for j in range(total):
                if not allowed(blocks[i], blocks[j]):
                    mask[i, j] = -math.inf
        names = (
            "paligemma_with_expert.paligemma.model.language_model.",
            "paligemma_with_expert.gemma_expert.model.",
        )
        for n in range(s.layers):
            layers = [f"{name}layers.{n}." for name in names]
            streams = self.layer(layers, streams, mask)
        out = self.rms_norm(names[1] + "norm.weight", streams[1])
        return self.linear("action_out_proj", out[1:])

    def layer(self, names, streams, mask):
        s = self.sizes
        normed = [
            self.rms_norm(n + "input_layernorm.weight", x)
            for n, x in zip(names, streams, strict=True)
        ]
        q, k, v = (
            torch.cat(
                [
                    x @ self.w(f"{n}self_attn.{p}_proj.weight").T
                    for n, x in zip(names, normed, strict=True)
                ]
            )
            for p in "qkv"
        )
        d, out = s.head_dim, []
        for head in range(s.heads):
            shared = head // (s.heads // s.kv_heads)
            qh = self.rope(q[:, head * d : (head + 1) * d])
            kh = self.rope(k[:, shared * d : (shared + 1) * d])
            scores = qh @ kh.T / math.sqrt(d) + mask
            out.append(scores.softmax(-1) @ v[:, shared * d : (shared + 1) * d])
        parts = torch.cat(out, dim=1).split([len(x) for x in streams])
        results = []
        for name, x, part in zip(names, streams, parts, strict=True):
            x = x + part @ self.w(name + "self_attn.o_proj.weight").T
            h = self.rms_norm(name + "post_attention_layernorm.weight", x)
            gate = gelu(h @ self.w(name + "mlp.gate_proj.weight").T)
            up = h @ self.w(name + "mlp.up_proj.weight").T
            results.append(x + (gate * up) @ self.w(name + "mlp.down_proj.weight").T)
        return results

    def prefix(self, policy, observation, row, instruction):
        """Tokens (P, width) of one row: all images, then the words that are there."""
        images = [
            resize_with_pad(
                torch.from_numpy(observation[f"observation.images.{name}"]), self.sizes.image
            )[row]
            for name in policy.cameras
        ]
        table = self.w("paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight")
        words = table[policy.tokenizer.prompt(instruction)] * math.sqrt(self.sizes.width)
        return torch.cat([*(self.image(image.double()) for image in images), words])

    def state(self, policy, observation, row):
        state = policy.state_normaliser(torch.from_numpy(observation["observation.state"]))[row]
        return torch.nn.functional.pad(state, (0, self.sizes.padded - len(state))).double()

    def fill(self, actions, tau):
        """Actions (C, A) -> (C, padded): what the robot lacks is tau * eps, on the way to zero."""
        return torch.cat([actions, tau * self.filling], dim=1)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
