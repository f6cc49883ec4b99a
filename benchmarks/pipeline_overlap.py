"""Shows that FAETrainPipeline hides the latency of the input dist, across changes between hot and cold batches.

    python benchmarks/pipeline_overlap.py
    python benchmarks/pipeline_overlap.py --quick --ranks 1        # some seconds, to see that it runs; its figures mean nothing

The input dist of each batch gets an artificial latency: each of its two rounds (counts, then ids) has come so many ms after it was started,
at the earliest, as over a slow network. It is no work: whoever waits for it sleeps, and the cores are free. A DLRM of the same start and
the same batches, of alternating kinds, is trained by each of

    plain        model(batch), backward, optimizer step: waits for every exchange
    stock        TorchRec's TrainPipelineSparseDist
    fae          FAETrainPipeline, in stock's place
    fae ahead    FAETrainPipeline with lookahead 4: a step for each round, cold rows brought in while hot batches are trained

in turns, some steps of each in a round. A step's time is that of the slowest rank, a round's the mean of its steps; speed is plain's time
over the other's, the median of the rounds. Without latency (`none`) it says what the pipeline itself costs or gains. Stock's pipeline waits
for the counts between forward and backward, so that a latency that is all in one round has less than a step to hide behind.

About six minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from record import record_header, write_record
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import Awaitable, ShardedModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.data.batches import HotColdBatch, HotKeyedJaggedTensor
from fae_torchrec.distributed.local_ranks import quiet_host, run_on_local_ranks
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.dlrm import build_dlrm
from fae_torchrec.training.shard import build_optimizer, shard_model
from fae_torchrec.training.train_pipeline import FAETrainPipeline

_ROOT = Path(__file__).resolve().parent.parent
_QUICK = {"rows": 500, "batch_size": 32, "over_arch": [16], "rounds": 2, "steps": 8, "json": _ROOT / "runs/pipeline_overlap_quick.json"}
_CPU = torch.device("cpu")
_FEATURES, _DENSE, _HOT_SHARE = 8, 13, 0.1
_TARGET = 1.5
LATENCIES = {"none": (0.0, 0.0), "20 ms": (10.0, 10.0), "20 ms, counts": (20.0, 0.0), "20 ms, ids": (0.0, 20.0)}
JUDGED = "20 ms"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the comparison and returns what was written as JSON."""
    args = _arguments(argv)
    quiet_host()
    started = time.perf_counter()
    runs = []
    for ranks in args.ranks:
        before = os.getloadavg()[0]
        measured = run_on_local_ranks(_measure, ranks, args, timeout_s=args.timeout_s)
        runs.append({"ranks": ranks, "load_average": [before, os.getloadavg()[0]], **_summarised(measured)})
    record = {
        **record_header("pipeline_overlap", argv),
        "seed": args.seed,
        "wall_s": round(time.perf_counter() - started, 1),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "latency_ms_of_counts_and_ids": LATENCIES,
        "targets": judged_targets(runs),
        "runs": runs,
    }
    write_record(args.json, record)
    print(f"{_text(record)}\nwritten: {args.json}")
    return record


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2], help="rank counts, each in processes of its own (default: %(default)s)")
    add("--rows", type=int, default=100_000, help="rows of each table (default: %(default)s)")
    add("--dim", type=int, default=32, help="embedding dimension (default: %(default)s)")
    add("--batch-size", type=int, default=768, help="samples of a step, over all ranks (default: %(default)s)")
    add("--over-arch", type=int, nargs="+", default=[512, 256], help="hidden widths of the over MLP (default: %(default)s)")
    add("--kinds", default="HHCHCCHC", help="kinds of the batches, again and again (default: %(default)s)")
    add("--rounds", type=int, default=11, help="timed rounds (default: %(default)s)")
    add("--steps", type=int, default=16, help="timed steps of each loop in a round (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the data and the weights (default: %(default)s)")
    add("--timeout-s", type=float, default=900.0, help="after which a run's ranks are killed (default: %(default)s)")
    add("--json", type=Path, default=_ROOT / "benchmarks/results/pipeline_overlap.json")
    add("--quick", action="store_true", help="small sizes instead of the defaults above; writes runs/pipeline_overlap_quick.json")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**_QUICK)
    return parser.parse_args(argv)


