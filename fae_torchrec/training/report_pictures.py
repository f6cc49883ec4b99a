"""The report's pictures: each takes the report and gives one SVG that takes its colours from the page, or None if its part is missing."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

Report = Mapping[str, Any]

MAX_SKEW_TABLES = 8
"""Curves that can still be told apart in one picture."""

# Marker colours that become CSS variables, so that one SVG serves light pages, dark pages and paper.
_INK, _SOFT, _LINE = "#010101", "#020202", "#030303"
_SERIES = ("#040404", "#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b")
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line", **{colour: f"--s{index}" for index, colour in enumerate(_SERIES)}}
_PLACEMENTS = {"stock": _SERIES[0], "fae": _SERIES[1], "fae-unsegregated": _SERIES[2]}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fae",
    "font.size": 10,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.8,
}


def skew_picture(report: Report) -> str | None:
    """Share of a table's accesses that its most popular rows take, for the largest tables."""
    skew = sorted((report.get("profile") or {}).get("skew") or (), key=lambda table: -table["rows"])[:MAX_SKEW_TABLES]
    return _draw(lambda axes: _skew(axes[0], skew), 1, (5.6, 3.7)) if skew else None


def budget_picture(report: Report) -> str | None:
    """Hot inputs and coverage against the bytes of fast memory, with the budget in use marked."""
    placement = report.get("placement") or {}
    curve = [point for point in placement.get("curve") or () if point["byte_share"] > 0]
    return _draw(lambda axes: _budget(axes[0], curve, placement), 1, (5.6, 3.7)) if curve else None


def throughput_picture(report: Report) -> str | None:
    """Samples per second and the bytes behind them, as bars for every run."""
    panels = (
        ("samples_per_s", "samples/s, and range over fifths"),
        ("bytes_crossed_per_sample", "bytes crossed ranks / sample"),
        ("cold_bytes_per_sample", "cold bytes / sample"),
    )
    runs = [run for run in report.get("runs") or () if run.get("samples_per_s") is not None]

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (key, title) in zip(axes, panels, strict=True):
            _bars(axis, runs, key, title)
            axis.tick_params(labelleft=axis is axes[0])

    return _draw(draw, len(panels), (11.4, 0.9 + 0.36 * len(runs))) if runs else None


def breakdown_picture(report: Report) -> str | None:
    """Milliseconds of one step by part, for every run and kind of batch."""
    rows = [
        (f"{_label(run)}, {kind}", parts)
        for run in report.get("runs") or ()
        for kind in ("hot", "cold", "mixed")
        if (parts := (run.get("breakdown") or {}).get(kind))
    ]
    return _draw(lambda axes: _breakdown(axes[0], rows), 1, (11.4, 1.3 + 0.32 * len(rows))) if rows else None


def loss_picture(report: Report) -> str | None:
    """Train loss against samples, one panel for every number of ranks."""
    runs = [run for run in report.get("runs") or () if run.get("loss_curve")]
    ranks = sorted({run["ranks"] for run in runs})

    def draw(axes: Sequence[Axes]) -> None:
        for axis, count in zip(axes, ranks, strict=True):
            _losses(axis, [run for run in runs if run["ranks"] == count], f"{count} rank{'s' if count > 1 else ''}")
            axis.sharey(axes[0])
        axes[0].set_ylabel("train loss")

    return _draw(draw, len(ranks), (11.4 if len(ranks) > 1 else 6.4, 3.6)) if runs else None


