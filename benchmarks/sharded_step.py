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
from criteo_workload import (
    QUICK,
    Trainee,
    add_workload_arguments,
    batches_by_kind,
    both_trainees,
    described,
    loss_difference,
    planned,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from record import record_header, write_record
from sharded_step_summary import KINDS, joined_ranks, judged_targets, record_text, summarised
from torchrec.datasets.utils import Batch
from torchrec.distributed.types import ShardedModule
from tqdm import tqdm

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.distributed.fast_memory import fast_memory_bytes
from fae_torchrec.distributed.local_ranks import quiet_host, run_on_local_ranks
from fae_torchrec.training.audit import cold_accesses
from fae_torchrec.training.traffic import CollectiveCounter

_ROOT = Path(__file__).resolve().parent.parent
_QUICK = {**QUICK, "pairs": 4, "warmup": 1, "json": _ROOT / "runs/sharded_step_quick.json"}
_SETTLE_S = 0.002


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the comparison and returns what was written as JSON."""
    args = _arguments(argv)
    quiet_host()
    started = time.perf_counter()
    tables, placement, rows = planned(args)
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
        "placement": described(tables, placement),
        "targets": judged_targets(summary),
        "summary": summary,
        "runs": runs,
    }
    write_record(args.json, record)
    print(f"{record_text(record)}\nwritten: {args.json}")
    return record


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2], help="rank counts, each in processes of its own (default: %(default)s)")
    add("--repeats", type=int, default=1, help="independent runs of each rank count; all are reported (default: %(default)s)")
    add("--pairs", type=int, default=30, help="timed pairs of each kind (default: %(default)s)")
    add("--warmup", type=int, default=5, help="pairs before the timed ones (default: %(default)s)")
    add("--timeout-s", type=float, default=1800.0, help="after which a run's ranks are killed (default: %(default)s)")
    add("--json", type=Path, default=_ROOT / "benchmarks/results/sharded_step.json")
    add("--quick", action="store_true", help="small sizes instead of the defaults above; writes runs/sharded_step_quick.json")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**_QUICK)
    return parser.parse_args(argv)


class _Trainee:
    """A trainee whose embedding collection can also be run alone."""

    def __init__(self, trainee: Trainee, args: argparse.Namespace, tables: int) -> None:
        self.step, self.fresh = trainee.step, trainee.fresh
        self.collection: Any = next(module for module in trainee.model.modules() if isinstance(module, ShardedModule))
        # One random block for every table: the placements order their columns differently, and both must train alike.
        block = torch.randn(args.batch_size, args.dim, generator=torch.Generator().manual_seed(args.seed)) / args.batch_size
        self._gradient = block.repeat(1, tables)

    def embedding(self, batch: Batch) -> None:
        """Forward and backward of the embedding collection alone, its fused update in it."""
        self.collection(batch.sparse_features).wait().values().backward(self._gradient)


def _measure(rank: int, args: argparse.Namespace, placement: RowPlacement, rows: dict[str, int]) -> dict[str, Any]:
    """What one rank measures; runs on every rank."""
    group = dist.group.WORLD
    assert group is not None
    batches = batches_by_kind(rank, group.size(), args, placement)
    models, plans = both_trainees(placement, args, rows, group)
    trainees = {name: _Trainee(model, args, len(rows)) for name, model in models.items()}
    steps = 2 * (args.warmup + args.pairs) + (args.batches + 2 if group.size() > 1 else 0)
    with tqdm(total=steps * len(KINDS), desc=f"{group.size()} ranks", unit=" pairs", disable=None if rank == 0 else True) as bar:
        data = {kind: {"cold_rows_per_sample": _cold_rows(batches[kind], placement)} for kind in KINDS}
        result: dict[str, Any] = {"threads": torch.get_num_threads(), "plans": plans, "batches": data}
        result["loss_difference"] = loss_difference(models, batches)  # first: later, training itself amplifies what rounding differs
        if group.size() > 1:
            result["bytes"] = _traffic(rank, trainees, batches, args, bar)
        result["memory"] = _memory(rank, trainees["fae"].collection, placement)
        for stage in ("step", "embedding"):
            result[stage] = {kind: _times(stage, kind, trainees, batches[kind], args, bar) for kind in KINDS}
    return result


def _cold_rows(batches: list[Batch], placement: RowPlacement) -> float:
    counts: list[float] = [cold_accesses(batch.sparse_features, placement.tables, placement)[0] / batch.labels.numel() for batch in batches]
    return sum(counts) / len(counts)


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


if __name__ == "__main__":
    main()
