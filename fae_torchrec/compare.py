"""fae compare: named placements on the same data, seed and start weights, and the report that puts them side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from fae_torchrec.config import CheckpointConfig, RunConfig
from fae_torchrec.core.candidates import pinned_tables
from fae_torchrec.core.hot_set import HotSet, hot_inputs_curve
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.doctor import collect
from fae_torchrec.experiment import check_run, experiment_tables, placed_tables, run_placement
from fae_torchrec.experiment_data import ExperimentData, open_data
from fae_torchrec.experiment_placement import make_placement, settle_hot_set
from fae_torchrec.experiment_profile import make_profile
from fae_torchrec.report_parts import describe_environment, describe_profile

_CURVE_POINTS = 24


def compare(config: RunConfig, command: Sequence[str], *, show_progress: bool = False) -> dict[str, Any]:
    """Profiles, places and trains every configured placement at every configured number of ranks, one after the other.

    Args:
        config: the experiment.
        command: the command line, for the report.
        show_progress: progress bars and a line per run on standard error.

    Returns:
        The report (see `fae_torchrec.training.report`).

    Raises:
        FAEError: bad input; before any training where it can be known.
    """
    data = open_data(config)
    tables = placed_tables(config, data)
    profile = make_profile(config, data, tables, show_progress=show_progress)
    config, hot_set = settle_hot_set(config, data, profile, config.compare.ranks)
    placement, _ = make_placement(config, tables, hot_set)
    check_run(config, data, placement, config.compare.placements, max(config.compare.ranks))
    report: dict[str, Any] = {
        "schema": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        **describe_environment(collect()),
        "config": config.to_dict(),
        "data": describe_data(data, experiment_tables(config, data)),
        "profile": describe_profile(profile),
        "placement": describe_placement(config, profile, hot_set, placement),
        "runs": [],
    }
    for ranks in config.compare.ranks:
        for name in config.compare.placements:
            if show_progress:
                print(f"{name} on {ranks} rank{'s' if ranks > 1 else ''}", file=sys.stderr)
            of_run = _of_run(config, f"{name}_{ranks}")
            results = run_on_local_ranks(run_placement, ranks, of_run, name, placement, show_progress, device_type=config.train.device)
            report["runs"].append(results[0])
    return report


def _of_run(config: RunConfig, run: str) -> RunConfig:
    """The config of one of the runs: no checkpoints, which are for one run, and a folder of its own for TensorBoard."""
    tensorboard = config.train.tensorboard and os.path.join(config.train.tensorboard, run)
    return replace(config, checkpoint=CheckpointConfig(), train=replace(config.train, tensorboard=tensorboard))


def describe_data(data: ExperimentData, tables: TableSet) -> dict[str, Any]:
    """The data and all tables of the model as the report has them."""
    return {
        "name": data.name,
        "train_samples": data.train.num_samples,
        "test_samples": data.test.num_samples,
        "tables": len(tables),
        "rows": sum(table.rows for table in tables),
        "bytes": tables.total_bytes,
    }


def describe_placement(config: RunConfig, profile: PopularityProfile, hot_set: HotSet | None, placement: RowPlacement) -> dict[str, Any]:
    """The placed tables as the report has them, with hot inputs over budgets from the pinned tables' bytes to all."""
    tables = placement.tables
    pinned = config.placement.pinned_max_rows
    most = tables.total_bytes
    least = max(sum(table.total_bytes for table in pinned_tables(tables, pinned)), most // 10_000, 1)
    budgets = sorted({int(least * (most / least) ** (i / (_CURVE_POINTS - 1))) for i in range(_CURVE_POINTS)} | {most})
    return {
        "fingerprint": placement.fingerprint,
        "budget_bytes": placement.budget_bytes,
        "used_bytes": placement.hot_bytes,
        "hot_tier": config.placement.hot_tier,
        "stock_tables": list(config.placement.stock_tables),
        "hot_rows": sum(placement.hot_rows(name) for name in tables.names),
        "pinned": [] if hot_set is None else list(hot_set.pinned),
        "policy": None if hot_set is None else hot_set.policy,
        "threshold": None if hot_set is None else hot_set.threshold,
        "resolution": None if hot_set is None else {"reached": hot_set.resolution_reached, "resolving_rate": hot_set.resolving_rate},
        "coverage": placement.coverage,
        "hot_inputs": placement.hot_inputs,
        "hot_inputs_interval": list(placement.hot_inputs_interval),
        "per_table": [
            {
                "table": table.name,
                "rows": table.rows,
                "hot_rows": placement.hot_rows(table.name),
                "kind": placement.kind(table.name).value,
                "bytes_hot": placement.hot_rows(table.name) * table.row_bytes,
                "bytes_all": table.total_bytes,
            }
            for table in tables
        ],
        "curve": [
            {
                "used_bytes": point.used_bytes,
                "byte_share": point.used_bytes / most,
                "hot_inputs": point.hot_inputs,
                "low": point.hot_inputs_interval[0],
                "high": point.hot_inputs_interval[1],
                "coverage": point.coverage,
            }
            for point in hot_inputs_curve(profile, budgets, pinned, policy=config.placement.policy)
        ],
    }
