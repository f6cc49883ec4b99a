"""Scores against a slow second method, and joined over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import DataError
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.training.metrics import Scores, check_labels, evaluate

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:No (positive|negative) samples:UserWarning")


class Echo(nn.Module):
    """Takes the first dense column for the logit."""

    def forward(self, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        assert not self.training
        logits = batch.dense_features[:, 0]
        return logits.sum(), (logits.sum(), logits, batch.labels)


def batch_of(logits: list[float], labels: list[int]) -> Batch:
    """A batch that Echo gives these logits for."""
    kjt = KeyedJaggedTensor(["f"], torch.zeros(len(logits), dtype=torch.int64), lengths=torch.ones(len(logits), dtype=torch.int32))
    return Batch(torch.tensor(logits, dtype=torch.float32).view(-1, 1), kjt, torch.tensor(labels, dtype=torch.float32))


def slow_scores(logits: list[float], labels: list[int]) -> Scores:
    """Every pair of a positive and a negative is looked at; plain Python floats."""
    positives = [x for x, y in zip(logits, labels, strict=True) if y]
    negatives = [x for x, y in zip(logits, labels, strict=True) if not y]
    won = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives)
    losses = [math.log1p(math.exp(-x if y else x)) for x, y in zip(logits, labels, strict=True)]
    right = [(x >= 0) == bool(y) if x else not y for x, y in zip(logits, labels, strict=True)]
    return Scores(
        auc=won / (len(positives) * len(negatives)) if positives and negatives else 0.0,
        logloss=sum(losses) / len(losses),
        accuracy=sum(right) / len(right),
        samples=len(labels),
    )


def assert_same(given: Scores, expected: Scores) -> None:
    """Within float64 rounding; accuracy is a float32 of torchmetrics."""
    assert given.samples == expected.samples
    assert given.auc == pytest.approx(expected.auc, rel=1e-6)
    assert given.logloss == pytest.approx(expected.logloss, rel=1e-9)
    assert given.accuracy == pytest.approx(expected.accuracy, rel=1e-6)


few_logits = st.sampled_from([-21.0, -20.0, -1.5, 0.0, 0.25, 3.0, 20.0, 21.0])  # few, for many ties
logits_and_labels = st.lists(st.tuples(few_logits, st.integers(0, 1)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(samples=logits_and_labels, size=st.integers(1, 17))
def test_against_slow_reference(samples: list[tuple[float, int]], size: int) -> None:
    logits, labels = [x for x, _ in samples], [y for _, y in samples]
    batches = [batch_of(logits[i : i + size], labels[i : i + size]) for i in range(0, len(logits), size)]
    assert_same(evaluate(Echo(), batches, CPU), slow_scores(logits, labels))


def test_by_hand() -> None:
    """Pairs: (2 beats 0), (2 beats 1), (0 ties 0), (0 loses to 1) -> 2.5 of 4."""
    scores = evaluate(Echo(), [batch_of([2.0, 0.0], [1, 1]), batch_of([0.0, 1.0], [0, 0])], CPU)
    assert scores.auc == 0.625
    assert scores.logloss == pytest.approx((math.log1p(math.exp(-2)) + 2 * math.log(2) + math.log1p(math.e)) / 4)


def test_large_logits_are_no_ties() -> None:
    """In float32 both probabilities are exactly 1."""
    assert torch.equal(torch.tensor(20.0).sigmoid(), torch.tensor(21.0).sigmoid())
    assert evaluate(Echo(), [batch_of([21.0, 20.0], [1, 0])], CPU).auc == 1.0


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_put_back(training: bool) -> None:
    model = Echo().train(training)
    evaluate(model, [batch_of([1.0], [1])], CPU)
    assert model.training is training


def test_nothing_to_score() -> None:
    with pytest.raises(DataError, match="no samples to evaluate on"):
        evaluate(Echo(), [], CPU)


@pytest.mark.parametrize("label", [2.0, 0.5, -1.0, math.nan])
def test_labels_are_checked(label: float) -> None:
    with pytest.raises(DataError, match=f"must be 0 or 1, received {label:g}"):
        check_labels(torch.tensor([0.0, 1.0, label]))
    check_labels(torch.tensor([0.0, 1.0]))


STREAMS = {
    "different lengths": [([1.0, 2.0, 0.5, -1.0, 0.5], [1, 0, 1, 0, 0]), ([0.5, 3.0], [1, 1])],
    "one rank has none": [([1.0, 2.0, 0.0], [1, 0, 1]), ([], [])],
}


def _score(rank: int) -> dict[str, Scores | str]:
    from torch import distributed as dist

    scores: dict[str, Scores | str] = {}
    for name, streams in STREAMS.items():
        logits, labels = streams[rank]
        batches = [batch_of(logits[i : i + 2], labels[i : i + 2]) for i in range(0, len(logits), 2)]
        scores[name] = evaluate(Echo(), batches, CPU, dist.group.WORLD)
    try:
        evaluate(Echo(), [], CPU, dist.group.WORLD)
    except DataError as error:
        scores["nothing"] = str(error)
    return scores


def test_ranks_are_joined() -> None:
    first, second = run_on_local_ranks(_score, 2, timeout_s=120)
    assert first == second, "the same on every rank, bit for bit"
    for name, ((logits, labels), (more_logits, more_labels)) in STREAMS.items():
        assert_same(first[name], slow_scores(logits + more_logits, labels + more_labels))
        assert first[name] == evaluate(Echo(), [batch_of(logits + more_logits, labels + more_labels)], CPU)
    assert "no samples to evaluate on" in first["nothing"]
