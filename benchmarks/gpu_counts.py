"""What benchmarks/gpu.py counts and clocks apart from whole runs: rows over the link, misses of caches, the device's time of the tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gpu_scenarios import SLOT_BYTES, Workload
from gpu_trainee import Runner, Trainee
from torchrec.datasets.utils import Batch

from fae_torchrec.core.placement import RowPlacement

_SLEEP_CYCLES = 30_000_000  # some 15 ms, in which the host queues what is then timed without gaps


def rows_touched(batches: Sequence[Batch], rows: RowPlacement | None) -> dict[str, float]:
    """Rows per batch that are looked up outside the hot tier, and distinct ones: what crosses the link without a cache.

    Forward reads the first (as far as the GPU's own cache does not have them), the update reads and writes the second.
    """
    lookups, distinct = 0.0, 0.0
    for batch in batches:
        names = batch.sparse_features.keys()
        for name, ids in zip(names, batch.sparse_features.values().numpy().reshape(len(names), -1), strict=True):
            cold = ids if rows is None else ids[~rows.is_hot(f"t_{name}", ids)]
            lookups += cold.size
            distinct += np.unique(cold).size
    return {"lookups": lookups / max(len(batches), 1), "distinct": distinct / max(len(batches), 1)}


def cache_counts(trainee: Trainee, batches: Sequence[Batch], workload: Workload) -> dict[str, Any]:
    """Size of a placement's caches, and their misses over some steps without a pipeline, looked up right before each forward."""
    counts: list[torch.Tensor] = []

    def count(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        indices = kwargs["indices"] if "indices" in kwargs else args[0]
        offsets = kwargs["offsets"] if "offsets" in kwargs else args[1]
        linear = torch.ops.fbgemm.linearize_cache_indices(kernel.cache_hash_size_cumsum, indices, offsets)
        distinct = torch.unique(linear)
        distinct = distinct[distinct < kernel.total_cache_hash_size]  # beyond: of tables that are not cached
        found = torch.ops.fbgemm.lxu_cache_lookup(distinct, kernel.lxu_cache_state, kernel.total_cache_hash_size)
        counts.append(
            torch.stack([(linear < kernel.total_cache_hash_size).sum(), torch.tensor(distinct.numel()).to(found), (found < 0).sum()])
        )

    kernels = trainee.cache_kernels()
    hooks = [kernel.register_forward_pre_hook(count, with_kwargs=True) for kernel in kernels]
    trainee.use(None)
    for batch in batches:
        trainee.direct_step(batch.to(trainee.device))
    for hook in hooks:
        hook.remove()
    slots = sum(kernel.lxu_cache_weights.shape[0] for kernel in kernels)
    steps = len(counts) / max(len(kernels), 1)  # hot batches ask no cache
    total = torch.stack(counts).sum(0).tolist() if counts else [0, 0, 0]
    per_step = dict(zip(("lookups", "distinct", "misses"), (round(number / max(steps, 1), 1) for number in total), strict=True))
    return {"slots": slots, "bytes": slots * (4 * workload.dim + SLOT_BYTES), "steps": steps, **per_step}


def device_ms(runner: Runner, batches: Sequence[Batch], repeats: int = 3) -> dict[str, float]:
    """Milliseconds of the device for the tables alone: lookup, joining of tiers, backward with the update; and, beside, for the prefetch.

    The host queues a step behind a kernel that waits, so that its own time does not count. The input dist is done before. What a pipeline
    prefetches on another stream, beside the step before, is prefetched before, and clocked by itself. (What a staging area sends home goes
    over the link in the other direction, beside that; as many bytes.)

    Args:
        runner: its pipeline released.
        batches: as its pipeline takes them, in their order; the mean is over all.
        repeats: the median counts.
    """
    clocked = [[_clocked(runner, batch) for batch in batches] for _ in range(repeats + 1)][1:]
    step, prefetch = (
        statistics.mean(statistics.median(times) for times in zip(*([found[part] for found in one] for one in clocked), strict=True))
        for part in (0, 1)
    )
    return {"step": step, "prefetch": prefetch}


def _clocked(runner: Runner, batch: Batch) -> tuple[float, float]:
    """Milliseconds of one step and of its prefetch."""
    trainee, device = runner.trainee, runner.trainee.device
    bags, forward_stream = trainee.bags, torch.cuda.default_stream(device)
    gradient = trainee.gradient(batch.labels.numel())
    context = bags.create_context()
    inputs = bags.input_dist(context, batch.to(device).sparse_features).wait().wait()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    prefetch_ms = 0.0
    staging = getattr(context, "staged", None) and bags._staging
    if runner.prefetches or staging:
        side = staging._stream if staging else torch.cuda.Stream(device)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(_SLEEP_CYCLES)
            begin.record()
            if staging:
                bags.look_ahead(context, inputs, forward_stream)
            else:
                bags.prefetch(inputs, forward_stream, context)
            end.record()
        torch.cuda.synchronize()
        prefetch_ms = begin.elapsed_time(end)
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES)
    begin.record()
    values = bags.compute_and_output_dist(context, inputs).wait().values()
    values.backward(gradient[: values.shape[0]])
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), prefetch_ms
