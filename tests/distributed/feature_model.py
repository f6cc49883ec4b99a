"""Models that each use one more feature of EmbeddingBagCollection, and their training by stock sharding and by ours on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import FAEEmbeddingBagCollectionSharder
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.traffic import CollectiveCounter
from tests.distributed.small_model import Case, configs, new_batch, optimizer_state, whole_tensors
from tests.distributed.test_hot_batches import promised

CPU = torch.device("cpu")
LEARNING_RATE = 0.1
EPS = 1e-4  # with less, a row whose gradients cancel to rounding errors takes a step as large as any other, in a direction of their own
STEPS = 6
HOT_EVERY = 3  # every third batch is hot, the first included
TABLES = tuple(configs(Case()))  # tiny (a), big (b, c), wide (c), frozen (d), other (e)
HOT_ROWS = {"tiny": 6, "big": 60, "wide": 30, "frozen": 0, "other": 25}
Marks = tuple[tuple[str, type[torch.optim.Optimizer], dict[str, Any]], ...]  # a table's name (or "" for all), optimizer, arguments
ALL_ROWWISE: Marks = (("", RowWiseAdagrad, {"lr": LEARNING_RATE, "eps": EPS}),)


def _same_batch(batch: Batch, step: int, ours: bool) -> Batch:
    return batch


@dataclass(frozen=True)
class Feature:
    """One model and its training; what is not said is an fp32 collection of sums, trained by row-wise Adagrad.

    Attributes:
        tables: of the collection `ebc`.
        more: of a second collection, `second`, which is fed a subset of the features.
        hot_rows: by table; the tables that are neither here nor `left` are all cold.
        left: tables left to stock sharding.
        marks: what `apply_optimizer_in_backward` is called with.
        fused_params: the sharders'.
        default: the optimizer of unmarked tables.
        qcomms: quantized communication.
        constraints: for both planners; stock's other tables are table-wise.
        weighted: whether ids have weights.
        allowed: (placement, rank) -> the ids that batches on that rank may have, before hot batches are cut down to hot ids.
        change_batch: (batch, step, whether it is for us) -> the batch.
        before: what is done with the new model before it is trained; its result is compared.
        schedule: (fused optimizer, step) -> None, before each step.
        wrap: what to train with in place of the fused optimizer.
        steps: number of batches.
        sizes: of the batches, in turn.
        one_seed: whether all ranks draw the same ids.
    """

    tables: tuple[EmbeddingBagConfig, ...] = TABLES
    more: tuple[EmbeddingBagConfig, ...] = ()
    hot_rows: Mapping[str, int] = field(default_factory=lambda: HOT_ROWS)
    left: tuple[str, ...] = ()
    marks: Marks = ALL_ROWWISE
    fused_params: Mapping[str, Any] | None = None
    default: Optimizer = Optimizer.SGD
    qcomms: QCommsConfig | None = None
    constraints: Mapping[str, ParameterConstraints] = field(default_factory=dict)
    weighted: bool = False
    allowed: Callable[[RowPlacement, int], RowPlacement] | None = None
    change_batch: Callable[[Batch, int, bool], Batch] = _same_batch
    before: Callable[[DistributedModelParallel, list[Batch]], Any] | None = None
    schedule: Callable[[KeyedOptimizer, int], None] | None = None
    wrap: Callable[[KeyedOptimizer], KeyedOptimizer] | None = None
    steps: int = STEPS
    sizes: tuple[int, ...] = (16,)
    one_seed: bool = False


class Trained(NamedTuple):
    """What one run left on one rank; whole tensors are the same on all.

    Attributes:
        losses: by step.
        outputs: of the last batch, by "<collection>/<stock name>".
        weights: by stock key, whole, as float32.
        optimizer: fused state by "<parameter>/<state>", whole.
        dtypes: of this rank's state dict, by key.
        shards: sizes of all shards, by key of the sharded part of the state dict.
        hot_rows: those that lie on this rank, weights and optimizer state by "<table>/<name>"; none for stock.
        kinds: names of the sharded modules' classes.
        calls: collectives by step.
        sent_bytes: by step.
        before: what `Feature.before` gave.
    """

    losses: list[float]
    outputs: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    dtypes: dict[str, torch.dtype]
    shards: dict[str, list[list[int]]]
    hot_rows: dict[str, torch.Tensor]
    kinds: list[str]
    calls: list[dict[str, int]]
    sent_bytes: list[float]
    before: Any


class FeatureModel(nn.Module):
    """One or two collections, and one linear layer over everything that they give."""

    def __init__(self, feature: Feature) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(tables=list(feature.tables), is_weighted=feature.weighted, device=torch.device("meta"))
        self.subset = [name for config in feature.more for name in config.feature_names]
        if feature.more:
            self.second = EmbeddingBagCollection(tables=list(feature.more), is_weighted=feature.weighted, device=torch.device("meta"))
        width = sum(config.embedding_dim * len(config.feature_names) for config in (*feature.tables, *feature.more))
        self.over = nn.Linear(width + 3, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        features = batch.sparse_features
        pooled = {f"ebc/{name}": value for name, value in self.ebc(features).to_dict().items()}
        if self.subset:
            part = features.permute([features.keys().index(name) for name in self.subset])
            pooled |= {f"second/{name}": value for name, value in self.second(part).to_dict().items()}
        inputs = torch.cat([batch.dense_features, *(pooled[name] for name in sorted(pooled))], dim=1)
        loss = nn.functional.binary_cross_entropy_with_logits(self.over(inputs).squeeze(1), batch.labels)
        return loss, {name: value.detach().clone() for name, value in pooled.items()}


def new_model(feature: Feature) -> FeatureModel:
    """The unsharded model, its tables on the meta device and marked."""
    torch.manual_seed(11)
    model = FeatureModel(feature)
    for table, optimizer, arguments in feature.marks:
        params = [param for name, param in model.named_parameters() if "embedding_bags" in name and f".{table}" in name]
        apply_optimizer_in_backward(optimizer, params, dict(arguments))
    return model


def placement_of(feature: Feature) -> RowPlacement:
    """The feature's hot rows, scattered over each table."""
    tables = model_tables(new_model(feature), optimizer=feature.default, leave=feature.left)
    rng = np.random.default_rng(17)
    hot_ids = {table.name: np.sort(rng.choice(table.rows, feature.hot_rows.get(table.name, 0), replace=False)) for table in tables}
    return RowPlacement(tables=tables, hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


def shard(feature: Feature, hot_tier: str | None) -> DistributedModelParallel:
    """A new model, sharded by the stock planner or, with a hot tier, by ours, with the same start weights every time."""
    model, world = new_model(feature), dist.get_world_size()
    dense = model.over.state_dict(prefix="over.")
    topology = Topology(world_size=world, local_world_size=world, compute_device="cpu")
    # "cuda", or TorchRec would turn bf16 into fp16; gloo sends both.
    registry = get_qcomm_codecs_registry(feature.qcomms, device=torch.device("cuda")) if feature.qcomms else None
    fused_params = dict(feature.fused_params) if feature.fused_params else None
    if hot_tier:
        sharders = [FAEEmbeddingBagCollectionSharder(fused_params, registry)]
        planner: Any = FAEShardingPlanner(
            placement_of(feature), topology, 16, feature.constraints, hot_tier=hot_tier, stock_tables=feature.left
        )
    else:
        sharders = [EmbeddingBagCollectionSharder(fused_params, registry)]
        names = [config.name for config in (*feature.tables, *feature.more)]
        constraints = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in names} | dict(feature.constraints)
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=16, constraints=constraints)
    sharded = DistributedModelParallel(
        model, device=CPU, plan=planner.collective_plan(model, sharders, dist.group.WORLD), sharders=sharders
    )
    generator = torch.Generator().manual_seed(5)
    weights = {
        f"{collection}.embedding_bags.{config.name}.weight": torch.rand(config.num_embeddings, config.embedding_dim, generator=generator)
        - 0.5
        for collection, tables in (("ebc", feature.tables), ("second", feature.more))
        for config in tables
    }
    sharded.load_state_dict({**dense, **weights})  # float32, into tables of any dtype
    return sharded


