"""Scores against a slow second method, and joined over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import DataError
from fae_torchrec.data.batches import HotColdBatch, HotKeyedJaggedTensor, is_hot_batch
from fae_torchrec.data.filler import filler_like
from fae_torchrec.training.metrics import Scores, check_labels, evaluate
from tests.training.thread_ranks import run_on_threads

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


class Exchanging(nn.Module):
    """Echo with an exchange in every batch, as a sharded model has: a rank with fewer batches would let the others hang."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, self.batches = group, 0

    def forward(self, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        self.batches += 1
        seen = torch.tensor([self.batches, int(is_hot_batch(batch))])
        dist.all_reduce(seen, group=self.group)
        assert seen[0] == self.batches * self.group.size(), "every rank is at the same batch"
        assert seen[1] == 0, "raw batches on every rank"
        return Echo().eval()(batch)


def batches_of(samples: list[tuple[float, int]], size: int) -> Iterator[Batch]:
    """All samples in batches; every other one is promised to be hot, and every third is a HotColdBatch followed by a filler."""
    for n, i in enumerate(range(0, len(samples), size)):
        batch = batch_of([x for x, _ in samples[i : i + size]], [y for _, y in samples[i : i + size]])
        sparse = HotKeyedJaggedTensor.promise(batch.sparse_features) if n % 2 else batch.sparse_features
        if n % 3 == 2:
            yield HotColdBatch(batch.dense_features, sparse, batch.labels, "hot" if n % 2 else "cold", 1.0, len(batch.labels))
            yield filler_like(batch, kind="hot")
        else:
            yield Batch(batch.dense_features, sparse, batch.labels)


def score_on(streams: list[list[tuple[float, int]]], size: int) -> list[Any]:
    """What each rank gets for its stream, and the batches that its model saw."""

    def score(group: dist.ProcessGroup) -> tuple[Scores, int]:
        model = Exchanging(group)
        return evaluate(model, batches_of(streams[group.rank()], size), CPU, group), model.batches

    return run_on_threads(score, len(streams))


@settings(max_examples=40, deadline=None)
@given(
    streams=st.lists(st.lists(st.tuples(few_logits, st.integers(0, 1)), max_size=30), min_size=2, max_size=3).filter(any),
    size=st.integers(1, 5),
)
@example(streams=[[], [(1.0, 1)] * 30], size=1)  # several windows of batches; a rank that never had one
@example(streams=[[(1.0, 1)] * 16, [(0.5, 0)] * 3], size=1)
def test_ranks_with_unequal_streams_are_joined(streams: list[list[tuple[float, int]]], size: int) -> None:
    everything = [sample for stream in streams for sample in stream]
    logits, labels = [x for x, _ in everything], [y for _, y in everything]
    first, *others = score_on(streams, size)
    assert all(other == first for other in others), "the same on every rank, bit for bit"
    scores, batches = first
    assert_same(scores, slow_scores(logits, labels))
    assert scores == evaluate(Echo(), [batch_of(logits, labels)], CPU)
    assert batches == max(sum(1 for _ in batches_of(stream, size)) for stream in streams)


def test_what_one_rank_cannot_read_ends_all_of_them() -> None:
    assert [str(error) for error in score_on([[], []], 1)] == [
        "there are no samples to evaluate on; received an empty stream of test batches on every rank"
    ] * 2

    def broken(rank: int) -> Iterator[Batch]:
        for n in range(20):
            if rank == 1 and n == 10:
                raise OSError("the disk is gone")
            yield batch_of([1.0], [1])

    def score(group: dist.ProcessGroup) -> Scores:
        return evaluate(Exchanging(group), broken(group.rank()), CPU, group)

    first, second = run_on_threads(score, 2)
    assert isinstance(first, DataError) and "reading the test batches failed on rank 1" in str(first)
    assert isinstance(second, OSError)
