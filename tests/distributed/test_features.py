"""What else an EmbeddingBagCollection user has: each feature trained on mixed and promised-hot batches equals stock sharding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen, WeightDecayMode
from torchrec.datasets.utils import Batch
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import FAEEmbeddingBagCollectionSharder
from tests.distributed.feature_model import (
    EPS,
    HOT_EVERY,
    HOT_ROWS,
    TABLES,
    Feature,
    Trained,
    new_model,
    placement_of,
    reordered,
    train,
    with_ids,
)
from tests.distributed.reference_adam import reference_adam
from tests.distributed.small_model import ROWS_OF_FEATURE

KEYS = list(ROWS_OF_FEATURE)
BOUND = 1e-3  # about a tenth of a bag's largest gradient


def _tables(pooling: PoolingType = PoolingType.SUM, **dtypes: DataType) -> tuple[EmbeddingBagConfig, ...]:
    return tuple(replace(config, pooling=pooling, data_type=dtypes.get(config.name, config.data_type)) for config in TABLES)


def _more(name: str, rows: int, dim: int, key: str) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[key])


def _with_a_feature_of_no_table(batch: Batch, step: int, ours: bool) -> Batch:
    features = batch.sparse_features
    size = features.stride()
    extra = KeyedJaggedTensor(["x"], torch.full((size,), 10**9), lengths=torch.ones(size, dtype=torch.int32))
    return Batch(batch.dense_features, KeyedJaggedTensor.concat([extra, features]), batch.labels)


def _in_another_order(batch: Batch, step: int, ours: bool) -> Batch:
    """For us alone: stock remembers the order of its first batch."""
    return reordered(batch, KEYS[step % 5 :] + KEYS[: step % 5]) if ours else batch


def _scheduled(optimizer: KeyedOptimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.5 if step % 2 else 1.5


def _warmed_up(optimizer: KeyedOptimizer) -> KeyedOptimizer:
    return WarmupOptimizer(optimizer, [WarmupStage(WarmupPolicy.LINEAR, max_iters=4, value=0.1)], lr=0.3)


def _only_looked_at(model: DistributedModelParallel, batches: list[Batch]) -> Any:
    """The first batches, of the sizes that training will have, in ways that train nothing."""
    model.eval()
    with torch.no_grad():
        seen = [model(batch) for batch in batches[:2]]
    model.train()
    seen += [model(batch) for batch in batches[:2]]  # no backward
    return [(loss.detach().clone(), outputs) for loss, outputs in seen]


def _looked_at_in_inference_mode(model: DistributedModelParallel, batches: list[Batch]) -> Any:
    """FBGEMM 1.8's own training kernels have no operator there, in stock as in ours: the reference Adam's has."""
    model.eval()
    with torch.inference_mode():
        seen = [(loss.clone(), outputs) for loss, outputs in map(model, batches[:2])]
    model.train()
    return seen


def _rows_of_rank(placement: RowPlacement, rank: int) -> RowPlacement:
    """Every third row, others on each rank."""
    return replace(placement, hot_ids={table.name: np.arange(table.rows)[rank % 3 :: 3] for table in placement.tables})


ALL_FP16, ALL_BF16 = ({config.name: dtype for config in TABLES} for dtype in (DataType.FP16, DataType.BF16))
MIXED = {"big": DataType.FP16, "wide": DataType.FP16, "frozen": DataType.FP16}
ADAM = (("", torch.optim.Adam, {"lr": 0.1, "eps": EPS}),)  # the plain torch reference in FBGEMM's place, for stock and for us
SGD = (("", torch.optim.SGD, {"lr": 1.0}),)
CLIPPED = {"gradient_clipping": True, "max_gradient": BOUND}
ROWWISE = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.3, "eps": EPS}
DECAY = {"weight_decay": 0.05, "weight_decay_mode": WeightDecayMode.L2}  # FBGEMM's default mode decays nothing
PER_TABLE = (
    ("tiny", torch.optim.SGD, {"lr": 0.1}),
    ("big", RowWiseAdagrad, {"lr": 0.1, "eps": EPS}),
    ("wide", torch.optim.Adagrad, {"lr": 0.1, "eps": EPS}),
    ("frozen", torch.optim.Adagrad, {"lr": 0.2, "eps": EPS}),
    ("other", torch.optim.Adagrad, {"lr": 0.05, "eps": EPS}),
)
COLUMNS = {"other": ParameterConstraints(sharding_types=["column_wise"], min_partition=4)}
SECOND = (_more("second_e", 120, 8, "e"), _more("second_b", 200, 4, "b"))

FEATURES: dict[str, Feature] = {
    "plain": Feature(),
    "plain sgd": Feature(marks=SGD),
    "fp16": Feature(tables=_tables(**ALL_FP16)),
    "bf16": Feature(tables=_tables(**ALL_BF16), marks=ADAM),  # FBGEMM 1.8 has no bf16 kernel on the CPU; the reference takes any
    "mixed dtypes": Feature(tables=_tables(PoolingType.MEAN, **MIXED)),
    "clipped": Feature(marks=SGD, fused_params=CLIPPED),
    "clipped means": Feature(tables=_tables(PoolingType.MEAN), marks=SGD, fused_params=CLIPPED),
    "means": Feature(tables=_tables(PoolingType.MEAN), marks=SGD),
    "clipped weighted": Feature(weighted=True, fused_params=CLIPPED),
    "fp16 messages": Feature(qcomms=QCommsConfig(CommType.FP16, CommType.FP16)),
    "scaled fp16 messages": Feature(marks=SGD, qcomms=QCommsConfig(CommType.FP16, CommType.FP16, backward_loss_scale=64.0)),
    "bf16 messages": Feature(qcomms=QCommsConfig(CommType.BF16, CommType.BF16)),  # TorchRec makes them fp16 on the CPU
    "left, feature shared": Feature(left=("wide",)),
    "left, column-wise": Feature(left=("other",), constraints=COLUMNS),
    "left, means": Feature(tables=_tables(PoolingType.MEAN), left=("big", "frozen")),
    "left, weighted and clipped": Feature(left=("big",), weighted=True, marks=SGD, fused_params=CLIPPED),
    "two collections": Feature(more=SECOND, hot_rows={**HOT_ROWS, "second_e": 40, "second_b": 90}),
    "two collections, one stock": Feature(more=SECOND),
    "int32 ids": Feature(change_batch=lambda batch, step, ours: with_ids(batch, torch.int32)),
    "int64 lengths": Feature(change_batch=lambda batch, step, ours: with_ids(batch, torch.int64)),
    "a feature of no table": Feature(change_batch=_with_a_feature_of_no_table),
    "any order": Feature(left=("other",), change_batch=_in_another_order),
    "changing sizes": Feature(sizes=(16, 3, 1, 7)),
    "weighted": Feature(weighted=True),
    "fused_params alone": Feature(marks=(), fused_params=ROWWISE, default=Optimizer.ROWWISE_ADAGRAD),
    # Left, because of FBGEMM's CPU kernel: see test_weight_decay_that_replicas_would_not_have_is_refused.
    "weight decay": Feature(marks=(), fused_params={**ROWWISE, **DECAY}, default=Optimizer.ROWWISE_ADAGRAD, left=("big",)),
    "an optimizer per table": Feature(marks=PER_TABLE),
    "schedule": Feature(marks=PER_TABLE, schedule=_scheduled),
    "warm-up": Feature(wrap=_warmed_up),
    "only looked at": Feature(before=_only_looked_at),
    "looked at in inference mode": Feature(marks=ADAM, before=_looked_at_in_inference_mode),
    "ranks share their rows": Feature(one_seed=True),
    "ranks share no row": Feature(allowed=_rows_of_rank),
}
QUANTIZED = [name for name in FEATURES if "messages" in name]
OF_RANKS = [name for name in FEATURES if "ranks" in name]
HOT_TIERS = ["replicated", "table_wise"]
NAMES = {1: [name for name in FEATURES if name not in QUANTIZED + OF_RANKS], 2: list(FEATURES), 3: ["plain", *OF_RANKS]}
CASES = [(ranks, name) for ranks, names in NAMES.items() for name in names]
EXACT = [(ranks, name) for ranks, name in CASES if name not in QUANTIZED]
Runs = dict[tuple[str, str | None], Trained]  # by feature and hot tier, None for stock


def _train_all(rank: int, names: list[str]) -> Runs:
    with reference_adam():
        return {(name, tier): train(FEATURES[name], rank, tier) for name in names for tier in (None, *HOT_TIERS)}


@cache
def _trained(ranks: int) -> list[Runs]:
    """All runs by rank, in one start of the ranks."""
    return run_on_local_ranks(_train_all, ranks, NAMES[ranks], timeout_s=200)


def _compare(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor], precision: Mapping[str, float] | None = None) -> None:
    """Within 1e-5 relative, or a table's precision; a value that cancelled to almost nothing, within a tenth of that of the largest."""
    assert ours.keys() == stock.keys()
    for key, expected in stock.items():
        near = (precision or {}).get(key, 1e-5)
        atol = near / 10 * float(expected.abs().max())
        torch.testing.assert_close(ours[key], expected, rtol=near, atol=atol, msg=f"{key}: {{}}".format)