def batches_of(feature: Feature, rank: int, ours: bool) -> list[Batch]:
    """The same batches for stock and for us, where every third is promised to be hot."""
    placement = placement_of(feature)
    batches = []
    for step in range(feature.steps):
        is_hot = step % HOT_EVERY == 0
        within = feature.allowed(placement, rank) if feature.allowed else None
        if is_hot:
            within = _hot_within(placement, within)
        batch = new_batch(
            Case(weighted=feature.weighted), step, 0 if feature.one_seed else rank, feature.sizes[step % len(feature.sizes)], within
        )
        batch = feature.change_batch(Batch(batch.dense_features * (rank + 1), batch.sparse_features, batch.labels), step, ours)
        batches.append(promised(batch) if ours and is_hot else batch)
    return batches


def _hot_within(placement: RowPlacement, within: RowPlacement | None) -> RowPlacement:
    if within is None:
        return placement
    hot_ids = {table: np.intersect1d(ids, within.hot_ids[table]) for table, ids in placement.hot_ids.items()}
    return replace(placement, hot_ids=hot_ids)


def train(feature: Feature, rank: int, hot_tier: str | None) -> Trained:
    """Builds, trains and reads one model, stock's without a hot tier. Collective."""
    model, batches = shard(feature, hot_tier), batches_of(feature, rank, ours=hot_tier is not None)
    before = feature.before(model, batches) if feature.before else None
    dense = torch.optim.SGD(model.module.over.parameters(), lr=LEARNING_RATE)
    fused: Any = feature.wrap(model.fused_optimizer) if feature.wrap else model.fused_optimizer
    losses, calls, sent, outputs = [], [], [], {}
    for step, batch in enumerate(batches):
        if feature.schedule:
            feature.schedule(model.fused_optimizer, step)
        dense.zero_grad()
        fused.zero_grad()
        with CollectiveCounter(rank, dist.get_world_size()) as counter:
            loss, outputs = model(batch)
            loss.backward()
        dense.step()
        fused.step()
        losses.append(loss.item())
        calls.append(dict(counter.calls))
        sent.append(counter.total_bytes)
    modules = [module for name, module in model.module.named_children() if name in ("ebc", "second")]
    tiers = [module._hot for module in modules if hasattr(module, "_hot")]
    rows = {
        f"{table.table}/{name}": tensor.clone() for tier in tiers for table in tier.tables() for name, tensor in table.tensors().items()
    }
    state = model.state_dict()
    return Trained(
        losses=losses,
        outputs=outputs,
        weights=whole_tensors(state),
        optimizer=optimizer_state(model),
        dtypes={key: value.dtype for key, value in state.items()},
        shards={
            key: [shard.shard_sizes for shard in value.metadata().shards_metadata]
            for key, value in state.items()
            if isinstance(value, ShardedTensor)
        },
        hot_rows=rows,
        kinds=[type(module).__name__ for module in modules],
        calls=calls,
        sent_bytes=sent,
        before=before,
    )


def reordered(batch: Batch, keys: list[str]) -> Batch:
    """The same batch with its features in another order."""
    features = batch.sparse_features
    return Batch(batch.dense_features, features.permute([features.keys().index(key) for key in keys]), batch.labels)


def with_ids(batch: Batch, dtype: torch.dtype) -> Batch:
    """The same batch with ids and lengths of another dtype."""
    features = batch.sparse_features
    ids, weights, lengths = features.values().to(dtype), features.weights_or_none(), features.lengths().to(dtype)
    return Batch(batch.dense_features, KeyedJaggedTensor(features.keys(), ids, weights, lengths=lengths), batch.labels)
