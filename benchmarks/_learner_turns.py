"""Turns of the learner's benchmark: each algorithm fed by the replay service, and the same with its batches in memory."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks._learner_data import CHUNK, INSTRUCTION, POLICY, STEPS, Feed, segments
from buffer_service.client import Prefetcher, Reader
from learner.algorithms.chunk_q import ChunkQ, ChunkQConfig
from learner.algorithms.ppoflow import PPOFlow, PPOFlowConfig
from learner.algorithms.sft import SFT, ImitationData, SFTConfig
from learner.dataset import Windows, windows
from learner.features import FeatureCache, with_ids
from policies.policy import Policy
from policies.registry import make_policy
from twinrl.env import IMAGE_PREFIX, PRIVILEGED

Update = Callable[[], Any]
TWIN_PACE = 400.0  # transitions/s that come in meanwhile: what twin actors simulate on a machine of this size
REAL_PACE = 60.0  # an arm of 10 Hz at six times real time, as the demo's
AHEAD = 1.5  # PPOFlow's segments come so much faster than they are taken
BATCH = 256
MIX = {"demo": 0.25, "twin": 0.25, "real": 0.5}  # a job's
FIRST = 5  # updates that do not count: whatever is done once


class Turns:
    """Everything that the turns need, made once: the service and its content, and batches in memory."""

    def __init__(self, folder: Path, stored: int, taken: int, kept: int) -> None:
        """`stored`: segments of each source in the replay; `taken`: those of a PPOFlow iteration; `kept`: batches in
        memory for off-policy RL."""
        self.taken = taken
        self._kinds = {source: segments(source, self.policy()) for source in MIX}
        self.feed = Feed(folder, self._kinds, capacity=512 << 20)
        for source in MIX:
            self.feed.fill(source, stored)
        key, service = self.feed.service.keys(), self.feed.service
        self.reader = Reader(service.address, key, run_dir=str(self.feed.run_dir))
        self.reader.sync()
        self._caches = {fed: FeatureCache(self.policy(), INSTRUCTION) for fed in (True, False)}
        self._met: set[int] = set()
        self._iterations = 1.0  # of PPOFlow a second, as measured last
        self._batches = [self._kept() for _ in range(kept)]

    def close(self) -> None:
        """End the processes."""
        self.reader.close()
        self.feed.close()

    @staticmethod
    def policy() -> Policy:
        """The demo's policy, untrained, always the same."""
        torch.manual_seed(0)
        return make_policy(POLICY)

    def turn(self, algorithm: str, fed: bool, seconds: float) -> dict[str, float]:
        """Updates a second of `algorithm` for `seconds` s, and the share of time it waited for data."""
        return getattr(self, algorithm)(fed, seconds)

    # -- SFT -----------------------------------------------------------------------------------------------

    def sft(self, fed: bool, seconds: float) -> dict[str, float]:
        """Ours on windows that were read from the replay; the bare loop on tensors."""
        policy = self.policy()
        if not fed:
            return _timed(_bare_sft(policy, windows(self._many("demo"), CHUNK)), seconds, FIRST)
        shown = windows(list(self.reader.segments(source="demo")), CHUNK)
        algorithm = SFT(policy, SFTConfig(steps=10**6), shown)
        with _feeding(self.feed, "twin", TWIN_PACE):
            return _timed(algorithm.update, seconds, FIRST)

    def _many(self, source: str) -> list[Any]:
        """As many segments as the replay holds of `source`, in memory."""
        count = len(self.reader.entries(source=source))
        return list(itertools.islice(itertools.cycle(self._kinds[source]), count))

    # -- PPOFlow -------------------------------------------------------------------------------------------

    def ppoflow(self, fed: bool, seconds: float) -> dict[str, float]:
        """Whole iterations, on segments as they come in, or that lie in memory. No iteration ends early."""
        policy = self.policy()
        data = windows(self._kinds["demo"], CHUNK)
        anchor = ImitationData(policy, data, {"demo": 1.0})
        config = PPOFlowConfig(critic_warmup=0, max_kl=math.inf, max_learning_rate=1e-5)
        privileged = self._kinds["twin"][0].columns[PRIVILEGED].shape[1]
        algorithm = PPOFlow(policy, config, privileged, anchor)
        if not fed:
            many = list(itertools.islice(itertools.cycle(self._kinds["twin"]), self.taken))
            found = _timed(lambda: algorithm.update(many, 0), seconds, 1)
            self._iterations = found["updates_per_s"]
            return found
        cursor = self.reader.cursor("benchmark", source="twin")
        cursor.pass_by()
        waited = 0.0

        def update() -> None:
            nonlocal waited
            since = time.perf_counter()
            most = self.taken * STEPS
            found = cursor.take(min_segments=self.taken, max_transitions=most, timeout=60.0)
            waited += time.perf_counter() - since
            algorithm.update(found, 0)

        pace = AHEAD * self._iterations * self.taken * STEPS
        with _feeding(self.feed, "twin", pace):
            update()
            waited = 0.0
            found = _timed(update, seconds, 0)
        return {**found, "waited_share": waited / found["seconds"]}

    # -- off-policy ----------------------------------------------------------------------------------------

    def chunk_q(self, fed: bool, seconds: float) -> dict[str, float]:
        """Critic and actor updates, on batches as they are drawn, or that lie in memory. As in the stage, what comes in
        is encoded when it does."""
        policy = self.policy()
        imitation = ImitationData(policy, windows(self._kinds["demo"], CHUNK), {"demo": 1.0})
        algorithm = ChunkQ(policy, ChunkQConfig(actor_warmup=0), self._caches[fed])
        self._take_in()
        if not fed:
            batches = itertools.cycle(self._batches)
            update = lambda: algorithm.update(next(batches), imitation)  # noqa: E731
            return _timed(update, seconds, FIRST)
        with (
            Prefetcher(self.reader, BATCH, mix=MIX) as drawn,
            _feeding(self.feed, "real", REAL_PACE),
        ):
            for _ in range(FIRST):
                algorithm.update(with_ids(next(drawn)), imitation)
            before = drawn.wait_s

            def update() -> None:
                self._take_in("real")
                algorithm.update(with_ids(next(drawn)), imitation)

            found = _timed(update, seconds, 0)
            return {**found, "waited_share": (drawn.wait_s - before) / found["seconds"]}

    def _take_in(self, source: str | None = None) -> None:
        """Encode what the replay holds and was not met before, as it is known to the reader by now."""
        fresh = [e for e in self.reader.entries(source=source) if e.id not in self._met]
        self._met.update(entry.id for entry in fresh)
        for entry, segment in zip(fresh, self.reader.load(fresh), strict=True):
            if segment is not None:
                self._caches[True].add(entry.id, segment)

    def _kept(self) -> dict[str, np.ndarray]:
        """A batch in memory, whose features are known, so that its images are not looked at."""
        batch = with_ids(self.reader.sample(BATCH, chunk=CHUNK, mix=MIX))
        features = self._caches[False]
        features.lookup(batch)
        features.lookup(batch, "next.")
        kept = {key: value for key, value in batch.items() if IMAGE_PREFIX not in key}
        images = [key for key in batch if IMAGE_PREFIX in key]
        nothing = np.zeros((BATCH, 1), np.uint8)
        return {
            **{key: np.copy(value) for key, value in kept.items()},
            **dict.fromkeys(images, nothing),
        }