def _half_precision(stock: Trained) -> dict[str, float]:
    """By key of a half precision table, the distance of its neighbouring values.

    Both sides sum in float32 and round once an update. Sums in another order differ in the last bit of a float32, which now and then is
    what decides between two neighbours.
    """
    return {key: torch.finfo(dtype).eps for key, dtype in stock.dtypes.items() if dtype in (torch.float16, torch.bfloat16)}


@pytest.mark.parametrize("tier", HOT_TIERS)
@pytest.mark.parametrize(("ranks", "name"), EXACT)
def test_features_equal_stock(ranks: int, name: str, tier: str) -> None:
    for trained in _trained(ranks):
        stock, ours = trained[name, None], trained[name, tier]
        halves = _half_precision(stock)
        _compare(ours.weights, stock.weights, halves)
        for key in halves:
            assert (ours.weights[key] == stock.weights[key]).float().mean() > 0.99, "a neighbour is the exception"
        _compare(ours.optimizer, stock.optimizer)
        _compare(ours.outputs, stock.outputs)
        torch.testing.assert_close(ours.losses, stock.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.before, stock.before, rtol=1e-5, atol=1e-6)
        assert ours.dtypes == stock.dtypes
        assert ours.shards.keys() == stock.shards.keys()
        if name in ("fp16", "bf16"):
            assert set(ours.dtypes.values()) == {getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}[name]), torch.float32}


