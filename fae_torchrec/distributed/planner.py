"""FAEShardingPlanner: a TorchRec ShardingPlanner that puts popular rows into a hot tier; stock planning does the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ParameterSharding, ShardingPlan, ShardingPlanner

from fae_torchrec.core.errors import FingerprintError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind, TableSet, TableSpec
from fae_torchrec.distributed import hot_plan
from fae_torchrec.distributed.constraints import TierOptions, cold_cache, cold_constraints, cold_options, hot_constraints, hot_options
from fae_torchrec.distributed.fast_memory import fast_memory_bytes, left_of
from fae_torchrec.distributed.input_error import input_error
from fae_torchrec.distributed.local_ranks import from_first_rank
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.refusals import (
    check_collection,
    check_constraints,
    check_not_ours,
    check_optimizer,
    check_tables,
    check_weight_decay,
    fused_optimizer,
)
from fae_torchrec.distributed.sharder import FAEEmbeddingBagCollectionSharder, FAEEmbeddingCollectionSharder, get_fae_sharders
from fae_torchrec.distributed.staging_room import staging_bytes
from fae_torchrec.modules.model_tables import COLLECTIONS, sharded_modules, table_configs, table_specs
from fae_torchrec.modules.slot_index import COMPACT_ABOVE_ROWS

# Arguments of the stock planner that know the cold tier's tables and have no say over sharded hot rows.
_COLD_ONLY = ("enumerator", "plan_loader", "callbacks")


class _Collection(NamedTuple):
    """A collection that our sharders take, as far as planning looks at it."""

    path: str
    names: tuple[str, ...]
    placed: tuple[TableSpec, ...]
    hot_cold: bool


class FAEShardingPlanner(ShardingPlanner):
    """Plans the hot tier by the placement and the cold tier by TorchRec's own EmbeddingShardingPlanner.

    Every EmbeddingBagCollection and EmbeddingCollection with a hot row gets the hot/cold module; one without gets the stock module, its
    tables planned as cold ones; all other modules get the stock plan. The hot tier's bytes are taken from every rank's storage before
    the stock planner plans the cold tier.

    Args:
        placement: where the rows of the model's tables live; the same on every rank.
        topology: as for EmbeddingShardingPlanner. Default: this process group on CUDA if there is any, else CPU.
        batch_size: per rank.
        constraints: as for EmbeddingShardingPlanner, by table.
        cold_tier: "host" (looked up on the CPU), "uvm", "uvm_caching" or "auto" (CPU: host; one CUDA rank: uvm; several: uvm_caching).
        hot_tier: "replicated" (every rank holds every hot row), "table_wise" or, on CUDA, "row_wise" (the stock planner spreads the hot
            rows over the ranks, for hot sets larger than one device).
        stock_tables: names of tables left to stock sharding; the placement does not know them.
        compact_index_above_rows: rows of a collection above which its index from id to slot is a bitmap (1.5 bits a row) instead of a plain
            array (4 bytes a row, faster).
        cold_cache_bytes: fast memory per rank for cold rows on their way: the cache of `uvm_caching` (None: TorchRec's default, a fifth
            of all rows; tables whose constraints have `cache_params` keep these), or, on a single rank with "uvm", a staging area for
            batches that a loader has split ahead (`Staging`; None: room for the cold rows of two batches, see `staging_bytes`; 0: none).
            With "host" on a CPU it is for tests (None: none).
        **stock: further arguments of EmbeddingShardingPlanner (`storage_reservation`, `proposer`, `partitioner`, `stats`, ...).

    Raises:
        PlannerError: a tier does not exist on the device, or a constraint does not fit.
    """

    def __init__(
        self,
        placement: RowPlacement,
        topology: Topology | None = None,
        batch_size: int | None = None,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        cold_tier: str = "auto",
        hot_tier: str = "replicated",
        stock_tables: Iterable[str] = (),
        compact_index_above_rows: int = COMPACT_ABOVE_ROWS,
        cold_cache_bytes: int | None = None,
        **stock: Any,
    ) -> None:
        self._placement = placement
        self._topology = topology or _default_topology()
        self._hot_tier = hot_tier
        self._stock_tables = tuple(stock_tables)
        self._compact_above = compact_index_above_rows
        self._stock = {"batch_size": batch_size, **stock}
        self._cold_options = cold_options(cold_tier, self._topology.compute_device, self._topology.world_size)
        self._hot_options = hot_options(hot_tier, self._topology.compute_device)
        check_constraints(placement, constraints or {})
        cache = cold_cache(placement, self._cold_options, cold_cache_bytes, self._topology.world_size)
        self._staging_bytes = 0
        if self._cold_options.staged and hot_tier == "replicated" and self._topology.world_size == 1:
            staged = self._topology.compute_device == "cuda" and cold_cache_bytes is None
            self._staging_bytes = staging_bytes(placement, batch_size, constraints) if staged else cold_cache_bytes or 0
        # On a single rank all sharding types hold the same rows, and table-wise has the least to do (`LocalTier`).
        types = self._cold_options.sharding_types[: 1 if self._topology.world_size == 1 else None]
        self._cold_constraints = cold_constraints(placement, self._cold_options, constraints, cache, types)
        self._hot_constraints = hot_constraints(placement, self._hot_options, constraints)
        both = sorted(set(self._stock_tables) & set(placement.tables.names))
        if both:
            raise input_error(
                f"stock_tables {both} are tables of the row placement {placement.fingerprint}; a table is either placed or left to stock "
                "sharding: take the names out of stock_tables, or make the placement without these tables (model_tables(model, leave=...))"
            )

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """Plans one model; no collective.

        Args:
            module: the unsharded model.
            sharders: `get_fae_sharders()`.

        Returns:
            A ShardingPlan whose entries for hot/cold collections are FAEModuleShardingPlan.

        Raises:
            FingerprintError: the placement belongs to other tables than the model's.
            PlannerError: a table uses what hot/cold tables do not support (says which and what to do), or the hot rows do not fit into
                a rank's storage.
        """
        collections = self._checked(module, sharders)
        hot, cold = self._plan_tiers(module, sharders, collections)
        return self._joined(hot, cold, collections)

    def collective_plan(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]] | None = None, pg: dist.ProcessGroup | None = None
    ) -> ShardingPlan:
        """Plans both tiers on rank 0 and broadcasts them; every rank adds its own copy of the placement.

        Args:
            module: the unsharded model.
            sharders: default `get_fae_sharders()`.
            pg: default the whole world.

        Raises:
            FingerprintError: as `plan`, or the ranks hold different placements; on every rank alike.
            PlannerError: as `plan`; on every rank alike.
        """
        sharders = get_fae_sharders() if sharders is None else sharders
        pg = pg or dist.group.WORLD
        if pg is None:
            raise input_error(
                "collective_plan needs a process group and none is initialized; call torch.distributed.init_process_group, or use plan()"
            )
        self._check_same_placement(pg)  # first: with the same placement, the ranks fail or pass alike
        collections = self._checked(module, sharders)
        hot, cold = from_first_rank(lambda: self._plan_tiers(module, sharders, collections), pg)
        return self._joined(hot, cold, collections)

    def _plan_tiers(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]], collections: list[_Collection]
    ) -> tuple[ShardingPlan, ShardingPlan]:
        """The stock plans of the hot rows (empty if they are replicated) and of everything else."""
        placed = [collection.placed for collection in collections]
        replicated = self._hot_tier == "replicated"
        hot = ShardingPlan({}) if replicated else self._plan_hot_rows(module, sharders, placed)
        rows = _by_table(hot, collections)
        topology = left_of(self._topology, lambda rank: self._fast_memory(placed, rows, rank))
        planner = EmbeddingShardingPlanner(topology=topology, constraints=self._cold_constraints, **self._stock)
        if self._cold_beside_device:
            rest = planner.plan(module, self._showing(sharders, hot_plan.left_tables(self._placement)))
            return hot, _merged(rest, self._plan_on_host(module, sharders))
        return hot, planner.plan(module, self._showing(sharders, hot_plan.cold_tables(self._placement)))

    @property
    def _cold_beside_device(self) -> bool:
        """Whether the cold tier's kernels run on the CPU while the ranks train on another device."""
        return self._cold_options.on_host and self._topology.compute_device != "cpu"

    @staticmethod
    def _showing(sharders: list[ModuleSharder[nn.Module]], view: Any, others: Any = None) -> list[ModuleSharder[nn.Module]]:
        """The sharders, ours with a view of their parameters, and the others with one too if it is given."""
        views = [(sharder, view if _is_ours(sharder) else others) for sharder in sharders]
        return [sharder if view is None else hot_plan.showing(sharder, view) for sharder, view in views]

    def _plan_on_host(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """The stock plan of the cold tables as tables of a machine without accelerators."""
        host = Topology(
            world_size=self._topology.world_size,
            local_world_size=self._topology.local_world_size,
            compute_device="cpu",
            ddr_cap=min(device.storage.ddr for device in self._topology.devices),
        )
        stock = {name: value for name, value in self._stock.items() if name not in _COLD_ONLY}
        shown = self._showing(sharders, hot_plan.only_cold_tables(self._placement), hot_plan.nothing)
        return EmbeddingShardingPlanner(topology=host, constraints=self._cold_constraints, **stock).plan(module, shown)

    def _plan_hot_rows(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]], placed: list[tuple[TableSpec, ...]]
    ) -> ShardingPlan:
        index = {"index": self._fast_memory(placed)["index"]}
        shown = self._showing(sharders, hot_plan.hot_rows(self._placement), hot_plan.nothing)
        stock = {name: value for name, value in self._stock.items() if name not in _COLD_ONLY}
        topology = left_of(self._topology, lambda _: index)
        return EmbeddingShardingPlanner(topology=topology, constraints=self._hot_constraints, **stock).plan(module, shown)

    def _fast_memory(
        self, placed: list[tuple[TableSpec, ...]], hot: Mapping[str, ParameterSharding] | None = None, rank: int = 0
    ) -> dict[str, int]:
        parts = fast_memory_bytes(self._placement, placed, hot, rank, self._compact_above, self._topology.compute_device)
        return {**parts, "staging": self._staging_bytes} if self._staging_bytes else parts

    def _staging_rows(self, collections: list[_Collection], collection: _Collection) -> int:
        """Rows of a half of one collection's staging area: its share of the bytes is that of its cold tables."""
        cold = {path: self._cold_tables(placed) for path, _, placed, hot_cold in collections if hot_cold}
        whole = sum(table.total_bytes for tables in cold.values() for table in tables)
        mine = cold[collection.path]
        if not self._staging_bytes or not mine:
            return 0
        share = sum(table.total_bytes for table in mine) / whole
        return int(share * self._staging_bytes / (2 * max(table.row_bytes for table in mine)))

    def _cold_tables(self, placed: Iterable[TableSpec]) -> list[TableSpec]:
        return [table for table in placed if self._placement.kind(table.name) is not TableKind.HOT]

    def _joined(self, hot: ShardingPlan, cold: ShardingPlan, collections: list[_Collection]) -> ShardingPlan:
        """One plan of both tiers and the placement."""
        hot_rows, homes = _by_table(hot, collections), _by_table(cold, collections)
        self._check_planned(hot_rows, homes)
        tables = [table for collection in collections for table in collection.placed]
        if hot_rows:
            homes.update({table.name: hot_rows[table.name] for table in tables if self._placement.kind(table.name) is TableKind.HOT})
        else:
            homes.update(hot_plan.all_hot_homes(self._placement, tables, homes, self._topology, self._hot_options))
        plan = dict(cold.plan)
        for collection in collections:
            if collection.hot_cold:
                own = {**cold.plan.get(collection.path, {}), **homes}
                plan[collection.path] = FAEModuleShardingPlan(
                    {name: own[name] for name in collection.names},
                    self._placement,
                    self._hot_tier,
                    {table.name: hot_rows[table.name] for table in collection.placed if table.name in hot_rows},
                    self._compact_above,
                    self._cold_options.on_host,
                    self._staging_rows(collections, collection),
                )
        return ShardingPlan(plan)

    def _checked(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[_Collection]:
        """The collections to plan; raises for what cannot be planned, before any collective."""
        ours = {sharder.module_type: sharder for sharder in sharders if _is_ours(sharder)}
        modules = list(sharded_modules(module, {sharder.module_type for sharder in sharders}.difference(COLLECTIONS)))
        self._check_stock_tables(modules)
        collections = []
        for path, part in modules:
            if type(part) not in ours:
                check_not_ours(path, part, self._placement)
                continue
            check_tables(part, self._stock_tables)
            names = tuple(config.name for config in table_configs(part))
            hot_cold = any(name in self._placement.tables.names and self._placement.hot_rows(name) for name in names)
            if hot_cold:
                check_collection(path, part, self._stock_tables)
            default = fused_optimizer(part, ours[type(part)], self._stock_tables)
            placed = tuple(table_specs(part, default, self._stock_tables))
            if self._cold_beside_device and placed and not hot_cold:
                raise input_error(
                    f"module {path!r}: the placement has no hot row of its tables {[table.name for table in placed]}, and with "
                    "cold_tier='host' TorchRec would have to look the whole module up on the host; choose cold_tier='uvm', give the "
                    "placement a hot row of them (a larger budget), or leave them to stock sharding (stock_tables)"
                )
            collections.append(_Collection(path, names, placed, hot_cold))
        tables = TableSet(tuple(chain.from_iterable(collection.placed for collection in collections)))
        self._check_tables(tables)
        for table in tables:
            if self._placement.hot_rows(table.name):
                check_optimizer(table, self._topology.compute_device)
            if self._cold_beside_device and self._placement.kind(table.name) is not TableKind.HOT:
                check_optimizer(table, "cpu")
        if self._hot_tier == "replicated":
            parts = dict(modules)
            for collection in collections:
                part = parts[collection.path]
                hot = [table for table in collection.placed if self._placement.hot_rows(table.name)]
                check_weight_decay(part, ours[type(part)], hot, self._topology.compute_device)
        return collections

    def _check_stock_tables(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        known = {config.name for _, part in modules for inner in part.modules() for config in table_configs(inner)}
        unknown = sorted(set(self._stock_tables) - known)
        if unknown:
            raise input_error(f"stock_tables {unknown} are not tables of the model, which has {sorted(known)}; correct the names")

    def _check_tables(self, tables: TableSet) -> None:
        try:
            self._placement.check_tables(tables)
        except FingerprintError as error:
            unplaced = [name for name in tables.names if name not in self._placement.tables.names]
            if not unplaced:
                raise
            raise FingerprintError(
                f"{error}; or leave the tables that the placement does not know to stock sharding: FAEShardingPlanner(..., "
                f"stock_tables={unplaced})"
            ) from None

    def _check_planned(self, hot_rows: Mapping[str, ParameterSharding], homes: Mapping[str, ParameterSharding]) -> None:
        """Checks what arguments of the stock planner such as an enumerator of one's own could have changed."""
        for table in self._placement.tables:
            if self._placement.kind(table.name) is not TableKind.HOT:
                _check_tier(table.name, "cold", homes.get(table.name), self._cold_options)
            if self._placement.hot_rows(table.name) and self._hot_tier != "replicated":
                _check_tier(table.name, "hot", hot_rows.get(table.name), self._hot_options)

    def _check_same_placement(self, pg: dist.ProcessGroup) -> None:
        mine = self._placement.fingerprint
        everyone: list[str] = [mine] * pg.size()
        if pg.size() > 1:
            dist.all_gather_object(everyone, mine, group=pg)
        if len(set(everyone)) > 1:
            raise FingerprintError(
                f"the ranks hold different row placements: {everyone} by rank; load the same placement file on every rank"
            )


def _is_ours(sharder: ModuleSharder[nn.Module]) -> bool:
    return isinstance(sharder, FAEEmbeddingBagCollectionSharder | FAEEmbeddingCollectionSharder)


def _merged(one: ShardingPlan, other: ShardingPlan) -> ShardingPlan:
    """Two plans of different tables as one."""
    paths = [*one.plan, *(path for path in other.plan if path not in one.plan)]
    return ShardingPlan({path: EmbeddingModuleShardingPlan({**one.plan.get(path, {}), **other.plan.get(path, {})}) for path in paths})


def _by_table(plan: ShardingPlan, collections: Iterable[_Collection]) -> dict[str, ParameterSharding]:
    """The sharding of placed tables, whose names are unique over all collections."""
    parts = [(plan.plan.get(collection.path, {}), collection.placed) for collection in collections]
    return {table.name: part[table.name] for part, placed in parts for table in placed if table.name in part}


def _check_tier(table: str, tier: str, planned: ParameterSharding | None, options: TierOptions) -> None:
    got = None if planned is None else (planned.sharding_type, planned.compute_kernel)
    if got is None or got[0] not in options.sharding_types or got[1] not in options.kernels:
        raise PlannerError(
            f"table {table!r}: the stock planner gave {got or 'nothing'} for its {tier} tier, which may have {options}; leave out the "
            "argument of FAEShardingPlanner that changes what the stock planner does (enumerator, callbacks, plan_loader, a constraint's "
            "device_group), or leave the table to stock sharding (stock_tables)",
            PlannerErrorType.STRICT_CONSTRAINTS,
        )


def _default_topology() -> Topology:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Topology(world_size=world_size, local_world_size=get_local_size(world_size), compute_device=device)
