"""GPUs are dealt out so that Ray can place everybody, and hides none from who needs it."""

import pytest

from deploy.cluster import gpu_shares
from twinrl.config import make_config
from twinrl.core.errors import ConfigError


def shares(gpus, actors=2, twins="cuda", learner="auto", where="actor"):
    sections = {
        "twins": {"actors": actors, "device": twins},
        "learner": {"device": learner},
        "inference": {"where": where},
    }
    return gpu_shares(make_config(sections), gpus)


@pytest.mark.parametrize(
    ("gpus", "options", "expected"),
    [
        (0, {"twins": "cpu"}, (0, 0, 0)),
        (0, {"twins": "cpu", "where": "shared"}, (0, 0, 0)),
        (1, {"twins": "cpu"}, (1, 0, 0)),
        (1, {"twins": "cpu", "where": "shared"}, (0.5, 0, 0.5)),
        (1, {"twins": "cpu", "where": "shared", "learner": "cpu"}, (0, 0, 1)),
        (2, {"twins": "cpu", "where": "shared"}, (1, 0, 1)),
        (4, {"twins": "cpu", "learner": "cpu"}, (0, 0, 0)),
        (1, {}, (0.5, 0.25, 0)),
        (1, {"where": "shared", "actors": 4}, (0.5, 0.1, 0.1)),
        (1, {"learner": "cpu"}, (0, 0.5, 0)),
        (2, {}, (1, 0.5, 0)),
        (3, {}, (1, 1, 0)),
        (3, {"where": "shared"}, (1, 0.5, 0.5)),
        (3, {"actors": 3}, (1, 0.5, 0)),
        (8, {"actors": 3}, (1, 1, 0)),
    ],
)
def test_shares(gpus, options, expected):
    assert shares(gpus, **options) == expected


@pytest.mark.parametrize("actors", range(1, 40))
@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("where", ["actor", "shared"])
def test_everybody_finds_a_place(gpus, actors, where):
    learner, twin, inference = shares(gpus, actors, where=where)
    room = [1.0] * gpus
    room[0] -= learner
    for share in [twin] * actors + [inference]:
        place = next(i for i, left in enumerate(room) if left >= share - 1e-9)
        room[place] -= share
    assert twin > 0
    assert (inference > 0) == (where == "shared")


def test_no_gpu_where_one_is_asked_for():
    with pytest.raises(ConfigError, match=r"twins.device=cpu"):
        shares(0)
