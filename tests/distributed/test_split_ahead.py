"""Ids split ahead by the loader train as ids split in the step, bit for bit; who does not know the split uses the ids."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import HotBatchError
from fae_torchrec.data.batches import AheadKeyedJaggedTensor, HotColdBatch, HotKeyedJaggedTensor
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.split_ahead import SplitAhead
from fae_torchrec.modules.bag_split import BagSplit
from tests.distributed import sequence_model
from tests.distributed.sequence_model import Setup
from tests.distributed.small_model import Case, new_batch, optimizer_state, placement_of, shard, train, whole_tensors
from tests.training.small_pipeline import new_batches, of_kind, run_pipeline

KINDS = "MCHHMCHM"
CASES = [
    Case("rowwise_adagrad"),
    Case("sgd", multi_hot=False),
    Case("sgd", PoolingType.MEAN),
    Case("rowwise_adagrad", weighted=True, mixed_dims=False),
    Case("sgd", weighted=True, multi_hot=False),
]
TIERS = ["replicated", "table_wise"]


def _trained(case: Case, rank: int, tier: str, *, ahead: bool) -> tuple[dict[str, torch.Tensor], int]:
    """What was trained, and how many batches the module split itself."""
    model = shard(case, placement_of(case), hot_tier=tier)
    split: Any = SplitAhead(model) if ahead else lambda batch: batch
    batches = [split(batch) for batch in new_batches(case, KINDS, rank)]
    in_step = mock.Mock(side_effect=BagSplit.forward)
    with mock.patch.object(BagSplit, "forward", lambda self, *args, **kwargs: in_step(self, *args, **kwargs)):
        run_pipeline(model, batches)
    return {**whole_tensors(model.state_dict()), **optimizer_state(model)}, in_step.call_count


def _broken(rank: int) -> str:
    """A cold batch on the last rank that is promised to be hot."""
    case = CASES[0]
    model = shard(case, placement_of(case))
    batch = new_batches(case, "H", rank)[0]
    if rank == torch.distributed.get_world_size() - 1:
        batch = of_kind(new_batch(case, 1, rank), "hot")
    try:
        model(SplitAhead(model)(batch))
    except HotBatchError as error:
        return str(error)
    return "no error"


def _sequences(rank: int, *, ahead: bool) -> dict[str, torch.Tensor]:
    """A model with an EmbeddingCollection, which splits in the step, beside an EmbeddingBagCollection."""
    setup = Setup("rowwise_adagrad")
    model = sequence_model.shard(setup, sequence_model.placement_of(setup))
    batches = [of_kind(sequence_model.new_batch(setup, step, rank), "mixed") for step in range(4)]
    train(model, map(SplitAhead(model), batches) if ahead else batches)
    return {**whole_tensors(model.state_dict()), **optimizer_state(model)}


def _see(rank: int) -> dict[Any, Any]:
    seen: dict[Any, Any] = {
        (case, tier, ahead): _trained(case, rank, tier, ahead=ahead) for case in CASES for tier in TIERS for ahead in (0, 1)
    }
    return {**seen, "broken": _broken(rank), **{("sequences", ahead): _sequences(rank, ahead=ahead) for ahead in (False, True)}}


@cache
def _seen(ranks: int) -> list[dict[Any, Any]]:
    return run_on_local_ranks(_see, ranks, timeout_s=200)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], value) for key, value in other.items())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_trained_bit_for_bit_and_nothing_is_split_in_the_step(case: Case, tier: str, ranks: int) -> None:
    for seen in _seen(ranks):
        (ahead, in_step), (plain, control) = seen[case, tier, True], seen[case, tier, False]
        assert _same(ahead, plain)
        assert (in_step, control) == (0, len(KINDS))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_collection_that_is_not_split_for_is_left_alone(ranks: int) -> None:
    for seen in _seen(ranks):
        assert _same(seen["sequences", True], seen["sequences", False])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_broken_promise_is_an_error_on_every_rank(ranks: int) -> None:
    for seen in _seen(ranks):
        assert "promised to be hot holds cold ids" in seen["broken"]


@pytest.fixture
def one_rank() -> Any:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_split_for_other_tiers_is_not_used() -> None:
    """By another placement's split, ids would go to the wrong rows; the module makes its own."""
    case = CASES[0]
    model, other = shard(case, placement_of(case)), shard(case, placement_of(case), hot_tier="table_wise")
    batch = new_batches(case, "M", 0)[0]
    wrong = SplitAhead(other)(batch)
    assert isinstance(wrong.sparse_features, AheadKeyedJaggedTensor) and wrong.sparse_features.ahead
    assert torch.equal(model(wrong)[1], model(batch)[1])
    lacking = KeyedJaggedTensor(["z"], torch.tensor([1]), lengths=torch.tensor([1]))
    unrelated = SplitAhead(model)(HotColdBatch(torch.zeros(1, 3), lacking, torch.zeros(1)))
    assert unrelated.sparse_features.ahead == {}, "another collection's features"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("options", [{}, {"cold_cache_bytes": 1 << 20}], ids=["", "staged"])
def test_threads_split_while_a_pipeline_traces_the_model(options: dict[str, Any]) -> None:
    """As TorchRec's pipelines do at their first batch: torch.fx has calls of all modules patched meanwhile, in every thread."""
    case = Case("sgd", mixed_dims=False)
    model = shard(case, placement_of(case), **options)
    split, batches, done = SplitAhead(model), new_batches(case, "HCM", 0), []

    class Traced(nn.Module):
        """What is traced; meanwhile a thread splits."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with ThreadPoolExecutor(1) as thread:
                done.extend(thread.map(split, batches))
            return x

    torch.fx.symbolic_trace(Traced())
    for ours, batch in zip(done, batches, strict=True):
        assert torch.equal(model(ours)[1], model(batch)[1])


@pytest.mark.usefixtures("one_rank")
def test_the_loader_splits_each_batch_of_either_kind() -> None:
    case = Case("sgd", multi_hot=False)
    model = shard(case, placement_of(case))
    hot = placement_of(case)
    stream = [new_batch(case, step, 0, hot_only=hot if step % 2 else None) for step in range(30)]
    order = []
    for prefetch in (0, 2, 5):
        loader = HotColdDataLoader(stream, placement_of(case), batch_size=8, prefetch=prefetch, split_ahead=SplitAhead(model))
        batches = list(loader)
        order.append([batch.sparse_features.values().tolist() for batch in batches])
        assert {batch.kind for batch in batches} == {"hot", "cold"}
        (key,) = {key for batch in batches for key in batch.sparse_features.ahead}
        for batch in batches:
            ids = batch.sparse_features.ahead[key].ids
            assert isinstance(batch.sparse_features, HotKeyedJaggedTensor) == (batch.kind == "hot") == (ids.cold is None)
            assert ids.misses.tolist() == [0]
    assert order[0] == order[1] == order[2]
