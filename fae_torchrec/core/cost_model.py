"""Predicted bytes and time of a training step: stock placements, and hot and cold batches of FAE, on ranks that need not be there.

What a step does is counted first (`Work`: rows, bytes by memory and link, floating-point operations), by what the code of TorchRec and of
this package moves; then divided by the rates of a `Hardware`. Nothing is taken to overlap but, on CUDA, the host with the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fae_torchrec.core.access_curve import AccessCurve, Floats
from fae_torchrec.core.access_model import AccessModel, HotShare
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hardware import Hardware
from fae_torchrec.core.tables import Optimizer, TableSet

Stock = Literal["hbm", "uvm", "by_table", "uvm_caching", "prefetch", "host"]
HotTier = Literal["replicated", "sharded", "row_wise"]
Kind = Literal["hot", "cold"]

_KINDS: tuple[Kind, Kind] = ("hot", "cold")
_ID_BYTES = 8
_LENGTH_BYTES = 4
_SLOT_BYTES = 4  # of a hot row's number as it travels
_CACHE_SLOT_BYTES = 20  # FBGEMM's bookkeeping of a cached row
_ROWWISE_STATE_BYTES = 4  # FBGEMM keeps the row-wise state of UVM tables in HBM
_WITHOUT_PREFETCH = 0.4  # of the cache's bookkeeping, by benchmarks/results/gpu.json: prefetch is a second look at every id


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        tables: the embedding tables.
        batch_size: samples per rank.
        ranks: how many.
        dense_parameters: of all that is not a table; replicated, fp32.
        dense_macs: multiplications of a sample's forward.
    """

    tables: TableSet
    batch_size: int
    ranks: int
    dense_parameters: float
    dense_macs: float

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.ranks < 1:
            raise ConfigError(f"batch size and ranks must be at least 1, received {self.batch_size} and {self.ranks}")


@dataclass(frozen=True)
class Work:
    """What one rank does in a step, the mean over the ranks.

    Attributes:
        flops: floating-point operations of the dense part.
        fast_rows: rows looked up or updated in fast memory.
        fast_bytes: bytes read and written there.
        host_rows: rows that the host looks up or updates.
        host_bytes: bytes that it reads and writes for that.
        link_bytes: bytes between device and host.
        intra_bytes: bytes sent to ranks of the same host.
        inter_bytes: bytes sent to other hosts.
        collectives: calls.
        split_ids: ids split by tier within the step.
        cache_ids: ids that go through FBGEMM's cache.
        tiers: sharded collections used.
        steps: 1.
    """

    flops: float = 0.0
    fast_rows: float = 0.0
    fast_bytes: float = 0.0
    host_rows: float = 0.0
    host_bytes: float = 0.0
    link_bytes: float = 0.0
    intra_bytes: float = 0.0
    inter_bytes: float = 0.0
    collectives: float = 0.0
    split_ids: float = 0.0
    cache_ids: float = 0.0
    tiers: float = 0.0
    steps: float = 1.0

    @property
    def sent_bytes(self) -> float:
        """Bytes sent to other ranks."""
        return self.intra_bytes + self.inter_bytes

    def mixed(self, other: Work, share: float) -> Work:
        """The mean of steps of which `share` are like this one and the others like `other`."""
        return Work(**{key: share * value + (1 - share) * getattr(other, key) for key, value in vars(self).items()})

    def plus(self, **more: float) -> Work:
        """With that much more of some."""
        return Work(**{**vars(self), **{key: getattr(self, key) + value for key, value in more.items()}})

    def seconds(self, hardware: Hardware) -> dict[str, float]:
        """Seconds of each part on such a machine."""
        return {key: value * cost for (key, value), cost in zip(vars(self).items(), _costs(hardware).values(), strict=True)}


