"""Compares the hot/cold EmbeddingBagCollection with stock TorchRec on the same batches: bytes between ranks, step time, memory.

    python benchmarks/sharded_step.py
    python benchmarks/sharded_step.py --quick --ranks 2        # some seconds, to see that it runs; its figures mean nothing

A DLRM over synthetic Criteo Kaggle tables, trained twice side by side: `stock` (TorchRec's planner, table-wise) and `fae` (hot rows in the
hot tier). The hot set is counted on the train split; every measured sample is of the test split. Kinds of batches: `mixed` (samples as they
come), `hot` (every id of every sample is hot: promised to fae, plain to stock) and `cold` (every sample has a cold id).

bytes      What the loopback interface received (/proc/net/dev: each byte that a rank sends another once, headers and acknowledgements in)
           during forward and backward of the embedding collection alone, as the train step calls it, so that the dense gradients are
           out; less what the barriers around it take. Beside it the payload of all collectives as PyTorch sees them.
step       zero_grad, forward, backward and optimizer step, of the slowest rank. Pairs on the same batch, in alternating order.
embedding  the same for forward and backward of the collection alone, so that nothing hides behind the dense part.
memory     bytes of every tensor of the hot tier's kernels and of its index, against the plan.

Speed is stock's time over fae's, pair by pair: above 1, fae is faster. Other work on the machine disturbs the times, and other traffic on
the loopback interface the bytes: the load and that traffic are in the JSON. A network of its own keeps the bytes clean:

    unshare -rn sh -c 'ip link set lo up; GLOO_SOCKET_IFNAME=lo python benchmarks/sharded_step.py'

About five minutes and 8 GB of memory on two cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from record import record_header, write_record
from sharded_step_summary import KINDS, joined_ranks, judged_targets, record_text, summarised
from torchrec.datasets.utils import Batch
from torchrec.distributed.types import ShardedModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer, TableSet
from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.data.bundler import Bundler
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.segregate import hot_samples, select_samples
from fae_torchrec.data.synthetic import SyntheticCriteo
from fae_torchrec.distributed.fast_memory import fast_memory_bytes
from fae_torchrec.distributed.local_ranks import quiet_host, run_on_local_ranks
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.audit import cold_accesses
from fae_torchrec.training.dlrm import build_dlrm
from fae_torchrec.training.shard import build_optimizer, shard_model
from fae_torchrec.training.traffic import CollectiveCounter

_ROOT = Path(__file__).resolve().parent.parent
_QUICK = {
    **{
        "scale": 0.01,
        "dim": 16,
        "batch_size": 256,
        "budget_mib": 4.0,
        "profile_samples": 100_000,
        "dense_arch": [32],
        "over_arch": [32],
        "batches": 3,
    },
    **{"pairs": 4, "warmup": 1, "json": _ROOT / "runs/sharded_step_quick.json"},
}
_SETTLE_S = 0.002


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the comparison and returns what was written as JSON."""
    args = _arguments(argv)
    quiet_host()
    started = time.perf_counter()
    tables, placement, rows = _plan(args)
    runs = []
    for ranks in args.ranks:
        for repeat in range(args.repeats):
            before = os.getloadavg()[0]
            measured = run_on_local_ranks(_measure, ranks, args, placement, rows, timeout_s=args.timeout_s)
            load = {"load_average_before": before, "load_average_after": os.getloadavg()[0]}
            runs.append({"ranks": ranks, "repeat": repeat, **load, **joined_ranks(measured, args.seed)})
    summary = [summarised([run for run in runs if run["ranks"] == ranks], args.seed) for ranks in args.ranks]
    record = {
        **record_header("sharded_step", argv),
        "seed": args.seed,
        "wall_s": round(time.perf_counter() - started, 1),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "placement": _described(tables, placement),
        "targets": judged_targets(summary),
        "summary": summary,
        "runs": runs,
    }
    write_record(args.json, record)
    print(f"{record_text(record)}\nwritten: {args.json}")
    return record


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2], help="rank counts, each in processes of its own (default: %(default)s)")
    add("--repeats", type=int, default=1, help="independent runs of each rank count; all are reported (default: %(default)s)")
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
    add("--pairs", type=int, default=30, help="timed pairs of each kind (default: %(default)s)")
    add("--warmup", type=int, default=5, help="pairs before the timed ones (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the data and the weights (default: %(default)s)")
    add("--timeout-s", type=float, default=1800.0, help="after which a run's ranks are killed (default: %(default)s)")
    add("--json", type=Path, default=_ROOT / "benchmarks/results/sharded_step.json")
    add("--quick", action="store_true", help="small sizes instead of the defaults above; writes runs/sharded_step_quick.json")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**_QUICK)
    return parser.parse_args(argv)


def _source(args: argparse.Namespace, split: Any, num_samples: int) -> SyntheticCriteo:
    return SyntheticCriteo("kaggle", scale=args.scale, num_samples=num_samples, seed=args.seed, split=split)


