"""The plan of one hot/cold collection: where every table's home lies, where its hot rows lie, and its row placement."""

from __future__ import annotations

from collections.abc import Mapping

from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.modules.slot_index import COMPACT_ABOVE_ROWS


class FAEModuleShardingPlan(EmbeddingModuleShardingPlan):
    """A stock module plan of the tables' homes plus what tells the sharder to build the hot/cold module.

    As a mapping it names every table of the collection: split and all-cold tables with the cold tier's sharding; all-hot tables, which
    the cold tier does not hold, with the one rank that owns the home (or with their hot rows' own sharding, where that is sharded); and
    tables left to stock, which the placement does not know, with their stock sharding.

    Args:
        homes: sharding of every table's home, by table.
        placement: where the rows of this module's tables live; it may know tables of other modules.
        hot_tier: "replicated", "table_wise" or "row_wise".
        hot: sharding of the hot rows [hot rows, dim] by table, for hot and split tables; nothing if they are replicated.
        compact_index_above_rows: see `new_slot_index`.
        cold_on_host: whether the cold tier's kernels run on the CPU, whatever device the ranks train on.
        staging_rows: cold rows that each half of a staging area holds (`Staging`); 0: there is none.

    Attributes:
        placement: as given.
        hot_tier: as given.
        hot: as given.
        compact_index_above_rows: as given.
        cold_on_host: as given.
        staging_rows: as given.
    """

    placement: RowPlacement
    hot_tier: str
    hot: EmbeddingModuleShardingPlan
    compact_index_above_rows: int
    cold_on_host: bool
    staging_rows: int

    def __init__(
        self,
        homes: Mapping[str, ParameterSharding],
        placement: RowPlacement,
        hot_tier: str = "replicated",
        hot: Mapping[str, ParameterSharding] | None = None,
        compact_index_above_rows: int = COMPACT_ABOVE_ROWS,
        cold_on_host: bool = False,
        staging_rows: int = 0,
    ) -> None:
        super().__init__(homes)
        self.placement, self.hot_tier, self.hot = placement, hot_tier, EmbeddingModuleShardingPlan(hot or {})
        self.compact_index_above_rows = compact_index_above_rows
        self.cold_on_host = cold_on_host
        self.staging_rows = staging_rows

    def __bool__(self) -> bool:
        """Always true, as long as DistributedModelParallel takes a false plan for none."""
        return True
