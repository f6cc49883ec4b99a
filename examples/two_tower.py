"""A two-tower retrieval model with two EmbeddingBagCollections, trained by stock TorchRec or with hot and cold rows: three ways in.

A user tower and an item tower each look their features up in an EmbeddingBagCollection of their own and put an MLP on top. The logit of
a click is the dot product of what both give; the loss is binary cross-entropy. It is a TorchRec script as anybody would write it, and
docs/your_model.md walks through it. Nothing of fae_torchrec is imported with --fae off.

    --fae off        stock TorchRec: EmbeddingShardingPlanner, TrainPipelineSparseDist
    --fae planner    the planner and the sharders swapped: hot and cold rows, the same batches, the same losses
    --fae pipeline   loader and pipeline swapped too: batches that are hot in both towers skip the cold tier of both
    fae launch       this file as it is, with --fae off: see docs/launch.md

Commands, from a checkout:

    torchrun --standalone --nproc-per-node 2 examples/two_tower.py
    torchrun --standalone --nproc-per-node 2 examples/two_tower.py --fae planner
    torchrun --standalone --nproc-per-node 2 examples/two_tower.py --fae pipeline
    torchrun --standalone --nproc-per-node 2 --no-python fae launch --config examples/configs/launch.json examples/two_tower.py

It trains on CUDA (nccl) where there is a GPU for each rank, else on the CPU (gloo). Without --data the samples are synthetic: users and
items drawn by Zipf's law, and clicks that follow from the users' and items' hidden tastes, so that there is something to learn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from pyarrow import parquet
from torch import nn
from torchmetrics.classification import BinaryAUROC
from torchrec.datasets.utils import Batch
from torchrec.distributed import TrainPipelineSparseDist
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

USER_FEATURES = ("user", "segment", "recent")
ITEM_FEATURES = ("item", "brand", "category")
FEATURES = (*USER_FEATURES, *ITEM_FEATURES)
BAGS = ("recent",)
"""Features with several ids per sample: the categories of what the user looked at last."""
OTHER_ROWS = {"segment": 64, "recent": 2048, "brand": 20_000, "category": 2048}
"""Rows of the tables beside those of users and items."""
TASTES = 8


class Tower(nn.Module):
    """One side: ids [B] of some features -> a vector [B, out]."""

    def __init__(self, features: Sequence[str], rows: Mapping[str, int], dim: int, out: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self.features = tuple(features)
        tables = [
            EmbeddingBagConfig(
                name=f"t_{feature}",
                num_embeddings=rows[feature],
                embedding_dim=dim,
                feature_names=[feature],
                pooling=PoolingType.MEAN if feature in BAGS else PoolingType.SUM,
                init_fn=StartWeights(seed + number),
            )
            for number, feature in enumerate(self.features)
        ]
        self.ebc = EmbeddingBagCollection(tables=tables, device=device)
        self.mlp = nn.Sequential(nn.Linear(dim * len(tables), 64), nn.ReLU(), nn.Linear(64, out))

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.ebc(features)
        return self.mlp(torch.cat([pooled[feature] for feature in self.features], dim=1))


class TwoTowerTrain(nn.Module):
    """Both towers and the loss: Batch -> (loss, (loss, logits [B], labels [B])), as pipelines want it."""

    def __init__(self, user_tower: Tower, item_tower: Tower) -> None:
        super().__init__()
        self.user_tower, self.item_tower = user_tower, item_tower

    def forward(self, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        # Both towers take the batch's whole KeyedJaggedTensor: each collection picks its own features.
        users, items = self.user_tower(batch.sparse_features), self.item_tower(batch.sparse_features)
        logits = (users * items).sum(dim=1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


@dataclass(frozen=True)
class StartWeights:
    """Uniform start weights out of a seed of the table's own, so that two runs start alike wherever a table lies."""

    seed: int

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(weight.device).manual_seed(self.seed)
        return nn.init.uniform_(weight, -0.1, 0.1, generator=generator)


