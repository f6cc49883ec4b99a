"""examples/tbsm.py: logits and gradients by 21 separate lookups, what is hot, and stock's result on 1 and 2 ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.core.tables import Optimizer, TableSet
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.feature_batch import bag_batch
from fae_torchrec.data.segregate import hot_samples
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.sharded_embedding import ShardedFAEEmbeddingCollection
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.model_factory import load_factory
from fae_torchrec.training.model_spec import ModelSpec, build_model
from fae_torchrec.training.shard import build_optimizer, shard_model
from fae_torchrec.training.traffic import CollectiveCounter
from fae_torchrec.training.train_pipeline import FAETrainPipeline
from tests.distributed.small_model import optimizer_state, whole_tensors

FACTORY = f"{Path(__file__).resolve().parents[1] / 'examples' / 'tbsm.py'}:build_tbsm"
ROWS = {"user": 40, "item": 300, "category": 9}
HOT = {"t_user": 20, "t_item": 60, "t_category": 9}  # the first rows of each
HISTORY, DIM, SAMPLES, STEPS = 20, 16, 24, 12
OPTIMIZERS = (Optimizer.SGD, Optimizer.ROWWISE_ADAGRAD)
CPU = torch.device("cpu")


def _spec(**changes: Any) -> ModelSpec:
    return ModelSpec(**{"rows": ROWS, "num_dense": 1, "embedding_dim": DIM, "dense_arch": (DIM,), "over_arch": (60, 1), **changes})


def _model(optimizer: Optimizer = Optimizer.ROWWISE_ADAGRAD, **changes: Any) -> Any:
    return build_model(load_factory(FACTORY), _spec(**changes), optimizer, 0.05, seed=4)


def _batch(lengths: Sequence[int], seed: int, rows: dict[str, int] = ROWS) -> Batch:
    """Random ids, as many of each feature; the features in another order than the tables."""
    rng = np.random.default_rng(seed)
    sizes = np.asarray(lengths, dtype=np.int32)
    names = ["item", "category", "user"]
    bags = [(rng.integers(0, rows[name], sizes.sum()), sizes) for name in names]
    dense = rng.random((len(sizes), 1), dtype=np.float32)
    return bag_batch(names, dense, bags, rng.integers(0, 2, len(sizes)).astype(np.float32))


def _placement(tables: TableSet) -> RowPlacement:
    ids = {name: np.arange(HOT[name]) for name in tables.names}
    return RowPlacement(tables=tables, hot_ids=ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


def _slow_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Sample by sample, step by step: a lookup in each table and the tower for every step, vectors of zeros for what is not there."""
    arch = model.arch
    bottom, top, attention, over = (
        [layer for layer in part.modules() if isinstance(layer, nn.Linear)] for part in (arch.bottom, arch.tower, arch.attention, arch.over)
    )
    tables = {name: model.embedding_collection.embeddings[f"t_{name}"].weight for name in ROWS}
    bags = {name: batch.sparse_features[name].to_dense() for name in ROWS}
    logits = []
    for sample in range(batch.labels.numel()):
        vectors = []
        for back in range(HISTORY, -1, -1):
            at = bags["item"][sample].numel() - 1 - back
            if at < 0:
                vectors.append(torch.zeros(15, dtype=torch.float64))
                continue
            dense = batch.dense_features[sample].double()
            for layer in bottom:
                dense = torch.relu(layer.weight @ dense + layer.bias)
            parts = [dense, *(tables[name][bags[name][sample][at]] for name in ROWS)]
            products = [parts[i] @ parts[j] for i in range(4) for j in range(i + 1, 4)]
            vector = torch.cat([dense, torch.stack(products)])
            for layer in top:
                vector = torch.relu(layer.weight @ vector + layer.bias)
            vectors.append(vector / vector.norm().clamp(min=1e-12))
        *history, candidate = vectors
        wanted = arch.metric.T @ (arch.metric @ candidate)
        weights = torch.stack([vector @ wanted for vector in history])
        for number, layer in enumerate(attention):
            weights = (torch.sigmoid if number == 2 else torch.relu)(layer.weight @ weights + layer.bias)
        context = sum(weight * vector for weight, vector in zip(weights, history, strict=True))
        hidden = torch.relu(over[0].weight @ torch.cat([context, candidate]) + over[0].bias)
        logits.append((over[1].weight @ hidden + over[1].bias).squeeze(0))
    return torch.stack(logits)