def _draw(fill: Callable[[Sequence[Axes]], None], panels: int, size: tuple[float, float]) -> str:
    """One SVG element: no size, no fonts, no colours of its own, and nothing that a browser would fetch."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        fill([figure.add_subplot(1, panels, index + 1) for index in range(panels)])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    svg = re.sub(r"(font: [^;\"']*?px |font-family: )[^;\"]*", r"\1var(--font)", svg)
    svg = re.sub(r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|legend|PathCollection|LineCollection)_\d+"', "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()


def _skew(axis: Axes, skew: Sequence[Mapping[str, Any]]) -> None:
    for table, colour in zip(skew, _SERIES, strict=False):
        points = [(row, access) for row, access in zip(table["row_share"], table["access_share"], strict=True) if row > 0]
        axis.plot(*zip(*points, strict=True), color=colour, label=f"{table['table']} ({_count(table['rows'])} rows)")
    _log_shares(axis, [row for table in skew for row in table["row_share"] if row > 0])
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("most popular rows, share of the table's rows")
    axis.set_ylabel("share of its accesses")
    axis.legend(loc="lower right", fontsize=8.5)


def _budget(axis: Axes, curve: Sequence[Mapping[str, Any]], placement: Mapping[str, Any]) -> None:
    shares = [point["byte_share"] for point in curve]
    for key, label, colour in (("coverage", "coverage: accesses that are hot", _SERIES[0]), ("hot_inputs", "hot inputs", _SERIES[1])):
        axis.plot(shares, [point[key] for point in curve], color=colour, marker="o", markersize=3.5, label=label)
    last = max(curve, key=lambda point: point["used_bytes"])
    used, hot_inputs = placement.get("used_bytes"), placement.get("hot_inputs")
    if used and last["used_bytes"]:
        share = used / last["used_bytes"] * last["byte_share"]
        axis.axvline(share, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label=f"in use: {_percent(share)} of all bytes")
        if hot_inputs is not None:
            axis.plot([share], [hot_inputs], color=_INK, marker="o", markersize=6, linestyle="none")
            axis.annotate(f"{hot_inputs:.1%} hot inputs", (share, hot_inputs), xytext=(8, -14), textcoords="offset points")
    _log_shares(axis, shares)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("fast memory, share of all tables' bytes")
    axis.legend(loc="best", fontsize=8.5)


def _log_shares(axis: Axes, shares: Sequence[float]) -> None:
    """A logarithmic axis of percentages, with 2 and 5 between the powers of ten where there is room."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(shares) < 100 * min(shares) else (1,)))
    axis.xaxis.set_major_formatter(FuncFormatter(_percent))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _bars(axis: Axes, runs: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    values = [run.get(key) or 0.0 for run in runs]
    positions = list(range(len(runs)))
    axis.barh(positions, values, color=[_colour(run) for run in runs], height=0.72)
    for position, run, value in zip(positions, runs, values, strict=True):
        spread = run.get("samples_per_s_spread") if key == "samples_per_s" else None
        if spread:
            axis.plot(spread, [position, position], color=_INK, linewidth=1.2, marker="|", markersize=7)
        axis.annotate(
            "not known" if run.get(key) is None else _count(value),  # no bar is no claim of nothing
            (max(value, spread[1]) if spread else value, position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axis.set_yticks(positions, [_label(run) for run in runs])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, 1.28 * max([*values, 1e-9]))
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axis.set_title(title)


def _breakdown(axis: Axes, rows: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    parts = ["input_dist", "forward", "backward", "optimizer"]
    parts += sorted({name for _, values in rows for name in values} - set(parts))
    positions = list(range(len(rows)))
    left = [0.0] * len(rows)
    for part, colour in zip(parts, (*_SERIES[3:], *_SERIES[:3]), strict=False):  # not the placements' colours
        widths = [values.get(part) or 0.0 for _, values in rows]
        axis.barh(positions, widths, left=left, color=colour, height=0.72, label=part.replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for position, total in zip(positions, left, strict=True):
        axis.annotate(f"{total:.1f} ms", (total, position), xytext=(5, 0), textcoords="offset points", va="center")
    axis.set_yticks(positions, [label for label, _ in rows])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, 1.12 * max([*left, 1e-9]))
    axis.set_xlabel("milliseconds of one step")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(parts), fontsize=9)


def _losses(axis: Axes, runs: Iterable[Mapping[str, Any]], title: str) -> None:
    for run in runs:
        samples, losses = zip(*run["loss_curve"], strict=True)
        under = run["placement"] == "stock"  # wide and pale, so that a run that equals it does not hide it
        axis.plot(samples, losses, color=_colour(run), label=run["placement"], linewidth=4 if under else 1.3, alpha=0.5 if under else 1)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axis.set_xlabel("samples")
    axis.set_title(title)
    axis.legend(loc="upper right", fontsize=9)


def _colour(run: Mapping[str, Any]) -> str:
    return _PLACEMENTS.get(run["placement"], _SERIES[3])


def _label(run: Mapping[str, Any]) -> str:
    return f"{run['placement']}, {run['ranks']} rank{'s' if run['ranks'] > 1 else ''}"


def _count(value: float) -> str:
    """A number of up to four digits: 12, 1.5 k, 2.2 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2g}"


def _percent(value: float, _: object = None) -> str:
    """A share as a percentage with two digits that mean something: 0.002 -> 0.2%."""
    return f"{100 * value:.2g}%" if value < 0.995 else f"{100 * value:.0f}%"
