"""Clopper-Pearson intervals against sums of the binomial distribution."""

from __future__ import annotations

from math import comb

import pytest

from fae_torchrec.core.estimate import CONFIDENCE, share_estimate

TAIL = (1 - CONFIDENCE) / 2


def _chance(trials: int, share: float, hits: range) -> float:
    return sum(comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in hits)


@pytest.mark.parametrize(("hits", "trials"), [(1, 1), (1, 7), (3, 7), (6, 7), (1, 200), (77, 200), (199, 200)])
def test_the_ends_are_where_the_tails_are(hits: int, trials: int) -> None:
    estimate = share_estimate(hits, trials)
    assert estimate.value == hits / trials
    assert _chance(trials, estimate.low, range(hits, trials + 1)) == pytest.approx(TAIL, rel=1e-6)
    if hits < trials:
        assert _chance(trials, estimate.high, range(hits + 1)) == pytest.approx(TAIL, rel=1e-6)


@pytest.mark.parametrize("trials", [1, 10, 65_536])
def test_none_and_all(trials: int) -> None:
    none, every = share_estimate(0, trials), share_estimate(trials, trials)
    # By hand: no hit has the chance (1 - high) ** trials.
    assert (none.value, none.low) == (0, 0) and (1 - none.high) ** trials == pytest.approx(TAIL)
    assert (every.value, every.high) == (1, 1) and every.low == pytest.approx(1 - none.high)


@pytest.mark.parametrize("trials", [5, 60])
def test_every_share_is_covered_at_the_stated_rate(trials: int) -> None:
    intervals = [share_estimate(hits, trials) for hits in range(trials + 1)]
    for share in (n / 97 for n in range(98)):
        covering = [hits for hits, interval in enumerate(intervals) if interval.low <= share <= interval.high]
        assert _chance(trials, share, range(covering[0], covering[-1] + 1)) >= CONFIDENCE


def test_a_large_sample_is_as_the_normal_distribution_says() -> None:
    estimate = share_estimate(32_768, 65_536)
    assert estimate.high - estimate.low == pytest.approx(2 * 3.2905 * 0.5 / 256, rel=2e-3)  # z(0.0005) = 3.2905
