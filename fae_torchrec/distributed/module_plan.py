"""The plan of one hot/cold collection: a stock plan for its cold tier, and its row placement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrec.distributed.types import EmbeddingModuleShardingPlan

from fae_torchrec.core.placement import RowPlacement


class FAEModuleShardingPlan(EmbeddingModuleShardingPlan):
    """A stock module plan for the cold tier plus the row placement; what tells the sharder to build the hot/cold module.

    Attributes:
        placement: where the rows of this module's tables live.
    """

    placement: RowPlacement

    def __bool__(self) -> bool:
        """Always true: DistributedModelParallel leaves a module with a false plan unsharded, and no cold table is a plan too."""
        return True

    @classmethod
    def attach(cls, stock: Mapping[str, Any], placement: RowPlacement) -> FAEModuleShardingPlan:
        """Adds a placement to a stock plan that covers the split and all-cold tables."""
        plan = cls(stock)
        plan.placement = placement
        return plan
