"""Compares FAE with stock TorchRec where the ranks are on two machines with a slow network between them: step time and counted bytes.

    sudo python benchmarks/two_hosts.py
    sudo python benchmarks/two_hosts.py --quick                # some seconds, to see that it runs; its figures mean nothing
    sudo python benchmarks/two_hosts.py --mbit 1000 10000 0    # also faster links; 0 is without a limit

Two network namespaces stand for the machines (`ip netns`), a veth pair for the cable, and `tc` (tbf) limits both directions. Each has one
rank, and gloo talks over the cable alone. Both share this machine's cores and memory: only the network is that of two machines. Without
root, `ip` or `tc` nothing is measured, and a message says so.

A DLRM over synthetic Criteo Kaggle tables is trained by `stock` (TorchRec's planner, table-wise) and by `fae` (hot rows replicated), side
by side in the same processes, in blocks of steps that take turns. Samples are of the test split, the hot set is counted on the train split.

step       zero_grad, forward, backward, optimizer step. The same batches for both: `hot` (every id of every sample is hot), `mixed`
           (samples as they come; fae goes through both tiers) and `cold` (every sample has a cold id).
pipelined  the same steps by each one's pipeline, TrainPipelineSparseDist and FAETrainPipeline, which overlap the input dist.
epoch      a pass over the same samples by each one's pipeline, in stock's order by stock, as HotColdDataLoader's hot and cold batches
           (schedule `proportional`) by fae. Batches are made before: loading is not timed.
bytes      What left the hosts through the cable (the interface's tx_bytes), both together: embeddings, and the dense part's gradients,
           which DistributedDataParallel all-reduces, under both. Beside it the payload of all collectives of a step.
dense      Step and bytes of what is the same for both: the all-reduce of the dense part's gradients alone.

if both ways at once   An estimate: the speed if gloo's all-to-all and all-gather used both directions of the link at once, as its
           all-reduce does; gloo lets the ranks send by turns.

A block's time is the slowest rank's. Speed is stock's time over fae's, round by round: above 1, fae is faster. Before the ranks are trained
they measure the link: what it carries of each direction under gloo's collectives, and a round trip. A link that carries more than its limit
is an error.

About five minutes and 7 GB of memory on two cores for one rate. What else runs on the machine takes cores from both; where it cannot be
stopped, `nice -n -15` in front keeps it away. Load and niceness are in the JSON.
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import cycle
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
    criteo_source,
    described,
    loss_difference,
    planned,
)
from record import record_header, write_record
from sharded_step_summary import KINDS
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # private, torch 2.13
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from tqdm import tqdm
from two_hosts_link import INTERFACE, NoLinkError, sent_bytes, two_hosts
from two_hosts_summary import judged_targets, record_text, summarised

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.data.batches import HotColdBatch
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.distributed.local_ranks import quiet_host
from fae_torchrec.distributed.process_group import gather_counts
from fae_torchrec.training.traffic import CollectiveCounter
from fae_torchrec.training.train_pipeline import FAETrainPipeline

_ROOT = Path(__file__).resolve().parent.parent
_QUICK = {**QUICK, "rounds": 2, "steps": 2, "epoch_batches": 6, "epochs": 2, "json": _ROOT / "runs/two_hosts_quick.json"}
_CPU = torch.device("cpu")
_NAMES = ("stock", "fae")
_IN_FLIGHT = 3
"""Steps after which a pipeline has no batch of another block left."""


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison and writes the JSON.

    Returns:
        0, or 2 where no such link can be made (one message on standard error).
    """
    args = _arguments(argv)
    if args.worker:
        _work(*args.worker)
        return 0
    quiet_host()
    started = time.perf_counter()
    try:
        with two_hosts(args.mbit[0]):  # before anything takes time
            pass
        tables, placement, rows = planned(args)
        runs = [_run(mbit, args, placement, rows) for mbit in args.mbit]
    except NoLinkError as error:
        print(f"two_hosts.py: {error}", file=sys.stderr)
        return 2
    summary = [summarised(run, args.seed) for run in runs]
    record = {
        **record_header("two_hosts", argv),
        "seed": args.seed,
        "wall_s": round(time.perf_counter() - started, 1),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "worker"},
        "placement": described(tables, placement),
        "targets": judged_targets(summary),
        "summary": summary,
        "runs": runs,
    }
    write_record(args.json, record)
    print(f"{record_text(record)}\nwritten: {args.json}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    add = parser.add_argument
    add("--mbit", type=int, nargs="+", default=[1000], help="rates of the link, 10^6 bits per second each way (default: %(default)s)")
    add("--rounds", type=int, default=12, help="timed rounds, in which each placement takes its turn (default: %(default)s)")
    add("--steps", type=int, default=3, help="steps of a kind in a round (default: %(default)s)")
    add("--epoch-batches", type=int, default=24, help="batches per rank of the data's order that an epoch has (default: %(default)s)")
    add("--epochs", type=int, default=4, help="timed epochs of each placement (default: %(default)s)")
    add("--timeout-s", type=float, default=1800.0, help="after which a run's ranks are killed (default: %(default)s)")
    add("--json", type=Path, default=_ROOT / "benchmarks/results/two_hosts.json")
    add("--quick", action="store_true", help="small sizes instead of the defaults above; writes runs/two_hosts_quick.json")
    add("--worker", nargs=2, help=argparse.SUPPRESS)  # a rank: folder, number
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**_QUICK)
    return parser.parse_args(argv)


