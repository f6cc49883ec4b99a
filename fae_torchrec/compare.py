"""fae compare: named placements on the same data, seed and start weights, in turns, and the report that puts them side by side."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import torch
from torchrec.distributed.sharding_plan import get_default_sharders

from fae_torchrec.compare_scores import all_score_intervals
from fae_torchrec.compare_turns import summary, turns
from fae_torchrec.config import CheckpointConfig, RunConfig
from fae_torchrec.core.candidates import pinned_tables
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hot_set import HotSet, hot_inputs_curve
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet
from fae_torchrec.distributed.hardware_topology import machine_topology
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.doctor import collect
from fae_torchrec.experiment import check_run, experiment_tables, placed_tables, run_placement
from fae_torchrec.experiment_data import ExperimentData, open_data
from fae_torchrec.experiment_model import check_model, experiment_model
from fae_torchrec.experiment_placement import make_placement, settle_hot_set
from fae_torchrec.experiment_profile import make_profile
from fae_torchrec.report_parts import describe_environment, describe_profile
from fae_torchrec.training.baselines import cache_warnings, planned_caches, rows_of_two_batches, stock_baseline, stock_planner
from fae_torchrec.training.progress import WARM_UP_STEPS
from fae_torchrec.training.report_verdicts import baseline_of
from fae_torchrec.training.work import unequal_work, unlike_samples

_CURVE_POINTS = 24
FIGURES = (
    "samples_per_s", "hot_inputs", "hot_batches", "hot_lookups", "bytes_crossed_per_sample", "cold_rows_per_sample",
    "cold_bytes_per_sample", "fast_memory_allocated_bytes", "cold_memory_allocated_bytes", "host_peak_bytes", "device_peak_bytes",
    "cache_hits", "train_loss", "test_auc", "test_logloss", "test_accuracy", "wall_s",
)  # fmt: skip
"""What the repeats of a run are summarized by."""


def compare(config: RunConfig, command: Sequence[str], *, show_progress: bool = False) -> dict[str, Any]:
    """Profiles, places and trains every configured placement at every configured number of ranks, in turns.

    Args:
        config: the experiment.
        command: the command line, for the report.
        show_progress: progress bars and a line per run on standard error.

    Returns:
        The report (see `fae_torchrec.training.report`).

    Raises:
        FAEError: bad input; before any training where it can be known.
        ConfigError: placements did not do the same work (unless `compare.allow_unequal`), found after their first turn.
    """
    for name in config.compare.placements:
        stock_baseline(name, config.train.device)
    data = open_data(config)
    check_model(config, data)
    tables = placed_tables(config, data)
    profile = make_profile(config, data, tables, show_progress=show_progress)
    config, hot_set = settle_hot_set(config, data, profile, config.compare.ranks)
    placement, _ = make_placement(config, tables, hot_set)
    check_run(config, data, placement, config.compare.placements, max(config.compare.ranks))
    warnings = check_baselines(config, data, placement)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    report: dict[str, Any] = {
        "schema": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        **describe_environment(collect()),
        "config": config.to_dict(),
        "data": describe_data(data, experiment_tables(config, data)),
        "profile": describe_profile(profile),
        "placement": describe_placement(config, profile, hot_set, placement),
        "repeats": config.compare.repeats,
        "warm_up_steps": WARM_UP_STEPS,
        "warnings": warnings,
        "not_comparable": [],
        "notes": [],
        "runs": [],
    }
    for ranks in config.compare.ranks:
        report["runs"] += _run_on(ranks, config, placement, report, show_progress=show_progress)
    return report


def check_baselines(config: RunConfig, data: ExperimentData, placement: RowPlacement) -> list[str]:
    """What is wrong with the caches of TorchRec's own placements, from their plans and the first train batches; a sentence each."""
    warnings: list[str] = []
    tables, rows = experiment_tables(config, data), dict[int, dict[str, int]]()
    for name in config.compare.placements:
        baseline = stock_baseline(name, config.train.device)
        if baseline is None or not baseline.caches:
            continue
        for ranks in config.compare.ranks:
            size, cache_bytes = config.train.batch_size, config.compare.cache_bytes(placement.budget_bytes)
            planner = stock_planner(tables, machine_topology(ranks, config.train.device), size, baseline, cache_bytes)
            plan = planner.plan(experiment_model(config, data, torch.device("meta")), get_default_sharders())
            rows[ranks] = rows.get(ranks) or rows_of_two_batches(data.train, tables, size * ranks)
            caches = planned_caches(plan, tables)
            found = cache_warnings(name, caches, prefetches=baseline.prefetches, rows_of_two_batches=rows[ranks])
            warnings += [f"{text} ({_on(ranks)})" for text in found]
    return warnings


