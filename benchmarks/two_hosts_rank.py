"""What each rank of benchmarks/two_hosts.py measures: the link, steps with and without a pipeline, whole epochs, and the bytes sent."""

from __future__ import annotations

import argparse
import pickle
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from criteo_workload import Trainee, batches_by_kind, both_trainees, criteo_source, loss_difference
from sharded_step_summary import KINDS
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # private, torch 2.13
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from tqdm import tqdm
from two_hosts_link import sent_bytes

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.data.batches import HotColdBatch
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.distributed.local_ranks import quiet_host
from fae_torchrec.distributed.process_group import gather_counts
from fae_torchrec.training.traffic import CollectiveCounter
from fae_torchrec.training.train_pipeline import FAETrainPipeline

_CPU = torch.device("cpu")
_NAMES = ("stock", "fae")
_IN_FLIGHT = 3
"""Steps after which a pipeline has no batch of another block left."""


def work(folder: str, number: str) -> None:
    """One rank's process, which `ip netns exec` has put onto its host.

    Args:
        folder: where its task is, and where its result goes.
        number: of the rank, "0" or "1".
    """
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