def _plan(args: argparse.Namespace) -> tuple[TableSet, RowPlacement, dict[str, int]]:
    """The model's tables, its row placement, and feature -> rows."""
    source = _source(args, "train", args.profile_samples)
    rows = dict(source.cardinalities)
    tables = model_tables(_dlrm(args, rows, torch.device("meta")))
    profile = Calibrator(tables, sample_rate=0.9).run(source.batches(65_536), progress=True, total=args.profile_samples)
    hot_set = select_hot_set(profile, round(args.budget_mib * 2**20), policy="threshold", pinned_max_rows=args.pinned_max_rows)
    return tables, RowPlacement.from_hot_set(hot_set), rows


def _dlrm(args: argparse.Namespace, rows: dict[str, int], device: torch.device) -> Any:
    return build_dlrm(
        rows, 13, args.dim, [*args.dense_arch, args.dim], [*args.over_arch, 1], Optimizer(args.optimizer), 0.05, args.seed, device
    )


class _Trainee:
    """One sharded model under one placement."""

    def __init__(self, placement: RowPlacement | None, args: argparse.Namespace, rows: dict[str, int], group: dist.ProcessGroup) -> None:
        self.promises = placement is not None
        device = torch.device("cpu")
        tier: dict[str, Any] = {} if placement is None or args.hot_tier == "replicated" else {"hot_tier": args.hot_tier}
        self.model = shard_model(_dlrm(args, rows, device), placement, args.batch_size, device, group, **tier)
        self.optimizer = build_optimizer(self.model, 0.01)
        self.collection: Any = next(module for module in self.model.modules() if isinstance(module, ShardedModule))
        # One random block for every table: the placements order their columns differently, and both must train alike.
        block = torch.randn(args.batch_size, args.dim, generator=torch.Generator().manual_seed(args.seed)) / args.batch_size
        self._gradient = block.repeat(1, len(rows))

    def step(self, batch: Batch) -> torch.Tensor:
        """The whole train step; returns its loss."""
        self.optimizer.zero_grad()
        loss, _ = self.model(batch)
        loss.backward()
        self.optimizer.step()
        detached: torch.Tensor = loss.detach()
        return detached

    def embedding(self, batch: Batch) -> None:
        """Forward and backward of the embedding collection alone, its fused update in it."""
        self.collection(batch.sparse_features).wait().values().backward(self._gradient)

    def fresh(self, batch: Batch, kind: str) -> Batch:
        """The batch as a loader gives it: without what an earlier step has cached in its KeyedJaggedTensor."""
        old = batch.sparse_features
        kjt = KeyedJaggedTensor(old.keys(), old.values(), lengths=old.lengths(), stride=old.stride())
        return Batch(batch.dense_features, HotKeyedJaggedTensor.promise(kjt) if kind == "hot" and self.promises else kjt, batch.labels)


def _measure(rank: int, args: argparse.Namespace, placement: RowPlacement, rows: dict[str, int]) -> dict[str, Any]:
    """What one rank measures; runs on every rank."""
    group = dist.group.WORLD
    assert group is not None
    batches = _batches(rank, group.size(), args, placement)
    trainees = {"stock": _Trainee(None, args, rows, group), "fae": _Trainee(placement, args, rows, group)}
    plans = {name: _spread(trainee) for name, trainee in trainees.items()}
    if set(plans["stock"]["sharding"]) != {"table_wise"}:
        raise RuntimeError(f"the baseline is stock table-wise sharding, the stock planner chose {plans['stock']['sharding']}")
    steps = 2 * (args.warmup + args.pairs) + (args.batches + 2 if group.size() > 1 else 0)
    with tqdm(total=steps * len(KINDS), desc=f"{group.size()} ranks", unit=" pairs", disable=None if rank == 0 else True) as bar:
        data = {kind: {"cold_rows_per_sample": _cold_rows(batches[kind], placement)} for kind in KINDS}
        result: dict[str, Any] = {"threads": torch.get_num_threads(), "plans": plans, "batches": data}
        result["loss_difference"] = _loss_difference(trainees, batches)  # first: later, training itself amplifies what rounding differs
        if group.size() > 1:
            result["bytes"] = _traffic(rank, trainees, batches, args, bar)
        result["memory"] = _memory(rank, trainees["fae"].collection, placement)
        for stage in ("step", "embedding"):
            result[stage] = {kind: _times(stage, kind, trainees, batches[kind], args, bar) for kind in KINDS}
    return result


def _batches(rank: int, world_size: int, args: argparse.Namespace, placement: RowPlacement) -> dict[str, list[Batch]]:
    """`args.batches` batches of each kind out of this rank's share of the test split."""
    stream = _source(args, "test", 500 * args.batches * args.batch_size * world_size)
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


def _loss_difference(trainees: dict[str, _Trainee], batches: dict[str, list[Batch]]) -> float:
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


