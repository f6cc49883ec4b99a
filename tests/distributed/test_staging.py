"""Cold rows staged beside the hot ones for their step: the stock result, whatever comes between two steps; and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import PoolingType

from fae_torchrec.core.errors import StagingError
from fae_torchrec.data.batches import HotColdBatch
from fae_torchrec.distributed import staging
from fae_torchrec.distributed.split_ahead import SplitAhead
from tests.distributed.small_model import (
    Case,
    dense_optimizer,
    new_batch,
    optimizer_state,
    placement_of,
    shard,
    train,
    whole_tensors,
)
from tests.training.small_pipeline import new_batches, run_pipeline

KINDS = "HHCCHCMHHHHCCCHMMH"
ROOM = 1 << 20
CASES = [
    Case("sgd"),
    Case("rowwise_adagrad", multi_hot=False, mixed_dims=False),
    Case("adagrad", PoolingType.MEAN),
    Case("rowwise_adagrad", weighted=True, mixed_dims=False),
]
CASE = Case("rowwise_adagrad", mixed_dims=False)


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _staged(case: Case, room: int = ROOM) -> Any:
    model = shard(case, placement_of(case), cold_cache_bytes=room)
    assert model.module.ebc._staging is not None
    return model


def _state(model: Any) -> dict[str, torch.Tensor]:
    return {**whole_tensors(model.state_dict()), **optimizer_state(model)}


def _close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()), msg=lambda text, key=key: f"{key}: {text}"
        )


def _split(model: Any, batches: list[HotColdBatch], half: Callable[[int], int] = lambda step: step) -> list[HotColdBatch]:
    """Split ahead, cold batches in turns for the halves."""
    split, steps, done = SplitAhead(model), 0, []
    for batch in batches:
        done.append(split(batch, half(steps)))
        steps += batch.kind != "hot"
    return done


@pytest.mark.parametrize("lookahead", [None, 2, 3, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_equals_stock(case: Case, lookahead: int | None) -> None:
    stock = shard(case, None)
    train(stock, new_batches(case, KINDS, 0))
    model = _staged(case)
    batches = _split(model, new_batches(case, KINDS, 0))
    cold = [tier.module for tier in model.module.ebc._cold]
    with mock.patch.object(type(model.module.ebc._cold[0]), "look_up", side_effect=AssertionError("all ids are in the hot kernel")):
        if lookahead is None:
            train(model, batches)
        else:
            run_pipeline(model, batches, lookahead=lookahead)
    assert cold
    _close(_state(model), _state(stock))


@pytest.mark.parametrize("half", [lambda step: 0, lambda step: step // 2, lambda step: 1 - step % 2], ids=["always 0", "0011", "10"])
def test_any_order_of_halves_is_right(half: Callable[[int], int]) -> None:
    stock = shard(CASE, None)
    train(stock, new_batches(CASE, KINDS, 0))
    model = _staged(CASE)
    run_pipeline(model, _split(model, new_batches(CASE, KINDS, 0), half), lookahead=5)
    _close(_state(model), _state(stock))


def test_rows_are_brought_ahead_of_every_turn() -> None:
    """Each batch with cold rows but the first in the pipeline finds them there."""
    model = _staged(CASE)
    inline, ahead = [], []
    area = model.module.ebc._staging
    bring = area._bring
    with mock.patch.object(
        area, "_bring", lambda batch: ((ahead if area._current and not area._current.updated else inline).append(1), bring(batch))
    ):
        run_pipeline(model, _split(model, new_batches(CASE, "CCCCMMC", 0)))
    assert (len(inline), len(ahead)) == (1, 6)


def test_rows_that_are_not_passed_on_would_be_seen() -> None:
    """The control: what was brought ahead is as it was before the step."""
    states = []
    for patched in (False, True):
        model = _staged(CASE)
        batches = _split(model, new_batches(CASE, KINDS, 0))
        with (
            mock.patch.object(staging._Area, "pass_on", lambda *args: None)
            if patched
            else mock.patch.object(staging, "nothing", create=True)
        ):
            run_pipeline(model, batches)
        states.append(_state(model))
    assert not all(torch.equal(states[0][key], value) for key, value in states[1].items())


@pytest.mark.parametrize("lookahead", [2, 5])
def test_raw_batches_evaluations_and_states_in_between(lookahead: int) -> None:
    """After each step: evaluations by raw and by staged ids, at times a raw training step, the state; at last an old state is loaded."""
    kinds, other, mixed = "HCCHMCHHCCH", new_batch(CASE, 77, 0), new_batches(CASE, "M", 0)[0]

    def disturbed(model: Any, step: int, saved: dict[int, Any], split: Callable[[HotColdBatch], HotColdBatch]) -> None:
        model.eval()
        with torch.no_grad():
            model(other)
            model(split(mixed))
        model.train()
        if step % 3 == 0:
            train(model, [new_batch(CASE, 90 + step, 0)])
        saved[step] = whole_tensors(model.state_dict())
        if step == 6:
            model.load_state_dict({key: value.clone() for key, value in saved[1].items()})

    ours: dict[int, Any] = {}
    plain: dict[int, Any] = {}
    model = _staged(CASE)
    split = SplitAhead(model)
    batches = _split(model, new_batches(CASE, kinds, 0))
    run_pipeline(model, batches, lambda step, pipeline: disturbed(pipeline.detach(), step, ours, split), lookahead=lookahead)
    stock = shard(CASE, None)
    for step, batch in enumerate(new_batches(CASE, kinds, 0), start=1):
        train(stock, [batch])
        disturbed(stock, step, plain, lambda batch: batch)
    for step, state in plain.items():
        _close(ours[step], state)


def test_a_batch_with_more_cold_rows_than_there_is_room_goes_the_other_way() -> None:
    stock = shard(CASE, None)
    train(stock, new_batches(CASE, KINDS, 0))
    model = _staged(CASE, 24 * 2 * 20)  # twenty rows of 4 floats with their state and half as much again
    batches = _split(model, new_batches(CASE, KINDS, 0))
    staged = [ahead.staged is not None for batch in batches for ahead in batch.sparse_features.ahead.values() if batch.kind != "hot"]
    assert not all(staged)
    run_pipeline(model, batches)
    _close(_state(model), _state(stock))


def test_a_forward_before_the_backward_of_another_is_refused() -> None:
    model = _staged(CASE)
    first, second = _split(model, new_batches(CASE, "CC", 0))
    raw = new_batch(CASE, 5, 0)
    loss = model(first)[0]
    for batch in (second, raw):
        with pytest.raises(StagingError, match="still awaits its backward; take each batch's backward before the next forward"):
            model(batch)
    with torch.no_grad():
        model(raw)  # nothing is updated
    loss.backward()
    model(second)[0].backward()
    loss = model(first)[0]
    del loss  # its graph is gone: no backward will come
    optimizer = dense_optimizer(model)
    optimizer.zero_grad()
    train(model, [second])


def test_what_is_not_alike_is_not_staged() -> None:
    with pytest.raises(PlannerError, match="cold_cache_bytes=5: this cold tier brings no rows to fast memory on 2 ranks"):
        from torchrec.distributed.planner import Topology

        from fae_torchrec.distributed.planner import FAEShardingPlanner

        FAEShardingPlanner(placement_of(CASE), Topology(2, "cpu"), 16, cold_cache_bytes=5)
    with pytest.raises(PlannerError, match=r"cold_cache_bytes must be at least 0 .*received -1"):
        shard(CASE, placement_of(CASE), cold_cache_bytes=-1)
    for none in (None, 0):  # on a CPU the homes are as near
        assert shard(CASE, placement_of(CASE), cold_cache_bytes=none).module.ebc._staging is None
    sharded = shard(CASE, placement_of(CASE), hot_tier="table_wise", cold_cache_bytes=ROOM)
    assert sharded.module.ebc._staging is None
    # FBGEMM lays row-wise state out by row and weights by column: with two dims a row is at two places.
    mixed = Case("rowwise_adagrad")
    assert shard(mixed, placement_of(mixed), cold_cache_bytes=ROOM).module.ebc._staging is None
