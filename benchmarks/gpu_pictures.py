"""The pictures of benchmarks/gpu.py's measurements; benchmarks/gpu_page.py writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_scenarios import BASE, FAE, HBM, PREFETCH, UVM
from matplotlib.axes import Axes

from fae_torchrec.training.picture import INK, SERIES, SOFT, Picture, short_count, short_percent

_COLOURS = {"hbm": SERIES[0], "uvm": SERIES[4], "caching": SERIES[2], "host": SERIES[3], "fae": SERIES[1]}
_SWEPT = {"batch_size": "batch size", "exponent": "Zipf exponent (0: uniform)", "budget": "budget in HBM", "dim": "columns of a table"}


def base_picture(record: Mapping[str, Any]) -> Picture | None:
    """Samples/s, the embedding stage's and its device time as bars, of all placements on the base workload; None if it was not measured."""
    found: dict[str, Any] = {}
    for entry in record["comparisons"]:
        if all(entry["workload"][key] == getattr(BASE, key) for key in _SWEPT):
            for name, placement in entry["placements"].items():
                if placement.get("samples_per_s_median"):
                    found.setdefault(name, placement)
    if not found:
        return None

    def fill(axes: Sequence[Axes]) -> None:
        rows = list(enumerate(reversed(found)))
        for position, name in rows:
            _rate_bar(axes[0], position, found[name])
            _device_bar(axes[1], position, found[name])
        for axis in axes:
            axis.set_yticks([position for position, _ in rows], [name for _, name in rows])
            axis.margins(x=0.16)
            axis.grid(visible=False, axis="y")
            axis.xaxis.set_major_formatter(short_count)
            axis.tick_params(labelleft=axis is axes[0])
        axes[0].set_title("samples/s, and range of the blocks")
        axes[1].set_title("embedding stage, ms of the GPU")
        axes[1].set_xlabel("pale: prefetched or staged beside the step before", color=SOFT)

    return Picture(fill, (11.4, 1.3 + 0.34 * len(found)), (1, 2))


def _rate_bar(axis: Axes, position: int, placement: Mapping[str, Any]) -> None:
    value, blocks = placement["samples_per_s_median"], placement["samples_per_s"]
    axis.barh(position, value, color=_COLOURS[placement["kind"]], height=0.7)
    axis.plot([min(blocks), max(blocks)], [position, position], color=INK, linewidth=1.2, marker="|", markersize=7)
    _note(axis, short_count(value), max(*blocks, value), position)


def _device_bar(axis: Axes, position: int, placement: Mapping[str, Any]) -> None:
    left = 0.0
    for part, alpha in (("step", 1.0), ("prefetch", 0.45)):
        value = _device_ms(placement, part)
        axis.barh(position, value, left=left, color=_COLOURS[placement["kind"]], alpha=alpha, height=0.7)
        left += value
    _note(axis, f"{left:.2f}" if left else "not clocked", left, position)


def _note(axis: Axes, text: str, x: float, y: float) -> None:
    axis.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", color=INK, fontsize=9)


def sweep_picture(record: Mapping[str, Any]) -> Picture | None:
    """Samples/s over all-HBM's as one thing is varied, a panel for each; None where nothing was varied."""
    panels = {key: points for key in _SWEPT if len(points := _points(record, key)) > 1}
    if not panels:
        return None

    def fill(axes: Sequence[Axes]) -> None:
        for axis, (key, points) in zip(axes, panels.items(), strict=True):
            for name, kind in ((UVM.name, "uvm"), (PREFETCH.name, "caching"), (FAE.name, "fae")):
                line = [(value, rates[name] / rates[HBM.name]) for value, rates in points if name in rates]
                axis.plot(*zip(*line, strict=True), marker="o", color=_COLOURS[kind], label=name)
            axis.axhline(1.0, color=_COLOURS["hbm"], linewidth=1.0, label=HBM.name)
            axis.set_xlabel(_SWEPT[key])
            axis.set_ylim(bottom=0)
            if key != "exponent":
                axis.set_xscale("log")
                axis.minorticks_off()
                values = [value for value, _ in points]
                axis.set_xticks(values, [short_percent(value) if key == "budget" else f"{value:,}" for value in values])
        axes[0].set_title("samples/s over all-HBM's")
        axes[0].legend()

    return Picture(fill, (3.6 * len(panels) + 0.6, 3.4), (1, len(panels)))


def _points(record: Mapping[str, Any], key: str) -> list[tuple[float, dict[str, float]]]:
    """Values of one thing, the others as on the base workload, with the rates by placement."""
    found: dict[float, dict[str, float]] = {}
    for entry in record["comparisons"]:
        workload = entry["workload"]
        if all(workload[other] == getattr(BASE, other) for other in _SWEPT if other != key):
            rates = {name: p["samples_per_s_median"] for name, p in entry["placements"].items() if p.get("samples_per_s_median")}
            found.setdefault(workload[key], rates)
    return sorted((value, rates) for value, rates in found.items() if HBM.name in rates)


def _device_ms(placement: Mapping[str, Any], part: str) -> float:
    by_kind: dict[str, dict[str, float]] = placement.get("device_ms") or {}
    if set(by_kind) == {"hot", "cold"}:
        hot: float = placement["hot_batches"]
        return hot * by_kind["hot"][part] + (1 - hot) * by_kind["cold"][part]
    return sum(of_kind[part] for of_kind in by_kind.values())
