"""Measures one comparison of benchmarks/gpu.py: models built side by side, blocks of steps in turns, medians; bytes counted beside."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from gpu_data import ZipfSamples, placement_of, profile_of
from gpu_scenarios import SLOT_BYTES, Comparison, Placement, Workload
from gpu_trainee import Runner, Trainee, allocated
from torchrec.datasets.utils import Batch

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.store_writer import write_store
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.dlrm import build_dlrm

_SETTLE = 6  # steps after a pipeline was made or the stage was changed: filling it, first kernels
_SLOW_MS = 40.0  # a step that takes longer is measured in short blocks
_COUNTED = 6  # batches whose rows are counted


@dataclass(frozen=True)
class Options:
    """How long to measure.

    Attributes:
        samples: of an epoch; at least `min_steps` batches.
        min_steps: batches of an epoch.
        rounds: blocks of each placement.
        profile_samples: that hot sets are selected from.
        seed: of all draws.
        deadline: `time.monotonic` after which nothing more is begun.
        device: where.
        trace: gets the pipelines to look at with a profiler, of the base comparison; None: no.
    """

    samples: int = 1 << 20
    min_steps: int = 24
    rounds: int = 4
    profile_samples: int = 1 << 22
    seed: int = 0
    deadline: float = float("inf")
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    trace: Callable[[str, Runner], None] | None = None


class Measurement:
    """Keeps what comparisons share: profiles by law and rows, and the epoch's batches."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self._say = options, say
        self._profiles: dict[tuple[Any, ...], PopularityProfile] = {}

    def run(self, comparison: Comparison, cut: Sequence[Sequence[Placement]]) -> dict[str, Any]:
        """Measures the groups of a comparison one after the other.

        Returns:
            JSON values: the workload, and for every placement samples/s of the blocks, times of the embedding stage, bytes and counts.
        """
        workload = comparison.workload
        result: dict[str, Any] = {"workload": {**asdict(workload), "name": workload.name, "rows": workload.num_rows}, "placements": {}}
        batches = self._batches(workload)
        result["link_rows"] = {"all": _rows_touched(batches[:_COUNTED], None)}
        for number, group in enumerate(cut):
            if time.monotonic() > self.options.deadline:
                result["skipped"] = [placement.name for placement in group]
                break
            self._measure_group(workload, group, batches, number, result)
        return result

    def _measure_group(
        self, workload: Workload, group: Sequence[Placement], batches: list[Batch], number: int, result: dict[str, Any]
    ) -> None:
        trainees: dict[tuple[object, ...], Trainee] = {}
        runners: dict[str, Runner] = {}
        with ExitStack() as stack:
            for placement in group:
                began = time.monotonic()
                rows = self._rows(workload, placement)
                if placement.model_key not in trainees:
                    trainees[placement.model_key] = Trainee(placement, workload, rows, self.options.device)
                trainee = trainees[placement.model_key]
                own, again = self._feed(placement, workload, batches, rows, stack)
                runners[placement.name] = Runner(trainee, placement, own, again)
                entry = _described(placement, workload, rows, own, trainee, number)
                entry["build_s"] = round(time.monotonic() - began, 2)
                kept = result["placements"].setdefault(placement.name, entry)
                for name in ("samples_per_s", "embedding_samples_per_s"):
                    kept.setdefault(name, [])
                self._say(f"{workload.name}: built {placement.name} in {entry['build_s']} s")
            for stage in ("samples_per_s", "embedding_samples_per_s"):
                self._rounds(stage, runners, number, result["placements"])
            for runner in runners.values():
                runner.release()
            for name, runner in runners.items():
                if runner.trainee.cache_kernels():
                    result["placements"][name]["cache"] = _cache_counts(runner, workload)
        del runners, trainees
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()

    def _rounds(self, stage: str, runners: dict[str, Runner], number: int, entries: dict[str, Any]) -> None:
        """Blocks in turns, in another order every time. A later group repeats all-HBM: its blocks are kept apart."""
        blocks: dict[str, list[float]] = {name: [] for name in runners}
        names = list(runners)
        steps: dict[str, int] = {}
        for turn in range(self.options.rounds + 1):
            for name in names if turn % 2 else reversed(names):
                if time.monotonic() > self.options.deadline and turn > 1:
                    continue
                runner = runners[name]
                for other in runners.values():
                    if other is not runner and other.trainee is runner.trainee:
                        other.release()
                runner.trainee.use(embedding_only=stage != "samples_per_s")
                pilot = runner.run(_SETTLE if turn else 3) / (_SETTLE if turn else 3)
                if name not in steps:
                    steps[name] = runner.steps if pilot < _SLOW_MS else max(4, round(runner.steps * _SLOW_MS / pilot / 8))
                before = allocated(self.options.device)
                if self.options.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                elapsed_ms = runner.run(steps[name])
                if turn:  # the first is the warm-up: caches fill, allocators grow
                    blocks[name].append(1000 * runner.samples * steps[name] / runner.steps / elapsed_ms)
                if self.options.device.type == "cuda" and stage == "samples_per_s":
                    entries[name]["peak_hbm_bytes"] = entries[name]["static_hbm_bytes"] + torch.cuda.max_memory_allocated() - before
                if turn == self.options.rounds and self.options.trace is not None and stage == "samples_per_s":
                    self.options.trace(name, runner)
        for name, found in blocks.items():
            entry = entries[name]
            if entry["group"] == number:
                entry[stage] = found
                entry[f"{stage}_median"] = statistics.median(found) if found else None
            entry.setdefault(f"{stage}_by_group", {})[str(number)] = found
            self._say(f"  {stage:24} {name:58} {statistics.median(found) if found else float('nan'):12,.0f}")

    def _batches(self, workload: Workload) -> list[Batch]:
        steps = max(self.options.min_steps, self.options.samples // workload.batch_size)
        drawn = ZipfSamples(workload.rows, workload.exponent, self.options.seed, self.options.device)
        return drawn.batches(steps * workload.batch_size, workload.batch_size)

    def _rows(self, workload: Workload, placement: Placement) -> RowPlacement | None:
        if placement.kind != "fae":
            return None
        key = (workload.exponent, *workload.rows.values(), workload.dim)
        if key not in self._profiles:
            dlrm = build_dlrm(
                workload.rows, 13, workload.dim, [workload.dim], [8, 1], Optimizer.ROWWISE_ADAGRAD, 0.01, 0, torch.device("meta")
            )
            options = self.options
            self._profiles[key] = profile_of(workload, model_tables(dlrm), options.profile_samples, options.seed + 1, options.device)
        return placement_of(self._profiles[key], round((1 - placement.cache_share) * workload.budget_bytes))

    def _feed(
        self, placement: Placement, workload: Workload, batches: list[Batch], rows: RowPlacement | None, stack: ExitStack
    ) -> tuple[list[Batch], Callable[[], Iterable[Batch]] | None]:
        """The batches of an epoch, and what makes them anew at every pass where they are not made before."""
        pin = self.options.device.type == "cuda" and placement.pipeline != "none"
        if rows is None:
            return [batch.pin_memory() if pin else batch for batch in batches], None

        def loader(source: Any, *, prefetch: int) -> HotColdDataLoader:
            return HotColdDataLoader(
                source, rows, batch_size=workload.batch_size, schedule=ShuffleSchedule("proportional"), pin_memory=pin, prefetch=prefetch
            )

        own: list[Batch] = list(loader(batches, prefetch=0))
        if placement.feed == "resident":
            return own, None
        source: Any = batches
        if placement.feed == "store":
            folder = tempfile.mkdtemp()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            source = write_store(f"{folder}/store", _Source(batches), rows)
        live = loader(source, prefetch=2)
        stack.callback(live.close)
        return own, lambda: live


class _Source:
    """Batches as a BatchSource, for a store."""

    num_dense = 13

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches
        self.feature_names = tuple(batches[0].sparse_features.keys())
        self.num_samples = sum(batch.labels.numel() for batch in batches)

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterable[Batch]:
        """All of them, in the sizes they have."""
        return iter(self._batches)


def _described(
    placement: Placement, workload: Workload, rows: RowPlacement | None, own: list[Batch], trainee: Trainee, number: int
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        **asdict(placement),
        "group": number,
        "planned": asdict(placement.memory(workload)),
        "static_hbm_bytes": trainee.static_bytes,
        "steps": len(own),
    }
    if rows is not None:
        kinds = [getattr(batch, "kind", "mixed") for batch in own]
        entry |= {
            "hot_inputs": rows.hot_inputs,
            "coverage": rows.coverage,
            "hot_rows": sum(rows.hot_rows(name) for name in rows.tables.names),
            "hot_bytes": rows.hot_bytes,
            "hot_batches": kinds.count("hot") / len(kinds),
            "cold_rows": _rows_touched([batch for batch in own if getattr(batch, "kind", "") == "cold"][:_COUNTED], rows),
        }
    return entry


def _rows_touched(batches: Sequence[Batch], rows: RowPlacement | None) -> dict[str, float]:
    """Rows per batch that are looked up outside the hot tier, and distinct ones: what crosses the link without a cache."""
    lookups, distinct = [0.0], [0.0]
    for batch in batches:
        ids = batch.sparse_features.values().numpy().reshape(len(batch.sparse_features.keys()), -1)
        of_table = [
            table if rows is None else table[~rows.is_hot(f"t_{name}", table)]
            for name, table in zip(batch.sparse_features.keys(), ids, strict=True)
        ]
        lookups.append(sum(table.size for table in of_table))
        distinct.append(sum(np.unique(table).size for table in of_table))
    return {"lookups": sum(lookups) / max(len(batches), 1), "distinct": sum(distinct) / max(len(batches), 1)}


def _cache_counts(runner: Runner, workload: Workload, steps: int = 24) -> dict[str, Any]:
    """FBGEMM's own counts of its caches over some steps without a clock; private switches of FBGEMM 1.6 to 1.8, hence at the very end."""
    kernels = runner.trainee.cache_kernels()
    for kernel in kernels:
        kernel.gather_uvm_cache_stats = True
        kernel._init_uvm_cache_stats()
    runner.trainee.use(embedding_only=False)
    runner.run(steps)
    counts = sum(kernel.get_uvm_cache_stats().cpu().numpy() for kernel in kernels) / steps
    for kernel in kernels:
        kernel.gather_uvm_cache_stats = False
        kernel._init_uvm_cache_stats()
    runner.release()
    slots = sum(kernel.lxu_cache_weights.shape[0] for kernel in kernels)
    names = ("calls", "requested", "unique", "unique_misses", "conflict_unique_misses", "conflict_misses")
    return {
        "slots": slots,
        "bytes": slots * (4 * workload.dim + SLOT_BYTES),
        "per_step": dict(zip(names, (round(float(count), 1) for count in counts), strict=False)),
    }
