"""Looks at some steps of a placement with torch's profiler: where the device's time goes, and where the host's."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from gpu_trainee import Runner

_STEPS = 8
_ROWS = 45
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def tracer(folder: Path, names: Sequence[str]) -> Callable[[str, Runner], dict[str, float]]:
    """What writes DIR/<placement>.txt, two tables, by the device's time and by the host's, and says `busy_ms` of them.

    Args:
        folder: DIR.
        names: of the placements that are looked at; others give nothing.
    """

    def trace(name: str, runner: Runner) -> dict[str, float]:
        if name not in names:
            return {}
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with profile(activities=activities) as seen:
            elapsed_ms = runner.run(_STEPS)
        averages = seen.key_averages()
        device = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        tables = [averages.table(sort_by=order, row_limit=_ROWS, max_name_column_width=90) for order in (device, "self_cpu_time_total")]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{''.join(c if c.isalnum() else '_' for c in name)}.txt"
        text = f"{name}: {_STEPS} steps, {elapsed_ms / _STEPS:.3f} ms a step under the profiler\n" + "\n".join(tables)
        file.write_text(text)
        return busy_ms(text)

    return trace


def busy_ms(text: str) -> dict[str, float]:
    """From what `tracer` writes: milliseconds of a step's kernels and copies, on whatever streams ("kernels_ms").

    What the host takes is not told: under the profiler it is half as slow again.
    """
    found = re.search(r"Self CUDA time total: ([\d.]+)(us|ms|s)\b", text)
    return {} if found is None else {"kernels_ms": round(float(found[1]) * _UNITS[found[2]] / _STEPS, 3)}
