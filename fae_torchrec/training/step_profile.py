"""Profiles some steps of every kind after training, and sorts their time into categories: the collector of `step_shares`."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from itertools import cycle, islice
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from fae_torchrec.data.batches import HotColdBatch
from fae_torchrec.training.step_shares import PROFILED, STEP, StepTimes, step_shares, step_times

_SETTLE = 3  # steps before: the pipeline fills, the first of a kind may set something up


def profile_steps(
    new_pipeline: Callable[[], TrainPipelineSparseDist[HotColdBatch, Any]],
    batches: Iterable[HotColdBatch],
    steps: int,
    device: torch.device,
    group: dist.ProcessGroup,
) -> dict[str, Any]:
    """Trains on batches of one kind after the other, under torch.profiler, through the pipeline that trained.

    Changes the weights, and a profiled step is slower than another: call it after everything that is timed or scored. A kind's batches are
    repeated as often as needed. Collective: every rank takes the same kinds of steps.

    Args:
        new_pipeline: makes a pipeline around the model.
        batches: this rank's, of one kind or several; the order of kinds is the same on every rank.
        steps: of each kind, at least 1.
        device: where the model lies.
        group: the ranks.

    Returns:
        By kind ("hot", "cold", "mixed"), see `step_shares`; the same on every rank. A kind of which a rank's profiler gave nothing that can
        be read is left out, with a warning: the run is over, and what it gave must not be lost for a figure.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch 2.13 prints a line at every start and stop otherwise
    by_kind: dict[str, list[HotColdBatch]] = {}
    for batch in batches:
        by_kind.setdefault(batch.kind, []).append(batch)
    shares = {}
    for kind, of_kind in by_kind.items():
        whole_turns = of_kind[: len(of_kind) // 2 * 2] or of_kind  # staged batches take turns at two halves, over the end of the list too
        times = _profiled(new_pipeline(), whole_turns, steps, device)
        of_ranks: list[Any] = [None] * group.size()
        dist.all_gather_object(of_ranks, times, group=group)
        problems = [found for found in of_ranks if isinstance(found, str)]
        if problems and group.rank() == 0:
            warnings.warn(f"the {kind} steps were profiled, but not to be read: {problems[0]}; their shares are left out", stacklevel=2)
        if not problems:
            shares[kind] = step_shares(of_ranks)
    return shares


def _profiled(
    pipeline: TrainPipelineSparseDist[HotColdBatch, Any], batches: list[HotColdBatch], steps: int, device: torch.device
) -> StepTimes | str:
    """Steps in the middle of a pass: each starts what later ones need, and none is the last. A text says why their times are missing."""
    several = islice(cycle(batches), 2 * _SETTLE + steps)
    for _ in range(_SETTLE):
        pipeline.progress(several)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as seen:
        _wait_for(device)
        with record_function(PROFILED):
            for _ in range(steps):
                with record_function(STEP):
                    pipeline.progress(several)
            _wait_for(device)
    while True:
        try:
            pipeline.progress(several)
        except StopIteration:
            break
    pipeline.detach()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        seen.export_chrome_trace(path)
        try:
            with open(path, encoding="utf-8") as file:
                times = step_times(json.load(file)["traceEvents"])
        except ValueError as error:
            return str(error)
    return "the profiler saw no kernel of the GPU" if device.type == "cuda" and not times.on_device else times


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
