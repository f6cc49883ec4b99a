"""What benchmarks of the sharded collection train: a DLRM over Criteo Kaggle's tables, its placement, batches by kind, both trainees."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from sharded_step_summary import KINDS
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer, TableSet
from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.data.bundler import Bundler
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.segregate import hot_samples, select_samples
from fae_torchrec.data.synthetic import SyntheticCriteo
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.dlrm import build_dlrm
from fae_torchrec.training.shard import build_optimizer, shard_model

QUICK = {
    **{"scale": 0.01, "dim": 16, "batch_size": 256, "budget_mib": 4.0, "profile_samples": 100_000, "dense_arch": [32], "over_arch": [32]},
    **{"batches": 3},
}
"""Small sizes instead of the defaults."""


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the data and the hot set."""
    add = parser.add_argument
    add("--scale", type=float, default=0.1, help="rows as a share of Criteo Kaggle's (default: %(default)s)")
    add("--dim", type=int, default=64, help="embedding dimension (default: %(default)s)")
    add("--batch-size", type=int, default=2048, help="samples per rank (default: %(default)s)")
    add("--dense-arch", type=int, nargs="+", default=[512, 256], help="hidden widths of the dense MLP (FAE's RMC3: %(default)s)")
    add("--over-arch", type=int, nargs="+", default=[512, 512, 256], help="hidden widths of the over MLP (RMC3: %(default)s)")
    add("--optimizer", choices=[o.value for o in Optimizer], default=Optimizer.ROWWISE_ADAGRAD.value, help="of the tables (%(default)s)")
    add("--hot-tier", default="replicated", help="how the hot rows lie on the ranks (default: %(default)s)")
    add("--budget-mib", type=float, default=60.0, help="fast memory per rank: weights and optimizer state (default: %(default)s)")
    add("--pinned-max-rows", type=int, default=4096, help="tables of at most so many rows are all hot (default: %(default)s)")
    add("--profile-samples", type=int, default=1_000_000, help="samples the hot set is selected from (default: %(default)s)")
    add("--batches", type=int, default=12, help="different batches of each kind, per rank (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the data and the weights (default: %(default)s)")


def criteo_source(args: argparse.Namespace, split: Any, num_samples: int) -> SyntheticCriteo:
    """Samples of one split; the hot set is counted on "train", and every measured sample is of "test"."""
    return SyntheticCriteo("kaggle", scale=args.scale, num_samples=num_samples, seed=args.seed, split=split)


def planned(args: argparse.Namespace) -> tuple[TableSet, RowPlacement, dict[str, int]]:
    """The model's tables, its row placement, and feature -> rows."""
    source = criteo_source(args, "train", args.profile_samples)
    rows = dict(source.cardinalities)
    tables = model_tables(_dlrm(args, rows, torch.device("meta")))
    profile = Calibrator(tables, sample_rate=0.9).run(source.batches(65_536), progress=True, total=args.profile_samples)
    hot_set = select_hot_set(profile, round(args.budget_mib * 2**20), policy="threshold", pinned_max_rows=args.pinned_max_rows)
    return tables, RowPlacement.from_hot_set(hot_set), rows


def described(tables: TableSet, placement: RowPlacement) -> dict[str, Any]:
    """The tables and what of them is hot, for the JSON."""
    return {
        "tables": len(tables),
        "rows": sum(table.rows for table in tables),
        "bytes": tables.total_bytes,
        "hot_rows": sum(placement.hot_rows(name) for name in tables.names),
        "hot_bytes": placement.hot_bytes,
        "byte_share": placement.hot_bytes / tables.total_bytes,
        "hot_inputs": placement.hot_inputs,
        "coverage": placement.coverage,
        "fingerprint": placement.fingerprint,
        "by_table": {t.name: {"rows": t.rows, "hot": placement.hot_rows(t.name), "kind": placement.kind(t.name).value} for t in tables},
    }


def _dlrm(args: argparse.Namespace, rows: dict[str, int], device: torch.device) -> Any:
    return build_dlrm(
        rows, 13, args.dim, [*args.dense_arch, args.dim], [*args.over_arch, 1], Optimizer(args.optimizer), 0.05, args.seed, device
    )


