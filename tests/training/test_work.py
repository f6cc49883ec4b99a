"""Work: sums that no order changes, a hash of the weights, and every way in which two runs may not be comparable."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.filler import filler_like
from fae_torchrec.training.work import TrainedSamples, unequal_work, unlike_samples, weights_fingerprint
from tests.training.small_run import Samples, new_model, placement_of

WORK: dict[str, Any] = {
    "ranks": 2, "batch_size": 16, "epochs": 1, "drop_last": False, "whole_epochs": True, "steps": 20, "samples": 640, "ids": 2000,
    "id_sum": 99_000, "positives": 200, "test_samples": 100, "start_weights": "3f2a", "start_logloss": 0.7, "optimizer": "sgd 0.1",
    "learning_rates": [0.01, 0.1], "sharding_types": ["table_wise"],
}  # fmt: skip


def told(**changes: Any) -> list[str]:
    return unequal_work({"stock": WORK, "fae": {**WORK, **changes}})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 608}, "fae trained 608 samples, stock 640; they may differ by 1"),
        ({"id_sum": 99_001}, "fae trained other samples than stock"),
        ({"positives": 201}, "fae trained other samples than stock"),
        ({"test_samples": 99}, "fae was scored on test samples: 99, stock 100"),
        ({"start_weights": "91bc"}, "fae started from the weights 91bc, stock 3f2a"),
        ({"start_logloss": 0.7005}, "fae starts from a test log loss of 0.700500, stock from 0.700000"),
        ({"optimizer": "adam 0.1"}, "fae trained with the optimizer settings adam 0.1, stock sgd 0.1"),
        ({"learning_rates": [0.1]}, r"fae ended with the learning rates \[0.1\]"),
        ({"batch_size": 32}, "fae trained with a batch size of 32, stock 16"),
        ({"sharding_types": ["column_wise", "table_wise"]}, "fae shards a table as column_wise"),
        ({"ranks": 1}, "fae ran on ranks: 1, stock 2"),
    ],
)
def test_unequal(changes: dict[str, Any], words: str) -> None:
    assert told() == []
    problems = told(**changes)
    assert len(problems) == 1 and re.search(words, problems[0]), problems


def test_what_may_differ() -> None:
    """A step more for leftovers, a sample that is not dealt, a start loss within rounding."""
    assert told(steps=21) == []
    assert told(samples=641, ids=2003, id_sum=99_100) == [] and told(samples=642) != []
    assert told(start_logloss=0.70001) == []
    assert unlike_samples({"stock": WORK, "fae": {**WORK, "samples": 641}}) == ["fae trained 641 samples, stock 640"]


def test_runs_cut_by_steps() -> None:
    """Equal steps; other samples are a note, and part-full batches of two kinds are no other work."""
    cut = {**WORK, "whole_epochs": False}
    other = {**cut, "id_sum": 5, "samples": 640}
    assert unequal_work({"stock": cut, "fae": other}) == []
    assert "as many samples as stock, but others" in unlike_samples({"stock": cut, "fae": other})[0]
    assert unequal_work({"stock": cut, "fae": {**other, "steps": 19}}) == ["fae trained 19 steps, stock 20"]
    assert unequal_work({"stock": cut, "fae": {**cut, "samples": 640 - 2 * 16 * 2}}) == []
    assert unequal_work({"stock": cut, "fae": {**cut, "samples": 640 - 2 * 16 * 2 - 1}}) != []
    # One reached the limit with its last sample, the other one step before: all was trained by both.
    assert unequal_work({"stock": {**WORK, "steps": 19}, "fae": {**WORK, "whole_epochs": False}}) == []


def test_last_samples_left_out() -> None:
    """Each kind's last batch is, which are other samples than stock's; more than that is other work."""
    dropped = {**WORK, "drop_last": True}
    other = {**dropped, "id_sum": 5}
    assert unequal_work({"stock": dropped, "fae": other}) == []
    assert "loader.drop_last leaves the last ones out" in unlike_samples({"stock": dropped, "fae": other})[0]
    assert unequal_work({"stock": dropped, "fae": {**other, "samples": 640 - 2 * 16 * 2 - 1}}) != []


def test_sums_do_not_depend_on_the_order() -> None:
    samples = Samples(101)
    placement = placement_of(new_model())
    loaders = [
        HotColdDataLoader(samples, placement, batch_size=size, schedule=ShuffleSchedule(policy), prefetch=0)
        for size, policy in ((16, "fixed"), (16, "stock"), (7, "proportional"))
    ]
    sums = []
    for loader in loaders:
        trained = TrainedSamples()
        for batch in loader:
            trained.add(batch)
            trained.add(filler_like(batch, kind="mixed"))
        sums.append(trained.sums)
    ids = samples.whole.sparse_features.values()
    expected = {"samples": 101, "ids": ids.numel(), "id_sum": int(ids.sum()), "positives": int(samples.whole.labels.sum())}
    assert sums == [expected] * 3


def test_fingerprint_of_weights() -> None:
    one, same, other = new_model(seed=3), new_model(seed=3), new_model(seed=4)
    assert weights_fingerprint(one) == weights_fingerprint(same) != weights_fingerprint(other)
    with torch.no_grad():
        next(iter(same.parameters())).view(-1)[-1] += 1e-3
    assert weights_fingerprint(one) != weights_fingerprint(same)
