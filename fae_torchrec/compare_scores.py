"""Test scores of compared runs with their intervals, and how much each placement's differ from the baseline's on the same test samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.score_interval import ScoreEstimate, auc_components, auc_estimate, logloss_estimate, logloss_terms


@dataclass(frozen=True)
class ScoredRuns:
    """The repeats of one placement on the same test samples.

    Attributes:
        labels: [samples], 0 or 1.
        auc: `auc_components` of every repeat.
        logloss: `logloss_terms` of every repeat.
    """

    labels: np.ndarray
    auc: list[np.ndarray]
    logloss: list[np.ndarray]

    @classmethod
    def load(cls, paths: Sequence[str | Path]) -> ScoredRuns:
        """Reads what the repeats wrote (`write_scores`).

        Raises:
            ConfigError: the repeats were scored on different samples.
        """
        auc, logloss, labels = [], [], None
        for path in paths:
            with np.load(path) as saved:
                if labels is not None and not np.array_equal(labels, saved["labels"]):
                    raise _other_samples("two repeats")
                labels = saved["labels"]
                auc.append(auc_components(saved["logits"], labels))
                logloss.append(logloss_terms(saved["logits"], labels))
        assert labels is not None
        return cls(labels, auc, logloss)


def score_intervals(runs: ScoredRuns, base: ScoredRuns | None = None, baseline: str = "") -> dict[str, Any]:
    """The scores of a placement's repeats, and less those of the baseline, with 95 % intervals.

    Args:
        runs: of the placement.
        base: of the baseline, repeat by repeat; None for the baseline itself.
        baseline: its name.

    Returns:
        "test_auc_interval" and "test_logloss_interval" ([low, high], around the mean over repeats), and "less_baseline": None, or
        "baseline", "auc" and "logloss" with "value", "low" and "high".

    Raises:
        ConfigError: the baseline was scored on other samples.
    """
    auc, logloss = auc_estimate(runs.auc, runs.labels), logloss_estimate(runs.logloss)
    made: dict[str, Any] = {
        "test_auc_interval": [max(auc.low, 0.0), min(auc.high, 1.0)] if auc.low == auc.low else None,
        "test_logloss_interval": [logloss.low, logloss.high],
        "less_baseline": None,
    }
    if base is not None:
        if not np.array_equal(runs.labels, base.labels):
            raise _other_samples(f"the baseline {baseline} and a placement")
        pairs = zip(runs.auc, base.auc, strict=True), zip(runs.logloss, base.logloss, strict=True)
        less_auc, less_logloss = ([ours - theirs for ours, theirs in each] for each in pairs)
        made["less_baseline"] = {
            "baseline": baseline,
            "auc": _plain(auc_estimate(less_auc, runs.labels)),
            "logloss": _plain(logloss_estimate(less_logloss)),
        }
    return made


def all_score_intervals(paths: Mapping[str, Sequence[str | Path]], baseline: str) -> dict[str, dict[str, Any]]:
    """`score_intervals` of every placement.

    Args:
        paths: placement -> what its repeats wrote.
        baseline: the placement that the others are held against.
    """
    base = ScoredRuns.load(paths[baseline])
    return {
        name: score_intervals(base) if name == baseline else score_intervals(ScoredRuns.load(files), base, baseline)
        for name, files in paths.items()
    }


def _plain(estimate: ScoreEstimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _other_samples(who: str) -> ConfigError:
    return ConfigError(
        f"compare: {who} were scored on different test samples, or in another order; received unequal labels. Scores are compared pair by "
        "pair: give test data that every run reads in the same order"
    )