def _run_on(ranks: int, config: RunConfig, placement: RowPlacement, report: dict[str, Any], *, show_progress: bool) -> list[dict[str, Any]]:
    """All placements on so many ranks, in turns; one entry each, in the order of the config. Adds to what the report says of work."""
    names, options = config.compare.placements, config.compare
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        scores: dict[str, list[str]] = {name: [] for name in names}
        for turn, order in enumerate(turns(names, options.repeats)):
            for place, name in enumerate(order):
                if show_progress:
                    of_turns = f", turn {turn + 1} of {options.repeats}" if options.repeats > 1 else ""
                    print(f"{name} {_on(ranks)}{of_turns}", file=sys.stderr)
                scores[name].append(os.path.join(folder, f"{name}_{turn}.npz"))
                of_run = _of_run(config, f"{name}_{ranks}", turn)
                job = (of_run, name, placement, show_progress, None, None, scores[name][-1])
                entry = run_on_local_ranks(run_placement, ranks, *job, device_type=config.train.device)[0]
                done[name].append({**entry, "turn": turn, "place": place, "seed": of_run.train.seed})
            if turn == 0:
                _check_work(ranks, {name: entries[0]["work"] for name, entries in done.items()}, config, report)
        intervals = {} if report["not_comparable"] else all_score_intervals(scores, baseline_of(names))
    return [
        {
            **summary(entries, FIGURES),
            **intervals.get(name, {}),
            "each": [{key: entry.get(key) for key in ("turn", "place", "seed", *FIGURES)} for entry in entries],
        }
        for name, entries in done.items()
    ]


def _check_work(ranks: int, works: Mapping[str, Any], config: RunConfig, report: dict[str, Any]) -> None:
    """Refuses placements that did not do the same work, or says so in the report.

    Raises:
        ConfigError: they did not, and `compare.allow_unequal` is false.
    """
    first = baseline_of(works)
    ordered = {first: works[first], **works}
    problems = [f"{_on(ranks)}: {text}" for text in unequal_work(ordered)]
    if problems and not config.compare.allow_unequal:
        raise ConfigError(
            f"compare: the placements did not do the same work; {'; '.join(problems)}. Make them alike, or give --allow-unequal for a "
            "report that says that they are not comparable"
        )
    report["not_comparable"] += problems
    report["notes"] += [f"{_on(ranks)}: {text}" for text in unlike_samples(ordered)]


def _on(ranks: int) -> str:
    return f"on {ranks} rank{'s' if ranks > 1 else ''}"


def _of_run(config: RunConfig, run: str, turn: int) -> RunConfig:
    """The config of one of the runs: no checkpoints, which are for one run, a folder of its own for TensorBoard, the seed of its turn."""
    name = run if config.compare.repeats == 1 else f"{run}_{turn}"
    tensorboard = config.train.tensorboard and os.path.join(config.train.tensorboard, name)
    seed = config.train.seed + (turn if config.compare.vary_seed else 0)
    return replace(config, checkpoint=CheckpointConfig(), train=replace(config.train, tensorboard=tensorboard, seed=seed))


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
