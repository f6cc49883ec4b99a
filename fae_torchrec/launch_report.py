"""What `fae launch` says at the start and at the end of a run, and the record that it writes."""

from __future__ import annotations

import os
import platform
import resource
from typing import Any

import torch
import torchrec

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.launch_parts import Session
from fae_torchrec.launch_placement import Prepared
from fae_torchrec.launch_script import ScriptRun
from fae_torchrec.training.report_table import bytes_text, percent_text

_MARK = "fae launch |"
_REPLACED = {
    "EmbeddingShardingPlanner": "EmbeddingShardingPlanner -> FAEShardingPlanner",
    "get_default_sharders": "default sharders -> get_fae_sharders()",
    "TrainPipelineSparseDist": "TrainPipelineSparseDist -> FAETrainPipeline, which sorts the script's own batches",
}


def start_lines(script: ScriptRun, prepared: Prepared, session: Session, world_size: int, *, stock_wanted: bool = False) -> list[str]:
    """The block at the start: what is replaced, and by which placement; or why nothing is."""
    lines = [f"{script.text}  ({world_size} rank{'s' if world_size > 1 else ''})"]
    placement = prepared.placement
    if stock_wanted:
        lines.append("placement stock was asked for: nothing is replaced, the steps are counted and timed")
    if placement is not None:
        lines += [
            f"placement {placement.fingerprint}, {prepared.origin}",
            f"  {bytes_text(placement.hot_bytes)} of {bytes_text(placement.tables.total_bytes)} are hot, the budget is "
            f"{bytes_text(placement.budget_bytes)}; {_rows_text(placement)}",
            f"  expected: {percent_text(placement.hot_inputs)} % of the samples all hot "
            f"({' to '.join(map(percent_text, placement.hot_inputs_interval))} %)",
            f"  coverage: {_coverage_text(prepared, placement)}",
        ]
    if prepared.profiled:
        told = prepared.profiled
        lines.append(f"  profiled: {told['samples']:,} samples in {told['batches']:,} batches; {told['ended']}")
    if prepared.why_not is not None:
        lines.append(f"FAE does not pay here, because {prepared.why_not}.")
    if session.placement is None:
        if not stock_wanted:
            lines.append("the run goes on with TorchRec's own planner and pipeline (when_not_paying: stock); nothing is replaced")
    else:
        if prepared.why_not is not None:
            lines.append("the run goes on with FAE all the same (when_not_paying: fae)")
        elif session.placement.tables.total_bytes <= session.placement.budget_bytes:
            lines.append("all tables fit into the budget; TorchRec could keep them there too: FAE saves only exchanges between ranks")
        lines += ["replaced:", *(f"  {text}" for text in _REPLACED.values())]
    return _block(lines)


def end_lines(record: dict[str, Any]) -> list[str]:
    """The block at the end: what was used, and what it gained."""
    steps, error = record["steps"], record["error"]
    lines = [f"{record['script']}: ended" if error is None else f"{record['script']}: failed ({error})"]
    total = steps["hot"] + steps["other"]
    if not total:
        used = ", ".join(record["used"]) or "none"
        lines.append(f"no training step of TrainPipelineSparseDist was seen; of the names that fae launch knows the script used {used}")
    elif record["placement"] == "fae":
        share, kept = percent_text(record["hot_share"]), bytes_text(record["hot_lookup_bytes"])
        lines += [
            f"{total:,} training steps: {steps['hot']:,} all hot ({share} %), {steps['other']:,} through both tiers",
            f"the hot ones looked up {record['hot_lookups']:,} rows ({kept}) of tables that are not all hot on each rank, and no cold tier",
        ]
    else:
        lines.append(f"{total:,} training steps of TorchRec's own pipeline")
    if record["samples_per_s"] is not None:
        lines.append(
            f"{record['samples']:,} samples in {record['seconds']:.1f} s of training: {record['samples_per_s']:,.0f} samples/s "
            f"(all {record['world_size']} ranks, evaluation left out)"
        )
    if record["placement"] == "fae" and "EmbeddingShardingPlanner" not in record["used"]:
        lines.append("the script did not plan a model with the placement's tables: FAE had no effect")
    if record["why_not"] is not None:
        if record["hot_share"] is not None and record["hot_share"] >= record["config"]["least_hot_inputs"]:
            lines.append("more steps were hot than the profile promised: the script feeds samples again that were counted")
        else:
            lines.append(f"FAE does not pay here, because {record['why_not']}.")
    lines += record["notes"]
    return _block([*lines, f"all figures: {record['path']}"])


