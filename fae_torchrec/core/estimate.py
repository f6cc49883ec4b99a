"""A figure estimated from a sample, with the interval that holds the true one."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.special import betaincinv

CONFIDENCE = 0.999
"""The chance that an interval of this package holds the true value (FAE §4.1 takes t(0.0005), both sides: 99.9 %)."""


@dataclass(frozen=True)
class Estimate:
    """An estimate and its interval at `CONFIDENCE`.

    Attributes:
        value: the estimate.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


def share_estimate(hits: int, trials: int) -> Estimate:
    """The share of a population that has a property, from a uniform sample of it (Clopper-Pearson: never too narrow).

    Args:
        hits: inputs of the sample that have the property, 0..trials.
        trials: inputs in the sample, at least 1.
    """
    tail = (1 - CONFIDENCE) / 2
    low = float(betaincinv(hits, trials - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, trials - hits, 1 - tail)) if hits < trials else 1.0
    return Estimate(hits / trials, low, high)