def _run(mbit: int, args: argparse.Namespace, placement: RowPlacement, rows: dict[str, int]) -> dict[str, Any]:
    """One rate: a rank on each host; what they measured."""
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, two_hosts(mbit) as link:
        Path(folder, "task").write_bytes(pickle.dumps((args, mbit, placement, rows)))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
            **{"GLOO_SOCKET_IFNAME": INTERFACE, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"},
        }
        ranks = [
            subprocess.Popen(
                link.on(rank, [sys.executable, __file__, "--worker", folder, str(rank)]), env={**environment, "RANK": str(rank)}
            )
            for rank in (0, 1)
        ]
        try:
            deadline = time.monotonic() + args.timeout_s
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the ranks did not end within {args.timeout_s:.0f} s")
                time.sleep(0.2)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(rank.returncode for rank in ranks):
            raise RuntimeError(f"the ranks ended with exit codes {[rank.returncode for rank in ranks]}; their messages are above")
        measured = [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in (0, 1)]
    load = {"load_average_before": before, "load_average_after": os.getloadavg()[0], "niceness": os.nice(0)}
    return {"mbit": mbit, **load, "ranks": measured}


def _work(folder: str, number: str) -> None:
    """One rank's process, which `ip netns exec` has put onto its host."""
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    quiet_host()
    rank = int(number)
    args, mbit, placement, rows = pickle.loads(Path(folder, "task").read_bytes())
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=min(args.timeout_s, 600))
    )
    try:
        result = _measure(rank, args, mbit, placement, rows)
        Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _measure(rank: int, args: argparse.Namespace, mbit: int, placement: RowPlacement, rows: dict[str, int]) -> dict[str, Any]:
    """What one rank measures; runs on both."""
    group = dist.group.WORLD
    assert group is not None
    link = _link(rank, mbit)
    batches = batches_by_kind(rank, group.size(), args, placement)
    trainees, plans = both_trainees(placement, args, rows, group)
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "link": link, "plans": plans}
    result["loss_difference"] = loss_difference(trainees, batches)  # first: later, training itself amplifies what rounding differs
    total = 2 * (args.rounds + 1) * len(KINDS) * len(_NAMES) + args.epochs * len(_NAMES)
    with tqdm(total=total, desc=f"{mbit} Mbit/s" if mbit else "no limit", unit=" blocks", disable=None if rank == 0 else True) as bar:
        result["collectives"] = {kind: {name: _counted(rank, trainees[name], batches[kind][0], kind) for name in _NAMES} for kind in KINDS}
        result["dense"] = _dense(trainees["stock"], args)
        result["step"] = _steps(trainees, batches, args, bar)
        result["pipelined"] = _pipelined(trainees, batches, args, bar)
        result["epoch"] = _epochs(rank, trainees, args, placement, bar)
    return result