@dataclass(frozen=True)
class Samples:
    """Samples in memory.

    Attributes:
        ids: feature -> int64 ids, sample after sample.
        lengths: feature -> int32 [N], ids of each sample.
        labels: float32 [N], 0 or 1.
    """

    ids: Mapping[str, np.ndarray]
    lengths: Mapping[str, np.ndarray]
    labels: np.ndarray

    @classmethod
    def generated(cls, number: int, rows: Mapping[str, int], seed: int) -> Samples:
        """Synthetic samples: skewed users and items, and clicks that their tastes explain."""
        rng = np.random.default_rng(seed)
        ids = {name: _zipf(rng, rows[name], number) for name in ("user", "item")}
        # What else is known of a user or an item follows from its id; categories and segments tell of tastes, and so do popular ids.
        taste = {name: _scrambled(ids[name], TASTES, salt) for salt, name in enumerate(("user", "item"))}
        ids["segment"] = taste["user"] + TASTES * _scrambled(ids["user"], rows["segment"] // TASTES, 2)
        ids["category"] = taste["item"] + TASTES * _scrambled(ids["item"], rows["category"] // TASTES, 3)
        ids["brand"] = _scrambled(ids["item"] // 20, rows["brand"], 4)
        lengths = {feature: np.ones(number, dtype=np.int32) for feature in FEATURES}
        lengths["recent"] = rng.integers(0, 4, number, dtype=np.int32)
        of_user = np.repeat(taste["user"], lengths["recent"])
        ids["recent"] = of_user + TASTES * _zipf(rng, rows["recent"] // TASTES, len(of_user))
        liking = np.random.default_rng(11).normal(0, 1.5, (TASTES, TASTES))[taste["user"], taste["item"]]
        labels = rng.random(number) < 1 / (1 + np.exp(-liking))
        return cls(ids, lengths, labels.astype(np.float32))

    @classmethod
    def read(cls, path: str, rows: Mapping[str, int]) -> Samples:
        """Samples of a Parquet file: integer columns of FEATURES (lists for BAGS) and `label`; ids are taken modulo their table's rows."""
        table = parquet.read_table(path)
        if missing := [name for name in (*FEATURES, "label") if name not in table.column_names]:
            raise SystemExit(f"{path} has the columns {table.column_names}; {missing} are missing; needed are {[*FEATURES, 'label']}")
        ids, lengths = {}, {}
        for name in FEATURES:
            column = table[name].combine_chunks()
            if name in BAGS:
                lengths[name] = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int32)
                column = column.flatten()
            else:
                lengths[name] = np.ones(len(column), dtype=np.int32)
            ids[name] = column.to_numpy(zero_copy_only=False).astype(np.int64) % rows[name]
        return cls(ids, lengths, table["label"].to_numpy().astype(np.float32))

    def steps(self, batch_size: int, world_size: int) -> int:
        """Whole steps of all ranks."""
        return len(self.labels) // (batch_size * world_size)

    def batches(self, steps: range, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        """A rank's batches of some steps; a step's samples follow one another in the data."""
        ends = {feature: np.cumsum(lengths) for feature, lengths in self.lengths.items()}
        for step in steps:
            begin = (step * world_size + rank) * batch_size
            lengths = {feature: self.lengths[feature][begin : begin + batch_size] for feature in FEATURES}
            first = {feature: ends[feature][begin] - lengths[feature][0] for feature in FEATURES}
            ids = [self.ids[feature][first[feature] : ends[feature][begin + batch_size - 1]] for feature in FEATURES]
            yield Batch(
                dense_features=torch.empty(batch_size, 0),  # towers often have some; this one has none
                sparse_features=KeyedJaggedTensor(
                    list(FEATURES),
                    torch.from_numpy(np.concatenate(ids)),
                    lengths=torch.from_numpy(np.concatenate(list(lengths.values()))),
                    stride=batch_size,
                ),
                labels=torch.from_numpy(self.labels[begin : begin + batch_size]),
            )


def _zipf(rng: np.random.Generator, rows: int, number: int) -> np.ndarray:
    """Ids by Zipf's law with exponent 1.1, the popular ones scattered over the table."""
    shares = np.cumsum(np.arange(1, rows + 1) ** -1.1)
    return rng.permutation(rows)[np.searchsorted(shares, rng.random(number) * shares[-1])]


def _scrambled(ids: np.ndarray, values: int, salt: int) -> np.ndarray:
    """A value in 0..values-1 that an id always has, and its neighbours need not."""
    return (ids * 2_654_435_761 + salt * 40_503 >> 7) % values


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    told = run(options, start_process_group())
    if dist.get_rank() == 0:
        print(json.dumps(told) if options.json else _text(told))
    dist.destroy_process_group()


def run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Trains and tests on every rank; what rank 0 saw of it is what is printed."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = {**OTHER_ROWS, "user": options.users, "item": options.items}
    number = options.batch_size * world_size * (options.steps + -(-options.steps // 10))
    samples = Samples.read(options.data, rows) if options.data else Samples.generated(number, rows, options.seed)
    all_steps = samples.steps(options.batch_size, world_size)
    test_steps = max(1, all_steps // 11)
    train_steps = min(options.steps, all_steps - test_steps)
    if train_steps < 1:
        raise SystemExit(f"{len(samples.labels)} samples make no step of {world_size} x {options.batch_size}; lower --batch-size")

    def train_batches() -> Iterator[Batch]:
        return samples.batches(range(train_steps), options.batch_size, rank, world_size)

    # The model, as it is: on the meta device, tables marked with their fused optimizer.
    torch.manual_seed(options.seed)
    meta = torch.device("meta")
    user_tower = Tower(USER_FEATURES, rows, options.dim, options.dim, options.seed, meta)
    item_tower = Tower(ITEM_FEATURES, rows, options.dim, options.dim, options.seed + 100, meta)
    model = TwoTowerTrain(user_tower, item_tower)
    for tower in (user_tower, item_tower):
        apply_optimizer_in_backward(RowWiseAdagrad, tower.ebc.parameters(), {"lr": options.lr})

    # The plan. Tables stay whole, so that no plan trains them by the dense optimizer (data parallel) or by column shards.
    topology = Topology(
        world_size=world_size, local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), compute_device=device.type
    )
    constraints = {f"t_{feature}": ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value]) for feature in FEATURES}
    told: dict[str, Any] = {"data": options.data or "synthetic samples", "fae": options.fae, "ranks": world_size, "device": device.type}
    if options.fae == "off":
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=options.batch_size, constraints=constraints)
        sharders = get_default_sharders()
    else:
        from fae_torchrec import FAEShardingPlanner, get_fae_sharders

        of_all_ranks = samples.batches(range(train_steps), options.batch_size * world_size, rank=0, world_size=1)
        placement = hot_rows(model, of_all_ranks, options.budget_mib)
        planner = FAEShardingPlanner(placement, topology=topology, batch_size=options.batch_size, constraints=constraints)
        sharders = get_fae_sharders()
        told["placement"] = placement.fingerprint
        told["hot_bytes"], told["table_bytes"] = placement.hot_bytes, placement.tables.total_bytes
        told["expected_hot"] = placement.hot_inputs
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    model = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())), lambda params: torch.optim.Adam(params, lr=options.dense_lr)
    )
    optimizer = CombinedOptimizer([model.fused_optimizer, dense])

    # Batches and the pipeline that trains them.
    if options.fae == "pipeline":
        from fae_torchrec import FAETrainPipeline, HotColdDataLoader, ShuffleSchedule, gather_counts
        from fae_torchrec.distributed.split_ahead import SplitAhead

        on_gpu = device.type == "cuda"
        batches = HotColdDataLoader(
            train_batches,
            placement,
            batch_size=options.batch_size,
            schedule=ShuffleSchedule("proportional"),
            rank=rank,
            world_size=world_size,
            agree=gather_counts(dist.new_group(backend="gloo")),
            pin_memory=on_gpu,
            split_ahead=SplitAhead(model) if on_gpu else None,
        )
        pipeline = FAETrainPipeline(model, optimizer, device)
    else:
        batches = train_batches()
        pipeline = TrainPipelineSparseDist(model, optimizer, device)
    counter: Any = contextlib.nullcontext()
    if options.bytes:
        from fae_torchrec.training.traffic import CollectiveCounter

        counter = CollectiveCounter(rank, world_size)
    with counter:
        model.train()
        losses = train(pipeline, iter(batches))
    told["steps"], told["losses"] = len(losses), losses
    told["hot_steps"] = pipeline.steps.hot if options.fae == "pipeline" else 0
    told["sent_bytes"] = int(counter.total_bytes) if options.bytes else None
    model.eval()
    told["auc"] = auc(pipeline, samples.batches(range(train_steps, train_steps + test_steps), options.batch_size, rank, world_size), device)
    return told


