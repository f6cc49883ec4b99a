"""Where the fast memory of a rank goes, purpose by purpose, and how many bytes that leaves to hot rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType, StorageReservation
from torchrec.distributed.types import ModuleSharder

from fae_torchrec.core.expected_access import AccessRates, TableAccess
from fae_torchrec.core.tables import Optimizer, TableSpec
from fae_torchrec.distributed.fast_memory import shard_rows
from fae_torchrec.distributed.model_check import PlannedCollection
from fae_torchrec.distributed.tier_plans import TierPlans, by_table
from fae_torchrec.modules.slot_index import slot_index_kind

_UVM = (EmbeddingComputeKernel.FUSED_UVM.value, EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
_STATE_BYTES = 4  # FBGEMM keeps a row-wise optimizer state on the device, wherever the rows lie
_VALUE_BYTES, _ID_BYTES = 4, 8


@dataclass(frozen=True)
class RankMemory:
    """The fast memory of one rank.

    Attributes:
        rank: whose.
        memory: "hbm", or "ddr" where the ranks train on a CPU.
        total: bytes that the topology gives the rank.
        parts: bytes by purpose. "reserve", "dense" and "kjt" are TorchRec's storage reservation; "stock tables" and "cold tier" what the
            stock planner expects these to take, their lookups and caches included; "cold optimizer state", "staging", "hot lookups",
            "index" and "hot rows" what it does not know of.
    """

    rank: int
    memory: str
    total: int
    parts: Mapping[str, int]

    @property
    def left(self) -> int:
        """Bytes that no part takes; below 0 if they do not fit."""
        return self.total - sum(self.parts.values())

    def listed(self) -> str:
        """The parts as text."""
        return ", ".join(f"{purpose} {count:,}" for purpose, count in self.parts.items() if count)


def reserved_memory(
    module: nn.Module,
    sharders: Sequence[ModuleSharder[nn.Module]],
    topology: Topology,
    batch_size: int | None,
    reservation: StorageReservation,
    constraints: Mapping[str, ParameterConstraints],
) -> list[dict[str, int]]:
    """What TorchRec's storage reservation takes of every rank: "reserve", "dense" and "kjt".

    Raises:
        PlannerError: more than there is.
    """
    memory = fast_memory_name(topology)
    reserved = reservation.reserve(topology, batch_size or BATCH_SIZE, module, list(sharders), dict(constraints))
    known = {"dense": 0, "kjt": 0}
    if isinstance(reservation, HeuristicalStorageReservation):  # the only one that reserves by purpose; the names are TorchRec 1.8's
        storages = {"dense": reservation._dense_storage, "kjt": reservation._kjt_storage}
        known = {purpose: getattr(storage, memory) for purpose, storage in storages.items() if storage is not None}
    found = []
    for before, after in zip(topology.devices, reserved.devices, strict=True):
        taken = getattr(before.storage, memory) - getattr(after.storage, memory)
        found.append({"reserve": taken - sum(known.values()), **known})
    return found


def planned_memory(
    topology: Topology,
    reserved: Sequence[Mapping[str, int]],
    collections: Sequence[PlannedCollection],
    plans: TierPlans,
    hot_tier: Sequence[Mapping[str, int]],
    lookups: Sequence[int],
) -> list[RankMemory]:
    """The fast memory of every rank under a plan.

    Args:
        topology: of all ranks.
        reserved: by rank, from `reserved_memory`.
        collections: that our sharders take.
        plans: of the tiers.
        hot_tier: by rank, what the hot tier takes ("hot rows", "index", "staging").
        lookups: by rank, what hot rows take while they are looked up and updated.
    """
    memory, ranks = fast_memory_name(topology), range(topology.world_size)
    placed = {table.name: table for collection in collections for table in collection.placed}
    stock, cold, state = ([0] * topology.world_size for _ in range(3))
    for name, by_rank in plans.storage.items():
        for rank, storage in by_rank.items():
            (cold if name in placed else stock)[rank] += getattr(storage, memory)
    if memory == "hbm":
        for name, sharding in by_table(plans.cold, collections).items():
            if sharding.compute_kernel in _UVM and placed[name].optimizer is Optimizer.ROWWISE_ADAGRAD:
                for rank in set(sharding.ranks or ()):
                    state[rank] += _STATE_BYTES * shard_rows(sharding, rank)
    return [
        RankMemory(
            rank,
            memory,
            getattr(topology.devices[rank].storage, memory),
            {
                **reserved[rank],
                "stock tables": stock[rank],
                "cold tier": cold[rank],
                "cold optimizer state": state[rank],
                "hot lookups": lookups[rank],
                **hot_tier[rank],
            },
        )
        for rank in ranks
    ]


def lookup_bytes(access: Mapping[str, TableAccess], collections: Iterable[PlannedCollection], batch_size: int) -> int:
    """Bytes on a rank of the ids of hot lookups, of what they give (pooled or not) and of its gradients; the same for every hot tier.

    Args:
        access: expected accesses by table.
        collections: that the tables are in.
        batch_size: per rank.
    """
    unpooled = {table.name for collection in collections if not collection.pooled for table in collection.placed}
    total = 0.0
    for name, one in access.items():
        rows = one.ids_per_sample if name in unpooled else len(one.table.feature_names)
        total += batch_size * 2 * (rows * one.table.dim * _VALUE_BYTES + one.ids_per_sample * _ID_BYTES)
    return math.ceil(total)


def gradient_bytes(rates: AccessRates, dim: int, batch_size: int, ranks: int) -> int:
    """Bytes on a rank of the gradients of replicated hot rows: its own, and at most twice the union of all ranks' while they are exchanged.

    Args:
        rates: of the hot rows.
        dim: of the table.
        batch_size: per rank.
        ranks: that train.
    """
    return math.ceil((rates.distinct(batch_size) + 2 * rates.distinct(batch_size * ranks)) * dim * _VALUE_BYTES)


def room_beside_index(
    left: int, collections: Iterable[Iterable[TableSpec]], compact_above_rows: int, device_type: str, copies: int = 1
) -> int:
    """The largest budget of hot rows that, with the index that so many rows need at most, does not exceed some bytes.

    Args:
        left: bytes on a rank.
        collections: the placed tables of each collection.
        compact_above_rows: see `new_slot_index`.
        device_type: where the hot tier lies.
        copies: ranks that share the hot rows (the index is on each of them).

    Returns:
        Bytes of hot rows, over all of the ranks that share them; 0 if there is no room.
    """
    sizes = [(sum(table.rows for table in tables), min(table.row_bytes for table in tables)) for tables in map(list, collections) if tables]
    low, high = 0, max(left, 0) * copies
    while low < high:
        middle = (low + high + 1) // 2
        index = sum(_index_bytes(rows, min(rows, middle // row_bytes), device_type, compact_above_rows) for rows, row_bytes in sizes)
        if -(-middle // copies) + index <= left:
            low = middle
        else:
            high = middle - 1
    return low


def no_room(memory: RankMemory, needed: int, what: str) -> PlannerError:
    """The error that a rank has no room for the hot rows that there must be."""
    most = max(memory.parts, key=lambda purpose: memory.parts[purpose])
    return PlannerError(
        f"budget 'auto': rank {memory.rank} has {max(memory.left, 0):,} of {memory.total:,} bytes of {memory.memory} left for hot rows "
        f"({memory.listed()}), {what} need {needed:,}; most of it goes to {most!r}. Remedies: a smaller batch_size, a smaller dense part, "
        "a smaller cold cache (cold_cache_bytes), a storage_reservation with a smaller percentage, tables taken out of stock_tables, a "
        "smaller pinned_max_rows, more ranks with a sharded hot_tier, or devices with more memory (the Topology's hbm_cap)",
        PlannerErrorType.INSUFFICIENT_STORAGE,
    )


def fast_memory_name(topology: Topology) -> str:
    """TorchRec's name of the memory that the hot tier lies in: "hbm" or "ddr"."""
    return "hbm" if topology.compute_device == "cuda" else "ddr"


def _index_bytes(rows: int, slots: int, device_type: str, compact_above_rows: int) -> int:
    """Bytes of an index of at most so many slots: a hash of fewer slots can take more than the bitmap that comes after it."""
    few = min(slots, max(rows // 16 - 1, 0))
    return max(slot_index_kind(rows, each, device_type, compact_above_rows).bytes_of(rows, each) for each in (few, slots))
