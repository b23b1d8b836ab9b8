"""Instructions as tokens for a language model: PaliGemma's own tokenizer, or a stand-in for random weights."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from policies.hub import local_path, reason

HASHED = "hashed"
# Ids that PaliGemma's vocabulary gives to padding, begin of text and the line break that ends a prompt.
PADDING, BEGIN, NEWLINE = 0, 2, 108


class Tokenizer:
    """Prompts of a fixed length; a subclass brings `encode` and the ids."""

    begin: int

    def __init__(self, length: int) -> None:
        self.length = length

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin or end."""
        raise NotImplementedError

    def __call__(self, instruction: str | Sequence[str], batch: int) -> tuple[Tensor, Tensor]:
        """One instruction for all, or one for each of `batch` rows -> ids (batch, L) int64, valid (batch, L) bool."""
        same = isinstance(instruction, str)
        rows = [instruction] if same else list(instruction)
        if not same and len(rows) != batch:
            raise ValueError(f"{len(rows)} instructions for {batch} observations")
        prompts = [self.prompt(row) for row in rows]
        ids = torch.full((len(prompts), self.length), PADDING)
        valid = torch.zeros(len(prompts), self.length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            valid[row, : len(prompt)] = True
        return (ids.expand(batch, -1), valid.expand(batch, -1)) if same else (ids, valid)

    def prompt(self, instruction: str) -> list[int]:
        """Begin, the instruction on one line, and the line break after which pi0 was trained to act."""
        text = instruction.strip().replace("_", " ").replace("\n", " ")
        prompt = [self.begin, *self.encode(text), *self.encode("\n")]
        if len(prompt) > self.length:
            raise ValueError(
                f"the instruction {instruction!r} has {len(prompt)} tokens, at most {self.length} fit: "
                f"shorten it, or raise prompt_tokens"
            )
        return prompt


class HashedTokenizer(Tokenizer):
    """A word's id is its hash: tells instructions apart, and means nothing to trained weights."""

    begin = BEGIN

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__(length)
        if vocabulary <= NEWLINE + 1:
            raise ValueError(f"a vocabulary of {vocabulary}; at least {NEWLINE + 2} are needed")
        self.vocabulary = vocabulary

    def encode(self, text: str) -> list[int]:
        if text == "\n":
            return [NEWLINE]
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        # crc32, because Python's own hash differs between processes.
        buckets = self.vocabulary - NEWLINE - 1
        return [NEWLINE + 1 + zlib.crc32(word.encode()) % buckets for word in words]


class PretrainedTokenizer(Tokenizer):
    """A tokenizer's files in a folder or on the Hugging Face hub, read by `transformers`."""

    def __init__(self, name: str, vocabulary: int, length: int) -> None:
        super().__init__(length)
        from transformers import AutoTokenizer

        try:
            folder = local_path(name, ("tokenizer*", "config.json", "special_tokens_map.json"))
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"no tokenizer in {name!r}: {reason(error)}. policy.tokenizer takes the folder of PaliGemma's "
                f"tokenizer.json, a name on the hub that this machine can reach, or {HASHED!r} with random weights"
            ) from None
        if self._tokenizer.bos_token_id is None:
            raise ValueError(
                f"the tokenizer in {name!r} has no begin-of-text token, as PaliGemma's"
            )
        self.begin = self._tokenizer.bos_token_id
        self.vocabulary = vocabulary
        self._cached = lru_cache(maxsize=1024)(self._encode)

    def encode(self, text: str) -> list[int]:
        return list(self._cached(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        if ids and max(ids) >= self.vocabulary:
            raise ValueError(
                f"token {max(ids)} of {text!r} is not in the model's vocabulary of {self.vocabulary}: "
                f"this tokenizer belongs to another model"
            )
        return ids


def make_tokenizer(name: str, vocabulary: int, length: int) -> Tokenizer:
    """The tokenizer called `name`: a folder, a name on the hub, or "hashed"."""
    if name == HASHED:
        return HashedTokenizer(vocabulary, length)
    return PretrainedTokenizer(name, vocabulary, length)