def _costs(hardware: Hardware) -> Mapping[str, float]:
    """Seconds of one of each of Work's, in its order."""
    return {
        "flops": 1 / hardware.flops,
        "fast_rows": hardware.fast_row_s,
        "fast_bytes": 1 / hardware.fast_bandwidth,
        "host_rows": hardware.host_row_s,
        "host_bytes": 1 / hardware.host_bandwidth,
        "link_bytes": 1 / hardware.host_link_bandwidth,
        "intra_bytes": 1 / hardware.intra_host_bandwidth,
        "inter_bytes": 1 / hardware.inter_host_bandwidth,
        "collectives": hardware.collective_s,
        "split_ids": hardware.split_id_s,
        "cache_ids": hardware.cache_id_s,
        "tiers": hardware.tier_s,
        "steps": hardware.step_s,
    }


def step_seconds(work: Work, hardware: Hardware) -> float:
    """Seconds of a step: all parts one after the other; on CUDA at least as long as the host takes to queue them (`step_s`)."""
    parts = work.seconds(hardware)
    queued = parts.pop("steps")
    return max(queued, sum(parts.values())) if hardware.device == "cuda" else queued + sum(parts.values())


class CostModel:
    """Counts the work of steps.

    Args:
        job: what is trained.
        access: how its samples access the tables.
        hardware: whose ranks share hosts, and whether the tiers lie in different memories.
    """

    def __init__(self, job: Job, access: AccessModel, hardware: Hardware) -> None:
        access.tables.check_same(job.tables, f"access model ({access.source})")
        self.job, self.access, self.hardware = job, access, hardware
        self._links = _Links(job.ranks, min(job.ranks, hardware.ranks_per_host))
        self._weights = np.array([table.weight_bytes for table in job.tables], dtype=np.float64)
        self._rows_bytes = np.array([table.row_bytes for table in job.tables], dtype=np.float64)
        self._dims = np.array([table.dim for table in job.tables], dtype=np.float64)
        self._features = np.array([len(table.feature_names) for table in job.tables], dtype=np.float64)
        self._pooled = np.array([table.pooled for table in job.tables])
        self._lookups = np.array([curve.lookups for curve in access.curves])
        everything = [curve.mass for curve in access.curves]
        #: distinct rows of each table in a step's samples of all ranks
        self._distinct = self._distinct_rows(everything, job.batch_size * job.ranks)

    def stock(self, placement: Stock, cache_bytes: float = 0.0) -> Work:
        """A step of stock TorchRec, its tables sharded table-wise.

        Args:
            placement: all rows in "hbm", in "uvm", whole tables in HBM and the others in UVM ("by_table"), in UVM behind a cache
                ("uvm_caching", or "prefetch" with the prefetch pipeline), or on the "host".
            cache_bytes: fast memory per rank for cached rows, or for whole tables.
        """
        job, ranks = self.job, self.job.ranks
        lookups = job.batch_size * self._lookups
        touched = self._distinct / ranks
        given = self._given_bytes(job.batch_size * self._features, lookups)
        work = self._dense().plus(tiers=1.0, **self._exchange(self._features, lookups))
        if placement == "host" and self.hardware.device == "cuda":
            work = work.plus(link_bytes=2 * given, fast_bytes=2 * given)
            return work.plus(**self._lookup("host", lookups, touched))
        work = work.plus(fast_bytes=2 * given)
        if placement in ("hbm", "host") or self.hardware.device == "cpu":
            return work.plus(**self._lookup("fast", lookups, touched))
        if placement in ("uvm", "by_table"):
            whole = self.whole_tables(cache_bytes) if placement == "by_table" else np.zeros(len(lookups))
            work = work.plus(**self._lookup("fast", lookups * whole, touched * whole))
            return work.plus(**self._uvm(lookups * (1 - whole), touched * (1 - whole)))
        traffic = float(self._missed(cache_bytes) @ self._link_bytes(2.0)) / ranks
        known = 1.0 if placement == "prefetch" else _WITHOUT_PREFETCH
        return work.plus(link_bytes=traffic, cache_ids=known * float(lookups.sum()), **self._lookup("fast", lookups, touched))

    def whole_tables(self, room: float) -> Floats:
        """Which tables a planner that places whole tables has in fast memory, those with the most lookups per byte first: 0 or 1, [tables].

        Args:
            room: bytes per rank.
        """
        size = np.array([table.total_bytes for table in self.job.tables]) / self.job.ranks
        order = np.argsort(size / np.maximum(self._lookups, 1e-12), kind="stable")
        whole = np.zeros(len(size))
        whole[order[size[order].cumsum() <= room]] = 1.0
        return whole

    def fae(self, share: HotShare, kind: Kind, cold_tier: str, *, split_ahead: bool, hot_tier: HotTier = "replicated") -> Work:
        """A step of hot and cold tiers.

        Args:
            share: what is hot.
            kind: of the batch.
            cold_tier: "uvm" (staged), "uvm_caching" (with prefetch) or "host".
            split_ahead: whether a loader splits the ids by tier before the step.
            hot_tier: every rank has all hot rows, or they are spread over the ranks, table-wise ("sharded") or row by row.
        """
        job, ranks = self.job, self.job.ranks
        hot_mass, cold_mass = self._tier_masses(share, kind)
        lookups = job.batch_size * self._lookups * np.array([float(of_table.sum()) for of_table in hot_mass])
        own, union = (self._distinct_rows(hot_mass, samples, share.hot) for samples in (job.batch_size, job.batch_size * ranks))
        given = self._given_bytes(job.batch_size * self._features, lookups)
        if hot_tier != "replicated":
            parts = ranks if hot_tier == "row_wise" else 1  # by row every rank has a part of every bag
            updated, more = union / ranks, self._exchange(self._features, lookups, parts=parts)
        else:
            updated, more = self._hot_exchange(own, union)
        work = self._dense().plus(tiers=1.0, fast_bytes=2 * given).plus(**self._lookup("fast", lookups, updated)).plus(**more)
        if not split_ahead:
            work = work.plus(split_ids=job.batch_size * float(self._lookups.sum()))
        if kind == "hot":
            return work
        cold = job.batch_size * self._lookups * np.array([float(of_table.sum()) for of_table in cold_mass])
        touched = self._distinct_rows(cold_mass, job.batch_size * ranks, [1 - part for part in share.hot]) / ranks
        features, bags = self._features * [float((part < 1).any()) for part in share.hot], self._packed_bags(cold_mass)
        work = work.plus(tiers=1.0, **self._exchange(features, cold, bags))
        given = self._given_bytes(bags * features, cold)
        if self.hardware.device == "cpu":
            return work.plus(fast_bytes=2 * given).plus(**self._lookup("host", cold, touched))
        if cold_tier == "host":
            return work.plus(link_bytes=2 * given, fast_bytes=2 * given).plus(**self._lookup("host", cold, touched))
        cached = float(cold.sum()) if cold_tier == "uvm_caching" else 0.0
        brought = float(touched @ self._link_bytes(2.0))  # once in, once back, whoever brings them
        work = work.plus(fast_bytes=2 * given, link_bytes=brought, cache_ids=cached)
        return work.plus(**self._lookup("fast", cold, touched))

    def epoch(self, share: HotShare, cold_tier: str, *, split_ahead: bool, hot_tier: HotTier = "replicated") -> Work:
        """The mean step of an epoch's hot and cold batches."""
        hot = self.fae(share, "hot", cold_tier, split_ahead=split_ahead, hot_tier=hot_tier)
        return hot.mixed(self.fae(share, "cold", cold_tier, split_ahead=split_ahead, hot_tier=hot_tier), share.hot_inputs)

    def epoch_seconds(self, share: HotShare, cold_tier: str, *, split_ahead: bool, hot_tier: HotTier = "replicated") -> float:
        """Mean seconds of those steps. Batches of a kind come in runs, so the host cannot queue hot steps while cold ones take longer."""
        hot, cold = (
            step_seconds(self.fae(share, kind, cold_tier, split_ahead=split_ahead, hot_tier=hot_tier), self.hardware) for kind in _KINDS
        )
        return share.hot_inputs * hot + (1 - share.hot_inputs) * cold

    def fast_bytes(self, placement: Stock | Literal["fae"], budget_bytes: float = 0.0, cold_tier: str = "uvm") -> float:
        """Fast memory per rank that the tables take: rows, caches, and FBGEMM's row-wise state and map of rows behind a cache.

        Args:
            placement: of stock TorchRec, or "fae".
            budget_bytes: for hot rows, cached rows or whole tables.
            cold_tier: of "fae", as in `fae`.
        """
        tables, ranks = self.job.tables, self.job.ranks
        rows = sum(table.rows for table in tables) / ranks
        if self.hardware.device == "cpu" or placement == "hbm":
            whole = tables.total_bytes / ranks
            return whole + (budget_bytes if placement == "fae" else 0.0) if self.hardware.device == "cpu" else whole
        if placement == "host":
            return 0.0
        beside = _ROWWISE_STATE_BYTES * sum(table.rows for table in tables if table.optimizer is Optimizer.ROWWISE_ADAGRAD) / ranks
        if placement in ("uvm_caching", "prefetch") or (placement == "fae" and cold_tier == "uvm_caching"):
            beside += 4 * rows
        return beside + (0.0 if placement == "uvm" else budget_bytes)

    def cache_misses(self, cache_bytes: float) -> float:
        """Distinct rows of a step's samples of all ranks that an LRU cache does not hold, all ranks' caches taken as one.

        By Che's approximation: rows stay for as many samples as fill the cache with distinct rows.
        """
        return float(self._missed(cache_bytes).sum())

    def _missed(self, cache_bytes: float) -> Floats:
        """The same by table."""
        slot = float((self._weights @ [table.rows for table in self.job.tables]) / sum(table.rows for table in self.job.tables))
        room = cache_bytes * self.job.ranks / (slot + _CACHE_SLOT_BYTES)
        if room >= sum(table.rows for table in self.job.tables):
            return np.zeros(len(self.job.tables))
        curves = self.access.curves
        lasting = _solved(lambda samples: sum(float(curve.distinct(samples).sum()) for curve in curves), room)
        step = self.job.batch_size * self.job.ranks
        return np.array([float(curve.distinct(step) @ _unseen(curve, lasting)) for curve in curves])

    def _dense(self) -> Work:
        gradients = self._links.reduced(4 * self.job.dense_parameters) if self.job.ranks > 1 else {}
        return Work(flops=6 * self.job.dense_macs * self.job.batch_size).plus(**gradients)

    def _given_bytes(self, bags: Floats, ids: Floats) -> float:
        """Bytes of what the tables give (fp32): a row for each bag, or unpooled for each id; both by table."""
        return 4 * float(np.where(self._pooled, bags, ids) @ self._dims)

    def _packed_bags(self, cold_mass: Sequence[Floats]) -> Floats:
        """Bags of each feature that the cold tier is given, by table: pooled ones with a cold id, where the feature with most decides."""
        each = self._lookups / self._features  # ids of a bag
        chance = np.array([float(of_table.sum()) for of_table in cold_mass])
        with_cold = np.where(each > 1, 1 - (1 - np.minimum(chance, 1.0)) ** each, each * chance)
        return self.job.batch_size * np.where(self._pooled, with_cold.max(where=self._pooled, initial=0.0), 1.0)

    def _exchange(self, features: Floats, ids: Floats, bags: float | Floats | None = None, parts: int = 1) -> dict[str, float]:
        """The input dist of ids and lengths, and the rows that are given and their gradients, all to all.

        Args:
            features: of each table.
            ids: of each table.
            bags: of each feature; a sample's each if it is not given.
            parts: rows that are sent for each bag.
        """
        if self.job.ranks == 1 or not features.any():
            return {}
        size = self.job.batch_size if bags is None else bags
        inputs = _ID_BYTES * float(ids.sum()) + _LENGTH_BYTES * float((size * features).sum())
        others = (self.job.ranks - 1) / self.job.ranks
        sent = self._links.to_others((inputs + 2 * self._given_bytes(parts * size * features, ids)) * others)
        return {**sent, "collectives": sent["collectives"] + 4}

    def _hot_exchange(self, own: Floats, union: Floats) -> tuple[Floats, dict[str, float]]:
        """Rows that each rank updates, by table, and what the exchange of touched rows and of their gradients sends."""
        ranks = self.job.ranks
        if ranks == 1:
            return own, {}
        widths = 4 * self._dims
        slots = self._links.to_others((_SLOT_BYTES * float(own.sum()) + 3 * 8) * (ranks - 1))
        if ranks > 2 and 2 * float(union @ widths) < ranks * float(own @ widths):
            rows, gradients = union, self._links.reduced(float(union @ widths))
        else:
            rows, gradients = own * ranks, self._links.to_others(float(own @ widths) * (ranks - 1))
        sent = {key: slots[key] + gradients[key] for key in slots}
        return rows, {**sent, "collectives": 3.0}

    def _lookup(self, tier: str, lookups: Floats, updated: Floats) -> dict[str, float]:
        """Forward reads a row for each lookup, the fused update reads and writes each touched one with its state."""
        rows = float(lookups.sum() + updated.sum())
        moved = float(lookups @ self._weights + 2 * updated @ self._rows_bytes)
        return {f"{tier}_rows": rows, f"{tier}_bytes": moved}

    def _uvm(self, lookups: Floats, touched: Floats) -> dict[str, float]:
        """Rows cross the link once for the forward (the GPU's own cache has the repeated ones), and twice for the update."""
        return {"link_bytes": float(touched @ self._link_bytes(3.0)), "fast_rows": float(lookups.sum())}

    def _link_bytes(self, times: float) -> Floats:
        """Bytes that a row's weights take over the link, so many times, and state that is not row-wise twice."""
        state = self._rows_bytes - self._weights
        found: Floats = times * self._weights + 2 * np.where(state > _ROWWISE_STATE_BYTES, state, 0.0)
        return found

    def _distinct_rows(self, masses: Sequence[Floats], samples: float, parts: Sequence[Floats] | None = None) -> Floats:
        """By table, the distinct rows that samples look up; `parts` as of AccessCurve.distinct."""
        some: Sequence[Floats | None] = parts or [None] * len(masses)
        found = (curve.distinct(samples, mass, part) for curve, mass, part in zip(self.access.curves, masses, some, strict=True))
        return np.array([float(of_table.sum()) for of_table in found])

    def _tier_masses(self, share: HotShare, kind: Kind) -> tuple[list[Floats], list[Floats]]:
        """Where the lookups of one kind of samples go, by table and bin: those of hot rows, and those of cold rows.

        All that goes to cold rows is of cold samples. A bin that is partly hot has both.
        """
        whole = share.of(kind)
        if kind == "hot" or share.hot_inputs >= 1:
            return list(whole), [np.zeros_like(of_table) for of_table in whole]
        curves = self.access.curves
        cold = [curve.mass * (1 - part) / (1 - share.hot_inputs) for curve, part in zip(curves, share.hot, strict=True)]
        return [np.maximum(of_table - of_cold, 0.0) for of_table, of_cold in zip(whole, cold, strict=True)], cold


