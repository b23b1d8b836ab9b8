"""Failed starts that are tried again."""

import numpy as np

from actors.retries import KEPT, Retries

ALL = np.ones(4, bool)


def starts_of(*names):
    return [{"name": name} for name in names]


def test_each_failure_is_tried_once_the_oldest_first():
    retries = Retries(1.0, 4, np.random.default_rng(0))
    assert retries.starts(ALL) == [None] * 4 and not retries.trying.any()
    retries.add(starts_of("a", "b", "c", "d"), np.array([False, True, False, True]))
    assert retries.starts(np.array([True, False, False, False])) == [{"name": "b"}, *[None] * 3]
    assert retries.trying.tolist() == [True, False, False, False]
    assert retries.starts(ALL) == [{"name": "d"}, *[None] * 3], "the rest is fresh"
    assert retries.starts(ALL) == [None] * 4 and not retries.trying.any()


def test_fresh_starts_keep_their_share():
    retries = Retries(0.25, 4, np.random.default_rng(0))
    tried = 0
    for _ in range(1000):
        retries.add(starts_of(*"abcd"), ALL)
        tried += sum(start is not None for start in retries.starts(ALL))
    assert abs(tried / 4000 - 0.25) < 0.03
    assert KEPT - 4 <= len(retries._failed) <= KEPT
    none = Retries(0.0, 4, np.random.default_rng(0))
    none.add(starts_of(*"abcd"), ALL)
    assert none.starts(ALL) == [None] * 4
