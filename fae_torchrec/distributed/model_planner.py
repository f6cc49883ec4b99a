"""Plans a whole model on one process: the hot rows where they are to be chosen, both tiers, and where each rank's memory goes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType, Storage, StorageReservation
from torchrec.distributed.types import ModuleSharder

from fae_torchrec.core.byte_size import parse_budget
from fae_torchrec.core.expected_access import TableAccess, expected_access
from fae_torchrec.core.hot_set import HotSet
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet
from fae_torchrec.distributed.hot_choice import Choice, HotChoice, HotOptions, choose_hot_rows, no_rows
from fae_torchrec.distributed.model_check import PlannedCollection, checked_collections, placed_collections
from fae_torchrec.distributed.rank_memory import RankMemory, fast_memory_name, gradient_bytes, lookup_bytes, planned_memory, reserved_memory
from fae_torchrec.distributed.refusals import check_constraints
from fae_torchrec.distributed.tier_plans import Sharders, TierPlanner, TierPlans, by_table
from fae_torchrec.distributed.tier_settings import TierSettings, tier_settings

_SHARES = (1.0, 0.95, 0.85, 0.7)  # of what is left: the partitioner may not find a way to fill every rank to the brim


@dataclass(frozen=True)
class PlannerOptions:
    """What FAEShardingPlanner was given, but for the hot rows; see there."""

    topology: Topology
    batch_size: int | None
    constraints: Mapping[str, ParameterConstraints]
    cold_tier: str
    stock_tables: tuple[str, ...]
    compact_index_above_rows: int
    cold_cache_bytes: int | None
    stock: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ModelPlan:
    """The plans of a model's tiers and what they follow from.

    Attributes:
        settings: of the placement.
        collections: that our sharders take.
        plans: of the tiers.
        memory: fast memory of every rank.
        choices: what was chosen, and why.
        access: expected accesses by table; None where no profile was given.
        hot_set: what the placement was made of, where it was chosen.
    """

    settings: TierSettings
    collections: Sequence[PlannedCollection]
    plans: TierPlans
    memory: Sequence[RankMemory]
    choices: Sequence[Choice]
    access: Mapping[str, TableAccess] | None = None
    hot_set: HotSet | None = None

    def without(self, placement: RowPlacement | None) -> ModelPlan:
        """The same without a placement that every rank has anyway, to be sent."""
        return self if placement is None else replace(self, settings=replace(self.settings, placement=no_rows(TableSet(()))))

    def having(self, placement: RowPlacement | None) -> ModelPlan:
        """The same with this rank's copy of the placement."""
        return self if placement is None else replace(self, settings=replace(self.settings, placement=placement))


