"""fae plan --what-if: predicted step time and bytes of every placement on ranks that need not be there, the winner, and why."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fae_torchrec.config import RunConfig
from fae_torchrec.core.access_model import AccessModel
from fae_torchrec.core.calibration import Point, calibrated
from fae_torchrec.core.candidates import pinned_tables
from fae_torchrec.core.cost_model import CostModel, Job
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hardware import Hardware, load_hardware
from fae_torchrec.core.outlook import Outlook, budgets_of, fae_cold_tier, look_out
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.synthetic_access import synthetic_access
from fae_torchrec.experiment_data import ExperimentData, open_data
from fae_torchrec.experiment_model import experiment_model, placed_tables, try_experiment
from fae_torchrec.experiment_profile import make_profile
from fae_torchrec.modules.model_tables import COLLECTIONS, table_weights
from fae_torchrec.training.outlook_page import outlook_page, outlook_picture, outlook_text
from fae_torchrec.training.report import write_json
from fae_torchrec.training.whole_file import write_whole

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_PRESET = {"cpu": "cpu", "cuda": "h100"}  # by train.device, where no hardware is named
_POINT_KEYS = {"placement", "budget_bytes", "ranks", "batch_size", "step_s"}


def what_if(
    config: RunConfig,
    *,
    machines: Sequence[tuple[Hardware, Sequence[int]]],
    shares: Sequence[float] = SHARES,
    access: str = "auto",
    calibration: Sequence[Mapping[str, Any]] = (),
    show_progress: bool = False,
) -> list[Outlook]:
    """Predicts every placement of the configured model.

    Args:
        config: data, model, batch size per rank.
        machines: hardware to plan for, and numbers of ranks of it.
        shares: budgets of fast memory per rank, as shares of all tables' bytes; those too small for the tables that are always hot are
            left out.
        access: where the access curves come from: "law" (of synthetic data), "profile" (measured now if there is none), "uniform", or
            "auto": the law where there is one.
        calibration: measured steps of the same model, each with the keys placement, budget_bytes, ranks, batch_size, step_s.
        show_progress: progress bars on standard error.

    Raises:
        ConfigError: there is no law, a number is out of range, or a point lacks a key.
        BudgetError: no budget holds the tables that are always hot.
    """
    data = open_data(config)
    tables = placed_tables(config, data)
    curves = _access(config, data, tables, access, show_progress)
    pinned = config.placement.pinned_max_rows
    budgets = budgets_of(tables.total_bytes, shares, sum(table.total_bytes for table in pinned_tables(tables, pinned)))
    job = _job(config, data, tables)
    found = []
    for hardware, ranks in machines:
        points = [_point(point, job, curves, hardware, pinned) for point in calibration]
        known = calibrated(hardware, points) if points else hardware
        found += [look_out(CostModel(replace(job, ranks=number), curves, known), budgets, pinned) for number in ranks]
    return found


def check_options(arguments: Namespace) -> None:
    """Refuses options of --what-if without it.

    Raises:
        ConfigError: one was given.
    """
    given = [name for name in ("budgets", "calibration") if getattr(arguments, name)]
    if given and not arguments.what_if:
        raise ConfigError(f"{', '.join(f'--{name}' for name in given)}: only with --what-if; add it, or leave these out")


def run_what_if(arguments: Namespace, config: RunConfig) -> int:
    """Predicts, writes OUTPUT/what_if.html, .png and .json, and prints what is best."""
    outlooks = what_if(
        config,
        machines=[machine_of(text, arguments.ranks) for text in arguments.hardware or [_PRESET[config.train.device]]],
        shares=[_share(text) for text in arguments.budgets] if arguments.budgets else SHARES,
        access=arguments.access,
        calibration=_points(arguments.calibration) if arguments.calibration else (),
        show_progress=not arguments.quiet,
    )
    values = {
        "schema": 1,
        "kind": "what-if",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(arguments.command_line),
        "config": config.to_dict(),
        "access": outlooks[0].model.access.source,
        "tables": len(outlooks[0].model.job.tables),
        "table_bytes": outlooks[0].model.job.tables.total_bytes,
        "outlooks": [outlook.to_json() for outlook in outlooks],
    }
    folder = Path(config.output)
    picture = write_whole(outlook_picture(outlooks).png(), folder / "what_if.png")
    page = write_whole(outlook_page(outlooks, values), folder / "what_if.html")
    path = write_json(values, folder / "what_if.json")
    if arguments.json:
        print(path.read_text(encoding="utf-8").rstrip())
    else:
        print("\n".join([*outlook_text(outlooks), "", *map(str, (path, page, picture))]))
    return 0


def machine_of(text: str, ranks: int = 1) -> tuple[Hardware, Sequence[int]]:
    """Reads "v100:1,4,8", a preset or a JSON file and numbers of ranks of it; without numbers, `ranks`.

    Raises:
        ConfigError: there is no such hardware, or a number is none of at least 1.
    """
    name, _, numbers = text.partition(":")
    try:
        found = [int(number) for number in numbers.split(",")] if numbers else [ranks]
    except ValueError:
        found = []
    if min(found, default=0) < 1:
        raise ConfigError(f"--hardware: received {text!r}; give a preset or a file, and ranks of at least 1 behind a colon: v100:1,4,8")
    return load_hardware(name), found


def _access(config: RunConfig, data: ExperimentData, tables: TableSet, access: str, show_progress: bool) -> AccessModel:
    synthetic = config.data.synthetic
    if access == "auto":
        access = "profile" if synthetic is None else "law"
    if access == "uniform":
        return AccessModel.uniform(tables)
    if access == "law":
        if synthetic is None:
            raise ConfigError(f"--access law: the data are {config.data.source}, whose law is not known; take profile")
        return synthetic_access(synthetic.dataset, synthetic.scale, tables)
    profile = make_profile(config, data, tables, show_progress=show_progress)
    return AccessModel.from_profile(profile, tables, config.placement.pinned_max_rows)


def _job(config: RunConfig, data: ExperimentData, tables: TableSet) -> Job:
    model = experiment_model(config, data, torch.device("meta"))
    rows = sum(weight.numel() for module in model.modules() if type(module) in COLLECTIONS for weight in table_weights(module).values())
    dense = sum(parameter.numel() for parameter in model.parameters()) - rows
    return Job(tables, config.train.batch_size, 1, dense, try_experiment(config, data))


def _point(point: Mapping[str, Any], job: Job, access: AccessModel, hardware: Hardware, pinned_max_rows: int) -> Point:
    """What a measured step did, by the model."""
    if unlike := sorted(_POINT_KEYS.symmetric_difference(point)):
        raise ConfigError(f"--calibration: each point has the keys {sorted(_POINT_KEYS)}; {unlike} are missing or not known")
    model = CostModel(replace(job, ranks=int(point["ranks"]), batch_size=int(point["batch_size"])), access, hardware)
    placement, budget = str(point["placement"]), int(point["budget_bytes"])
    if placement.startswith("fae"):
        cold = fae_cold_tier(model)
        ahead = hardware.device == "cuda" and model.job.ranks == 1
        share = access.share(budget, pinned_max_rows)
        kind = placement.removeprefix("fae").strip("-")
        work = (
            model.fae(share, "hot" if kind == "hot" else "cold", cold, split_ahead=ahead)
            if kind in ("hot", "cold")
            else model.epoch(share, cold, split_ahead=ahead)
        )
        return Point(work, float(point["step_s"]))
    names: Mapping[str, Any] = {"stock": "host" if hardware.device == "cpu" else "hbm"}
    allowed = ("stock", "hbm", "uvm", "by_table", "uvm_caching", "prefetch", "host", "fae", "fae-hot", "fae-cold")
    if placement not in allowed:
        raise ConfigError(f"--calibration: placement {placement!r} is not one of {list(allowed)}; name one of those")
    return Point(model.stock(names.get(placement, placement), budget), float(point["step_s"]))


def _points(path: str) -> list[Mapping[str, Any]]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--calibration {path}: cannot be read ({error}); give a JSON file with a list of measured points") from None
    points = values.get("points") if isinstance(values, dict) else values
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points) or not points:
        raise ConfigError(f"--calibration {path}: a list of measured points, or an object with `points`, is needed; each is an object")
    return list(points)


def _share(text: str) -> float:
    """A budget as a share of all tables' bytes: "1%"."""
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else float("nan")
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise ConfigError(f"--budgets: received {text!r}; give shares of all tables' bytes, more than 0% and at most 100%, such as 0.5%")
    return share