def _cold_rows(batches: list[Batch], placement: RowPlacement) -> float:
    counts: list[float] = [cold_accesses(batch.sparse_features, placement.tables, placement)[0] / batch.labels.numel() for batch in batches]
    return sum(counts) / len(counts)


def _spread(trainee: _Trainee) -> dict[str, Any]:
    """How the plan shards the tables: tables by sharding type, and those of each rank."""
    shards = [shard for plan in trainee.model.plan.plan.values() for shard in plan.values()]
    kinds = [shard.sharding_type for shard in shards]
    ranks = [rank for shard in shards for rank in shard.ranks]
    return {
        "sharding": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "tables_by_rank": {str(rank): ranks.count(rank) for rank in sorted(set(ranks))},
    }


def loopback_bytes() -> int:
    """Bytes that the loopback interface has received since boot: what one process of this machine sent another, counted once."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise RuntimeError("/proc/net/dev lists no interface 'lo', on which this benchmark counts bytes; run it on Linux")


def _traffic(
    rank: int, trainees: dict[str, _Trainee], batches: dict[str, list[Batch]], args: argparse.Namespace, bar: tqdm[Any]
) -> dict[str, Any]:
    """Bytes by kind and placement: on the loopback interface (all ranks together), and this rank's collectives."""

    def received(act: Callable[[], Any]) -> int:
        """Bytes while `act` runs on every rank, two barriers with it. Rank 0 reads while the others sleep."""
        dist.barrier()
        time.sleep(_SETTLE_S if rank == 0 else 3 * _SETTLE_S)
        before = loopback_bytes()
        dist.barrier()
        act()
        dist.barrier()
        time.sleep(_SETTLE_S if rank == 0 else 3 * _SETTLE_S)
        return loopback_bytes() - before

    barriers = statistics.median(received(lambda: None) for _ in range(15))
    result: dict[str, Any] = {"barriers": barriers, "foreign_per_s": 5 * (received(lambda: time.sleep(0.2)) - barriers)}
    for kind in KINDS:
        result[kind] = {}
        for name, trainee in trainees.items():
            loopback, collectives = [], []
            for batch in (trainee.fresh(batch, kind) for batch in batches[kind]):
                counter = CollectiveCounter(rank, dist.get_world_size())
                with counter:
                    loopback.append(received(partial(trainee.embedding, batch)) - barriers)
                collectives.append(counter.total_bytes)
            steps = [trainee.fresh(batch, kind) for batch in batches[kind][:2]]
            whole = [received(partial(trainee.step, batch)) - barriers for batch in steps]
            result[kind][name] = {"loopback": loopback, "collectives": collectives, "whole_step": whole}
        bar.update(args.batches + 2)
    return result


def _memory(rank: int, collection: Any, placement: RowPlacement) -> dict[str, Any]:
    """Fast memory of the hot tier on this rank: what its tensors really take, against what the planner reserves."""
    split = collection.tier_split
    map_bytes, split_bytes = _storage_bytes(split.index.buffers()), _storage_bytes(split.buffers())  # the map, and all with it
    kernels = sum(_storage_bytes([*kernel.parameters(), *kernel.buffers()]) for kernel in _hot_kernels(collection))
    planned = fast_memory_bytes(placement, hot=collection.module_sharding_plan.hot, rank=rank)
    rows = sum(table.rows for table in placement.tables)
    hot_rows = sum(placement.hot_rows(name) for name in placement.tables.names)
    return {
        "allocated": {"hot rows": kernels, "index": split_bytes},
        "planned": planned,
        "allocated_over_planned": (kernels + split_bytes) / sum(planned.values()),
        "index_bytes_per_row": map_bytes / rows,
        "compact_index_may_take": round(1.5 / 8 * rows + 12 * hot_rows),
    }


def _hot_kernels(collection: Any) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """The fused kernels that hold the hot rows."""
    return [m for lookup in collection._hot.lookups for m in lookup.modules() if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)]


def _storage_bytes(tensors: Any) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _times(
    stage: str,
    kind: str,
    trainees: dict[str, _Trainee],
    batches: list[Batch],
    args: argparse.Namespace,
    bar: tqdm[Any],
) -> dict[str, list[float]]:
    """Seconds of this rank's steps by placement, pair by pair."""
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    for pair in range(args.warmup + args.pairs):
        for name in ("stock", "fae") if pair % 2 else ("fae", "stock"):
            trainee = trainees[name]
            batch, act = trainee.fresh(batches[pair % len(batches)], kind), getattr(trainee, stage)
            dist.barrier()
            began = time.perf_counter()
            act(batch)
            seconds[name].append(time.perf_counter() - began)
        bar.update()
    return {name: values[args.warmup :] for name, values in seconds.items()}


def _described(tables: TableSet, placement: RowPlacement) -> dict[str, Any]:
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


if __name__ == "__main__":
    main()