@pytest.mark.parametrize("tier", HOT_TIERS)
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("clipped", "plain sgd"),
        ("clipped means", "means"),
        ("clipped weighted", "weighted"),
        ("fused_params alone", "plain"),
        ("weight decay", "fused_params alone"),
        ("an optimizer per table", "plain"),
        ("schedule", "an optimizer per table"),
        ("warm-up", "plain"),
        ("weighted", "plain"),
    ],
)
def test_the_feature_makes_a_difference(name: str, other: str, tier: str) -> None:
    """Controls: without it, every table would end elsewhere."""
    trained = _trained(1)[0]
    ours, without = trained[name, tier].weights, trained[other, tier].weights
    tables = [key for key in ours if "embedding_bags" in key]
    assert len(tables) == 5
    for key in tables:
        with pytest.raises(AssertionError, match="not close"):
            _compare({key: ours[key]}, {key: without[key]})


@pytest.mark.parametrize(("ranks", "name"), [case for case in CASES if case[0] > 1])
def test_replicas_are_bit_identical(ranks: int, name: str) -> None:
    first, *others = (trained[name, "replicated"].hot_rows for trained in _trained(ranks))
    assert {"tiny/weight", "wide/weight"} - {f"{table}/weight" for table in FEATURES[name].left} <= first.keys()
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(rows, other[key]) for key, rows in first.items())


