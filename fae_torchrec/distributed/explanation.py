"""Why a plan is as it is: every table's tiers, what is expected of them, where a rank's memory goes, and what was chosen why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from fae_torchrec.core.expected_access import TableAccess
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind, TableSpec
from fae_torchrec.core.tier_traffic import TierTraffic, tier_traffic
from fae_torchrec.distributed.hot_choice import Choice
from fae_torchrec.distributed.model_check import PlannedCollection
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.rank_memory import RankMemory


@dataclass(frozen=True)
class TablePlan:
    """One table of a plan.

    Attributes:
        table: its name.
        kind: "hot", "split", "cold", or "stock" for a table that the placement does not know.
        rows: of the table.
        hot_rows: of those.
        hot_bytes: of its hot rows, weights and optimizer state, on the rank that holds most of them.
        cold_bytes: of its home, or what the stock planner expects a stock table to take, on the rank that has most; 0 for an all-hot
            table whose rows are replicated.
        hot_sharding: how the hot rows lie: "replicated", or sharding type and kernel; empty without any.
        cold_sharding: sharding type of the home; empty for an all-hot table.
        cold_kernel: compute kernel of the home; empty for an all-hot table.
        ranks: that hold a part of the home.
        cache_load_factor: of a cached home; None if it is not cached.
        expected_miss_rate: of that cache, asked for cold rows alone; None where it is not known.
        ids_per_sample: expected; None without a profile, and so are those below.
        coverage: share of its accesses that are hot.
        cold_ids_per_sample: expected.
        because: why it is so.
    """

    table: str
    kind: str
    rows: int
    hot_rows: int
    hot_bytes: int
    cold_bytes: int
    hot_sharding: str
    cold_sharding: str
    cold_kernel: str
    ranks: int
    cache_load_factor: float | None
    expected_miss_rate: float | None
    ids_per_sample: float | None
    coverage: float | None
    cold_ids_per_sample: float | None
    because: str


@dataclass(frozen=True)
class ModulePlan:
    """One sharded module of a plan.

    Attributes:
        path: in the model.
        hot_cold: whether it becomes a hot/cold module; else it is stock's.
        tables: in the module's order.
        hot_bytes: by rank.
        cold_bytes: by rank; of homes and stock tables.
        traffic: expected; None without a profile.
    """

    path: str
    hot_cold: bool
    tables: tuple[TablePlan, ...]
    hot_bytes: tuple[int, ...]
    cold_bytes: tuple[int, ...]
    traffic: TierTraffic | None


@dataclass(frozen=True)
class PlanExplanation:
    """A plan, explained.

    Attributes:
        ranks: of the plan.
        device: "cpu" or "cuda".
        batch_size: per rank.
        placement: fingerprint of the row placement.
        hot_tier: "replicated", "table_wise" or "row_wise".
        budget_bytes: that the hot set was selected for.
        hot_bytes: of all hot rows.
        hot_inputs: expected share of samples that are all hot, with the ends of its interval.
        coverage: expected share of the accesses that are hot; without a profile the placement's, which is of counted accesses.
        traffic: expected, of the whole model; None without a profile.
        modules: sharded ones.
        memory: fast memory of every rank.
        choices: what was chosen, and why.
    """

    ranks: int
    device: str
    batch_size: int
    placement: str
    hot_tier: str
    budget_bytes: int
    hot_bytes: int
    hot_inputs: tuple[float, float, float]
    coverage: float
    traffic: TierTraffic | None
    modules: tuple[ModulePlan, ...]
    memory: tuple[RankMemory, ...]
    choices: tuple[Choice, ...]

    @property
    def tightest(self) -> RankMemory:
        """The rank with the fewest bytes left."""
        return min(self.memory, key=lambda memory: memory.left)

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can write."""
        values = asdict(self)
        value, low, high = self.hot_inputs
        return {
            **values,
            "hot_inputs": {"value": value, "low": low, "high": high},
            "memory": [{**asdict(memory), "left": memory.left} for memory in self.memory],
        }