def build_two_tower(spec: Any) -> TwoTowerTrain:
    """A model factory for the configs of the command line: `model.factory: two_tower.py:build_two_tower`.

    Args:
        spec: a ModelSpec; `options` has "users", the features of the user tower. All others are the item tower's. Dense features are
            not looked at.
    """
    users = tuple(spec.options.get("users", ()))
    items = tuple(feature for feature in spec.rows if feature not in users)
    if not users or not items or not set(users) <= spec.rows.keys():
        raise ValueError(f"model.options: users is {list(users)}; name some, and not all, of the features {list(spec.rows)}")
    dim, seed = spec.embedding_dim, torch.initial_seed()
    return TwoTowerTrain(
        Tower(users, spec.rows, dim, dim, seed, spec.device), Tower(items, spec.rows, dim, dim, seed + len(users), spec.device)
    )


def start_process_group() -> torch.device:
    """One process group of all ranks, on this rank's device; without torchrun a group of one."""
    device = torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone)
    return device


def hot_rows(model: nn.Module, batches: Iterator[Batch], budget_mib: float) -> Any:
    """One placement for the tables of both towers, the same on every rank: rank 0 counts and selects."""
    from fae_torchrec import MIB, Calibrator, RowPlacement, model_tables, select_hot_set

    chosen = [None]
    if dist.get_rank() == 0:
        profile = Calibrator(model_tables(model), sample_rate=0.5).run(batches)
        hot_set = select_hot_set(profile, budget_bytes=int(budget_mib * MIB))
        chosen = [RowPlacement.from_hot_set(hot_set)]
    dist.broadcast_object_list(chosen)
    return chosen[0]


