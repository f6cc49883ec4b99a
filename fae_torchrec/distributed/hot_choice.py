"""How many bytes the hot set gets, which rows it takes, and whether they are replicated: chosen from what a rank has left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.types import CollectiveType

from fae_torchrec.core.byte_size import AUTO
from fae_torchrec.core.candidates import pinned_tables
from fae_torchrec.core.expected_access import TableAccess, expected_access
from fae_torchrec.core.hot_set import HotSet, Policy, Sizes, select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet
from fae_torchrec.core.tier_traffic import TierTraffic, tier_traffic
from fae_torchrec.core.whole_tables import with_whole_tables
from fae_torchrec.distributed.constraints import HOT_TIERS
from fae_torchrec.distributed.model_check import PlannedCollection
from fae_torchrec.distributed.rank_memory import RankMemory, gradient_bytes, lookup_bytes, no_room, room_beside_index
from fae_torchrec.distributed.stock_search import MOST_SHARDS

CPU_SHARE = 0.1
"""On a CPU hot rows lie in the same memory as the cold ones: `auto` takes this share of the placed tables, not all that is left."""

_SHARDED_SHARE = 0.9  # of what the ranks have left: whole tables do not divide evenly among them


@dataclass(frozen=True)
class Choice:
    """Something that the planner chose.

    Attributes:
        what: was to be chosen.
        chosen: what was.
        because: why.
    """

    what: str
    chosen: str
    because: str


@dataclass(frozen=True)
class HotOptions:
    """What the user says about the hot set.

    Attributes:
        budget: as `parse_budget` reads it, per rank if the rows are replicated, else over all ranks.
        policy: as `select_hot_set`.
        pinned_max_rows: as `select_hot_set`.
        sizes: as `select_hot_set`.
        hot_tier: "replicated", "table_wise", "row_wise", or "auto".
    """

    budget: int | str = AUTO
    policy: Policy = "input_aware"
    pinned_max_rows: int = 1024
    sizes: Sizes = "exact"
    hot_tier: str = "auto"


@dataclass(frozen=True, eq=False)
class HotChoice:
    """The hot rows of a model.

    Attributes:
        placement: where the rows live.
        hot_tier: "replicated", "table_wise" or "row_wise".
        access: expected accesses by table.
        choices: what was chosen, and why.
        hot_set: what the placement was made of.
    """

    placement: RowPlacement
    hot_tier: str
    access: Mapping[str, TableAccess]
    choices: tuple[Choice, ...]
    hot_set: HotSet


def choose_hot_rows(
    profile: PopularityProfile,
    options: HotOptions,
    collections: Sequence[PlannedCollection],
    memories: Sequence[RankMemory],
    topology: Topology,
    batch_size: int | None,
    compact_above_rows: int,
    budget: int | None,
) -> HotChoice:
    """Chooses budget, hot rows and hot tier; a pure function of its arguments.

    Args:
        profile: of the model's placed tables.
        options: the user's.
        collections: that our sharders take.
        memories: of every rank, planned without a hot row; not looked at if a budget is given.
        topology: of all ranks.
        batch_size: per rank; None for TorchRec's default.
        compact_above_rows: as FAEShardingPlanner.
        budget: bytes that were given; None for what a rank has left.

    Raises:
        BudgetError: a given budget cannot hold the pinned tables.
        PlannerError: a rank has no room for them.
    """
    ranks, batch, device = topology.world_size, batch_size or BATCH_SIZE, topology.compute_device
    everything = expected_access(profile, no_rows(profile.tables).hot_ids) if budget is None else {}

    selected: dict[int, HotSet] = {}

    def candidate(hot_tier: str) -> _Candidate:
        replicated = hot_tier == "replicated"
        room, size, why = budget, budget, "it was given"
        if room is None:
            lookups = lookup_bytes(everything, collections, batch)
            if replicated:
                lookups += sum(gradient_bytes(one.seen, one.table.dim, batch, ranks) for one in everything.values())
            tight = _with_lookups(min(memories, key=lambda memory: memory.left), lookups)
            room, why = _left_for_hot(profile.tables, options, collections, tight, device, compact_above_rows, 1 if replicated else ranks)
            size = min(room, profile.tables.total_bytes)
        assert room is not None and size is not None
        if size not in selected:
            selected[size] = select_hot_set(
                profile, size, policy=options.policy, pinned_max_rows=options.pinned_max_rows, sizes=options.sizes
            )
        hot_set = selected[size]
        if budget is None:
            hot_inputs = hot_set.hot_inputs

            def seconds(one: TableAccess) -> float:
                return _seconds(tier_traffic({one.table.name: one}, hot_inputs, batch, ranks, hot_tier), topology)

            hot_set = with_whole_tables(
                hot_set,
                profile,
                lambda one: gradient_bytes(one.unseen, one.table.dim, batch, ranks) if replicated else 0,
                lambda one: seconds(one.all_hot()) <= seconds(one),
                room,
            )
        access = expected_access(profile, hot_set.hot_ids)
        return _Candidate(
            hot_tier, hot_set, access, why, _seconds(tier_traffic(access, hot_set.hot_inputs, batch, ranks, hot_tier), topology)
        )

    best, tier_why = candidate("replicated" if options.hot_tier == "auto" else options.hot_tier), "it was given"
    if options.hot_tier == "auto":
        if ranks == 1:
            tier_why = "there is one rank"
        elif budget is not None:
            tier_why = "the budget that was given is per rank"
        elif device == "cpu":
            tier_why = "on a CPU another rank's memory is no faster than this one's"
        else:
            found = [best, *map(candidate, _sharded_tiers(device, len(profile.tables), ranks))]
            found = [each for each in found if each.hot_tier != "table_wise" or _divides(each.hot_set, ranks)]
            best = min(found, key=lambda each: each.seconds)
            tier_why = "expected bytes hot, and the time of a step's embedding bytes: " + "; ".join(
                f"{each.hot_tier} {each.hot_set.used_bytes:,} bytes, {each.seconds * 1e3:.3g} ms" for each in found
            )
    hot_set = best.hot_set
    each = "per rank" if best.hot_tier == "replicated" else "over all ranks"
    choices = (
        Choice("budget", f"{hot_set.budget_bytes:,} bytes {each}", best.budget_why),
        Choice("hot rows", f"{hot_set.used_bytes:,} bytes", _rows_why(hot_set, profile)),
        Choice("hot tier", best.hot_tier, tier_why),
    )
    return HotChoice(RowPlacement.from_hot_set(hot_set), best.hot_tier, best.access, choices, hot_set)


class _Candidate(NamedTuple):
    """A hot set under one hot tier, and the time of the embeddings' bytes of a step with it."""

    hot_tier: str
    hot_set: HotSet
    access: dict[str, TableAccess]
    budget_why: str
    seconds: float


