"""FAEShardingPlanner: a TorchRec ShardingPlanner that puts popular rows into a hot tier; stock planning does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingPlanner

from fae_torchrec.core.byte_size import parse_budget
from fae_torchrec.core.errors import FingerprintError
from fae_torchrec.core.hot_set import HotSet, Policy, Sizes
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableKind, TableSpec
from fae_torchrec.distributed import hot_plan
from fae_torchrec.distributed.explanation import PlanExplanation, explain
from fae_torchrec.distributed.hot_choice import HotOptions
from fae_torchrec.distributed.input_error import input_error
from fae_torchrec.distributed.local_ranks import from_first_rank
from fae_torchrec.distributed.model_check import PlannedCollection
from fae_torchrec.distributed.model_planner import ModelPlan, ModelPlanner, PlannerOptions
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.distributed.tier_plans import by_table, check_planned
from fae_torchrec.distributed.tier_settings import cold_cache_size
from fae_torchrec.modules.slot_index import COMPACT_ABOVE_ROWS

HotTier = Literal["auto", "replicated", "table_wise", "row_wise"]


class FAEShardingPlanner(ShardingPlanner):
    """Plans the hot tier by the placement and the cold tier by TorchRec's own EmbeddingShardingPlanner.

    Every EmbeddingBagCollection and EmbeddingCollection with a hot row gets the hot/cold module; one without gets the stock module, its
    tables planned as cold ones; all other modules get the stock plan. The hot tier's bytes are taken from every rank's storage before
    the stock planner plans the cold tier. `from_profile` makes a planner that chooses the placement as well.

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
            of all rows, or, with a profile, room for the cold rows of two batches; tables whose constraints have `cache_params` keep
            these), or, on a single rank with "uvm", a staging area for batches that a loader has split ahead (`Staging`; None: room for
            the cold rows of two batches, see `staging_bytes`; 0: none). With "host" on a CPU it is for tests (None: none).
        profile: of the placed tables; with it the stock planner is told what `from_profile` tells it of the cold ones.
        **stock: further arguments of EmbeddingShardingPlanner (`storage_reservation`, `proposer`, `partitioner`, `stats`, ...). Where
            tables times ranks are many the search is bounded unless a `proposer` is given (`stock_search`).

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
        profile: PopularityProfile | None = None,
        **stock: Any,
    ) -> None:
        left = tuple(stock_tables)
        both = sorted(set(left) & set(placement.tables.names))
        if both:
            raise input_error(
                f"stock_tables {both} are tables of the row placement {placement.fingerprint}; a table is either placed or left to stock "
                "sharding: take the names out of stock_tables, or make the placement without these tables (model_tables(model, leave=...))"
            )
        given = PlannerOptions(
            topology or _default_topology(),
            batch_size,
            constraints or {},
            cold_tier,
            left,
            compact_index_above_rows,
            cold_cache_bytes,
            stock,
        )
        self._planner = ModelPlanner(given, placement=placement, hot_tier=hot_tier, profile=profile)
        self._made: tuple[ModelPlan, Callable[[], PlanExplanation]] | None = None

    @classmethod
    def from_profile(
        cls,
        profile: PopularityProfile,
        topology: Topology | None = None,
        batch_size: int | None = None,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        *,
        budget: int | str = "auto",
        policy: Policy = "input_aware",
        pinned_max_rows: int = 1024,
        sizes: Sizes = "exact",
        hot_tier: HotTier = "auto",
        cold_tier: str = "auto",
        stock_tables: Iterable[str] = (),
        compact_index_above_rows: int = COMPACT_ABOVE_ROWS,
        cold_cache_bytes: int | None = None,
        **stock: Any,
    ) -> FAEShardingPlanner:
        """A planner that chooses for the whole model: bytes of hot rows, the rows, the hot tier, and how the cold tables are sharded.

        The stock planner is told what the profile lets expect of the cold tables: cold ids per sample, and how often a cache of cold rows
        misses. After `plan` or `collective_plan`, `placement` and `explanation` say what was chosen.

        Args:
            profile: popularity of the rows of all tables but `stock_tables`. `collective_plan` takes rank 0's; all ranks need the same.
            topology: as above; its bandwidths decide where there is a choice (`hardware_topology` makes one of a preset).
            batch_size: as above.
            constraints: as above.
            budget: of hot rows, weights and optimizer state: "auto", bytes, "64MiB", or "10%" of the placed tables. "auto" is what the
                storage reservation (dense part, KJTs, a margin), stock tables, the cold tier with its caches and states, lookups and the
                index leave of the rank that has least; tables that fit whole become all hot. On a CPU, where hot rows lie in the same
                memory as cold ones, it is at most 10 % of the placed tables (or what the pinned tables need).
            policy: as `select_hot_set`.
            pinned_max_rows: as `select_hot_set`.
            sizes: as `select_hot_set`.
            hot_tier: "auto" replicates, unless a device cannot hold what is worth being hot and the bytes of a step take less time with
                the rows spread over the ranks.
            cold_tier: as above.
            stock_tables: as above.
            compact_index_above_rows: as above.
            cold_cache_bytes: as above.
            **stock: as above.

        Raises:
            ConfigError: the budget cannot be read.
            PlannerError: as above; when planning, also: a rank has no room for hot rows (says what takes the rest).
        """
        left = tuple(stock_tables)
        both = sorted(set(left) & set(profile.tables.names))
        if both:
            raise input_error(
                f"stock_tables {both} are tables of the popularity profile {profile.fingerprint}; a table is either placed or left to "
                "stock sharding: take the names out of stock_tables, or profile without these tables (model_tables(model, leave=...))"
            )
        parse_budget(budget, 1)  # an unreadable budget fails here
        options = PlannerOptions(
            topology or _default_topology(),
            batch_size,
            constraints or {},
            cold_tier,
            left,
            compact_index_above_rows,
            cold_cache_bytes,
            stock,
        )
        planner = cls.__new__(cls)
        hot = HotOptions(budget, policy, pinned_max_rows, sizes, hot_tier)
        planner._planner, planner._made = ModelPlanner(options, profile=profile, hot=hot), None
        return planner

    @property
    def placement(self) -> RowPlacement:
        """Where the rows live: as given, or as chosen by the last plan.

        Raises:
            PlannerError: the planner chooses it, and has not planned yet.
        """
        given = self._planner.placement
        return self._last()[0].settings.placement if given is None else given

    @property
    def hot_set(self) -> HotSet | None:
        """What the chosen placement was made of; None if the placement was given or nothing was planned yet."""
        return None if self._made is None else self._made[0].hot_set

    @property
    def cold_cache_bytes(self) -> int | None:
        """Fast memory of a rank for cached cold rows under the last plan, as the argument of this name; None without a cache."""
        return cold_cache_size(self._last()[0].settings, self._planner.options.topology.world_size)

    @property
    def explanation(self) -> PlanExplanation:
        """Why the last plan is as it is.

        Raises:
            PlannerError: nothing was planned yet.
        """
        return self._last()[1]()

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """Plans one model; no collective.

        Args:
            module: the unsharded model.
            sharders: `get_fae_sharders()`.

        Returns:
            A ShardingPlan whose entries for hot/cold collections are FAEModuleShardingPlan.

        Raises:
            FingerprintError: the placement, or the profile, belongs to other tables than the model's.
            PlannerError: a table uses what hot/cold tables do not support (says which and what to do), or the hot rows do not fit into
                a rank's storage.
        """
        return self._joined(self._planner.plan(module, sharders))

    def collective_plan(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]] | None = None, pg: dist.ProcessGroup | None = None
    ) -> ShardingPlan:
        """Plans on rank 0 and broadcasts; every rank adds its own copy of a placement that was given.

        Args:
            module: the unsharded model.
            sharders: default `get_fae_sharders()`.
            pg: default the whole world.

        Raises:
            FingerprintError: as `plan`, or the ranks hold different placements or profiles; on every rank alike.
            PlannerError: as `plan`; on every rank alike.
        """
        sharders = get_fae_sharders() if sharders is None else sharders
        pg = pg or dist.group.WORLD
        if pg is None:
            raise input_error(
                "collective_plan needs a process group and none is initialized; call torch.distributed.init_process_group, or use plan()"
            )
        self._check_same_source(pg)  # first: with the same placement, the ranks fail or pass alike
        given = self._planner.placement
        if given is not None:
            self._planner.checked(module, sharders)
        made = from_first_rank(lambda: self._planner.plan(module, sharders).without(given), pg)
        return self._joined(made.having(given))

    def _joined(self, made: ModelPlan) -> ShardingPlan:
        """One plan of both tiers and the placement."""
        settings, collections, options = made.settings, made.collections, self._planner.options
        placement, cold = settings.placement, made.plans.cold
        hot_rows, homes = by_table(made.plans.hot, collections), by_table(cold, collections)
        check_planned(settings, hot_rows, homes)
        tables = [table for collection in collections for table in collection.placed]
        if hot_rows:
            homes.update({table.name: hot_rows[table.name] for table in tables if placement.kind(table.name) is TableKind.HOT})
        else:
            homes.update(hot_plan.all_hot_homes(placement, tables, homes, options.topology, settings.hot_options))
        plan = dict(cold.plan)
        for collection in collections:
            if collection.hot_cold:
                own = {**cold.plan.get(collection.path, {}), **homes}
                plan[collection.path] = FAEModuleShardingPlan(
                    {name: own[name] for name in collection.names},
                    placement,
                    settings.hot_tier,
                    {table.name: hot_rows[table.name] for table in collection.placed if table.name in hot_rows},
                    options.compact_index_above_rows,
                    settings.cold_options.on_host,
                    _staging_rows(made, collection),
                )
        joined = ShardingPlan(plan)
        self._made = made, lambda: _explained(joined, made, options)
        return joined

    def _last(self) -> tuple[ModelPlan, Callable[[], PlanExplanation]]:
        if self._made is None:
            raise input_error("nothing was planned yet; call plan() or collective_plan() first")
        return self._made

    def _check_same_source(self, pg: dist.ProcessGroup) -> None:
        what, mine = self._planner.source
        everyone: list[tuple[str, str]] = [(what, mine)] * pg.size()
        if pg.size() > 1:
            dist.all_gather_object(everyone, (what, mine), group=pg)
        if len(set(everyone)) > 1:
            listed = [
                fingerprint if {kind for kind, _ in everyone} == {what} else f"{kind} {fingerprint}" for kind, fingerprint in everyone
            ]
            raise FingerprintError(
                f"the ranks hold different {what}s: {listed} by rank; load the same {what.split()[-1]} file on every rank"
            )


