"""Hot rows spread over the ranks, by table and by row: stock's results, stock's state, no cold tier in a hot batch, promises checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingPlan, ShardMetadata
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import HotBatchError
from fae_torchrec.distributed import homes
from fae_torchrec.distributed.homes import local_tables
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.training.traffic import CollectiveCounter
from fae_torchrec.training.whole_state import load_whole_state, whole_state
from tests.distributed import sequence_model, small_model
from tests.distributed.sequence_model import Setup
from tests.distributed.small_model import (
    ROWS_OF_FEATURE,
    Case,
    dense_optimizer,
    new_batch,
    optimizer_state,
    placement_of,
    shard,
    train,
    whole_tensors,
)
from tests.distributed.test_hot_batches import kernels_of, promised

TIERS = ["table_wise", "row_wise"]
CASES = [
    Case(optimizer="adagrad", weighted=True, steps=9),
    Case(optimizer="rowwise_adagrad", pooling=PoolingType.MEAN, steps=9),
    Case(optimizer="sgd", multi_hot=False, mixed_dims=False, steps=9),
]
SEQUENCES = [Setup("adagrad"), Setup("rowwise_adagrad", ids=torch.int32, left=("frozen",))]
CASE = Case(optimizer="rowwise_adagrad")
PLACEMENT = placement_of(CASE)
HOT_ROWS = {"tiny": 6, "big": 60, "wide": 30, "other": 25}
WORLDS = pytest.mark.parametrize("seen", [1, 2], ids="ranks={}".format, indirect=True)
BOTH = pytest.mark.parametrize("tier", TIERS)


class _ByRow(FAEShardingPlanner):
    """Spreads the hot rows of every table evenly over the ranks: by hand, since TorchRec's planner does not offer it on a CPU."""

    def collective_plan(self, *args: Any, **kwargs: Any) -> ShardingPlan:
        plan = super().collective_plan(*args, **kwargs)
        for path, part in plan.plan.items():
            assert isinstance(part, FAEModuleShardingPlan)
            hot = {name: self._by_row(*sharding.sharding_spec.shards[0].shard_sizes) for name, sharding in part.hot.items()}
            homes = {name: hot[name] if part.hot.get(name) is home else home for name, home in part.items()}
            plan.plan[path] = FAEModuleShardingPlan(homes, part.placement, "row_wise", hot)
        return plan

    @staticmethod
    def _by_row(rows: int, dim: int) -> ParameterSharding:
        world = dist.get_world_size()
        each = -(-rows // world)
        shards = [
            ShardMetadata([min(rank * each, rows), 0], [min(each, rows - rank * each), dim], f"rank:{rank}/cpu") for rank in range(world)
        ]
        return ParameterSharding("row_wise", "fused", list(range(world)), EnumerableShardingSpec(shards))


@contextmanager
def _hot_tier(tier: str) -> Iterator[None]:
    """Makes the small models' hot tiers such."""
    planner = _ByRow if tier == "row_wise" else FAEShardingPlanner

    def new_planner(*args: Any, **more: Any) -> FAEShardingPlanner:
        return planner(*args, **{**more, "hot_tier": "table_wise"})

    with ExitStack() as stack:
        for model in (small_model, sequence_model):
            stack.enter_context(mock.patch.object(model, "FAEShardingPlanner", new_planner))
        yield


def _batches(case: Case, rank: int, *, promise: bool, first: int = 0, last: int = 9) -> list[Batch]:
    """Every third is hot, the first included."""
    hot = placement_of(case)
    batches = [new_batch(case, step, rank, size=8, hot_only=None if step % 3 else hot) for step in range(first, last)]
    return [promised(batch) if promise and not step % 3 else batch for step, batch in enumerate(batches, first)]


def _result(model: DistributedModelParallel, losses: list[float]) -> dict[str, Any]:
    return {"losses": losses, "weights": whole_tensors(model.state_dict()), "state": optimizer_state(model)}


def _trained(case: Case, rank: int, *, ours: bool) -> dict[str, Any]:
    model = shard(case, placement_of(case) if ours else None)
    return _result(model, train(model, _batches(case, rank, promise=ours)))


def _trained_sequences(setup: Setup, rank: int, *, ours: bool) -> dict[str, Any]:
    model = sequence_model.shard(setup, sequence_model.placement_of(setup) if ours else None)
    batches = [sequence_model.new_batch(setup, step, rank, hot=step % 3 == 0) for step in range(9)]
    if not ours:
        batches = [Batch(batch.dense_features, batch.sparse_features.permute(list(range(5))), batch.labels) for batch in batches]
    return _result(model, train(model, batches))


def _pipelined(rank: int) -> dict[str, torch.Tensor]:
    """Trained through TorchRec's pipeline, whose first batch is hot."""
    model = shard(CASE, PLACEMENT)
    pipeline = TrainPipelineSparseDist(model, dense_optimizer(model), torch.device("cpu"))
    batches = _batches(CASE, rank, promise=True)
    stream = iter(batches)
    for _ in batches:
        pipeline.progress(stream)
    return whole_tensors(model.state_dict())


def _hot_rows(model: DistributedModelParallel) -> dict[str, dict[str, torch.Tensor]]:
    """All ranks' hot rows, put together: weights and optimizer state, by table."""
    mine = [(shard.table, shard.row_offset, {k: v.clone() for k, v in shard.tensors().items()}) for shard in model.module.ebc._hot.tables()]
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    shards = sorted((shard for of_rank in of_all for shard in of_rank), key=lambda shard: shard[1])
    return {
        table: {name: torch.cat([tensors[name] for of, _, tensors in shards if of == table]) for name in ("weight", "sum")}
        for table in HOT_ROWS
    }


def _state(rank: int) -> dict[str, Any]:
    """Stock -> ours -> stock; then what training changed is written back, in pieces of a few rows."""
    stock, ours, again = shard(CASE, None), shard(CASE, PLACEMENT), shard(CASE, None)
    train(stock, _batches(CASE, rank, promise=False, last=4))
    seen: dict[str, Any] = {"saved": _result(stock, [])}
    load_whole_state(ours, ours.fused_optimizer, whole_state(stock, stock.fused_optimizer))
    seen["ours"] = _result(ours, [])
    seen["hot rows"] = _hot_rows(ours)
    load_whole_state(again, again.fused_optimizer, whole_state(ours, ours.fused_optimizer))
    seen["again"] = _result(again, [])

    with mock.patch.object(homes, "PART_BYTES", 200):  # 12 rows of width 4
        train(ours, _batches(CASE, rank, promise=True, first=4, last=6))
        at_home = {shard.table: shard for shard in local_tables(ours.module.ebc._cold[0].module._lookups)}
        for shard_here in at_home.values():
            for tensor in shard_here.tensors().values():
                tensor.fill_(7.0)
        ours.module.ebc.write_back()
        seen["written back"] = {table: {k: v.clone() for k, v in shard.tensors().items()} for table, shard in at_home.items()}
        seen["trained rows"] = _hot_rows(ours)
        state = ours.state_dict()
        seen["elsewhere"] = [
            table for table in HOT_ROWS if table not in at_home and table in {t.table for t in ours.module.ebc._hot.tables()}
        ]
        for value in state.values():  # as torch.distributed.checkpoint loads
            for piece in getattr(value, "local_shards", list)():
                piece.tensor.detach().fill_(0.25)
        ours.load_state_dict(state)
        seen["loaded in place"] = _hot_rows(ours)
    return seen


def _hot_batch(rank: int) -> dict[str, dict[str, int]]:
    """The stages of the cold tier that ran, and the collectives, in a hot and in a mixed batch."""
    model = shard(CASE, PLACEMENT)
    stages: Counter[str] = Counter()
    tier = model.module.ebc._cold[0]
    cold = tier.module
    for modules in (tier.input_dists, kernels_of(cold), cold._output_dists if tier.input_dists else []):
        for module in modules:
            module.register_forward_hook(lambda module, *_: stages.update([type(module).__name__]))
    seen = {}
    for kind, batch in zip(("hot", "mixed"), _batches(CASE, rank, promise=True, last=2), strict=True):
        stages.clear()
        with CollectiveCounter(rank, dist.get_world_size()) as counter:
            train(model, [batch])
        seen[kind] = {"stages": sum(stages.values()), **counter.calls}
    return seen


def _broken_promise(rank: int) -> str:
    """On the last rank."""
    model = shard(CASE, PLACEMENT)
    batch = _batches(CASE, rank, promise=True, last=1)[0]
    if rank == dist.get_world_size() - 1:
        batch = promised(new_batch(CASE, 1, rank))
    with CollectiveCounter(rank, dist.get_world_size()) as counter, pytest.raises(HotBatchError) as caught:
        model(batch)
    return f"{caught.value} after {sum(counter.calls.values())} collectives"


def _at_the_edges(model: DistributedModelParallel, rank: int) -> dict[str, Any]:
    """A batch without a hot id on any rank, and one without any id."""
    cold = [i for i in range(200) if i not in PLACEMENT.hot_ids["big"]]
    batches = []
    for ids in ([[], cold[:3], [], [0, 1, 1], []], [[], [], [], [], []]):  # of features a to e
        values = torch.tensor([i for of in ids for i in of], dtype=torch.int64)
        lengths = torch.tensor([n for of in ids for n in (len(of), 0)], dtype=torch.int32)
        batches.append(Batch(torch.ones(2, 3), KeyedJaggedTensor(list(ROWS_OF_FEATURE), values, lengths=lengths), torch.tensor([0.0, 1.0])))
    return _result(model, train(model, batches))


def _other_sizes(model: DistributedModelParallel, rank: int) -> dict[str, Any]:
    """Batches of another size on every rank and at every step."""
    return _result(model, train(model, [new_batch(CASE, step, rank, size=1 + step + rank) for step in range(3)]))


def _see(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {case: _trained(case, rank, ours=False) for case in CASES}
    seen.update({setup: _trained_sequences(setup, rank, ours=False) for setup in SEQUENCES})
    seen["edges"], seen["other sizes"] = _at_the_edges(shard(CASE, None), rank), _other_sizes(shard(CASE, None), rank)
    for tier in TIERS:
        with _hot_tier(tier):
            seen.update({(tier, case): _trained(case, rank, ours=True) for case in CASES})
            seen.update({(tier, setup): _trained_sequences(setup, rank, ours=True) for setup in SEQUENCES})
            seen[tier, "edges"] = _at_the_edges(shard(CASE, PLACEMENT), rank)
            if tier == "table_wise":  # gloo, unlike nccl, scatters no sums in parts of different sizes, for stock row-wise tables either
                seen[tier, "other sizes"] = _other_sizes(shard(CASE, PLACEMENT), rank)
            model = shard(CASE, PLACEMENT)
            train(model, _batches(CASE, rank, promise=False))
            seen[tier, "plain"] = whole_tensors(model.state_dict())
            seen[tier, "pipeline"] = _pipelined(rank)
            seen[tier, "state"] = _state(rank)
            seen[tier, "hot batch"] = _hot_batch(rank)
            seen[tier, "broken promise"] = _broken_promise(rank)
    return seen


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    """What every rank saw, in one start of the ranks."""
    return run_on_local_ranks(_see, request.param, timeout_s=200)


def _name(case: object) -> str:
    return f"sequences, {case.optimizer}" if isinstance(case, Setup) else str(case)


def _assert_close(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    assert ours["weights"].keys() == stock["weights"].keys() and ours["state"].keys() == stock["state"].keys()
    torch.testing.assert_close(ours["weights"], stock["weights"], rtol=1e-5, atol=1e-6)  # weights start at 0.25 on average
    torch.testing.assert_close(ours["state"], stock["state"], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ours["losses"], stock["losses"], rtol=1e-5, atol=0)


@WORLDS
@BOTH
@pytest.mark.parametrize("case", [*CASES, *SEQUENCES, "edges"], ids=_name)
def test_equals_stock(seen: list[dict[Any, Any]], tier: str, case: Any) -> None:
    _assert_close(seen[0][tier, case], seen[0][case])


@WORLDS
def test_other_batch_sizes_equal_stock(seen: list[dict[Any, Any]]) -> None:
    _assert_close(seen[0]["table_wise", "other sizes"], seen[0]["other sizes"])


@WORLDS
def test_a_run_unlike_stock_would_be_seen(seen: list[dict[Any, Any]]) -> None:
    """The control of the test above."""
    with pytest.raises(AssertionError):
        _assert_close(seen[0][TIERS[0], CASES[0]], {**seen[0][CASES[0]], "weights": seen[0][CASES[2]]["weights"]})


@WORLDS
@BOTH
def test_promise_and_pipeline_change_nothing(seen: list[dict[Any, Any]], tier: str) -> None:
    torch.testing.assert_close(seen[0][tier, "pipeline"], seen[0][tier, "plain"], rtol=1e-6, atol=1e-7)


def _assert_equal(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(tensors[key], value), key


@WORLDS
@BOTH
def test_stock_to_ours_and_back_is_bitwise(seen: list[dict[Any, Any]], tier: str) -> None:
    state = seen[0][tier, "state"]
    for name in ("ours", "again"):
        _assert_equal(state[name]["weights"], state["saved"]["weights"])
        _assert_equal(state[name]["state"], state["saved"]["state"])
    for table, hot in state["hot rows"].items():
        ids = torch.from_numpy(PLACEMENT.hot_ids[table])
        assert torch.equal(hot["weight"], state["saved"]["weights"][f"ebc.embedding_bags.{table}.weight"][ids]), "promoted"
        assert torch.equal(hot["sum"], state["saved"]["state"][f"ebc.embedding_bags.{table}.weight/{table}.momentum1"][ids])


@WORLDS
@BOTH
def test_write_back_touches_hot_rows_alone(seen: list[dict[Any, Any]], tier: str) -> None:
    for of_rank in seen:
        state = of_rank[tier, "state"]
        for table, tensors in state["written back"].items():
            ids = torch.from_numpy(PLACEMENT.hot_ids[table])
            hot = torch.zeros(PLACEMENT.tables[table].rows, dtype=torch.bool)
            hot[ids] = True
            for name, home in tensors.items():
                assert (home[~hot] == 7.0).all(), (table, name)
                assert not len(ids) or torch.equal(home[ids], state["trained rows"][table][name]), (table, name)
        assert all((hot["weight"] == 0.25).all() for hot in state["loaded in place"].values())
    if len(seen) > 1:
        assert any(of_rank[tier, "state"]["elsewhere"] for of_rank in seen), "control: some rows and their homes are on different ranks"


@WORLDS
@BOTH
def test_hot_batch_calls_nothing_of_the_cold_tier(seen: list[dict[Any, Any]], tier: str) -> None:
    for of_rank in seen:
        hot, mixed = of_rank[tier, "hot batch"]["hot"], of_rank[tier, "hot batch"]["mixed"]
        assert (hot["stages"], mixed["stages"]) == (0, 3 if len(seen) > 1 else 1), "a single rank has the kernel alone"
        if len(seen) > 1:
            assert hot["alltoall_base"] < mixed["alltoall_base"], "its own all-to-alls alone"
            kinds = 1 + (tier == "row_wise")  # which sums by reduce-scatter, and so gathers in backward
            assert hot["allgather_base"] == mixed["allgather_base"] == kinds


@WORLDS
@BOTH
def test_broken_promise_is_an_error_on_every_rank(seen: list[dict[Any, Any]], tier: str) -> None:
    for message in (of_rank[tier, "broken promise"] for of_rank in seen):
        assert "promised to be hot holds cold ids" in message
        assert message.endswith(f"after {len(seen) - 1} collectives"), "the kinds themselves, and nothing else"