def _left_for_hot(
    tables: TableSet,
    options: HotOptions,
    collections: Sequence[PlannedCollection],
    tight: RankMemory,
    device: str,
    compact_above_rows: int,
    copies: int,
) -> tuple[int, str]:
    """The bytes of hot rows, and why so many."""
    room = room_beside_index(tight.left, [collection.placed for collection in collections], compact_above_rows, device, copies)
    if copies > 1:
        room = int(room * _SHARDED_SHARE)
    pinned = sum(table.total_bytes for table in pinned_tables(tables, options.pinned_max_rows))
    if room < max(pinned, 1):
        raise no_room(tight, max(pinned, 1), "the tables that are always hot (pinned_max_rows)" if pinned else "hot rows")
    if device == "cpu" and max(int(CPU_SHARE * tables.total_bytes), pinned, 1) < room:
        return max(int(CPU_SHARE * tables.total_bytes), pinned, 1), (
            f"on a CPU hot rows lie in the same memory as cold ones, so they get {CPU_SHARE:.0%} of the placed tables' bytes (more if the "
            "pinned tables need it), not all that is left; give a budget for another share"
        )
    why = f"rank {tight.rank} has {tight.left:,} of {tight.total:,} bytes of {tight.memory} left, the index among them ({tight.listed()})"
    if room >= tables.total_bytes:
        why += f", and all tables need {tables.total_bytes:,}"
    return room, why


def no_rows(tables: TableSet) -> RowPlacement:
    """The placement of tables without a hot row: what is planned to see what a rank has left."""
    ids = {name: np.zeros(0, dtype=np.int64) for name in tables.names}
    return RowPlacement(tables=tables, hot_ids=ids, hot_set_fingerprint="none", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


def _with_lookups(memory: RankMemory, lookups: int) -> RankMemory:
    return replace(memory, parts={**memory.parts, "hot lookups": lookups})


def _sharded_tiers(device: str, tables: int, ranks: int) -> list[str]:
    """The sharded tiers of a device; by row only where a shard of every table on every rank is not too much to plan."""
    known = [tier for tier, on in HOT_TIERS if on == device and tier != "replicated"]
    return [tier for tier in known if tier != "row_wise" or tables * ranks <= MOST_SHARDS]


def _divides(hot_set: HotSet, ranks: int) -> bool:
    """Whether no table's hot rows are more than a rank's share of the budget, so that whole tables can be dealt to the ranks."""
    most = max(len(hot_set.hot_ids[table.name]) * table.row_bytes for table in hot_set.tables)
    return most <= hot_set.budget_bytes / ranks


def _holds_all(hot_set: HotSet, profile: PopularityProfile) -> bool:
    """Whether every row that was seen is hot."""
    return all(len(hot_set.hot_ids[name]) >= counts.ids.size for name, counts in profile.counts.items()) and hot_set.coverage == 1


def _rows_why(hot_set: HotSet, profile: PopularityProfile) -> str:
    whole = sum(len(hot_set.hot_ids[table.name]) == table.rows for table in hot_set.tables)
    if whole == len(hot_set.tables):
        return "every row of every table fits; nothing is cold, and stock sharding without a cold tier may do as well"
    how = "rows that together make the most samples all hot" if hot_set.policy == "input_aware" else "rows above FAE's access threshold"
    seen = "every row that the sample saw fits" if _holds_all(hot_set, profile) else how
    if profile.sample_rate < 1 and _holds_all(hot_set, profile):
        seen += f" (a sampling rate above {profile.sample_rate:g} would find more)"
    return f"{seen}; {whole} of {len(hot_set.tables)} tables fit whole"


def _seconds(traffic: TierTraffic, topology: Topology) -> float:
    """Time of a step's bytes by the topology's bandwidths, which are in bytes per millisecond."""
    cuda = topology.compute_device == "cuda"
    fast = topology.hbm_mem_bw if cuda else topology.ddr_mem_bw
    slow = topology.hbm_to_ddr_mem_bw if cuda else topology.ddr_mem_bw
    network = topology.comms_bandwidths.get_bw(topology.local_world_size, topology.world_size, CollectiveType.ALL_TO_ALL)
    return traffic.seconds(fast * 1e3, slow * 1e3, network * 1e3)
