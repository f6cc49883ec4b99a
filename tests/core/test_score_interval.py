"""Intervals of AUC and log loss: by hand, against every pair and against the bootstrap; how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtr

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.score_interval import auc_components, auc_estimate, logloss_estimate, logloss_terms, mean_estimate

Z = 1.959964


def drawn(samples: int, seed: int, gap: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Normal scores, positives higher by `gap`: the true AUC is Phi(gap / sqrt 2)."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(samples) < 0.3).astype(float)
    return rng.normal(size=samples) + gap * labels, labels


def test_by_hand() -> None:
    """Positives 2, 0; negatives 0, 1: 2 beats both, 0 ties one and loses to the other. V10 = (1, 1/4), V01 = (3/4, 1/2)."""
    labels = np.array([1, 1, 0, 0])
    components = auc_components(np.array([2.0, 0.0, 0.0, 1.0]), labels)
    assert components.tolist() == [1, 0.25, 0.75, 0.5]
    given = auc_estimate([components], labels)
    variance = 0.28125 / 2 + 0.03125 / 2  # sample variances of the two pairs, each over two samples
    assert given.value == 0.625
    assert given.standard_error == pytest.approx(math.sqrt(variance))
    assert (given.low, given.high) == pytest.approx((0.625 - Z * math.sqrt(variance), 0.625 + Z * math.sqrt(variance)))


def test_against_all_pairs() -> None:
    """DeLong's definition, pair by pair, with many ties."""
    rng = np.random.default_rng(3)
    scores, labels = rng.integers(0, 6, 60) / 2, rng.integers(0, 2, 60)
    wins = [[1.0 if x > y else 0.5 if x == y else 0.0 for y in scores[labels == 0]] for x in scores[labels == 1]]
    matrix = np.array(wins)
    components = auc_components(scores, labels)
    np.testing.assert_allclose(components[labels == 1], matrix.mean(axis=1))
    np.testing.assert_allclose(components[labels == 0], matrix.mean(axis=0))


def test_against_the_bootstrap() -> None:
    """The standard errors of an AUC and of the difference of two correlated ones."""
    scores, labels = drawn(1500, 1)
    other = scores + np.random.default_rng(2).normal(size=1500)
    one, two = auc_components(scores, labels), auc_components(other, labels)
    rng = np.random.default_rng(5)
    aucs, differences = [], []
    for _ in range(400):
        rows = rng.integers(0, 1500, 1500)
        again = [auc_components(of[rows], labels[rows])[labels[rows] == 1].mean() for of in (scores, other)]
        aucs.append(again[0])
        differences.append(again[0] - again[1])
    assert auc_estimate([one], labels).standard_error == pytest.approx(np.std(aucs), rel=0.12)
    paired = auc_estimate([one - two], labels)
    assert paired.standard_error == pytest.approx(np.std(differences), rel=0.12)
    apart = math.hypot(*(auc_estimate([each], labels).standard_error for each in (one, two)))
    assert paired.standard_error < 0.85 * apart, "the control: pairing must matter"


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """500 test sets of a known AUC."""
    truth, held = ndtr(1 / math.sqrt(2)), 0
    for seed in range(500):
        scores, labels = drawn(300, seed)
        given = auc_estimate([auc_components(scores, labels)], labels)
        held += given.low <= truth <= given.high
    assert 0.92 <= held / 500 <= 0.98


def test_logloss() -> None:
    """Ln 2 at a logit of 0; the textbook's standard error of a mean."""
    terms = logloss_terms(np.array([0.0, 0.0, 40.0, -800.0]), np.array([0, 1, 0, 0]))
    np.testing.assert_allclose(terms, [math.log(2), math.log(2), 40, 0], atol=1e-12)
    given = logloss_estimate([terms])
    assert given.value == pytest.approx(terms.mean())
    assert given.standard_error == pytest.approx(terms.std(ddof=1) / 2)


def test_runs_from_several_seeds() -> None:
    """Two runs whose scores are 0.4 and 0.6 on samples without variance: t with one degree of freedom is 12.706."""
    given = logloss_estimate([np.full(10, 0.4), np.full(10, 0.6)])
    error = math.sqrt(0.02 / 2)
    assert given.value == pytest.approx(0.5) and given.standard_error == pytest.approx(error)
    assert given.high - 0.5 == pytest.approx(12.7062 * error, rel=1e-4)
    # Runs that are the same say no more than one.
    terms = np.random.default_rng(0).random(50)
    assert logloss_estimate([terms, terms]) == logloss_estimate([terms])


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0], [1, 0, 0]])
def test_what_cannot_be_known(labels: list[int]) -> None:
    given = auc_estimate([auc_components(np.array([0.1, 0.5, 0.3]), np.array(labels))], np.array(labels))
    assert math.isnan(given.standard_error) and math.isnan(given.low)
    assert math.isnan(given.value) == (len(set(labels)) == 1)


def test_a_score_that_is_no_number() -> None:
    assert np.isnan(auc_components(np.array([0.1, np.nan, 0.3]), np.array([0, 1, 1]))).all()


def test_runs_of_other_samples() -> None:
    with pytest.raises(DataError, match=r"the same samples, received \[3, 4\]"):
        mean_estimate([np.zeros(3), np.zeros(4)], [np.ones(3, dtype=bool)])
