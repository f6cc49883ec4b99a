"""Intervals of test scores and of their differences: AUC by DeLong's method, log loss by its mean over samples.

DeLong, DeLong and Clarke-Pearson (Biometrics 1988) write the AUC as a mean of one component per sample, so that two models scored on the
same samples are compared pair by pair; Sun and Xu (IEEE Signal Processing Letters 2014) compute the components from ranks in O(n log n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from fae_torchrec.core.errors import DataError

SCORE_CONFIDENCE = 0.95
"""The chance that an interval of a score holds the true one."""


@dataclass(frozen=True)
class ScoreEstimate:
    """A score, or a difference of scores, and its interval at `SCORE_CONFIDENCE`.

    Attributes:
        value: the estimate, a mean over the runs.
        standard_error: of the value; NaN where it cannot be known (fewer than two samples of a class).
        low: lower end of the interval; NaN as above.
        high: upper end.
    """

    value: float
    standard_error: float
    low: float
    high: float


def auc_components(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """DeLong's structural components: for a positive the share of negatives that it beats, for a negative the share that beats it.

    Args:
        scores: float [samples], the higher the more likely positive; ties count half.
        labels: [samples], 0 or 1.

    Returns:
        float64 [samples]; their mean over the positives is the AUC, and so is that over the negatives. NaN where a class is missing or a
        score is no number.
    """
    positive = np.asarray(labels) > 0.5
    scores = np.asarray(scores, dtype=np.float64)
    if not (positive.any() and not positive.all() and np.isfinite(scores).all()):
        return np.full(scores.shape, np.nan)
    ranks = _midranks(scores)
    components = np.empty_like(scores)
    negatives, positives = int((~positive).sum()), int(positive.sum())
    components[positive] = (ranks[positive] - _midranks(scores[positive])) / negatives
    components[~positive] = 1 - (ranks[~positive] - _midranks(scores[~positive])) / positives
    return components


def logloss_terms(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The log loss of every sample, whose mean is the log loss.

    Args:
        logits: float [samples].
        labels: [samples], 0 or 1.

    Returns:
        float64 [samples], in nats.
    """
    logits = np.asarray(logits, dtype=np.float64)
    terms = np.maximum(logits, 0) - logits * np.asarray(labels, dtype=np.float64) + np.log1p(np.exp(-np.abs(logits)))
    return np.asarray(terms)


def mean_estimate(runs: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> ScoreEstimate:
    """A score that is a mean of independent values per sample, over one or several runs of the same training.

    Two sources move it. The samples: the variance of the values, averaged over the runs, in each group of samples (DeLong's formula with
    the groups positives and negatives; the textbook's with one group). The runs, if there are several that differ (another seed each): the
    variance of their scores over their number. Both are added; the quantile is Student's with Welch and Satterthwaite's degrees of freedom.

    Args:
        runs: float64 [samples] each, the values of one run; for a difference of two models, the difference of their values.
        groups: masks, bool [samples], that together hold every sample once. The value is the mean over the first.

    Returns:
        The mean over runs, with its interval.

    Raises:
        DataError: no run, or runs of different numbers of samples.
    """
    if not runs or len({len(values) for values in runs}) != 1:
        raise DataError(f"scores of runs must be of the same samples, received {[len(values) for values in runs]} of them")
    value_of_run = [float(values[groups[0]].mean()) if groups[0].any() else np.nan for values in runs]
    mean = np.mean(np.stack(runs), axis=0)
    of_samples = sum(_variance(mean[group]) / max(int(group.sum()), 1) for group in groups)
    of_runs = _variance(np.array(value_of_run)) / len(runs) if len(runs) > 1 else 0.0
    value, error = float(np.mean(value_of_run)), float(np.sqrt(of_samples + of_runs))
    tail = 1 - (1 - SCORE_CONFIDENCE) / 2
    # Many samples, few runs: only the runs' variance is itself uncertain.
    freedom = (of_samples + of_runs) ** 2 / (of_runs**2 / (len(runs) - 1)) if of_runs > 0 else np.inf
    quantile = float(ndtri(tail) if not np.isfinite(freedom) else stdtrit(freedom, tail))
    return ScoreEstimate(value, error, value - quantile * error, value + quantile * error)


def auc_estimate(runs: Sequence[np.ndarray], labels: np.ndarray) -> ScoreEstimate:
    """The AUC, or a difference of AUCs, of one or several runs.

    Args:
        runs: `auc_components` of each run, or differences of two models' components.
        labels: [samples], 0 or 1.
    """
    positive = np.asarray(labels) > 0.5
    return mean_estimate(runs, [positive, ~positive])


def logloss_estimate(runs: Sequence[np.ndarray]) -> ScoreEstimate:
    """The log loss, or a difference of log losses, of one or several runs.

    Args:
        runs: `logloss_terms` of each run, or differences of two models' terms.
    """
    return mean_estimate(runs, [np.ones(len(runs[0]) if runs else 0, dtype=bool)])


def _midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middles = counts.cumsum() - (counts - 1) / 2
    return np.asarray(middles[inverse])


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if values.size > 1 else float("nan")