class Trainee:
    """One sharded model under one placement, or stock's table-wise."""

    def __init__(self, placement: RowPlacement | None, args: argparse.Namespace, rows: dict[str, int], group: dist.ProcessGroup) -> None:
        self.promises = placement is not None
        device = torch.device("cpu")
        tier: dict[str, Any] = {} if placement is None or args.hot_tier == "replicated" else {"hot_tier": args.hot_tier}
        self.model = shard_model(_dlrm(args, rows, device), placement, args.batch_size, device, group, **tier)
        self.optimizer = build_optimizer(self.model, 0.01)

    def step(self, batch: Batch) -> torch.Tensor:
        """The whole train step; returns its loss."""
        self.optimizer.zero_grad()
        loss, _ = self.model(batch)
        loss.backward()
        self.optimizer.step()
        detached: torch.Tensor = loss.detach()
        return detached

    def fresh(self, batch: Batch, kind: str) -> Batch:
        """The batch as a loader gives it: without what an earlier step has cached in its KeyedJaggedTensor."""
        old = batch.sparse_features
        kjt = KeyedJaggedTensor(old.keys(), old.values(), lengths=old.lengths(), stride=old.stride())
        return Batch(batch.dense_features, HotKeyedJaggedTensor.promise(kjt) if kind == "hot" and self.promises else kjt, batch.labels)

    def spread(self) -> dict[str, Any]:
        """How the plan shards the tables: tables by sharding type, and those of each rank."""
        shards = [shard for plan in self.model.plan.plan.values() for shard in plan.values()]
        kinds = [shard.sharding_type for shard in shards]
        ranks = [rank for shard in shards for rank in shard.ranks]
        return {
            "sharding": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "tables_by_rank": {str(rank): ranks.count(rank) for rank in sorted(set(ranks))},
        }


def both_trainees(
    placement: RowPlacement, args: argparse.Namespace, rows: dict[str, int], group: dist.ProcessGroup
) -> tuple[dict[str, Trainee], dict[str, dict[str, Any]]]:
    """The trainees "stock" and "fae" with the same weights, and how each is spread.

    Raises:
        RuntimeError: the stock planner has not chosen table-wise sharding, so that there is no such baseline.
    """
    trainees = {"stock": Trainee(None, args, rows, group), "fae": Trainee(placement, args, rows, group)}
    plans = {name: trainee.spread() for name, trainee in trainees.items()}
    if set(plans["stock"]["sharding"]) != {"table_wise"}:
        raise RuntimeError(f"the baseline is stock table-wise sharding, the stock planner chose {plans['stock']['sharding']}")
    return trainees, plans


def batches_by_kind(rank: int, world_size: int, args: argparse.Namespace, placement: RowPlacement) -> dict[str, list[Batch]]:
    """`args.batches` batches of each kind out of this rank's share of the test split.

    Of kind "mixed" samples as they come, "hot" those whose every id is hot, "cold" those with a cold id.
    """
    stream = criteo_source(args, "test", 500 * args.batches * args.batch_size * world_size)
    kinds: dict[str, list[Batch]] = {kind: [] for kind in KINDS}
    queues = {"hot": Bundler(), "cold": Bundler()}
    for batch in stream.batches(args.batch_size, rank=rank, world_size=world_size):
        kinds["mixed"].append(batch)
        hot = hot_samples(batch.sparse_features, placement)
        for kind, chosen in (("hot", hot), ("cold", ~hot)):
            places = chosen.nonzero().squeeze(1)
            if len(kinds[kind]) < args.batches:
                queues[kind].add(select_samples(batch, places), places.numpy())
                while len(queues[kind]) >= args.batch_size:
                    kinds[kind].append(queues[kind].pop(args.batch_size)[0])
        if all(len(found) >= args.batches for found in kinds.values()):
            return {kind: found[: args.batches] for kind, found in kinds.items()}
    found = {kind: len(value) for kind, value in kinds.items()}
    raise RuntimeError(f"{stream.num_samples} samples made {found} batches by kind, {args.batches} of each are needed; change --budget-mib")


def loss_difference(trainees: dict[str, Trainee], batches: dict[str, list[Batch]]) -> float:
    """The largest relative difference of the losses of the first six steps: both must train alike, or nothing here compares.

    Also the warm-up of what is made at the first batch, such as stock's input dists.
    """
    worst = 0.0
    for number in (0, 1):
        for kind in KINDS:
            batch = batches[kind][number % len(batches[kind])]
            stock, fae = (float(trainees[name].step(trainees[name].fresh(batch, kind))) for name in ("stock", "fae"))
            worst = max(worst, abs(stock - fae) / abs(stock))
    return worst