@pytest.mark.parametrize("lengths", [[21] * 6, [21, 3, 1, 0, 14, 25]], ids=["whole histories", "of other lengths"])
def test_logits_and_gradients_of_separate_lookups(lengths: list[int]) -> None:
    model, batch = _model(), _batch(lengths, 1)
    loss, (detached, given, labels) = model(batch)
    model.double()
    slow = _slow_logits(model, batch)
    nn.functional.binary_cross_entropy_with_logits(slow, batch.labels.double()).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model.arch(batch.dense_features.double(), model.embedding_collection(batch.sparse_features))
    nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.double()).backward()
    torch.testing.assert_close(logits, slow.detach(), rtol=1e-10, atol=1e-12)
    assert len(set(logits.tolist())) == len(lengths)
    torch.testing.assert_close(given.double(), slow.detach(), rtol=1e-5, atol=1e-6)
    assert loss == detached == nn.functional.binary_cross_entropy_with_logits(given, batch.labels) and torch.equal(labels, batch.labels)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-5, atol=1e-9)  # rows and their gradients are fp32
        assert expected[name].abs().sum() > 0, f"{name} matters"


def test_widths_and_start_are_the_papers() -> None:
    arch = _model(rows={"user": 987_994, "item": 4_162_024, "category": 9_439}, device=torch.device("meta")).arch
    widths = {
        name: [(layer.in_features, layer.out_features) for layer in getattr(arch, name).modules() if isinstance(layer, nn.Linear)]
        for name in ("bottom", "tower", "attention", "over")
    }
    assert widths == {
        "bottom": [(1, 16)],
        "tower": [(22, 15), (15, 15)],
        "attention": [(20, 15), (15, 15), (15, 20)],
        "over": [(30, 60), (60, 1)],
    }
    layers = [layer.weight.detach() for layer in arch.modules() if isinstance(layer, nn.Linear)]
    weight = torch.cat([values.flatten() * (sum(values.shape) / 2) ** 0.5 for values in layers])
    assert abs(float(weight.std()) - 1) < 0.03 and abs(float(weight.mean())) < 0.03
    assert float(arch.metric.detach().std()) == pytest.approx(15**-0.5, rel=0.15)


def test_what_is_refused() -> None:
    uneven = _batch([3, 3], 0)
    lengths = uneven.sparse_features.lengths().clone()
    lengths[:2] = torch.tensor([2, 4])  # of the item alone
    kjt = KeyedJaggedTensor(uneven.sparse_features.keys(), uneven.sparse_features.values(), lengths=lengths)
    with pytest.raises(ConfigError, match="not equally long"):
        _model()(Batch(uneven.dense_features, kjt, uneven.labels))
    for changes, told in (
        ({"options": {"histroy": 3}}, r"unknown \['histroy'\]; allowed are history"),
        ({"options": {"history": 0}}, "at least 1"),
        ({"dense_arch": (8,)}, r"dense_arch \[8\]"),
        ({"over_arch": (1,)}, "two or more"),
        ({"num_dense": 0}, "at least one dense feature"),
    ):
        with pytest.raises(ConfigError, match=told):
            _model(**changes)


