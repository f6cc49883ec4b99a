"""What the stock planner may choose for the cold tier: the one table of (tier, device) -> sharding types and kernels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType
from torchrec.distributed.types import ShardingType

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind


@dataclass(frozen=True)
class TierOptions:
    """Stock sharding types and compute kernels of one tier on one device."""

    sharding_types: tuple[str, ...]
    kernels: tuple[str, ...]


# Not column-wise: a column shard keeps a row-wise optimizer state of its own, and a hot row has one for all its columns.
_BY_ROW = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
COLD_TIERS: Mapping[tuple[str, str], TierOptions] = {
    ("host", "cpu"): TierOptions((ShardingType.TABLE_WISE.value,), (EmbeddingComputeKernel.FUSED.value,)),
    ("uvm", "cuda"): TierOptions(_BY_ROW, (EmbeddingComputeKernel.FUSED_UVM.value,)),
    ("uvm_caching", "cuda"): TierOptions(_BY_ROW, (EmbeddingComputeKernel.FUSED_UVM_CACHING.value,)),
}
DEFAULT_COLD_TIER: Mapping[str, str] = {"cpu": "host", "cuda": "uvm_caching"}


def cold_constraints(
    placement: RowPlacement, device_type: str, cold_tier: str = "auto", given: Mapping[str, ParameterConstraints] | None = None
) -> dict[str, ParameterConstraints]:
    """Constraints under which the stock planner plans the cold tier.

    Args:
        placement: where the rows live.
        device_type: "cpu" or "cuda".
        cold_tier: "host", "uvm", "uvm_caching", or "auto" for the device's default.
        given: the user's own constraints by table; their sharding types and kernels are kept where the tier allows them.

    Raises:
        PlannerError: the tier does not exist on the device, or the given constraints leave a table nothing to choose.
    """
    tier = DEFAULT_COLD_TIER.get(device_type, "") if cold_tier == "auto" else cold_tier
    if (tier, device_type) not in COLD_TIERS:
        allowed = [f"{name} on {device}" for name, device in COLD_TIERS]
        raise PlannerError(
            f"there is no cold tier {cold_tier!r} on device {device_type!r}; choose one of {allowed} or 'auto'",
            PlannerErrorType.INPUT_VALIDATION,
        )
    options = COLD_TIERS[tier, device_type]
    constraints = dict(given or {})
    for table in placement.tables:
        if placement.kind(table.name) is TableKind.HOT:
            continue
        constraint = copy.deepcopy(constraints.get(table.name, ParameterConstraints()))
        constraint.sharding_types = _allowed(table.name, "sharding types", constraint.sharding_types, options.sharding_types)
        constraint.compute_kernels = _allowed(table.name, "compute kernels", constraint.compute_kernels, options.kernels)
        constraints[table.name] = constraint
    return constraints


def _allowed(table: str, what: str, given: list[str] | None, offered: tuple[str, ...]) -> list[str]:
    both = [value for value in offered if not given or value in given]
    if not both:
        raise PlannerError(
            f"table {table!r}: constraints allow the {what} {given}, its cold tier offers {list(offered)}; add one of these, or leave the "
            "table out of the placement",
            PlannerErrorType.STRICT_CONSTRAINTS,
        )
    return both