def _staging_rows(made: ModelPlan, collection: PlannedCollection) -> int:
    """Rows of a half of one collection's staging area: its share of the bytes is that of its cold tables."""
    placement, staging_bytes = made.settings.placement, made.settings.staging_bytes

    def cold_tables(placed: Iterable[TableSpec]) -> list[TableSpec]:
        return [table for table in placed if placement.kind(table.name) is not TableKind.HOT]

    mine = cold_tables(collection.placed)
    if not staging_bytes or not mine:
        return 0
    whole = sum(table.total_bytes for each in made.collections if each.hot_cold for table in cold_tables(each.placed))
    share = sum(table.total_bytes for table in mine) / whole
    return int(share * staging_bytes / (2 * max(table.row_bytes for table in mine)))


def _explained(plan: ShardingPlan, made: ModelPlan, options: PlannerOptions) -> PlanExplanation:
    return explain(
        plan,
        made.collections,
        made.settings.placement,
        made.settings.hot_tier,
        ranks=options.topology.world_size,
        device=options.topology.compute_device,
        batch_size=options.batch_size or BATCH_SIZE,
        memory=made.memory,
        choices=made.choices,
        access=made.access,
        stock_bytes={name: {rank: held.hbm + held.ddr for rank, held in ranks.items()} for name, ranks in made.plans.storage.items()},
        pinned=made.hot_set.pinned if made.hot_set is not None else (),
    )


def _default_topology() -> Topology:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Topology(world_size=world_size, local_world_size=get_local_size(world_size), compute_device=device)
