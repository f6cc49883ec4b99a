"""What the stock planner is shown of hot/cold collections, pass by pass, and the owners of what no pass plans."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.sharding_plan import placement as device_of_rank
from torchrec.distributed.types import EnumerableShardingSpec, ModuleSharder, ParameterSharding, ShardMetadata

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind, TableSpec
from fae_torchrec.distributed.constraints import TierOptions

Parameters = dict[str, nn.Parameter]


def showing(sharder: ModuleSharder[nn.Module], view: Callable[[Parameters], Parameters]) -> ModuleSharder[nn.Module]:
    """A copy of a sharder that shows the stock planner other parameters than the module's."""
    shown = copy.copy(sharder)
    shown.shardable_parameters = lambda module: view(sharder.shardable_parameters(module))
    return shown


def nothing(_: Parameters) -> Parameters:
    """A view of no parameter: the module still counts as one that is sharded, so stock does not reserve memory for it as dense."""
    return {}


def cold_tables(placement: RowPlacement) -> Callable[[Parameters], Parameters]:
    """A view of the tables that the cold tier or stock sharding holds: all but the all-hot ones."""
    all_hot = {table.name for table in placement.tables if placement.kind(table.name) is TableKind.HOT}
    return lambda parameters: {name: parameter for name, parameter in parameters.items() if name not in all_hot}


def left_tables(placement: RowPlacement) -> Callable[[Parameters], Parameters]:
    """A view of the tables that the placement does not know."""
    placed = set(placement.tables.names)
    return lambda parameters: {name: parameter for name, parameter in parameters.items() if name not in placed}


def only_cold_tables(placement: RowPlacement) -> Callable[[Parameters], Parameters]:
    """A view of the tables that the cold tier holds."""
    cold = {table.name for table in placement.tables if placement.kind(table.name) is not TableKind.HOT}
    return lambda parameters: {name: parameter for name, parameter in parameters.items() if name in cold}


def hot_rows(placement: RowPlacement) -> Callable[[Parameters], Parameters]:
    """A view of the hot rows [hot rows, dim] as tables of their own."""
    rows = {table.name: placement.hot_rows(table.name) for table in placement.tables}
    return lambda parameters: {name: _cut(parameter, rows[name]) for name, parameter in parameters.items() if rows.get(name)}


def all_hot_homes(
    placement: RowPlacement, tables: Iterable[TableSpec], cold: Mapping[str, ParameterSharding], topology: Topology, options: TierOptions
) -> dict[str, ParameterSharding]:
    """Gives every all-hot table's home to the rank that holds the fewest bytes of homes, large tables first.

    Args:
        placement: where the rows live.
        tables: all placed tables of the model.
        cold: the cold tier's plan by table.
        topology: of all ranks.
        options: what the hot tier may be.
    """
    homes = {}
    tables = sorted(tables, key=lambda table: (-table.total_bytes, table.name))
    held = [0] * topology.world_size
    for table in (table for table in tables if table.name in cold):
        for shard in cold[table.name].sharding_spec.shards:
            held[shard.placement.rank()] += shard.shard_sizes[0] * table.row_bytes
    for table in tables:
        if placement.kind(table.name) is not TableKind.HOT:
            continue
        owner = held.index(min(held))
        held[owner] += table.total_bytes
        where = device_of_rank(topology.compute_device, owner, topology.local_world_size)
        shard = ShardMetadata(shard_offsets=[0, 0], shard_sizes=[table.rows, table.dim], placement=where)
        homes[table.name] = ParameterSharding(
            sharding_type=options.sharding_types[0],
            compute_kernel=options.kernels[0],
            ranks=[owner],
            sharding_spec=EnumerableShardingSpec([shard]),
        )
    return homes


def _cut(parameter: nn.Parameter, rows: int) -> nn.Parameter:
    cut = nn.Parameter(torch.empty((rows, parameter.shape[1]), dtype=parameter.dtype, device="meta"))
    cut.__dict__.update(parameter.__dict__)  # apply_optimizer_in_backward's mark: stock's storage estimate reads it
    return cut