def _link(rank: int, mbit: int) -> dict[str, float]:
    """What the link carries of each direction, in 10^6 bits per second, by what uses it, and the microseconds of a round trip.

    Raises:
        RuntimeError: more than its limit.
    """
    size = 1 << 23
    block, blocks = torch.zeros(size, dtype=torch.uint8), torch.zeros(2 * size, dtype=torch.uint8)
    floats = torch.zeros(size // 4)
    uses: dict[str, Callable[[], Any]] = {  # each sends `size` bytes over the link, all but the first in both directions
        "one_way": lambda: _there_and_back(rank, block, block[:1]),
        "all_reduce": lambda: dist.all_reduce(floats),
        "all_gather": lambda: dist.all_gather_into_tensor(blocks, block),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(blocks), blocks),
    }
    found = {f"{name}_mbit": 8e-6 * size / _median_seconds(use, 7) for name, use in uses.items()}
    check_limit(found, mbit)
    return {**found, "round_trip_us": 1e6 * _median_seconds(lambda: _there_and_back(rank, block[:1], block[:1]), 200)}


def check_limit(carried: dict[str, float], mbit: int) -> None:
    """Refuses a link that carries more than 1.05 times its limit (a bucket that is full at the start adds some); 0 is without a limit.

    Raises:
        RuntimeError: it does.
    """
    if mbit and max(carried.values()) > 1.05 * mbit:
        raise RuntimeError(f"the link is limited to {mbit} Mbit/s and carried {carried}: the limit does not hold; see `tc qdisc show`")


def _there_and_back(rank: int, there: torch.Tensor, back: torch.Tensor) -> None:
    first, second = (dist.send, dist.recv) if rank == 0 else (dist.recv, dist.send)
    first(there, 1 - rank)
    second(back, 1 - rank)


