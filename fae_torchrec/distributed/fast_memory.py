"""The bytes of fast memory that the hot tier takes on a rank, and what it leaves of a topology to the cold tier."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
from torchrec.distributed.types import ParameterSharding

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSpec
from fae_torchrec.modules.slot_index import COMPACT_ABOVE_ROWS, slot_index_kind


def fast_memory_bytes(
    placement: RowPlacement,
    collections: Sequence[Iterable[TableSpec]] | None = None,
    hot: Mapping[str, ParameterSharding] | None = None,
    rank: int = 0,
    compact_index_above_rows: int = COMPACT_ABOVE_ROWS,
    device_type: str = "cpu",
) -> dict[str, int]:
    """Bytes of fast memory that the hot tier takes on one rank.

    Args:
        placement: where the rows live.
        collections: the placed tables of each collection, as the model has them (a placement does not depend on dim, dtype and
            optimizer). Default: the placement's own tables, as one collection.
        hot: sharding of the hot rows by table; none if they are replicated.
        rank: whose memory; replicated rows take the same on every rank.
        compact_index_above_rows: see `new_slot_index`.
        device_type: where the hot tier lies; decides on the kind of index.

    Returns:
        By purpose: "hot rows" (weights and optimizer state) and "index" (from id to slot).
    """
    collections = [list(tables) for tables in collections or [placement.tables]]
    # A collection without a hot row is stock's.
    hot_cold = [tables for tables in collections if any(placement.hot_rows(table.name) for table in tables)]
    return {
        "hot rows": sum(_hot_rows(placement, table, hot, rank) * table.row_bytes for tables in hot_cold for table in tables),
        "index": sum(_index_bytes(placement, tables, device_type, compact_index_above_rows) for tables in hot_cold),
    }


def fast_memory_of_ranks(
    placement: RowPlacement,
    collections: Sequence[Iterable[TableSpec]],
    hot: Mapping[str, ParameterSharding],
    ranks: int,
    compact_index_above_rows: int,
    device_type: str,
) -> list[dict[str, int]]:
    """`fast_memory_bytes` of every rank, in one pass over the shards."""
    collections = [list(tables) for tables in collections]
    parts = fast_memory_bytes(placement, collections, None, 0, compact_index_above_rows, device_type)
    if not hot:
        return [parts] * ranks
    held = [0] * ranks
    for table in (table for tables in collections for table in tables if table.name in hot):
        for shard in hot[table.name].sharding_spec.shards:
            held[shard.placement.rank()] += shard.shard_sizes[0] * table.row_bytes
    return [{**parts, "hot rows": count} for count in held]


def left_of(topology: Topology, taken: Callable[[int], Mapping[str, int]]) -> Topology:
    """A copy of a topology without the fast memory that the hot tier takes.

    Args:
        topology: of all ranks; stays as it is.
        taken: rank -> bytes by purpose.

    Raises:
        PlannerError: a rank has less.
    """
    left = copy.deepcopy(topology)
    memory = "hbm" if topology.compute_device == "cuda" else "ddr"
    for device in left.devices:
        parts, has = taken(device.rank), getattr(device.storage, memory)
        if sum(parts.values()) > has:
            listed = ", ".join(f"{purpose} {count:,}" for purpose, count in parts.items())
            raise PlannerError(
                f"the hot tier takes {sum(parts.values()):,} bytes on rank {device.rank} ({listed}), which has {has:,} bytes of {memory}; "
                "select the hot set under a smaller budget",
                PlannerErrorType.INSUFFICIENT_STORAGE,
            )
        setattr(device.storage, memory, has - sum(parts.values()))
    return left


def shard_rows(sharding: ParameterSharding, rank: int) -> int:
    """Rows of a table that one rank holds under a sharding by table or by row."""
    return sum(shard.shard_sizes[0] for shard in sharding.sharding_spec.shards if shard.placement.rank() == rank)


def _hot_rows(placement: RowPlacement, table: TableSpec, hot: Mapping[str, ParameterSharding] | None, rank: int) -> int:
    if not hot or not placement.hot_rows(table.name):
        return placement.hot_rows(table.name)
    return shard_rows(hot[table.name], rank)


def _index_bytes(placement: RowPlacement, placed: Iterable[TableSpec], device_type: str, compact_above_rows: int) -> int:
    tables = list(placed)
    rows, slots = sum(table.rows for table in tables), sum(placement.hot_rows(table.name) for table in tables)
    return slot_index_kind(rows, slots, device_type, compact_above_rows).bytes_of(rows, slots)
