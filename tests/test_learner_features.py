"""Features of stored segments: encoded as they come in, found again by what is drawn from the replay."""

import numpy as np
import pytest
import torch

from buffer_service.testing import SCHEMA, segment
from learner.features import FeatureCache, encode, with_ids
from policies.registry import make_policy
from twinrl.core.segment import IMAGE_PREFIX, Segment

STEPS = 8


@pytest.fixture
def policy():
    torch.manual_seed(0)
    sizes = {"width": 4, "keypoints": 4, "latent": 16, "hidden": 32, "critics": 0}
    return make_policy(
        {
            "state_dim": SCHEMA.state_dim,
            "pose_dim": SCHEMA.privileged_dim,
            "cameras": list(SCHEMA.cameras),
            "image_size": SCHEMA.image_size,
            **sizes,
        }
    )


def drawn(parts, rows):
    """A batch with windows of 4 steps from `rows` (segment id, step), as the replay draws them."""

    def take(key, after):
        return np.stack([parts[id].columns[key][step + after] for id, step in rows])

    batch = {
        "segment": np.array([id for id, _ in rows]),
        "step": np.array([step for _, step in rows]),
        "steps": np.full(len(rows), 4),
    }
    keys = ("observation.state", *(IMAGE_PREFIX + camera for camera in SCHEMA.cameras))
    for key in keys:
        batch |= {key: take(key, 0), f"next.{key}": take(key, 4)}
    return batch


def test_what_was_added_is_found_by_what_is_drawn(policy):
    parts = {id: Segment(*segment(100 * id, STEPS)) for id in (3, 9)}
    cache = FeatureCache(policy, "lift the cube")
    for id, each in parts.items():
        cache.add(id, each)
        cache.add(id, each)  # once is enough
    assert cache.stats()["entries"] == 2 * (STEPS + 1)
    batch = with_ids(drawn(parts, [(9, 4), (3, 0), (9, 1), (3, 0)]))
    for prefix in ("", "next."):
        expected = encode(
            policy,
            {key.removeprefix(prefix): batch[key] for key in batch if key.startswith(f"{prefix}o")},
            "lift the cube",
        )
        np.testing.assert_allclose(cache.lookup(batch, prefix), expected, rtol=1e-4, atol=1e-5)
    assert cache.stats() == {"entries": 2 * (STEPS + 1), "hit_share": 1.0}


def test_a_full_cache_takes_nothing_in(policy):
    cache = FeatureCache(policy, "lift the cube", capacity=STEPS)
    cache.add(0, Segment(*segment(0, STEPS)))
    assert cache.stats()["entries"] == 0
    batch = with_ids(drawn({0: Segment(*segment(0, STEPS))}, [(0, 2), (0, 3)]))
    assert len(cache.lookup(batch)) == 2
