"""The audit of a trained model: what a step of each kind moves between ranks, touches in the cold tier, and spends its time on."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedModule
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.segregate import hot_samples
from fae_torchrec.training.cache_hits import CacheHits
from fae_torchrec.training.traffic import CollectiveCounter


@dataclass
class KindAudit:
    """Sums over the audited steps of one kind, over all ranks.

    Attributes:
        steps: steps times ranks.
        samples: samples.
        hot_samples: samples that are all hot (0 without a placement).
        crossed_bytes: bytes that left a rank for another; NaN if a collective was called whose bytes cannot be counted.
        lookups: rows looked up, repeats counted.
        cold_rows: those of them that the hot tier does not serve.
        cold_bytes: bytes of these rows with their optimizer state; backward touches as many again.
        cached_rows: distinct rows of each step that a cache stands in front of (UVM caching).
        cache_hits: those of them that lay in the cache before their step.
        input_dist_ms: time of the input dist alone, start to end, not overlapped.
        forward_ms: the rest of forward.
        backward_ms: backward, with the fused update.
        optimizer_ms: the dense optimizer's step and zero_grad.
        crossed_by_collective: `crossed_bytes` by collective, of those whose bytes can be counted.
    """

    steps: float = 0
    samples: float = 0
    hot_samples: float = 0
    crossed_bytes: float = 0
    lookups: float = 0
    cold_rows: float = 0
    cold_bytes: float = 0
    cached_rows: float = 0
    cache_hits: float = 0
    input_dist_ms: float = 0
    forward_ms: float = 0
    backward_ms: float = 0
    optimizer_ms: float = 0
    crossed_by_collective: dict[str, float] = field(default_factory=dict)


def audit(
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    loader: HotColdDataLoader,
    tables: TableSet,
    placement: RowPlacement | None,
    device: torch.device,
    group: dist.ProcessGroup,
) -> dict[str, KindAudit]:
    """Trains each batch twice without a pipeline: once under a count of all collectives, once under a clock.

    Changes the weights: call it after everything else. Collective: every rank takes the same kinds of steps.

    Args:
        model: sharded.
        optimizer: of the model.
        loader: this rank's batches and their kinds.
        tables: of the model, those left to stock sharding included.
        placement: of the model, None for stock.
        device: where the model lies.
        group: the ranks.

    Returns:
        Sums by kind ("hot", "cold", "mixed"), the same on every rank.
    """
    kinds: dict[str, KindAudit] = {}
    caches = CacheHits(model)
    uncounted: set[str] = set()
    model.train()
    for batch in loader:
        kind = kinds.setdefault(batch.kind, KindAudit())
        kind.steps += 1
        kind.samples += batch.num_samples
        if placement is not None and batch.num_samples:  # a filler has no id, and would pass for a hot sample
            kind.hot_samples += float(hot_samples(batch.sparse_features, placement).sum())
        rows, row_bytes = cold_accesses(batch.sparse_features, tables, placement)
        kind.lookups += cold_accesses(batch.sparse_features, tables, None)[0]
        kind.cold_rows += rows
        kind.cold_bytes += row_bytes
        batch = batch.to(device)
        counter = CollectiveCounter(group.rank(), group.size())
        rows_before, hits_before = caches.rows, caches.hits
        with counter, caches.watching():
            _step(model, optimizer, batch, device, KindAudit())
        kind.cached_rows += caches.rows - rows_before
        kind.cache_hits += caches.hits - hits_before
        kind.crossed_bytes += counter.total_bytes
        for collective, sent in counter.sent_bytes.items():
            kind.crossed_by_collective[collective] = kind.crossed_by_collective.get(collective, 0.0) + sent
        uncounted |= counter.uncounted.keys()
        kind.input_dist_ms += _input_dist_ms(model, batch, device)
        _step(model, optimizer, batch, device, kind)
    if uncounted and group.rank() == 0:  # the run is over: what it gave must not be lost for a figure
        warnings.warn(
            f"the collectives {sorted(uncounted)} have no byte count, so the bytes between ranks are not known; "
            "add them to fae_torchrec.training.traffic",
            stacklevel=2,
        )
    for kind in kinds.values():
        kind.forward_ms = max(kind.forward_ms - kind.input_dist_ms, 0.0)  # forward runs an input dist of its own
    return {name: _summed(kind, device, group) for name, kind in kinds.items()}


def cold_accesses(kjt: KeyedJaggedTensor, tables: TableSet, placement: RowPlacement | None) -> tuple[int, int]:
    """Counts lookups that the hot tier does not serve.

    Args:
        kjt: raw ids of one batch.
        tables: whose lookups are counted.
        placement: the hot rows; None counts every lookup, and a table that it does not know has no hot row.

    Returns:
        Rows looked up outside the hot tier (repeats counted) and their bytes, optimizer state included.
    """
    rows, row_bytes = 0, 0
    features = kjt.to_dict()
    placed = () if placement is None else placement.tables.names
    for name, feature in tables.lookups:
        ids = features[feature].values()
        cold = ids.numel()
        if placement is not None and name in placed:
            cold -= int(placement.is_hot(name, ids.cpu().numpy()).sum())
        rows += cold
        row_bytes += cold * tables[name].row_bytes
    return rows, row_bytes


def _step(model: DistributedModelParallel, optimizer: CombinedOptimizer, batch: Batch, device: torch.device, into: KindAudit) -> None:
    clock = _Clock(device)
    optimizer.zero_grad()
    zero_grad_ms = clock.lap_ms()
    loss, _ = model(batch)
    into.forward_ms += clock.lap_ms()
    loss.backward()
    into.backward_ms += clock.lap_ms()
    optimizer.step()
    into.optimizer_ms += clock.lap_ms() + zero_grad_ms


def _input_dist_ms(model: DistributedModelParallel, batch: Batch, device: torch.device) -> float:
    clock = _Clock(device)
    for module in model.modules():
        if isinstance(module, ShardedModule):
            module.input_dist(module.create_context(), batch.sparse_features).wait().wait()
    return clock.lap_ms()


class _Clock:
    """Wall time between laps, the device's queue drained at each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.lap_ms()

    def lap_ms(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        lap = 1e3 * (now - getattr(self, "_last", now))
        self._last = now
        return lap


def _summed(kind: KindAudit, device: torch.device, group: dist.ProcessGroup) -> KindAudit:
    numbers = [f.name for f in fields(kind) if f.name != "crossed_by_collective"]
    values = torch.tensor([getattr(kind, name) for name in numbers], dtype=torch.float64, device=device)
    dist.all_reduce(values, group=group)
    of_ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(of_ranks, kind.crossed_by_collective, group=group)
    collectives = sorted({name for sent in of_ranks for name in sent})
    sums = {name: sum(sent.get(name, 0.0) for sent in of_ranks) for name in collectives}
    return KindAudit(**dict(zip(numbers, values.tolist(), strict=True)), crossed_by_collective=sums)