class Late(Awaitable[Any]):
    """An awaitable of several rounds, each of which has come so many seconds after it was started, at the earliest."""

    def __init__(self, inner: Awaitable[Any], latencies: tuple[float, ...]) -> None:
        super().__init__()
        self._inner, self._later = inner, latencies[1:]
        self._ready = time.perf_counter() + latencies[0]

    def _wait_impl(self) -> Any:
        time.sleep(max(0.0, self._ready - time.perf_counter()))
        result = self._inner.wait()
        return Late(result, self._later) if self._later else result


class _Loop:
    """One model and the way it is trained."""

    def __init__(self, way: str, args: argparse.Namespace, placement: RowPlacement, batches: list[HotColdBatch]) -> None:
        group = dist.group.WORLD
        assert group is not None
        self.model = shard_model(_dlrm(args, _CPU), placement, args.batch_size // group.size(), _CPU, group)
        self._optimizer = build_optimizer(self.model, 0.01)
        self._batches = map(_fresh, cycle(batches))
        self._pipeline: Any = None
        self._loss = torch.zeros(())
        if way == "stock":
            self._pipeline = TrainPipelineSparseDist(self.model, self._optimizer, _CPU)
        elif way != "plain":
            self._pipeline = FAETrainPipeline(self.model, self._optimizer, _CPU, lookahead=4 if way == "fae ahead" else 2)
        collection: Any = next(module for module in self.model.modules() if isinstance(module, ShardedModule))
        self._latency = (0.0, 0.0)
        start: Callable[..., Awaitable[Any]] = collection._hot.input_dist
        collection._hot.input_dist = lambda *args, **kwargs: Late(start(*args, **kwargs), self._latency)

    def steps(self, count: int, latency: tuple[float, float]) -> None:
        """Takes steps with this latency, in seconds."""
        self._latency = latency
        for _ in range(count):
            if self._pipeline is not None:
                self._loss = self._pipeline.progress(self._batches)[0]
                continue
            self._optimizer.zero_grad()
            loss, (self._loss, *_) = self.model(next(self._batches))
            loss.backward()
            self._optimizer.step()

    @property
    def loss(self) -> float:
        """Of the latest step, on this rank."""
        return float(self._loss.detach())


def _dlrm(args: argparse.Namespace, device: torch.device) -> Any:
    rows = {f"f{i}": args.rows for i in range(_FEATURES)}
    return build_dlrm(rows, _DENSE, args.dim, [256, args.dim], [*args.over_arch, 1], Optimizer.ROWWISE_ADAGRAD, 0.05, args.seed, device)


def _fresh(batch: HotColdBatch) -> HotColdBatch:
    """The batch as a loader gives it: without what an earlier step has cached in its KeyedJaggedTensor."""
    old = batch.sparse_features
    kjt = KeyedJaggedTensor(old.keys(), old.values(), lengths=old.lengths(), stride=old.stride())
    features = HotKeyedJaggedTensor.promise(kjt) if batch.kind == "hot" else kjt
    return HotColdBatch(batch.dense_features, features, batch.labels, batch.kind, 1.0, batch.num_samples)


def _batches(rank: int, world_size: int, args: argparse.Namespace) -> list[HotColdBatch]:
    """A batch for each kind; the hot rows of a table are its first."""
    rng = np.random.default_rng([args.seed, rank])
    size = args.batch_size // world_size
    made = []
    for letter in args.kinds:
        hot = letter == "H"
        ids = torch.from_numpy(rng.integers(0, int(args.rows * (_HOT_SHARE if hot else 1)), _FEATURES * size))
        kjt = KeyedJaggedTensor(
            [f"f{i}" for i in range(_FEATURES)], ids, lengths=torch.ones(_FEATURES * size, dtype=torch.int32), stride=size
        )
        dense = torch.from_numpy(rng.random((size, _DENSE), dtype=np.float32))
        batch = Batch(dense, kjt, torch.from_numpy(rng.integers(0, 2, size).astype(np.float32)))
        made.append(HotColdBatch(batch.dense_features, kjt, batch.labels, "hot" if hot else "cold", 1.0, size))
    return made


def _placement(args: argparse.Namespace) -> RowPlacement:
    tables = model_tables(_dlrm(args, torch.device("meta")))
    hot_ids = {table.name: np.arange(int(table.rows * _HOT_SHARE)) for table in tables}
    return RowPlacement(tables=tables, hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


def _measure(rank: int, args: argparse.Namespace) -> dict[str, Any]:
    """What one rank measures: seconds of a step, by latency, loop and round."""
    batches, placement = _batches(rank, dist.get_world_size(), args), _placement(args)
    loops = {way: _Loop(way, args, placement, batches) for way in ("plain", "stock", "fae", "fae ahead")}
    seconds: dict[str, dict[str, list[float]]] = {name: {way: [] for way in loops} for name in LATENCIES}
    with tqdm(total=args.rounds * len(LATENCIES), desc=f"{dist.get_world_size()} ranks", disable=None if rank == 0 else True) as bar:
        for round_number in range(-1, args.rounds):  # the first warms up
            for name, latencies in LATENCIES.items():
                latency = (latencies[0] / 1000, latencies[1] / 1000)
                for way in _turned(loops, round_number):
                    loops[way].steps(6, latency)  # those in flight had the latency of before
                    dist.barrier()
                    start = time.perf_counter()
                    loops[way].steps(args.steps, latency)
                    if round_number >= 0:
                        seconds[name][way].append((time.perf_counter() - start) / args.steps)
                bar.update(round_number >= 0)
    return {"threads": torch.get_num_threads(), "seconds": seconds, "losses": {way: loop.loss for way, loop in loops.items()}}


def _turned(loops: dict[str, _Loop], number: int) -> Iterator[str]:
    """The loops, another one first in each round."""
    ways = list(loops)
    at = number % len(ways)
    yield from ways[at:] + ways[:at]


def _summarised(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of the slowest rank's steps; losses must be the same, or nothing here compares."""
    slowest = {
        name: {way: [max(times) for times in zip(*(rank["seconds"][name][way] for rank in measured), strict=True)] for way in of_way}
        for name, of_way in measured[0]["seconds"].items()
    }
    return {
        "threads": measured[0]["threads"],
        "loss_difference": max(abs(loss / rank["losses"]["plain"] - 1) for rank in measured for loss in rank["losses"].values()),
        "step_ms": {
            name: {way: round(1000 * statistics.median(times), 3) for way, times in ways.items()} for name, ways in slowest.items()
        },
        "speed": {name: {way: round(speed(ways["plain"], times), 4) for way, times in ways.items()} for name, ways in slowest.items()},
        "seconds": {name: {way: [round(s, 6) for s in times] for way, times in ways.items()} for name, ways in slowest.items()},
    }


def speed(plain: list[float], other: list[float]) -> float:
    """The median over the rounds of plain's time over the other's."""
    return statistics.median(one / two for one, two in zip(plain, other, strict=True))


def judged_targets(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The target, on every number of ranks: with 20 ms in the input dist the pipelined step is at least 1.5 times as fast."""
    return [
        {
            "target": f"{run['ranks']} ranks, {way}: speed with {JUDGED} of latency at least {_TARGET}",
            "value": run["speed"][JUDGED][way],
            "passed": run["speed"][JUDGED][way] >= _TARGET and run["loss_difference"] < 1e-3,
        }
        for run in runs
        for way in ("fae", "fae ahead")
    ]


def _text(record: dict[str, Any]) -> str:
    lines = []
    for run in record["runs"]:
        lines.append(f"{run['ranks']} ranks, {run['threads']} threads each; losses differ by {run['loss_difference']:.1e}")
        for name, times in run["step_ms"].items():
            lines.append(f"  {name:14}" + "  ".join(f"{way} {ms:.1f} ms ({run['speed'][name][way]:.2f})" for way, ms in times.items()))
    return "\n".join([*lines, *(f"{'passed' if t['passed'] else 'MISSED'}: {t['target']}: {t['value']:.2f}" for t in record["targets"])])


if __name__ == "__main__":
    main()