@contextlib.contextmanager
def _feeding(feed: Feed, source: str, rate: float) -> Iterator[None]:
    """Transitions of `source` come in, `rate` a second, while this lasts."""
    feed.begin(source, rate, 600.0)
    try:
        yield
    finally:
        feed.end()


def _timed(update: Update, seconds: float, first: int) -> dict[str, float]:
    """Call `update` for `seconds` s, after `first` calls that do not count."""
    for _ in range(first):
        update()
    count, began, used = 0, time.perf_counter(), time.thread_time()
    while time.perf_counter() - began < seconds or not count:
        update()
        count += 1
    whole, used = time.perf_counter() - began, time.thread_time() - used
    return {"updates_per_s": count / whole, "updates_per_cpu_s": count / used, "seconds": whole}


def _bare_sft(policy: Policy, data: Windows) -> Update:
    """SFT's step as one would write it with PyTorch alone: the same network, loss, optimiser, schedule and average."""
    config, flow = SFTConfig(steps=10**6), policy.flow
    policy.fit_states(data.state)
    prepared = ImitationData(policy, data, {"demo": 1.0})
    features, chunk, mask = prepared.features, prepared.chunk, prepared.mask
    parameters = list(flow.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimiser = torch.optim.AdamW(
        parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    steps = itertools.count()

    def update() -> tuple[float, float]:
        step = next(steps)
        optimiser.param_groups[0]["lr"] = config.learning_rate * min(
            1.0, (step + 1) / config.warmup
        )
        rows = torch.randint(len(chunk), (config.batch,))
        target, known = chunk[rows][:, None], mask[rows]
        t = torch.rand(config.batch, config.draws, 1)
        eps = torch.randn(config.batch, config.draws, flow.dim)
        velocity = flow.field(flow.condition(features[rows]), (1 - t) * eps + t * target, t)
        error = (velocity - (target - eps)).square().mean(1)
        loss = ((error * known).sum(-1) / known.sum(-1).clamp_min(1.0)).mean()
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.gradient_norm)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1.0 - config.ema)
        return float(loss.detach()), float(norm)

    return update
