"""The stock plans of a placement's tiers, and the bytes that they take on every rank."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType, ShardingOption, Storage
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ParameterSharding, ShardingPlan

from fae_torchrec.core.tables import TableKind, TableSpec
from fae_torchrec.distributed import hot_plan
from fae_torchrec.distributed.constraints import TierOptions
from fae_torchrec.distributed.fast_memory import fast_memory_of_ranks, left_of
from fae_torchrec.distributed.model_check import PlannedCollection, is_ours
from fae_torchrec.distributed.stock_search import stock_search
from fae_torchrec.distributed.tier_settings import TierSettings

Sharders = Sequence[ModuleSharder[nn.Module]]
# Arguments of the stock planner that know the cold tier's tables and have no say over sharded hot rows.
_COLD_ONLY = ("enumerator", "plan_loader", "callbacks")


@dataclass(frozen=True)
class TierPlans:
    """The stock plans of the hot rows (empty if they are replicated) and of everything else.

    Attributes:
        hot: of the hot rows.
        cold: of all else that is sharded.
        hot_storage: rank -> bytes by memory that the stock planner expects the sharded hot rows to take, lookups included.
        storage: table -> rank -> the same of everything else.
        reasons: why the search was bounded, if it was.
    """

    hot: ShardingPlan
    cold: ShardingPlan
    hot_storage: Mapping[int, Storage] = field(default_factory=dict)
    storage: Mapping[str, Mapping[int, Storage]] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


class TierPlanner:
    """Plans the tiers of one placement; a pure function of its arguments.

    Args:
        settings: of the placement.
        topology: of all ranks.
        stock: the user's arguments of EmbeddingShardingPlanner, `batch_size` among them.
        compact_index_above_rows: as FAEShardingPlanner.
        chosen: names of tables whose sharding types the user chose.
        rough: plans to see what is left, not to train; see `stock_search`.
    """

    def __init__(
        self,
        settings: TierSettings,
        topology: Topology,
        stock: Mapping[str, Any],
        compact_index_above_rows: int,
        chosen: Iterable[str] = (),
        *,
        rough: bool = False,
    ) -> None:
        self._rough = rough
        self._settings, self._topology, self._stock = settings, topology, dict(stock)
        if rough:  # not the plan that the user's callbacks, loader and stats are for
            self._stock = {name: value for name, value in stock.items() if name not in ("callbacks", "plan_loader")} | {"stats": []}
        self._compact_above, self._chosen = compact_index_above_rows, frozenset(chosen)

    @property
    def cold_beside_device(self) -> bool:
        """Whether the cold tier's kernels run on the CPU while the ranks train on another device."""
        return self._settings.cold_options.on_host and self._topology.compute_device != "cpu"

    def plan(self, module: nn.Module, sharders: Sharders, collections: Sequence[PlannedCollection]) -> TierPlans:
        """Plans both tiers.

        Raises:
            PlannerError: something does not fit.
        """
        settings, placement = self._settings, self._settings.placement
        placed = [collection.placed for collection in collections]
        hot, hot_storage = ShardingPlan({}), dict[str, dict[int, Storage]]()
        if settings.hot_tier != "replicated":
            hot, hot_storage = self._plan_hot_rows(module, sharders, placed)
        rows = by_table(hot, collections)
        taken = self.fast_memory(placed, rows)
        topology = left_of(self._topology, lambda rank: taken[rank])
        tables = [table for table in chain.from_iterable(placed) if placement.kind(table.name) is not TableKind.HOT]
        search = stock_search(tables, topology, settings.cold_constraints, self._stock, self._chosen, rough=self._rough)
        view = hot_plan.left_tables(placement) if self.cold_beside_device else hot_plan.cold_tables(placement)
        rest, storage = _planned(module, _showing(sharders, view), topology, search.constraints, search.arguments)
        if self.cold_beside_device:
            on_host, host_storage = self._plan_on_host(module, sharders, search.constraints, search.arguments)
            rest, storage = _merged(rest, on_host), {**storage, **host_storage}
        by_rank: dict[int, Storage] = defaultdict(lambda: Storage(0, 0))
        for rank, taken in chain.from_iterable(ranks.items() for ranks in hot_storage.values()):
            by_rank[rank] += taken
        return TierPlans(hot, rest, dict(by_rank), storage, (search.reason,) if search.reason else ())

    def _plan_on_host(
        self, module: nn.Module, sharders: Sharders, constraints: Mapping[str, ParameterConstraints], arguments: Mapping[str, Any]
    ) -> tuple[ShardingPlan, dict[str, dict[int, Storage]]]:
        """The stock plan of the cold tables as tables of a machine without accelerators."""
        host = Topology(
            world_size=self._topology.world_size,
            local_world_size=self._topology.local_world_size,
            compute_device="cpu",
            ddr_cap=min(device.storage.ddr for device in self._topology.devices),
        )
        stock = {name: value for name, value in arguments.items() if name not in _COLD_ONLY}
        shown = _showing(sharders, hot_plan.only_cold_tables(self._settings.placement), hot_plan.nothing)
        return _planned(module, shown, host, constraints, stock)

    def _plan_hot_rows(
        self, module: nn.Module, sharders: Sharders, placed: Sequence[Iterable[TableSpec]]
    ) -> tuple[ShardingPlan, dict[str, dict[int, Storage]]]:
        index = {"index": self.fast_memory(placed, {})[0]["index"]}
        settings = self._settings
        shown = _showing(sharders, hot_plan.hot_rows(settings.placement), hot_plan.nothing)
        tables = [table for table in chain.from_iterable(placed) if settings.placement.hot_rows(table.name)]
        search = stock_search(tables, self._topology, settings.hot_constraints, self._stock, self._chosen)
        stock = {name: value for name, value in search.arguments.items() if name not in _COLD_ONLY}
        return _planned(module, shown, left_of(self._topology, lambda _: index), search.constraints, stock)

    def fast_memory(self, placed: Sequence[Iterable[TableSpec]], hot: Mapping[str, ParameterSharding]) -> list[dict[str, int]]:
        """Bytes of fast memory that the hot tier takes on every rank, by purpose; arguments as `fast_memory_of_ranks`."""
        settings, topology = self._settings, self._topology
        ranks = topology.world_size
        taken = fast_memory_of_ranks(settings.placement, placed, hot, ranks, self._compact_above, topology.compute_device)
        return [{**parts, "staging": settings.staging_bytes} for parts in taken] if settings.staging_bytes else taken


