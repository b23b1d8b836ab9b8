"""Intervals and gains against closed forms."""

import math

import numpy as np
import pytest

from dashboard.statistics import Z95, mcnemar, paired_gain, success_rate, wilson


@pytest.mark.parametrize("k, n", [(0, 10), (10, 10), (3, 10), (81, 100), (1, 1), (150, 200)])
def test_wilson_solves_its_equation(k, n):
    """Both ends p satisfy (p - k/n)^2 = z^2 p (1 - p) / n, the definition of the interval."""
    rate = wilson(k, n)
    assert rate.rate == k / n and 0 <= rate.low <= rate.rate <= rate.high <= 1
    for p in (rate.low, rate.high):
        assert (p - k / n) ** 2 == pytest.approx(Z95**2 * p * (1 - p) / n, abs=1e-12)


def test_wilson_at_the_ends():
    """No success of n: [0, z^2 / (n + z^2)]; all of n is its mirror; nothing tried: nothing known."""
    n = 20
    assert wilson(0, n).low == 0.0
    assert wilson(0, n).high == pytest.approx(Z95**2 / (n + Z95**2))
    assert wilson(n, n).low == pytest.approx(n / (n + Z95**2)) and wilson(n, n).high == 1.0
    assert math.isnan(wilson(0, 0).rate) and wilson(0, 0)[1:] == (0.0, 1.0, 0)


@pytest.mark.parametrize("k, n", [(-1, 5), (6, 5)])
def test_impossible_counts_are_refused(k, n):
    with pytest.raises(ValueError, match=f"{k} successes in {n}"):
        wilson(k, n)


def test_published_value():
    """81 of 263: Newcombe (1998), table I, method 3."""
    rate = wilson(81, 263)
    assert (round(rate.low, 4), round(rate.high, 4)) == (0.2553, 0.3662)


def test_mcnemar_is_the_binomial_tail():
    """b = 1, c = 5: p = 2 (C(6,0) + C(6,1)) / 2^6; equal outcomes: 1; b = c is capped at 1."""
    before, after = [1] + [0] * 5 + [1] * 10, [0] + [1] * 5 + [1] * 10
    assert mcnemar(before, after) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(after, before) == mcnemar(before, after)
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1.0
    assert mcnemar([1, 0], [0, 1]) == 1.0


def test_gain_agrees_with_the_normal_form():
    """For many resets the bootstrap's half width is 1.96 sd(difference) / sqrt(n)."""
    generator = np.random.default_rng(1)
    before = generator.random(800) < 0.4
    after = before | (generator.random(800) < 0.3)
    gain = paired_gain(before, after)
    difference = after.astype(float) - before
    half = Z95 * difference.std() / math.sqrt(800)
    assert gain.gain == pytest.approx(difference.mean()) and gain.episodes == 800
    assert gain.low == pytest.approx(gain.gain - half, abs=0.004)
    assert gain.high == pytest.approx(gain.gain + half, abs=0.004)
    assert gain.p < 1e-10
    assert paired_gain(before, after) == gain, "the interval is the same each time"


def test_no_change_has_no_width():
    assert paired_gain([1, 0, 1], [1, 0, 1])[:4] == (0.0, 0.0, 0.0, 1.0)


def test_what_is_no_outcome_is_refused():
    with pytest.raises(ValueError, match="0 or 1"):
        success_rate([0, 1, 2])
    with pytest.raises(ValueError, match="3 and 2"):
        paired_gain([0, 1, 1], [0, 1])
    with pytest.raises(ValueError, match="3 and 2"):
        mcnemar([0, 1, 1], [0, 1])
    with pytest.raises(ValueError, match="no episodes"):
        paired_gain([], [])