def make_record(
    script: ScriptRun, prepared: Prepared, session: Session, world_size: int, wanted: str, error: str | None, path: str
) -> dict[str, Any]:
    """What launch.json holds; its keys are described in docs/launch.md. Counts and times are this rank's.

    Args:
        script: what was run.
        prepared: what was known before.
        session: what happened.
        world_size: ranks.
        wanted: the placement that was asked for, "fae" or "stock".
        error: what the script failed with; None if it ended well.
        path: where the record is written.
    """
    observed = session.observed
    total, samples = observed.hot + observed.other, observed.samples * world_size
    return {
        "format": 1,
        "script": script.text,
        "target": script.target,
        "arguments": list(script.arguments),
        "world_size": world_size,
        "wanted": wanted,
        "placement": "stock" if session.placement is None else "fae",
        "why_not": prepared.why_not,
        "error": error,
        "used": sorted(session.used),
        "placed": None if prepared.placement is None else _placed(prepared.placement, prepared.origin),
        "profiled": dict(prepared.profiled) or None,
        "config": session.config.to_dict(),
        "steps": {"hot": observed.hot, "other": observed.other, "evaluation": observed.evaluations},
        "hot_share": observed.hot / total if total else None,
        "samples": samples,
        "seconds": observed.seconds,
        "samples_per_s": samples / observed.seconds if observed.seconds and samples else None,
        "step_seconds": observed.step_seconds,
        "step_hot": observed.step_hot,
        "hot_lookups": observed.hot_lookups,
        "hot_lookup_bytes": observed.hot_lookup_bytes,
        "peak_bytes": _peak_bytes(),
        "notes": list(observed.sentences),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchrec": torchrec.__version__},
        "cpus": os.cpu_count(),
        "path": path,
    }


def _placed(placement: RowPlacement, origin: str) -> dict[str, Any]:
    tables = placement.tables
    return {
        "fingerprint": placement.fingerprint,
        "tables_fingerprint": tables.fingerprint,
        "origin": origin,
        "budget_bytes": placement.budget_bytes,
        "hot_bytes": placement.hot_bytes,
        "total_bytes": tables.total_bytes,
        "hot_rows": sum(placement.hot_rows(name) for name in tables.names),
        "rows": sum(table.rows for table in tables),
        "hot_inputs": placement.hot_inputs,
        "hot_inputs_interval": list(placement.hot_inputs_interval),
        "coverage": placement.coverage,
    }


def _peak_bytes() -> dict[str, int]:
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peaks["device"] = torch.cuda.max_memory_allocated()
    return peaks


def _rows_text(placement: RowPlacement) -> str:
    hot = sum(placement.hot_rows(name) for name in placement.tables.names)
    return f"{hot:,} of {sum(table.rows for table in placement.tables):,} rows in {len(placement.tables)} tables"


def _coverage_text(prepared: Prepared, placement: RowPlacement) -> str:
    fresh = prepared.profiled.get("fresh_coverage")
    if fresh is None:
        return f"{percent_text(placement.coverage)} % of the accesses that were counted are hot"
    return f"{percent_text(fresh)} % of the accesses of samples that were not counted are hot"


def _block(lines: list[str]) -> list[str]:
    return [f"{_MARK} {part}" for line in lines for part in line.splitlines()]