def test_one_cold_id_among_63_makes_a_sample_cold() -> None:
    """Sample 0 has hot ids alone; sample 1 + p the same but for the p-th of its 63, which is cold (a category never is here)."""
    tables = model_tables(_model(device=torch.device("meta")))
    placement = _placement(tables)
    placement = RowPlacement(
        tables=tables, hot_ids={**placement.hot_ids, "t_category": np.arange(8)}, hot_set_fingerprint="by hand", budget_bytes=0,
        hot_inputs=0.0, coverage=0.0,
    )  # fmt: skip
    names, cold = list(ROWS), {"user": 39, "item": 60, "category": 8}
    ids = np.zeros((3, 64, 21), dtype=np.int64)
    for position in range(63):
        ids[position // 21, 1 + position, position % 21] = cold[names[position // 21]]
    sizes = np.full(64, 21, dtype=np.int32)
    batch = bag_batch(names, np.zeros((64, 1), np.float32), [(ids[f].reshape(-1), sizes) for f in range(3)], np.zeros(64, np.float32))
    assert hot_samples(batch.sparse_features, placement).tolist() == [True] + [False] * 63
    loader = HotColdDataLoader([batch], placement, batch_size=64, schedule=ShuffleSchedule("fixed"))
    kinds = {batch.kind: batch for batch in loader}
    assert {kind: batch.num_samples for kind, batch in kinds.items()} == {"hot": 1, "cold": 63}
    assert int(kinds["hot"].sparse_features.values().sum()) == 0 and kinds["cold"].sparse_features.values().numel() == 63 * 63


def _batches(rank: int) -> list[Batch]:
    """Of the first rows mostly, so that there are hot samples; short histories too, and one without any id."""
    rng = np.random.default_rng(rank)
    found = []
    for step in range(STEPS):
        lengths = [0, *rng.integers(1, 22, 4), *[21] * (SAMPLES - 5)]
        rows = {"user": 20, "item": 60, "category": 9} if step % 3 == 0 else ROWS
        found.append(_batch(lengths, 100 * step + rank, rows))
    return found


def _crossed(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Bytes that leave this rank in forward and backward of the sharded collection alone, by collective."""
    collection = model.module.embedding_collection
    with CollectiveCounter(dist.get_rank(), dist.get_world_size()) as counter:
        rows = collection(batch.sparse_features)
        sum(rows[feature].values().sum() for feature in ROWS).backward()
    return dict(counter.sent_bytes)


def _train(rank: int, optimizer: Optimizer, way: str) -> dict[str, Any]:
    group = dist.group.WORLD
    model = _model(optimizer)
    placement = None if way == "stock" else _placement(model_tables(model))
    model = shard_model(model, placement, SAMPLES, CPU, group)
    combined = build_optimizer(model, 0.01)
    losses = []
    pipeline = FAETrainPipeline(model, combined, CPU)
    batches = iter(_batches(rank))
    for _ in range(STEPS):
        losses.append(pipeline.progress(batches)[0].item())
    pipelined = [type(module).__name__ for module in pipeline._pipelined_modules]
    pipeline.detach()
    (plan,) = model.plan.plan.values()
    shards = {
        name: [(shard.placement.rank(), shard.shard_offsets[0], shard.shard_sizes[0]) for shard in sharding.sharding_spec.shards]
        for name, sharding in plan.items()
    }
    result = {
        "losses": losses,
        "weights": whole_tensors(model.state_dict()),
        "optimizer": optimizer_state(model),
        "ours": any(isinstance(module, ShardedFAEEmbeddingCollection) for module in model.modules()),
        "pipelined": pipelined,
        "shards": shards,
    }
    result["crossed"] = _crossed(model, _batches(rank)[1])  # last: it trains
    return result


def _train_all(rank: int) -> dict[tuple[Optimizer, str], dict[str, Any]]:
    return {(optimizer, way): _train(rank, optimizer, way) for optimizer in OPTIMIZERS for way in ("stock", "fae")}


@cache
def trained(ranks: int) -> list[dict[tuple[Optimizer, str], dict[str, Any]]]:
    return run_on_local_ranks(_train_all, ranks, timeout_s=120)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_placement_alone_gives_the_stock_result(optimizer: Optimizer, ranks: int) -> None:
    for of_rank in trained(ranks):
        stock, ours = of_rank[optimizer, "stock"], of_rank[optimizer, "fae"]
        assert ours["ours"] and not stock["ours"]
        assert len(ours["pipelined"]) == len(stock["pipelined"]) == 1, "a pipeline starts their input dist early"
        torch.testing.assert_close(ours["losses"], stock["losses"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours["weights"], stock["weights"], rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(ours["optimizer"], stock["optimizer"], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("way", ["stock", "fae"])
def test_every_ids_row_travels(way: str) -> None:
    """Bytes that leave a rank in a step: lengths and ids of what the other rank holds, for each id a row and its gradient; of cold ids."""
    runs = [rank[Optimizer.SGD, way] for rank in trained(2)]
    for rank, run in enumerate(runs):
        expected = 3 * 8  # how many ids, lengths and samples will come
        for name, shards in run["shards"].items():
            if way == "fae" and HOT[name] == ROWS[name.removeprefix("t_")]:
                continue  # all of its rows are hot: it has no part in the exchange
            for holder, first, count in shards:
                asking = 1 - holder
                ids = _batches(asking)[1].sparse_features[name.removeprefix("t_")].values()
                cold = ids if way == "stock" else ids[ids >= HOT[name]]
                there = int(((cold >= first) & (cold < first + count)).sum())
                expected += (4 * SAMPLES + 8 * there) * (asking == rank) + 4 * DIM * there  # rows by the holder, gradients by who asks
        assert run["crossed"]["alltoall_base"] == expected
        assert ("allgather_base" in run["crossed"]) is (way == "fae"), "hot rows that were touched, and their gradients"
