"""Every algorithm trains a policy of transformers as it does one of vectors: features are rows, whatever their shape."""

import numpy as np
import pytest
import torch

from learner.algorithms.chunk_q import ChunkQ, ChunkQConfig
from learner.algorithms.pretrain import Pretrain, PretrainConfig
from learner.algorithms.sft import SFT, ImitationData, SFTConfig
from learner.dataset import Windows
from learner.features import FeatureCache
from policies.registry import make_policy

ROWS, SIZE, STATE_DIM, POSE_DIM, C = 40, 16, 9, 2, 4
FORMS = {
    "keypoints": {"keypoints": 8},
    "patches": {"stem": "patches", "patch": 8},
}


@pytest.fixture(params=FORMS)
def policy(request):
    torch.manual_seed(0)
    return make_policy(
        {
            "state_dim": STATE_DIM,
            "pose_dim": POSE_DIM,
            "image_size": SIZE,
            "cameras": ["side"],
            "integration_steps": 2,
            "width": 8,
            "latent": 32,
            "hidden": 32,
            "trunk": "transformer",
            "expert": "transformer",
            "expert_layers": 1,
            "critics": 2,
            **FORMS[request.param],
        }
    )


def observe(seed, prefix=""):
    rng = np.random.default_rng(seed)
    return {
        f"{prefix}observation.images.side": rng.integers(
            0, 256, (ROWS, SIZE, SIZE, 3), dtype=np.uint8
        ),
        f"{prefix}observation.state": rng.normal(size=(ROWS, STATE_DIM)).astype(np.float32),
    }


def copied(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def unchanged(before, parameters):
    return all(map(torch.equal, before, parameters))


def test_pretraining_fits_poses_through_the_trunk(policy):
    """The loss on one batch of scenes falls; the expert stays."""
    labels = np.random.default_rng(0).normal(size=(ROWS, POSE_DIM)).astype(np.float32)
    config = PretrainConfig(steps=40, batch=ROWS, learning_rate=3e-3)
    pretrain = Pretrain(policy, config, observe(0), labels, "put it there")
    expert = copied(policy.flow.parameters())
    losses = [pretrain.update()["pose_loss"] for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert unchanged(expert, policy.flow.parameters())


def test_sft_and_the_chunk_critic_train_on_kept_tokens(policy):
    """The expert and the critics move on rows of tokens that were encoded once; the encoder stays."""
    rng = np.random.default_rng(1)
    action = rng.normal(0, 0.02, (ROWS, C, 7)).astype(np.float32)
    seen = observe(1)
    windows = Windows(
        {"observation.images.side": seen["observation.images.side"]},
        seen["observation.state"],
        action,
        np.ones((ROWS, C), np.float32),
        np.zeros(ROWS, np.int64),
        ["put it there"] * ROWS,
    )
    policy.fit_actions(action.reshape(-1, 7))
    encoder = copied(policy.encoder_parameters())
    sft = SFT(policy, SFTConfig(steps=60, batch=32, warmup=5, learning_rate=3e-3, ema=0.9), windows)
    losses = [sft.update()["flow_loss"] for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert sft.data.features.shape == (ROWS, *policy.feature_shape)
    imitation = ImitationData(policy, windows, {"demo": 1.0})
    algorithm = ChunkQ(policy, ChunkQConfig(actor_warmup=1), FeatureCache(policy, "put it there"))
    batch = {
        **observe(2),
        **observe(3, "next."),
        "observation.id": np.arange(ROWS),
        "next.observation.id": np.arange(ROWS) + ROWS,
        "action": action,
        "reward": rng.random((ROWS, C)).astype(np.float32),
        "step_mask": np.ones((ROWS, C), bool),
        "steps": np.full(ROWS, C),
        "terminated": rng.random(ROWS) < 0.3,
        "truncated": np.zeros(ROWS, bool),
    }
    expert, critic = copied(policy.flow.parameters()), copied(policy.critic.parameters())
    metrics = [algorithm.update(batch, imitation) for _ in range(4)]
    assert metrics[-1]["critic_loss"] < metrics[0]["critic_loss"]
    assert not unchanged(critic, policy.critic.parameters())
    assert not unchanged(expert, policy.flow.parameters())
    assert unchanged(encoder, policy.encoder_parameters())