class ModelPlanner:
    """Plans models under given options; a pure function of these and the model.

    Args:
        options: of the planner.
        placement: where the rows live, or None: chosen from `profile`.
        hot_tier: of the placement.
        profile: of all placed tables; with a placement, what is told of its cold tables.
        hot: what the user says about the hot set.

    Raises:
        PlannerError: a tier does not exist on the device, or a constraint does not fit.
    """

    def __init__(
        self,
        options: PlannerOptions,
        placement: RowPlacement | None = None,
        hot_tier: str = "replicated",
        profile: PopularityProfile | None = None,
        hot: HotOptions | None = None,
    ) -> None:
        self.options, self.placement, self._profile, self._hot = options, placement, profile, hot or HotOptions()
        self._access: Mapping[str, TableAccess] | None = None
        if placement is not None:
            if profile is not None:
                placement.check_tables(profile.tables)
                self._access = expected_access(profile, placement.hot_ids)
            self._settings = self._settled(placement, hot_tier, self._access)
        else:
            assert profile is not None
            first = no_rows(profile.tables)  # finds wrong tiers and constraints before any work
            self._settings = self._settled(first, "replicated" if self._hot.hot_tier == "auto" else self._hot.hot_tier, None)

    @property
    def source(self) -> tuple[str, str]:
        """What the hot rows follow from, and its fingerprint."""
        if self.placement is not None:
            return "row placement", self.placement.fingerprint
        assert self._profile is not None
        return "popularity profile", self._profile.fingerprint

    def checked(self, module: nn.Module, sharders: Sharders, settings: TierSettings | None = None) -> list[PlannedCollection]:
        """The model's collections, checked against the placement; errors as `checked_collections`."""
        settings, device = settings or self._settings, self.options.topology.compute_device
        return checked_collections(
            module,
            sharders,
            settings.placement,
            self.options.stock_tables,
            replicated=settings.hot_tier == "replicated",
            device_type=device,
            cold_beside_device=settings.cold_options.on_host and device != "cpu",
        )

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ModelPlan:
        """Plans a model; errors as FAEShardingPlanner.plan."""
        if self.placement is None:
            return self._chosen(module, sharders)
        collections = self.checked(module, sharders)
        plans = self._tiers(self._settings).plan(module, sharders, collections)
        reserved = self._reserved(module, sharders, self._settings)
        memory = self._memory(self._settings, collections, plans, reserved, self._access)
        return ModelPlan(self._settings, collections, plans, memory, self._choices(self._settings, plans), self._access)

    def _chosen(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ModelPlan:
        """Plans without a hot row first, to see what that leaves; then with the rows that fit."""
        options, profile = self.options, self._profile
        assert profile is not None
        collections = placed_collections(module, sharders, options.stock_tables)
        profile = profile.for_tables(TableSet(tuple(table for collection in collections for table in collection.placed)))
        first = no_rows(profile.tables)
        everything = expected_access(profile, first.hot_ids)
        settings = self._settled(first, "replicated", everything)
        reserved = self._reserved(module, sharders, settings)
        budget = parse_budget(self._hot.budget, profile.tables.total_bytes)
        memories = []
        if budget is None:
            try:
                plans = self._tiers(settings, rough=True).plan(module, sharders, collections)
            except PlannerError as error:
                raise PlannerError(
                    f"budget 'auto': the model does not fit even without a hot row, so nothing is left for hot rows; {error}",
                    error.error_type,
                ) from error
            memories = self._memory(settings, collections, plans, reserved)
        shares = _SHARES if budget is None else _SHARES[:1]
        for share in shares:
            choice = choose_hot_rows(
                profile,
                self._hot,
                collections,
                [_with_less(memory, share) for memory in memories],
                options.topology,
                options.batch_size,
                options.compact_index_above_rows,
                budget,
            )
            try:
                return self._planned(module, sharders, choice, reserved)
            except PlannerError as error:
                if error.error_type is PlannerErrorType.INSUFFICIENT_STORAGE and share is not shares[-1]:
                    continue
                raise
        raise AssertionError("unreachable: the last share returns or raises")

    def _planned(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]], choice: HotChoice, reserved: list[dict[str, int]]
    ) -> ModelPlan:
        settings = self._settled(choice.placement, choice.hot_tier, choice.access)
        collections = self.checked(module, sharders, settings)
        plans = self._tiers(settings).plan(module, sharders, collections)
        memory = self._memory(settings, collections, plans, reserved, choice.access)
        choices = (*choice.choices, *self._choices(settings, plans))
        return ModelPlan(settings, collections, plans, memory, choices, choice.access, choice.hot_set)

    def _settled(self, placement: RowPlacement, hot_tier: str, access: Mapping[str, TableAccess] | None) -> TierSettings:
        options = self.options
        check_constraints(placement, options.constraints)
        return tier_settings(
            placement,
            options.topology,
            options.batch_size,
            options.constraints,
            options.cold_tier,
            hot_tier,
            options.cold_cache_bytes,
            access,
        )

    def _tiers(self, settings: TierSettings, *, rough: bool = False) -> TierPlanner:
        options = self.options
        chosen = [name for name, constraint in options.constraints.items() if constraint.sharding_types]
        stock = {"batch_size": options.batch_size, **options.stock}
        return TierPlanner(settings, options.topology, stock, options.compact_index_above_rows, chosen, rough=rough)

    def _reserved(self, module: nn.Module, sharders: Sharders, settings: TierSettings) -> list[dict[str, int]]:
        options = self.options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what the stock planner reserves by default, it says
            given: StorageReservation | None = options.stock.get("storage_reservation")
            # A copy, since it keeps what it reserved last: that is the stock planner's to see.
            reservation = copy.copy(given) if given is not None else HeuristicalStorageReservation(percentage=0.15)
            return reserved_memory(module, sharders, options.topology, options.batch_size, reservation, settings.cold_constraints)

    def _memory(
        self,
        settings: TierSettings,
        collections: Sequence[PlannedCollection],
        plans: TierPlans,
        reserved: Sequence[Mapping[str, int]],
        access: Mapping[str, TableAccess] | None = None,
    ) -> list[RankMemory]:
        tiers, hot = self._tiers(settings), by_table(plans.hot, collections)
        parts = tiers.fast_memory([collection.placed for collection in collections], hot)
        return planned_memory(
            self.options.topology, reserved, collections, plans, parts, self._lookups(settings, collections, plans, access or {}, parts)
        )

    def _lookups(
        self,
        settings: TierSettings,
        collections: Sequence[PlannedCollection],
        plans: TierPlans,
        access: Mapping[str, TableAccess],
        parts: Sequence[Mapping[str, int]],
    ) -> list[int]:
        """Bytes by rank while hot rows are looked up; of sharded ones the stock planner has an estimate."""
        topology = self.options.topology
        batch, ranks, memory = self.options.batch_size or BATCH_SIZE, topology.world_size, fast_memory_name(topology)
        if settings.hot_tier != "replicated":
            taken = [getattr(plans.hot_storage.get(rank, Storage(0, 0)), memory) for rank in range(ranks)]
            return [max(taken[rank] - parts[rank]["hot rows"], 0) for rank in range(ranks)]
        gradients = sum(gradient_bytes(one.hot, one.table.dim, batch, ranks) for one in access.values())
        return [lookup_bytes(access, collections, batch) + gradients] * ranks

    def _choices(self, settings: TierSettings, plans: TierPlans) -> tuple[Choice, ...]:
        options, ranks = self.options, self.options.topology.world_size
        why = (
            "it was given"
            if options.cold_tier != "auto"
            else {
                "cpu": "a CPU has host memory alone",
                "cuda": "on one CUDA rank cold rows are staged, which measured faster than a cache (docs/gpu.md)"
                if ranks == 1
                else "on several CUDA ranks cold rows are prefetched into a cache",
            }.get(options.topology.compute_device, "")
        )
        kernels = ", ".join(settings.cold_options.kernels)
        return (
            Choice("cold kernel", kernels + (" on the host" if settings.cold_options.on_host else ""), why),
            *(Choice("search of the stock planner", "bounded", reason) for reason in plans.reasons),
        )


def _with_less(memory: RankMemory, share: float) -> RankMemory:
    """The memory of a rank with a share of what is left."""
    if share == 1 or memory.left <= 0:
        return memory
    return replace(memory, parts={**memory.parts, "margin of the partitioner": int(memory.left * (1 - share))})
