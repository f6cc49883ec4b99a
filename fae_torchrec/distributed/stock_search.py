"""How far the stock planner searches: as far as it likes while tables times ranks are few, and no further than pays beyond that."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType

from fae_torchrec.core.tables import TableSpec

MOST_SHARDS = 4096
"""Tables times ranks above which not every table is planned by row: TorchRec 1.8 takes half a millisecond to enumerate and rate a shard."""

MOST_WORK = 1 << 17
"""Tables times tables times ranks above which the search is bounded: TorchRec 1.8's greedy proposer tries each sharding type of each table,
and every try is a new partition of all shards. 100 tables on 8 ranks take it some seconds, 300 tables on 8 ranks more than a minute."""

_TRIES = 16  # proposals in a row that are no better, after which the greedy proposer gives up


class StockSearch(NamedTuple):
    """What the stock planner is given, and why.

    Attributes:
        constraints: by table.
        arguments: further arguments of EmbeddingShardingPlanner.
        reason: what was bounded; empty if nothing was.
    """

    constraints: Mapping[str, ParameterConstraints]
    arguments: Mapping[str, Any]
    reason: str


def stock_search(
    tables: Iterable[TableSpec],
    topology: Topology,
    constraints: Mapping[str, ParameterConstraints],
    given: Mapping[str, Any],
    chosen: Iterable[str] = (),
    *,
    rough: bool = False,
) -> StockSearch:
    """Bounds a large search where the user has not said how to search.

    In a large search a table is sharded by row only if it is larger than a rank's fair share of all these tables, or could not else be
    balanced; the other tables are given table-wise, of which a rank holds several. The proposers are the uniform and the greedy one, which
    gives up when proposals in a row are no better.

    Args:
        tables: that the stock planner plans.
        topology: of all ranks.
        constraints: by table; kept as they are where the user chose sharding types.
        given: the user's own arguments of EmbeddingShardingPlanner; a proposer among them is kept.
        chosen: names of tables whose sharding types the user chose.
        rough: also gives tables table-wise that are larger than a rank's share, up to a quarter of its memory: quick, and no rank gets
            less than in a better balanced plan.
    """
    tables = list(tables)
    if len(tables) * topology.world_size <= MOST_SHARDS and len(tables) ** 2 * topology.world_size <= MOST_WORK:
        return StockSearch(constraints, given, "")
    share, kept = sum(table.total_bytes for table in tables) / topology.world_size, set(chosen)
    if rough:
        share = max(share, min(device.storage.ddr for device in topology.devices) / 4)
    bounded = dict(constraints)
    by_table = 0
    for table in tables:
        types = bounded[table.name].sharding_types if table.name in bounded else None
        if table.name in kept or not types or ShardingType.TABLE_WISE.value not in types or table.total_bytes > share:
            continue
        bounded[table.name] = copy.copy(bounded[table.name])
        bounded[table.name].sharding_types = [ShardingType.TABLE_WISE.value]
        by_table += 1
    reason = (
        f"{len(tables):,} tables on {topology.world_size:,} ranks: the {by_table:,} tables that are smaller than a rank's share of "
        f"{share:,.0f} bytes are sharded table-wise, and by row only the others"
    )
    arguments = dict(given)
    if not arguments.get("proposer"):
        arguments["proposer"] = [UniformProposer(), GreedyProposer(threshold=_TRIES), GreedyProposer(use_depth=False, threshold=_TRIES)]
        reason += f"; proposers give up after {_TRIES} proposals that are no better (give `proposer` to search further)"
    return StockSearch(bounded, arguments, reason)
