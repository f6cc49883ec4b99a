"""Measures one comparison of benchmarks/gpu.py: models built side by side, blocks of steps in turns, medians; bytes counted beside."""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from gpu_counts import cache_counts, device_ms, rows_touched
from gpu_data import NUM_DENSE, ZipfSamples, placement_of, profile_of
from gpu_scenarios import Comparison, Machine, Placement, Workload
from gpu_trainee import ModelPool, Runner, Trainee, allocated
from torchrec.datasets.utils import Batch

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.data.batches import AheadKeyedJaggedTensor, HotColdBatch
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.store_writer import write_store
from fae_torchrec.distributed.split_ahead import SplitAhead
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.dlrm import build_dlrm

_SETTLE = 6  # steps after a pipeline was made or the stage was changed: filling it, first kernels
_SLOW_MS = 40.0  # a step that takes longer is measured in short blocks
_COUNTED = 6  # batches whose rows are counted
STAGES = ("samples_per_s", "embedding_samples_per_s")


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
        ddp: whether DistributedDataParallel is around the dense part.
        trace: gets the pipelines to look at with a profiler; None: no.
    """

    samples: int = 1 << 19
    min_steps: int = 24
    rounds: int = 3
    profile_samples: int = 1 << 22
    seed: int = 0
    deadline: float = float("inf")
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    ddp: bool = True
    trace: Callable[[str, Runner], dict[str, float]] | None = None


class Measurement:
    """Keeps what comparisons share: models, and profiles by law and rows.

    Args:
        options: how long to measure.
        machine: its memory.
        say: gets a line about what was done.
    """

    def __init__(self, options: Options, machine: Machine, say: Callable[[str], None]) -> None:
        self.options, self._say = options, say
        self._models = ModelPool(machine, options.device, ddp=options.ddp)
        self._profiles: dict[tuple[Any, ...], PopularityProfile] = {}

    def run(self, comparison: Comparison, cut: Sequence[Sequence[Placement]]) -> dict[str, Any]:
        """Measures the groups of a comparison one after the other.

        Returns:
            JSON values: the workload, and for every placement samples/s of the blocks, times of the embedding stage, bytes and counts.
        """
        workload = comparison.workload
        described = {**asdict(workload), "name": workload.name, "num_rows": workload.num_rows, "row_bytes": workload.row_bytes}
        result: dict[str, Any] = {"name": comparison.name, "workload": described, "placements": {}}
        batches = self._batches(workload)
        result["rows_touched"] = rows_touched(batches[:_COUNTED], None)
        for number, group in enumerate(cut):
            if time.monotonic() > self.options.deadline:
                result["skipped"] = [placement.name for placement in group if placement.name not in result["placements"]]
                break
            self._measure_group(workload, group, batches, number, result["placements"])
        return result

    def _measure_group(
        self, workload: Workload, group: Sequence[Placement], batches: list[Batch], number: int, entries: dict[str, Any]
    ) -> None:
        runners: dict[str, Runner] = {}
        keys = [placement.model_key(workload) for placement in group]
        with ExitStack() as stack:
            for placement in group:
                began = time.monotonic()
                rows = self._rows(workload, placement)
                trainee = self._models.get(placement, workload, rows, keys)
                own, again = self._feed(placement, workload, batches, rows, trainee, stack)
                runners[placement.name] = Runner(trainee, placement, own, again)
                entry = _described(placement, workload, rows, own, trainee, number)
                entry["build_s"] = round(time.monotonic() - began, 2)
                entries.setdefault(placement.name, entry)
                self._say(f"{workload.name}: {placement.name} is ready after {entry['build_s']} s")
            for stage in STAGES:
                self._rounds(stage, runners, number, entries)
            try:
                self._counts(workload, runners, entries)
            except RuntimeError as error:  # what was clocked before is worth more than these
                entries["all-HBM"].setdefault("errors", []).append(repr(error))
                self._say(f"not counted: {error!r}")

    def _rounds(self, stage: str, runners: dict[str, Runner], number: int, entries: dict[str, Any]) -> None:
        """Blocks in turns, in another order every time. A later group repeats all-HBM: its blocks are kept by group too."""
        blocks: dict[str, list[float]] = {name: [] for name in runners}
        steps: dict[str, int] = {}
        for turn in range(self.options.rounds + 1):
            for name in list(runners) if turn % 2 else reversed(list(runners)):
                if time.monotonic() > self.options.deadline and turn > 1:
                    continue
                runner = runners[name]
                for other in runners.values():
                    if other is not runner and other.trainee is runner.trainee:
                        other.release()
                runner.trainee.use(None if stage == STAGES[0] else runner.largest)
                pilot_ms = runner.run(_SETTLE) / _SETTLE
                if name not in steps:
                    steps[name] = runner.steps if pilot_ms < _SLOW_MS else max(4, round(runner.steps * _SLOW_MS / pilot_ms / 8))
                before = allocated(self.options.device)
                if self.options.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                gc.collect()
                gc.disable()  # a collection looks at the batches of all placements
                elapsed_ms = runner.run(steps[name])
                gc.enable()
                if turn:  # the first is the warm-up: caches fill, allocators grow
                    blocks[name].append(1000 * runner.samples * steps[name] / runner.steps / elapsed_ms)
                if self.options.device.type == "cuda" and stage == STAGES[0]:
                    entries[name]["peak_hbm_bytes"] = entries[name]["static_hbm_bytes"] + torch.cuda.max_memory_allocated() - before
                if turn == self.options.rounds and self.options.trace is not None and stage == STAGES[0] and not number:
                    entries[name]["profile"] = self.options.trace(name, runner)
        for name, found in blocks.items():
            entry = entries[name]
            if entry["group"] == number:
                entry[stage] = found
                entry[f"{stage}_median"] = statistics.median(found) if found else None
            entry.setdefault(f"{stage}_by_group", {})[str(number)] = found
            self._say(f"  {stage:24} {name:58} {statistics.median(found) if found else float('nan'):12,.0f}")

    def _counts(self, workload: Workload, runners: dict[str, Runner], entries: dict[str, Any]) -> None:
        for runner in runners.values():
            runner.release()
            runner.trainee.use(None)
        seen: set[int] = set()
        for name, runner in runners.items():
            on_device = self.options.device.type == "cuda" and runner.placement.kind != "host" and runner.placement.cold != "host"
            if not on_device or id(runner.trainee) in seen or time.monotonic() > self.options.deadline:
                continue
            seen.add(id(runner.trainee))
            chosen = runner.batches[: 2 * _COUNTED]
            by_kind = {kind: [batch for batch in chosen if _kind(batch) == kind][:_COUNTED] for kind in {*map(_kind, chosen)}}
            entries[name]["device_ms"] = {kind: device_ms(runner, of_kind) for kind, of_kind in by_kind.items()}
            if runner.trainee.cache_kernels():
                entries[name]["cache"] = cache_counts(runner.trainee, chosen, workload)
            self._say(f"  {name:58} {entries[name]['device_ms']} {entries[name].get('cache', '')}")

    def _batches(self, workload: Workload) -> list[Batch]:
        steps = max(self.options.min_steps, self.options.samples // workload.batch_size)
        drawn = ZipfSamples(workload.rows, workload.exponent, self.options.seed, self.options.device)
        return drawn.batches(steps * workload.batch_size, workload.batch_size)

    def _rows(self, workload: Workload, placement: Placement) -> RowPlacement | None:
        if placement.kind != "fae":
            return None
        key = (workload.exponent, workload.dim, workload.table_bytes)
        if key not in self._profiles:
            dlrm = build_dlrm(
                workload.rows, 13, workload.dim, [workload.dim], [8, 1], Optimizer.ROWWISE_ADAGRAD, 0.01, 0, torch.device("meta")
            )
            options = self.options
            self._profiles[key] = profile_of(workload, model_tables(dlrm), options.profile_samples, options.seed + 1, options.device)
        return placement_of(self._profiles[key], round((1 - placement.cache_share) * workload.budget_bytes))

    def _feed(
        self,
        placement: Placement,
        workload: Workload,
        batches: list[Batch],
        rows: RowPlacement | None,
        trainee: Trainee,
        stack: ExitStack,
    ) -> tuple[list[Batch], Callable[[], Iterable[Batch]] | None]:
        """The batches of an epoch, and what makes them anew at every pass where they are not made before."""
        pin = self.options.device.type == "cuda" and placement.pipeline != "none"
        if rows is None:
            return [batch.pin_memory() if pin else batch for batch in batches], None
        split = SplitAhead(trainee.model) if placement.split_ahead else None

        def loader(source: Any, *, prefetch: int) -> HotColdDataLoader:
            return HotColdDataLoader(
                source,
                rows,
                batch_size=workload.batch_size,
                schedule=ShuffleSchedule("proportional"),
                pin_memory=pin,
                prefetch=prefetch,
                split_ahead=split,
            )

        own: list[Batch] = list(loader(batches, prefetch=0))
        if placement.feed == "resident":
            return own, None
        source: Any = batches
        if placement.feed == "store":
            folder = tempfile.mkdtemp()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            source = write_store(f"{folder}/store", _Source(batches), rows)
        live = loader(source, prefetch=4)
        stack.callback(live.close)
        return own, lambda: live


class _Source(ShardedSource):
    """Batches as a source, for a store: a batch is a shard."""

    num_dense = NUM_DENSE
    name = "drawn"

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches
        self.feature_names = tuple(batches[0].sparse_features.keys())

    @property
    def num_shards(self) -> int:
        """Batches."""
        return len(self._batches)

    def read_shard(self, shard: int) -> Iterator[Batch]:
        """One batch."""
        yield self._batches[shard]

    def size_hint(self) -> int:
        """Their samples."""
        return sum(batch.labels.numel() for batch in self._batches)


def _kind(batch: Batch) -> str:
    return batch.kind if isinstance(batch, HotColdBatch) else "mixed"


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
    if rows is None:
        return entry
    kinds = [_kind(batch) for batch in own]
    ahead = [
        ids for batch in own if isinstance(batch.sparse_features, AheadKeyedJaggedTensor) for ids in batch.sparse_features.ahead.values()
    ]
    return entry | {
        "hot_inputs": rows.hot_inputs,
        "coverage": rows.coverage,
        "hot_rows": sum(rows.hot_rows(name) for name in rows.tables.names),
        "hot_bytes": rows.hot_bytes,
        "hot_batches": kinds.count("hot") / len(kinds),
        "staged_batches": sum(ids.staged is not None for ids in ahead) / len(kinds),
        "cold_rows": rows_touched([batch for batch in own if _kind(batch) == "cold"][:_COUNTED], rows),
    }