@pytest.mark.parametrize("tier", HOT_TIERS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_messages_are_half_as_long_and_as_precise_as_stock(name: str, tier: str) -> None:
    without = "plain sgd" if FEATURES[name].marks == SGD else "plain"
    for trained in _trained(2):
        exact, stock, ours = trained[without, None], trained[name, None], trained[name, tier]
        tables = [key for key in exact.weights if "embedding_bags" in key]
        of_stock, of_ours = (max(float((run.weights[key] - exact.weights[key]).abs().max()) for key in tables) for run in (stock, ours))
        assert 0 < of_ours < 2 * of_stock, "as far from what was not quantized as stock is, and the control: it was quantized"
        torch.testing.assert_close(ours.losses, exact.losses, rtol=1e-3, atol=0)
        whole = trained[without, tier]
        for step, (sent, unquantized) in enumerate(zip(ours.sent_bytes, whole.sent_bytes, strict=True)):
            assert ours.calls[step] == whole.calls[step]
            assert sent < 0.75 * unquantized, "ids, lengths and the dense gradients are as before"


@pytest.mark.parametrize("name", [name for name in FEATURES if FEATURES[name].left])
def test_a_hot_batch_still_reaches_tables_left_to_stock(name: str) -> None:
    for trained in _trained(2):
        for step, calls in enumerate(trained[name, "replicated"].calls):
            alone = trained["plain", "replicated"].calls[step]
            assert calls["alltoall_base"] > alone.get("alltoall_base", 0)
            assert ("alltoall_base" in alone) == (step % HOT_EVERY > 0), "the control: without them a hot batch calls none"


@pytest.mark.parametrize("tier", HOT_TIERS)
def test_a_table_left_to_stock_has_its_stock_shards(tier: str) -> None:
    for trained in _trained(2):
        stock, ours = (trained["left, column-wise", which].shards["ebc.embedding_bags.other.weight"] for which in (None, tier))
        assert ours == stock == [[120, 4], [120, 4]]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tier", HOT_TIERS)
def test_a_collection_without_hot_rows_is_stocks(ranks: int, tier: str) -> None:
    for trained in _trained(ranks):
        assert trained["two collections", tier].kinds == ["ShardedFAEEmbeddingBagCollection"] * 2
        assert trained["two collections, one stock", tier].kinds == ["ShardedFAEEmbeddingBagCollection", "ShardedEmbeddingBagCollection"]


def test_gradients_are_gathered_or_reduced_whichever_is_shorter() -> None:
    """Gathers of counts and slots; then of gradients, or a reduction of them."""
    for trained in _trained(3):
        for name, gathers in (("ranks share their rows", 2), ("ranks share no row", 3)):
            steps = trained[name, "replicated"].calls
            assert [calls["allgather_base"] for calls in steps] == [gathers] * len(steps)
        reduced, gathered = (trained[name, "replicated"].calls[1]["allreduce"] for name in OF_RANKS)
        assert reduced == gathered + 1


@pytest.mark.parametrize("marked", [False, True])
def test_weight_decay_that_replicas_would_not_have_is_refused(marked: bool) -> None:
    """FBGEMM 1.8's row-wise Adagrad on the CPU decays tables of several features alone; a kernel of replicas has one feature."""
    feature = replace(FEATURES["weight decay"], left=())
    if marked:
        feature = replace(feature, fused_params=None, marks=(("", RowWiseAdagrad, {"lr": 0.1, **DECAY}),))
    sharders = [FAEEmbeddingBagCollectionSharder(dict(feature.fused_params or {}))]

    def plan(hot_tier: str, device: str) -> None:
        topology = Topology(world_size=1, compute_device=device)
        FAEShardingPlanner(placement_of(feature), topology, 16, hot_tier=hot_tier).plan(new_model(feature), sharders)

    with pytest.raises(
        PlannerError, match=r"table 'big' has weight_decay=0.05 and the features \['b', 'c'\]; .* use hot_tier='table_wise'"
    ):
        plan("replicated", "cpu")
    plan("table_wise", "cpu")
    plan("replicated", "cuda")


def test_weight_decay_that_counts_by_kernel_is_refused() -> None:
    mode = WeightDecayMode.COWCLIP
    feature = replace(FEATURES["weight decay"], fused_params={**ROWWISE, "weight_decay": 0.05, "weight_decay_mode": mode})
    planner = FAEShardingPlanner(placement_of(feature), Topology(world_size=1, compute_device="cpu"), 16, stock_tables=feature.left)
    with pytest.raises(PlannerError, match=r"weight_decay_mode=.*may have \['NONE', 'L2', 'DECOUPLE'\]"):
        planner.plan(new_model(feature), [FAEEmbeddingBagCollectionSharder(dict(feature.fused_params or {}))])


def test_fbgemm_decays_tables_of_several_features_alone() -> None:
    """On the CPU; this fails when FBGEMM does otherwise, and then the refusal may go."""
    for features in (1, 2):
        table = (2, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)
        kernels = [
            SplitTableBatchedEmbeddingBagsCodegen([table], feature_table_map=[0] * features, **ROWWISE, **decay) for decay in ({}, DECAY)
        ]
        for kernel in kernels:
            kernel.split_embedding_weights()[0].fill_(1.0)
            kernel(torch.tensor([1]), torch.tensor([0, 1] + [1] * (features - 1))).sum().backward()
        assert torch.equal(*(kernel.split_optimizer_states()[0][0] for kernel in kernels)) == (features == 1)
