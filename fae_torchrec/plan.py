"""fae plan: where every row of a model will lie on given ranks, what to expect of it, and why; for a person and as JSON."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fae_torchrec.config import RunConfig
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.distributed.explanation import ModulePlan, PlanExplanation, TablePlan
from fae_torchrec.distributed.hardware_topology import hardware_topology, machine_topology
from fae_torchrec.experiment import placed_tables
from fae_torchrec.experiment_data import open_data
from fae_torchrec.experiment_plan import plan_experiment
from fae_torchrec.experiment_profile import make_profile
from fae_torchrec.training.report import write_json
from fae_torchrec.training.report_table import bytes_text, percent_text
from fae_torchrec.what_if import machine_of

_MOST_TABLES = 60  # of a module that are printed; the JSON has all of them


def run_plan(arguments: Namespace, config: RunConfig) -> int:
    """Plans the configured model, writes OUTPUT/plan.json and prints the plan."""
    hardware, ranks = None, arguments.ranks
    if arguments.hardware:
        machines = [machine_of(text, arguments.ranks) for text in arguments.hardware]
        if len(machines) > 1 or len(machines[0][1]) > 1:
            raise ConfigError(
                f"--hardware: received {arguments.hardware}; a plan is for one hardware and one number of ranks: h100 or h100:8"
            )
        hardware, (ranks,) = machines[0]
        config = replace(config, train=replace(config.train, device=cast(Any, hardware.device)))
    topology = machine_topology(ranks, config.train.device) if hardware is None else hardware_topology(hardware, ranks)
    data = open_data(config)
    tables = placed_tables(config, data)
    saved = None
    if config.placement.path is not None:
        saved = RowPlacement.load(config.placement.path)
        saved.check_tables(tables)
    profile = make_profile(config, data, tables, show_progress=not arguments.quiet)
    planner, _ = plan_experiment(config, data, profile, topology, saved)
    explanation = planner.explanation
    described = {
        "schema": 1,
        "kind": "plan",
        "command": list(arguments.command_line),
        "hardware": None if hardware is None else hardware.to_json(),
        "profile": profile.fingerprint,
        **explanation.to_json(),
    }
    path = write_json(described, Path(config.output, "plan.json"))
    if arguments.json:
        print(path.read_text(encoding="utf-8").rstrip())
    else:
        print("\n".join([*plan_text(explanation), "", str(path)]))
    return 0


def plan_text(explanation: PlanExplanation) -> list[str]:
    """A plan as lines for a person.

    Args:
        explanation: of the plan.
    """
    value, low, high = (percent_text(share) for share in explanation.hot_inputs)
    tight = explanation.tightest
    lines = [
        f"{explanation.ranks} rank(s) of {explanation.device}, batch size {explanation.batch_size:,} per rank, placement "
        f"{explanation.placement}",
        f"hot inputs {value} % ({low} to {high}) of the samples, coverage {percent_text(explanation.coverage)} % of the accesses",
        *_traffic_lines(explanation),
        "",
        "chosen:",
        *(f"  {choice.what}: {choice.chosen}\n    {choice.because}" for choice in explanation.choices),
        "",
        f"{tight.memory} of rank {tight.rank}, which has least left, {bytes_text(tight.total)}:",
        *(f"  {purpose:<22} {bytes_text(count):>10}" for purpose, count in tight.parts.items() if count),
        f"  {'left':<22} {bytes_text(max(tight.left, 0)):>10}",
    ]
    for module in explanation.modules:
        lines += ["", *_module_lines(module)]
    return lines


def _traffic_lines(explanation: PlanExplanation) -> list[str]:
    traffic = explanation.traffic
    if traffic is None:
        return []
    hot, cold, sent = (bytes_text(count) for count in (traffic.hot_bytes, traffic.cold_bytes, traffic.exchanged_bytes))
    return [
        f"expected of a rank in a step: {hot} of hot rows, {cold} of cold rows ({traffic.cold_ids:,.0f} ids), {sent} sent to other ranks"
    ]


def _module_lines(module: ModulePlan) -> list[str]:
    most_hot, most_cold = max(module.hot_bytes, default=0), max(module.cold_bytes, default=0)
    kind = "hot/cold module" if module.hot_cold else "stock module"
    lines = [
        f"{module.path or '(the model)'}: {kind}, {bytes_text(most_hot)} hot and {bytes_text(most_cold)} elsewhere on the fullest rank"
    ]
    rows = [
        ("table", "kind", "rows", "hot rows", "hot", "cold", "ids", "cold ids", "hot rows lie", "home", "kernel", "because"),
        *(_table_row(table) for table in module.tables[:_MOST_TABLES]),
    ]
    lines += _aligned(rows)
    if len(module.tables) > _MOST_TABLES:
        lines.append(f"  and {len(module.tables) - _MOST_TABLES:,} more tables: --json")
    return lines


def _table_row(table: TablePlan) -> tuple[str, ...]:
    cache = "" if table.cache_load_factor is None else f", cache {table.cache_load_factor:.2%}"
    cache += "" if table.expected_miss_rate is None else f" missed {table.expected_miss_rate:.0%}"
    return (
        table.table,
        table.kind,
        f"{table.rows:,}",
        f"{table.hot_rows:,}",
        bytes_text(table.hot_bytes),
        bytes_text(table.cold_bytes),
        _number(table.ids_per_sample),
        _number(table.cold_ids_per_sample),
        table.hot_sharding or "-",
        f"{table.cold_sharding} x{table.ranks}" if table.cold_sharding else "-",
        table.cold_kernel + cache if table.cold_kernel else "-",
        table.because,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _aligned(rows: Sequence[Sequence[str]], right: Iterable[int] = (2, 3, 4, 5, 6, 7)) -> list[str]:
    """Rows as lines with columns of one width; numbers to the right, the last column as it comes."""
    numbers = frozenset(right)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[-1] = 0
    return [
        "  "
        + "  ".join(
            text.rjust(widths[column]) if column in numbers else text.ljust(widths[column]) for column, text in enumerate(row)
        ).rstrip()
        for row in rows
    ]