def by_table(plan: ShardingPlan, collections: Iterable[PlannedCollection]) -> dict[str, ParameterSharding]:
    """The sharding of placed tables, whose names are unique over all collections."""
    parts = [(plan.plan.get(collection.path, {}), collection.placed) for collection in collections]
    return {table.name: part[table.name] for part, placed in parts for table in placed if table.name in part}


def check_planned(settings: TierSettings, hot_rows: Mapping[str, ParameterSharding], homes: Mapping[str, ParameterSharding]) -> None:
    """Checks what arguments of the stock planner such as an enumerator of one's own could have changed.

    Raises:
        PlannerError: a table is planned as its tier may not be.
    """
    placement = settings.placement
    for table in placement.tables:
        if placement.kind(table.name) is not TableKind.HOT:
            _check_tier(table.name, "cold", homes.get(table.name), settings.cold_options)
        if placement.hot_rows(table.name) and settings.hot_tier != "replicated":
            _check_tier(table.name, "hot", hot_rows.get(table.name), settings.hot_options)


def _planned(
    module: nn.Module, sharders: Sharders, topology: Topology, constraints: Mapping[str, ParameterConstraints], stock: Mapping[str, Any]
) -> tuple[ShardingPlan, dict[str, dict[int, Storage]]]:
    """The stock planner's plan, and the storage it expects each table to take: table -> rank -> bytes."""
    storage: dict[str, dict[int, Storage]] = {}

    def remember(plan: list[ShardingOption]) -> list[ShardingOption]:
        for option in plan:
            ranks = storage.setdefault(option.name, {})
            for shard in option.shards:
                assert shard.rank is not None and shard.storage is not None
                ranks[shard.rank] = ranks.get(shard.rank, Storage(0, 0)) + shard.storage
        return plan

    # Proposers keep what they have found: each plan gets its own.
    arguments = {**stock, "callbacks": [*(stock.get("callbacks") or []), remember], "proposer": copy.deepcopy(stock.get("proposer"))}
    plan = EmbeddingShardingPlanner(topology=topology, constraints=dict(constraints), **arguments).plan(module, list(sharders))
    return plan, storage


def _showing(sharders: Sharders, view: Any, others: Any = None) -> list[ModuleSharder[nn.Module]]:
    """The sharders, ours with a view of their parameters, and the others with one too if it is given."""
    views = [(sharder, view if is_ours(sharder) else others) for sharder in sharders]
    return [sharder if view is None else hot_plan.showing(sharder, view) for sharder, view in views]


def _merged(one: ShardingPlan, other: ShardingPlan) -> ShardingPlan:
    """Two plans of different tables as one."""
    paths = [*one.plan, *(path for path in other.plan if path not in one.plan)]
    return ShardingPlan({path: EmbeddingModuleShardingPlan({**one.plan.get(path, {}), **other.plan.get(path, {})}) for path in paths})


def _check_tier(table: str, tier: str, planned: ParameterSharding | None, options: TierOptions) -> None:
    got = None if planned is None else (planned.sharding_type, planned.compute_kernel)
    if got is None or got[0] not in options.sharding_types or got[1] not in options.kernels:
        raise PlannerError(
            f"table {table!r}: the stock planner gave {got or 'nothing'} for its {tier} tier, which may have {options}; leave out the "
            "argument of FAEShardingPlanner that changes what the stock planner does (enumerator, callbacks, plan_loader, a constraint's "
            "device_group), or leave the table to stock sharding (stock_tables)",
            PlannerErrorType.STRICT_CONSTRAINTS,
        )
