"""An experiment's plan on ranks that need not be there, and the hot set of an experiment whose budget is `auto`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import ShardingPlan

from fae_torchrec.config import RunConfig
from fae_torchrec.core.byte_size import AUTO
from fae_torchrec.core.hot_set import HotSet
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.distributed.hardware_topology import machine_topology
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.experiment_data import ExperimentData
from fae_torchrec.experiment_model import experiment_model
from fae_torchrec.training.shard import stock_constraints


def plan_experiment(
    config: RunConfig, data: ExperimentData, profile: PopularityProfile, topology: Topology, placement: RowPlacement | None = None
) -> tuple[FAEShardingPlanner, ShardingPlan]:
    """Plans the configured model; no process group, no memory for tables.

    Args:
        config: the experiment.
        data: its samples; none is read.
        profile: of the placed tables.
        topology: of all ranks.
        placement: a saved one; None: chosen under `placement.budget`.

    Returns:
        The planner, which has the explanation, and the plan.

    Raises:
        BudgetError: the budget cannot hold the tables that are always hot.
        PlannerError: something does not fit.
    """
    options = config.placement
    common: dict[str, Any] = {
        "topology": topology,
        "batch_size": config.train.batch_size,
        "constraints": stock_constraints(options.stock_tables),
        "cold_tier": options.cold_tier,
        "stock_tables": options.stock_tables,
        "cold_cache_bytes": options.cold_cache_bytes,
        "stats": [],  # the stock planner's own page is of one tier at a time
    }
    if placement is not None:
        hot_tier = "replicated" if options.hot_tier == AUTO else options.hot_tier
        planner = FAEShardingPlanner(placement, profile=profile, hot_tier=hot_tier, **common)
    else:
        planner = FAEShardingPlanner.from_profile(
            profile,
            budget=options.budget,
            policy=options.policy,
            pinned_max_rows=options.pinned_max_rows,
            sizes=options.sizes,
            hot_tier=options.hot_tier,
            **common,
        )
    return planner, planner.plan(experiment_model(config, data, torch.device("meta")), get_fae_sharders())


def settled(config: RunConfig, data: ExperimentData, profile: PopularityProfile, ranks: Iterable[int]) -> tuple[RunConfig, HotSet | None]:
    """The config with what `budget: auto` stands for on these ranks of this machine, and the hot set that was chosen.

    Args:
        config: the experiment.
        data: its samples.
        profile: of the placed tables.
        ranks: numbers of ranks that will train; the hot set that fits all of them is taken.

    Returns:
        The config with `placement.budget`, `hot_tier`, and a cache's `cold_cache` as chosen, and the hot set; None for that if the budget
        is given or the placement is a saved one.

    Raises:
        PlannerError: a rank has no room for hot rows, or something else does not fit.
    """
    options = config.placement
    if options.path is not None or str(options.budget).strip() != AUTO:
        replicated = replace(options, hot_tier="replicated") if options.hot_tier == AUTO else options
        return replace(config, placement=replicated), None
    planners = [plan_experiment(config, data, profile, machine_topology(number, config.train.device))[0] for number in sorted(set(ranks))]
    least = min(planners, key=lambda planner: planner.placement.budget_bytes)
    cache = least.cold_cache_bytes if options.cold_cache is None else options.cold_cache
    found = replace(options, budget=least.placement.budget_bytes, cold_cache=cache, hot_tier=cast(Any, least.explanation.hot_tier))
    return replace(config, placement=found), least.hot_set