def _median_seconds(act: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _counted(rank: int, trainee: Trainee, batch: Batch, kind: str) -> dict[str, Any]:
    """Payload of a step's collectives that leaves this rank."""
    batch = trainee.fresh(batch, kind)
    with CollectiveCounter(rank, 2) as counter:
        trainee.step(batch)
    return {"sent_bytes": counter.total_bytes, "by_collective": dict(counter.sent_bytes), "calls": dict(counter.calls)}


def _dense(trainee: Trainee, args: argparse.Namespace) -> dict[str, Any]:
    """The all-reduce of the dense part's gradients alone: parameters, seconds and sent bytes of each."""
    parameters = sum(p.numel() for p in trainee.model.module.parameters() if p.requires_grad and p.grad is not None)
    gradients = torch.zeros(parameters)
    seconds, sent = [], []
    for _ in range(args.rounds):
        dist.barrier()
        start, before = time.perf_counter(), sent_bytes()
        dist.all_reduce(gradients)
        seconds.append(time.perf_counter() - start)
        sent.append(sent_bytes() - before)
    return {"parameters": parameters, "seconds": seconds, "sent_bytes": sent}


class _Blocks:
    """Seconds and sent bytes of a step, by placement and round, of blocks that take turns."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in _NAMES}
        self.sent_bytes: dict[str, list[float]] = {name: [] for name in _NAMES}

    def time(self, name: str, steps: int, block: Any) -> None:
        dist.barrier()
        start, before = time.perf_counter(), sent_bytes()
        block()
        self.seconds[name].append((time.perf_counter() - start) / steps)
        self.sent_bytes[name].append((sent_bytes() - before) / steps)

    def kept(self, rounds: int) -> dict[str, Any]:
        """Without what warmed up."""
        return {what: {name: found[-rounds:] for name, found in vars(self)[what].items()} for what in ("seconds", "sent_bytes")}


def _turns(number: int) -> tuple[str, ...]:
    return _NAMES if number % 2 else _NAMES[::-1]


def _steps(trainees: dict[str, Trainee], batches: dict[str, list[Batch]], args: argparse.Namespace, bar: tqdm[Any]) -> dict[str, Any]:
    """Steps without a pipeline."""
    blocks = {kind: _Blocks() for kind in KINDS}
    for number in range(args.rounds + 1):  # the first warms up
        for kind in KINDS:
            for name in _turns(number):
                taken = [batches[kind][(number * args.steps + i) % len(batches[kind])] for i in range(args.steps)]
                fresh = [trainees[name].fresh(batch, kind) for batch in taken]

                def block(trainee: Trainee = trainees[name], fresh: list[Batch] = fresh) -> None:
                    for batch in fresh:
                        trainee.step(batch)

                blocks[kind].time(name, args.steps, block)
                bar.update()
    return {kind: found.kept(args.rounds) for kind, found in blocks.items()}


def _pipelines(trainees: dict[str, Trainee]) -> dict[str, Any]:
    stock, fae = trainees["stock"], trainees["fae"]
    return {
        "stock": TrainPipelineSparseDist(stock.model, stock.optimizer, _CPU),
        "fae": FAETrainPipeline(fae.model, fae.optimizer, _CPU),
    }


def _pipelined(trainees: dict[str, Trainee], batches: dict[str, list[Batch]], args: argparse.Namespace, bar: tqdm[Any]) -> dict[str, Any]:
    """Steps of each one's pipeline, which is full all the time: the batches in flight at the start of a block are let through first."""
    pipelines = _pipelines(trainees)
    feeds = {(name, kind): _feed(trainees[name], batches[kind], kind) for name in _NAMES for kind in KINDS}
    blocks = {kind: _Blocks() for kind in KINDS}
    for number in range(args.rounds + 1):
        for kind in KINDS:
            for name in _turns(number):

                def block(steps: int = args.steps, pipeline: Any = pipelines[name], feed: Iterator[Batch] = feeds[name, kind]) -> None:
                    for _ in range(steps):
                        pipeline.progress(feed)

                block(_IN_FLIGHT)
                blocks[kind].time(name, args.steps, block)
                bar.update()
    for pipeline in pipelines.values():
        pipeline.detach()
    return {kind: found.kept(args.rounds) for kind, found in blocks.items()}


def _feed(trainee: Trainee, batches: list[Batch], kind: str) -> Iterator[Batch]:
    for batch in cycle(batches):
        yield trainee.fresh(batch, kind)


def _epochs(rank: int, trainees: dict[str, Trainee], args: argparse.Namespace, placement: RowPlacement, bar: tqdm[Any]) -> dict[str, Any]:
    """Passes over the same samples: by stock in the data's order, by fae as hot and cold batches."""
    source = criteo_source(args, "test", args.epoch_batches * args.batch_size * 2)
    agree = gather_counts(dist.new_group(backend="gloo"))
    loader = HotColdDataLoader(
        source, placement, batch_size=args.batch_size, schedule=ShuffleSchedule("proportional"), rank=rank, world_size=2, agree=agree
    )
    made: dict[str, list[Batch]] = {"stock": list(source.batches(args.batch_size, rank=rank, world_size=2)), "fae": list(loader)}
    pipelines, blocks = _pipelines(trainees), _Blocks()
    for number in range(args.epochs):
        for name in _turns(number):
            fresh = [_fresh(trainees[name], batch) for batch in made[name]]

            def block(pipeline: Any = pipelines[name], fresh: list[Batch] = fresh) -> None:
                feed = iter(fresh)
                try:
                    while True:
                        pipeline.progress(feed)
                except StopIteration:
                    return

            blocks.time(name, 1, block)
            bar.update()
    kinds = [batch.kind for batch in made["fae"]]
    return {
        **blocks.kept(args.epochs),
        "samples": {name: sum(_samples(batch) for batch in made[name]) for name in _NAMES},
        "steps": {"stock": {"mixed": len(made["stock"])}, "fae": {kind: kinds.count(kind) for kind in ("hot", "cold")}},
    }


def _fresh(trainee: Trainee, batch: Batch) -> Batch:
    if not isinstance(batch, HotColdBatch):
        return trainee.fresh(batch, "mixed")
    return replace(batch, sparse_features=trainee.fresh(batch, batch.kind).sparse_features)


def _samples(batch: Batch) -> int:
    return batch.num_samples if isinstance(batch, HotColdBatch) else batch.labels.numel()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else it would leave the namespaces
    sys.exit(main())
