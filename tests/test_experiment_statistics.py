"""Statistics over seeds: against brute force, known coverage, and times that were never reached."""

import math

import numpy as np
import pytest

from experiments.statistics import bootstrap, censored_median, iqm, time_to


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 10, 30])
def test_interquartile_mean_is_the_mean_of_the_middle_half(count):
    """Each value repeated four times makes the quarters whole: then a plain slice is the middle half."""
    values = np.random.default_rng(count).normal(size=count)
    repeated = np.sort(np.repeat(values, 4))
    assert iqm(values) == pytest.approx(repeated[count : 3 * count].mean())


def test_interquartile_mean_ignores_outliers():
    assert iqm([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1e9]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least one"):
        iqm([])


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    """Of 95 % intervals of a mean about 95 % hold it; groups are not mixed."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        groups = [rng.normal(1.0, 1.0, 30), rng.normal(100.0, 1.0, 30)]
        found = bootstrap(groups, lambda g: g[1].mean() - g[0].mean(), draws=200, seed=trial)
        hits += found.low <= 99.0 <= found.high
        assert found.high - found.low < 2.0  # mixed groups would be spread over 100
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_repeats_itself():
    groups = [np.arange(8.0)]
    assert bootstrap(groups, lambda g: g[0].mean()) == bootstrap(groups, lambda g: g[0].mean())


def test_time_to_a_score():
    curve = [[100, 1.0, -5.0], [200, 2.0, 3.0], [300, 3.0, 1.0]]
    assert time_to(curve, 2.0) == 2.0
    assert time_to(curve, 2.0, column=0) == 200
    assert math.isinf(time_to(curve, 4.0))


def test_a_median_with_runs_that_never_arrived():
    """Few missing: the median stands, however long they would have taken. Many: a lower bound, said so."""
    few = censored_median([1.0, 2.0, math.inf], [9.0, 9.0, 9.0])
    assert few == (2.0, True) and str(few) == "2.0"
    many = censored_median([1.0, math.inf, math.inf], [9.0, 9.0, 9.0])
    assert many == (9.0, False) and str(many) == ">= 9.0"
    even = censored_median([1.0, math.inf], [9.0, 7.0])
    assert not even.reached and even.value <= 7.0