def train(pipeline: Any, batches: Iterator[Batch]) -> list[float]:
    """One pass; this rank's loss of every step."""
    losses = []
    while True:
        try:
            loss, _, _ = pipeline.progress(batches)
        except StopIteration:
            return [float(loss) for loss in losses]
        losses.append(loss)


@torch.no_grad()
def auc(pipeline: Any, batches: Iterator[Batch], device: torch.device) -> float:
    """Area under the ROC curve over the samples of all ranks."""
    metric = BinaryAUROC().to(device)
    while True:
        try:
            _, logits, labels = pipeline.progress(batches)
        except StopIteration:
            return float(metric.compute())
        metric.update(logits.sigmoid(), labels.int())


def _text(told: Mapping[str, Any]) -> str:
    losses = told["losses"]
    lines = [f"two towers on {told['data']}, --fae {told['fae']}, {told['ranks']} x {told['device']}"]
    if "placement" in told:
        lines.append(
            f"hot rows of both towers: {told['hot_bytes'] / 2**20:.2f} of {told['table_bytes'] / 2**20:.2f} MiB; "
            f"{told['expected_hot']:.0%} of the samples are expected to be all hot"
        )
    lines.append(f"{told['steps']} steps, {told['hot_steps']} of them hot; loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    lines.append(f"AUC {told['auc']:.4f}")
    if told["sent_bytes"] is not None:
        lines.append(f"{told['sent_bytes'] / 1e6:.1f} MB left rank 0 in training")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fae", choices=("off", "planner", "pipeline"), default="off", help="see above (default: %(default)s)")
    parser.add_argument("--budget-mib", type=float, default=2.0, help="fast memory of a rank for hot rows, in MiB (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="batches of each rank to train on (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, help="samples per batch and rank (default: %(default)s)")
    parser.add_argument("--data", help="Parquet file to train and test on instead of synthetic samples (columns: see Samples.read)")
    parser.add_argument("--users", type=int, default=200_000, help="rows of the user table (default: %(default)s)")
    parser.add_argument("--items", type=int, default=400_000, help="rows of the item table (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=16, help="width of all tables, and of what towers give (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of the tables (default: %(default)s)")
    parser.add_argument("--dense-lr", type=float, default=0.003, help="learning rate of the MLPs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of samples and start weights (default: %(default)s)")
    parser.add_argument("--bytes", action="store_true", help="count the bytes that leave rank 0 in training (uses fae_torchrec's counter)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, the loss of every step in it, instead of text")
    return parser


if __name__ == "__main__":
    main()
