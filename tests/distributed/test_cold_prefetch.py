"""On two ranks: unequal shares of a batch, fillers among them, train as the joined batch, and rows brought in early change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fae_torchrec.data.batches import HotColdBatch
from fae_torchrec.data.segregate import select_samples
from fae_torchrec.distributed.hot_cold_module import ShardedHotColdModule
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.training.train_pipeline import FAETrainPipeline
from tests.distributed import sequence_model
from tests.distributed.reference_adam import reference_adam
from tests.distributed.sequence_model import Setup
from tests.distributed.small_model import Case, optimizer_state, placement_of, shard, whole_tensors
from tests.training.small_pipeline import CPU, KINDS, new_batches, of_kind, run_pipeline, shared, traced

SPLITS = [(5, 3), (8, 0), (0, 8)]  # samples of rank 0 and of rank 1; with every kind, for there are four steps in a round of kinds
KINDS_OF_STEPS = "CHHM" * 3
OPTIMIZERS = ["sgd", "rowwise_adagrad", "adam"]
SEQUENCES = Setup("rowwise_adagrad", left=("frozen", "wide"))


def _sequence_batches(rank: int) -> list[HotColdBatch]:
    kinds = "HHHCHMCHHC"
    return [of_kind(sequence_model.new_batch(SEQUENCES, i, rank, hot=kind == "H"), KINDS[kind]) for i, kind in enumerate(kinds)]


def _trained(model: Any, batches: list[HotColdBatch], **options: Any) -> dict[str, torch.Tensor]:
    run_pipeline(model, batches, **options)
    return {**whole_tensors(model.state_dict()), **optimizer_state(model)}


def _joined(optimizer: str) -> tuple[Case, list[HotColdBatch]]:
    """The case, and the batches that the ranks share: the same on every rank."""
    case = Case(optimizer)
    return case, new_batches(case, KINDS_OF_STEPS, 0, size=8)


def _alone(optimizer: str) -> dict[str, torch.Tensor]:
    case, batches = _joined(optimizer)
    with reference_adam() if optimizer == "adam" else nullcontext():
        return _trained(shard(case, placement_of(case)), batches)


def _see(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        case, batches = _joined(optimizer)
        with reference_adam() if optimizer == "adam" else nullcontext():
            for lookahead in (2, 4):
                model = shard(case, placement_of(case))
                seen[f"{optimizer}, {lookahead}"] = _trained(model, shared(batches, SPLITS, rank), lookahead=lookahead)
    case, batches = _joined("sgd")
    seen["not weighted"] = _trained(shard(case, placement_of(case)), shared(batches, SPLITS, rank, weighted=False))
    tables = shard(case, placement_of(case), hot_tier="table_wise")
    seen["sharded hot tier"] = _trained(tables, shared(batches, SPLITS, rank), lookahead=4)
    for lookahead in (2, 4):
        with traced() as events:
            model = sequence_model.shard(SEQUENCES, sequence_model.placement_of(SEQUENCES))
            seen[f"sequences, {lookahead}"] = _trained(model, _sequence_batches(rank), lookahead=lookahead)
        seen[f"events, {lookahead}"] = list(events)
    seen["rebundled"] = _rebundled(rank)
    return seen


def _rebundled(rank: int) -> dict[str, Any]:
    """A stock loop over plain batches, of which rank 0 has more: the samples it trained, and its steps."""
    from tests.training.small_run import Samples, new_model, numbers, placement_of, sharded

    placement, trained = placement_of(new_model()), []
    model, optimizer = sharded(new_model(), placement)

    def forward(batch: HotColdBatch) -> Any:
        trained.extend(numbers(batch)[: batch.num_samples])
        return model(batch)

    pipeline: Any = FAETrainPipeline(model, optimizer, CPU, custom_model_fwd=forward, placement=placement, batch_size=16, lookahead=4)
    mine = range(150) if rank == 0 else range(150, 203)
    stream = (select_samples(Samples(203).whole, torch.tensor(mine[at : at + 20])) for at in range(0, len(mine), 20))
    with pytest.raises(StopIteration):
        while True:
            pipeline.progress(stream)
    for module in model.modules():
        if isinstance(module, ShardedHotColdModule):
            module.check_replicas()
    return {"trained": trained, "steps": (pipeline.steps.hot, pipeline.steps.other)}


@cache
def _seen() -> list[dict[str, Any]]:
    return run_on_local_ranks(_see, 2, timeout_s=120)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of weights, as a share of the largest weight of the tensor."""
    return max(float((found[key] - value).abs().max() / value.abs().max()) for key, value in wanted.items())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_unequal_shares_train_as_the_joined_batch(optimizer: str) -> None:
    wanted = _alone(optimizer)
    for seen in _seen():
        assert max(_worst(seen[f"{optimizer}, {lookahead}"], wanted) for lookahead in (2, 4)) < 1e-5
        if optimizer == "sgd":
            assert _worst(seen["sharded hot tier"], wanted) < 1e-5
            assert _worst(seen["not weighted"], wanted) > 1e-3, "the control"


def test_rows_brought_in_early_change_no_bit() -> None:
    for seen in _seen():
        for name in (*OPTIMIZERS, "sequences"):
            early, stock = seen[f"{name}, 4"], seen[f"{name}, 2"]
            assert early.keys() == stock.keys() and all(torch.equal(early[key], stock[key]) for key in stock)


def test_plain_batches_are_rebundled_on_two_ranks() -> None:
    first, second = (seen["rebundled"] for seen in _seen())
    assert sorted(first["trained"]) == list(range(150)) and sorted(second["trained"]) == list(range(150, 203))
    assert first["steps"] == second["steps"] and min(first["steps"]) > 1


def test_ranks_begin_the_same_in_the_same_order() -> None:
    """An EmbeddingCollection and an EmbeddingBagCollection: each brings its rows. H0 H1 H2 C3 H4 M5 C6 H7 H8 C9."""
    (first, second) = (seen["events, 4"] for seen in _seen())
    assert first == second
    assert [event for event in first if event.startswith("rows")] == [f"rows{step}" for step in (3, 3, 5, 5, 9, 9)]
    for step, before in ((3, 0), (5, 3), (9, 6)):
        assert first.index(f"update{before}") < first.index(f"rows{step}") < first.index(f"update{step - 1}"), (
            "while a hot batch is trained"
        )
    assert not [event for event in _seen()[0]["events, 2"] if event.startswith("rows")]
