"""fae report: how popular rows are and what a budget of fast memory buys, as plain values, pictures and one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from fae_torchrec.config import RunConfig
from fae_torchrec.core.candidates import pinned_tables
from fae_torchrec.core.hot_set import (
    POLICIES,
    CurvePoint,
    HotSet,
    Policy,
    ThresholdPoint,
    hot_inputs_curve,
    select_hot_set,
    threshold_curve,
)
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.doctor import collect
from fae_torchrec.experiment import placed_tables
from fae_torchrec.experiment_data import open_data
from fae_torchrec.experiment_placement import make_hot_set
from fae_torchrec.experiment_profile import make_profile
from fae_torchrec.report_parts import describe_environment, describe_profile
from fae_torchrec.training.popularity_page import popularity_page, popularity_pictures
from fae_torchrec.training.report import write_json
from fae_torchrec.training.whole_file import write_whole

_CURVE_POINTS = 16
_LEAST_SHARE = 1e-4  # of the largest budget, where the curves begin if no table is pinned


def popularity_report(config: RunConfig, command: Sequence[str], *, show_progress: bool = False) -> dict[str, Any]:
    """Profiles the configured data, if there is no profile of them yet, and describes what either selection makes of it.

    What is in use is what `fae place` would select; if the config names a saved placement, it is selected anew under that one's budget.

    Args:
        config: the experiment.
        command: the command line, for the report.
        show_progress: progress bars on standard error.

    Returns:
        Plain values: schema, kind "popularity", created, command, versions, hardware, config, and the parts of `popularity_values`.

    Raises:
        FAEError: bad input.
    """
    data = open_data(config)
    tables = placed_tables(config, data)
    if config.placement.path is not None:
        saved = RowPlacement.load(config.placement.path)
        saved.check_tables(tables)
        config = replace(config, placement=replace(config.placement, budget=saved.budget_bytes))
    profile = make_profile(config, data, tables, show_progress=show_progress)
    return {
        "schema": 1,
        "kind": "popularity",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        **describe_environment(collect()),
        "config": config.to_dict(),
        **popularity_values(profile, make_hot_set(config, profile), config.placement.pinned_max_rows),
    }


def popularity_values(profile: PopularityProfile, in_use: HotSet, pinned_max_rows: int) -> dict[str, Any]:
    """What a profile says, and what both selections make of it.

    Args:
        profile: the counts and the inputs.
        in_use: the hot set that was selected from it; the other policy's is selected here, under the same budget.
        pinned_max_rows: tables of at most so many rows are always hot.

    Returns:
        profile: what was counted, with a skew curve per table; placement: both selections under the budget, per table too; curves:
        policy -> what larger and smaller budgets buy; thresholds: what an access threshold makes hot. Shares are between 0 and 1.
    """
    chosen = {
        name: in_use
        if name == in_use.policy
        else select_hot_set(profile, in_use.budget_bytes, policy=name, pinned_max_rows=pinned_max_rows)
        for name in POLICIES
    }
    thresholds, all_bytes = threshold_curve(profile, pinned_max_rows), profile.tables.total_bytes
    least = sum(table.total_bytes for table in pinned_tables(profile.tables, pinned_max_rows))
    most = thresholds[-1].used_bytes if thresholds else least  # all that was seen: no selection uses more
    budgets = np.geomspace(max(least, most * _LEAST_SHARE, 1), max(most, 1), _CURVE_POINTS)
    rounded = sorted({*budgets.astype(np.int64).tolist(), most})
    return {
        "profile": describe_profile(profile),
        "placement": _placement(profile, chosen, in_use),
        "curves": {
            name: _curve(hot_inputs_curve(profile, rounded, pinned_max_rows, policy=name), hot_set, all_bytes)
            for name, hot_set in chosen.items()
        },
        "thresholds": [
            {
                "threshold_percent": point.threshold_percent,
                "hot_rows": point.hot_rows,
                **_shares(point, all_bytes),
                "clamped": point is thresholds[-1],
            }
            for point in thresholds
        ],
    }


def write_popularity_report(report: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Writes popularity_*.png, popularity.html and, last, popularity.json, each under a temporary name first.

    Args:
        report: the report's plain values.
        folder: where to; made if it is missing.

    Returns:
        The paths: JSON, page, pictures.
    """
    pictures = {name: picture.png() for name, picture in popularity_pictures(report).items()}
    html = popularity_page(report)
    paths = [write_whole(png, Path(folder, f"popularity_{name}.png")) for name, png in pictures.items()]
    page = write_whole(html, Path(folder, "popularity.html"))
    return [write_json(report, Path(folder, "popularity.json")), page, *paths]


def _placement(profile: PopularityProfile, chosen: Mapping[Policy, HotSet], in_use: HotSet) -> dict[str, Any]:
    """Both selections under the budget, and the one in use."""
    tables, placement = profile.tables, RowPlacement.from_hot_set(in_use)
    return {
        "fingerprint": placement.fingerprint,
        "policy": in_use.policy,
        "budget_bytes": in_use.budget_bytes,
        "used_bytes": in_use.used_bytes,
        "byte_share": in_use.used_bytes / tables.total_bytes,
        "all_bytes": tables.total_bytes,
        "hot_inputs": in_use.hot_inputs,
        "hot_inputs_interval": list(in_use.hot_inputs_interval),
        "coverage": in_use.coverage,
        "threshold": in_use.threshold,
        "resolution": {"reached": in_use.resolution_reached, "resolving_rate": in_use.resolving_rate},
        "pinned": list(in_use.pinned),
        "selections": {
            name: {
                **_shares(hot, tables.total_bytes),
                "threshold": hot.threshold,
                "hot_rows": sum(len(ids) for ids in hot.hot_ids.values()),
            }
            for name, hot in chosen.items()
        },
        "per_table": [
            {
                "table": table.name,
                "rows": table.rows,
                "seen_rows": profile.counts[table.name].ids.size,
                "hot_rows": {name: len(hot.hot_ids[table.name]) for name, hot in chosen.items()},
                "row_bytes": table.row_bytes,
                "kind": placement.kind(table.name).value,
            }
            for table in tables
        ],
    }


def _curve(points: Sequence[CurvePoint], hot_set: HotSet, all_bytes: int) -> list[dict[str, Any]]:
    """A point for every amount of bytes used, ascending, the hot set's own among them."""
    by_bytes: dict[int, CurvePoint | HotSet] = {point.used_bytes: point for point in points}
    by_bytes[hot_set.used_bytes] = hot_set
    return [_shares(by_bytes[used], all_bytes) for used in sorted(by_bytes)]


def _shares(point: CurvePoint | ThresholdPoint | HotSet, all_bytes: int) -> dict[str, Any]:
    low, high = point.hot_inputs_interval
    return {
        "used_bytes": point.used_bytes,
        "byte_share": point.used_bytes / all_bytes,
        "hot_inputs": point.hot_inputs,
        "low": low,
        "high": high,
        "coverage": point.coverage,
    }