def explain(
    plan: ShardingPlan,
    collections: Sequence[PlannedCollection],
    placement: RowPlacement,
    hot_tier: str,
    *,
    ranks: int,
    device: str,
    batch_size: int,
    memory: Sequence[RankMemory],
    choices: Sequence[Choice],
    access: Mapping[str, TableAccess] | None = None,
    pinned: Iterable[str] = (),
    stock_bytes: Mapping[str, Mapping[int, int]] | None = None,
) -> PlanExplanation:
    """Explains a plan of FAEShardingPlanner.

    Args:
        plan: the plan.
        collections: that our sharders take.
        placement: where the rows live.
        hot_tier: of the plan.
        ranks: of the plan.
        device: where the ranks train.
        batch_size: per rank.
        memory: fast memory of every rank.
        choices: what was chosen, and why.
        access: expected accesses by table; None without a profile.
        pinned: names of tables that are all hot because they are small.
        stock_bytes: table -> rank -> bytes that the stock planner expects it to take; of tables that the placement does not know.
    """
    known, small = access or {}, frozenset(pinned)
    stock = stock_bytes or {}
    specs = {table.name: table for collection in collections for table in collection.placed}
    modules = []
    for path, module in plan.plan.items():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        hot, cold, tables = [0] * ranks, [0] * ranks, []
        for name, home in module.items():
            expected = None if name in specs else stock.get(name)
            taken = None if expected is None else [expected.get(rank, 0) for rank in range(ranks)]
            of_table = _Tiers(module, name, home, specs.get(name), placement, ranks, taken)
            hot = [a + b for a, b in zip(hot, of_table.hot_bytes, strict=True)]
            cold = [a + b for a, b in zip(cold, of_table.cold_bytes, strict=True)]
            tables.append(of_table.plan(known.get(name), name in small))
        placed = {table.table: known[table.table] for table in tables if table.table in known}
        traffic = tier_traffic(placed, placement.hot_inputs, batch_size, ranks, hot_tier) if placed else None
        modules.append(ModulePlan(path, isinstance(module, FAEModuleShardingPlan), tuple(tables), tuple(hot), tuple(cold), traffic))
    ids = sum(one.ids_per_sample for one in known.values())
    cold_ids = sum(one.cold_ids_per_sample for one in known.values())
    return PlanExplanation(
        ranks=ranks,
        device=device,
        batch_size=batch_size,
        placement=placement.fingerprint,
        hot_tier=hot_tier,
        budget_bytes=placement.budget_bytes,
        hot_bytes=placement.hot_bytes,
        hot_inputs=(placement.hot_inputs, *placement.hot_inputs_interval),
        coverage=1 - cold_ids / ids if ids else placement.coverage,
        traffic=tier_traffic(known, placement.hot_inputs, batch_size, ranks, hot_tier) if known else None,
        modules=tuple(modules),
        memory=tuple(memory),
        choices=tuple(choices),
    )


class _Tiers:
    """One table's tiers in a plan."""

    def __init__(
        self,
        module: EmbeddingModuleShardingPlan,
        name: str,
        home: ParameterSharding,
        spec: TableSpec | None,
        placement: RowPlacement,
        ranks: int,
        taken: list[int] | None,
    ) -> None:
        self._name, self._home, self._placement = name, home, placement
        placed = spec is not None
        self._kind = placement.kind(name) if placed else None
        self._hot_rows = placement.hot_rows(name) if placed else 0
        replicated = isinstance(module, FAEModuleShardingPlan) and module.hot_tier == "replicated"
        self._hot = module.hot.get(name) if isinstance(module, FAEModuleShardingPlan) else None
        shards = [] if home.sharding_spec is None else home.sharding_spec.shards
        self._rows = spec.rows if spec is not None else max((shard.shard_offsets[0] + shard.shard_sizes[0] for shard in shards), default=0)
        row_bytes = 0 if spec is None else spec.row_bytes
        self.hot_bytes = [self._hot_rows * row_bytes] * ranks if replicated else _bytes_by_rank(self._hot, row_bytes, ranks)
        no_home = self._kind is TableKind.HOT and isinstance(module, FAEModuleShardingPlan)
        self.cold_bytes = [0] * ranks if no_home else _bytes_by_rank(home, row_bytes, ranks)
        if taken is not None:
            self.cold_bytes = taken
        self._no_home = no_home

    def plan(self, access: TableAccess | None, pinned: bool) -> TablePlan:
        """The table as the explanation has it."""
        home, cache = self._home, self._home.cache_params
        hot = f"{self._hot.sharding_type} {self._hot.compute_kernel}" if self._hot is not None else ""
        factor = None if cache is None or self._no_home else cache.load_factor
        miss = None if cache is None or cache.stats is None or factor is None else float(cache.stats.expected_miss_rate(factor))
        return TablePlan(
            table=self._name,
            kind="stock" if self._kind is None else self._kind.value,
            rows=self._rows,
            hot_rows=self._hot_rows,
            hot_bytes=max(self.hot_bytes),
            cold_bytes=max(self.cold_bytes),
            hot_sharding=hot or ("replicated" if self._hot_rows else ""),
            cold_sharding="" if self._no_home else home.sharding_type,
            cold_kernel="" if self._no_home else home.compute_kernel,
            ranks=0 if self._no_home else len(set(home.ranks or ())),
            cache_load_factor=factor,
            expected_miss_rate=miss,
            ids_per_sample=None if access is None else access.ids_per_sample,
            coverage=None if access is None else access.coverage,
            cold_ids_per_sample=None if access is None else access.cold_ids_per_sample,
            because=self._because(access, pinned),
        )

    def _because(self, access: TableAccess | None, pinned: bool) -> str:
        if self._kind is None:
            return "left to stock sharding (stock_tables), or in a module that stock shards as a whole"
        if self._kind is TableKind.HOT:
            return "small, so always hot (pinned_max_rows)" if pinned else "all of its rows fit"
        if self._kind is TableKind.COLD:
            return "no row of it was worth its bytes under the budget"
        share = "" if access is None else f" take {access.coverage:.1%} of its accesses"
        return f"{self._hot_rows:,} of {self._rows:,} rows{share}"


def _bytes_by_rank(sharding: ParameterSharding | None, row_bytes: int, ranks: int) -> list[int]:
    held = [0] * ranks
    for shard in [] if sharding is None or sharding.sharding_spec is None else sharding.sharding_spec.shards:
        held[shard.placement.rank()] += shard.shard_sizes[0] * row_bytes
    return held
