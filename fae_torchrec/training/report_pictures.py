"""The comparison's pictures: each takes the report and gives one picture, or None if its part is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fae_torchrec.training.picture import INK, SERIES, Picture, short_count, stacked_ms

Report = Mapping[str, Any]

_PLACEMENTS = {"stock": SERIES[0], "fae": SERIES[1], "fae-unsegregated": SERIES[2]}


def throughput_picture(report: Report) -> Picture | None:
    """Samples per second and the bytes behind them, as bars for every run."""
    runs = [run for run in report.get("runs") or () if run.get("samples_per_s") is not None]
    over = "fifths" if (report.get("repeats") or 1) == 1 else "runs"
    panels = [
        (key, title)
        for key, title in (
            ("samples_per_s", "samples/s" if report.get("script") and over == "fifths" else f"samples/s, and range over {over}"),
            ("step_ms", "ms / step"),
            ("bytes_crossed_per_sample", "bytes crossed ranks / sample"),
            ("cold_bytes_per_sample", "cold bytes / sample"),
        )
        if any(run.get(key) is not None for run in runs)
    ]

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (key, title) in zip(axes, panels, strict=True):
            _bars(axis, runs, key, title)
            axis.tick_params(labelleft=axis is axes[0])

    return Picture(draw, (11.4, 0.9 + 0.36 * len(runs)), (1, len(panels))) if runs else None


def breakdown_picture(report: Report) -> Picture | None:
    """Milliseconds of one step by part, for every run and kind of batch."""
    rows = [
        (f"{_label(run)}, {kind}", parts)
        for run in report.get("runs") or ()
        for kind in ("hot", "cold", "mixed")
        if (parts := (run.get("breakdown") or {}).get(kind))
    ]
    return Picture(lambda axes: _breakdown(axes[0], rows), (11.4, 1.3 + 0.32 * len(rows))) if rows else None


def loss_picture(report: Report) -> Picture | None:
    """Train loss against samples, one panel for every number of ranks."""
    runs = [run for run in report.get("runs") or () if run.get("loss_curve")]
    ranks = sorted({run["ranks"] for run in runs})

    def draw(axes: Sequence[Axes]) -> None:
        for axis, count in zip(axes, ranks, strict=True):
            _losses(axis, [run for run in runs if run["ranks"] == count], f"{count} rank{'s' if count > 1 else ''}")
            axis.sharey(axes[0])
        axes[0].set_ylabel("train loss")

    return Picture(draw, (11.4 if len(ranks) > 1 else 6.4, 3.6), (1, len(ranks))) if runs else None


def _bars(axis: Axes, runs: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    values = [run.get(key) or 0.0 for run in runs]
    positions = list(range(len(runs)))
    axis.barh(positions, values, color=[_colour(run) for run in runs], height=0.72)
    for position, run, value in zip(positions, runs, values, strict=True):
        spread = run.get("samples_per_s_spread") if key == "samples_per_s" else None
        if spread:
            axis.plot(spread, [position, position], color=INK, linewidth=1.2, marker="|", markersize=7)
        axis.annotate(
            "not known" if run.get(key) is None else short_count(value),  # no bar is no claim of nothing
            (max(value, spread[1]) if spread else value, position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axis.set_yticks(positions, [_label(run) for run in runs])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    spreads = [run.get("samples_per_s_spread") or (0.0,) for run in runs] if key == "samples_per_s" else []
    axis.set_xlim(0, 1.28 * max([*values, *map(max, spreads), 1e-9]))
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(short_count))
    axis.set_title(title)


def _breakdown(axis: Axes, rows: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    parts = ["input_dist", "forward", "backward", "optimizer"]
    parts += sorted({name for _, values in rows for name in values} - set(parts))
    colours = dict(zip(parts, (*SERIES[3:], *SERIES[:3]), strict=False))  # not the placements' colours
    named = [(label, {part.replace("_", " "): ms for part, ms in values.items()}) for label, values in rows]
    stacked_ms(axis, named, {part.replace("_", " "): colour for part, colour in colours.items()}, "milliseconds of one step", len(parts))


def _losses(axis: Axes, runs: Iterable[Mapping[str, Any]], title: str) -> None:
    for run in runs:
        samples, losses = zip(*run["loss_curve"], strict=True)
        under = run["placement"] == "stock"  # wide and pale, so that a run that equals it does not hide it
        axis.plot(samples, losses, color=_colour(run), label=run["placement"], linewidth=4 if under else 1.3, alpha=0.5 if under else 1)
    axis.xaxis.set_major_formatter(FuncFormatter(short_count))
    axis.set_xlabel("samples")
    axis.set_title(title)
    axis.legend(loc="upper right", fontsize=9)


def _colour(run: Mapping[str, Any]) -> str:
    return _PLACEMENTS.get(run["placement"], SERIES[3])


def _label(run: Mapping[str, Any]) -> str:
    return f"{run['placement']}, {run['ranks']} rank{'s' if run['ranks'] > 1 else ''}"