@dataclass(frozen=True)
class _Links:
    """How what a rank sends is divided between the ranks of its host and other hosts."""

    ranks: int
    per_host: int

    def to_others(self, sent: float) -> dict[str, float]:
        """Of what goes to all other ranks alike."""
        inside = (self.per_host - 1) / (self.ranks - 1) if self.ranks > 1 else 0.0
        return {"intra_bytes": sent * inside, "inter_bytes": sent * (1 - inside) if self.ranks > 1 else 0.0, "collectives": 1.0}

    def reduced(self, size: float) -> dict[str, float]:
        """Of an all-reduce of so many bytes: within each host, then between hosts by all its ranks, a part each; 2(n-1)/n in all."""
        hosts = -(-self.ranks // self.per_host)
        inter = 2 * (hosts - 1) / hosts * size / self.per_host
        return {"intra_bytes": 2 * (self.ranks - 1) / self.ranks * size - inter, "inter_bytes": inter, "collectives": 1.0}


def _unseen(curve: AccessCurve, samples: float) -> Floats:
    """By bin, the chance that a row is not among what so many samples look up."""
    unseen: Floats = np.exp(curve.lookups * samples * np.log1p(-np.minimum(curve.chance, 1 - 1e-12)))
    return unseen


def _solved(rising: Callable[[float], float], wanted: float) -> float:
    """Where a rising function of the samples takes a value, within a thousandth."""
    low, high = 0.0, 1.0
    while rising(high) < wanted and high < 1e15:
        low, high = high, 4 * high
    while high - low > 1e-3 * high and high > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return high
