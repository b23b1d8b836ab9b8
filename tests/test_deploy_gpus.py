"""GPUs are dealt out so that Ray can place everybody, and hides none from who needs it."""

import pytest

from deploy.cluster import gpu_shares
from twinrl.config import make_config
from twinrl.core.errors import ConfigError


def shares(gpus, actors=2, twins="cuda", learner="auto"):
    twins = {"actors": actors, "device": twins}
    return gpu_shares(make_config({"twins": twins, "learner": {"device": learner}}), gpus)


@pytest.mark.parametrize(
    ("gpus", "options", "expected"),
    [
        (0, {"twins": "cpu"}, (0, 0)),
        (1, {"twins": "cpu"}, (1, 0)),
        (4, {"twins": "cpu", "learner": "cpu"}, (0, 0)),
        (1, {}, (0.5, 0.25)),
        (1, {"learner": "cpu"}, (0, 0.5)),
        (2, {}, (1, 0.5)),
        (3, {}, (1, 1)),
        (3, {"actors": 3}, (1, 0.5)),
        (8, {"actors": 3}, (1, 1)),
    ],
)
def test_shares(gpus, options, expected):
    assert shares(gpus, **options) == expected


@pytest.mark.parametrize("actors", range(1, 40))
@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_everybody_finds_a_place(gpus, actors):
    learner, twin = shares(gpus, actors)
    room = [1.0] * gpus
    room[0] -= learner
    for _ in range(actors):
        place = next(i for i, left in enumerate(room) if left >= twin - 1e-9)
        room[place] -= twin
    assert twin > 0


def test_no_gpu_where_one_is_asked_for():
    with pytest.raises(ConfigError, match=r"twins.device=cpu"):
        shares(0)
