"""A picture, drawn the same way twice: as SVG that takes its colours from the page around it, and as PNG on white."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, SOFT, LINE = "C8", "C9", "C10"
"""Colours of text and of what is emphasised, of labels, and of grids and whatever lies in the background."""
SERIES = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C7")
"""Colours of data."""

COLOURS_ON_WHITE: Mapping[str, str] = {
    "s0": "#7a8794", "s1": "#c8501e", "s2": "#16808a", "s3": "#7d5ba6", "s4": "#b58a1b", "s5": "#3f7d3a", "s6": "#b03a6c", "s7": "#3b62a8",
    "ink": "#1c2024", "soft": "#5b636c", "line": "#d9dde1",
}  # fmt: skip
"""The colours on white by the names of the page's variables, in the order of matplotlib's C0, C1, ..."""
# Stand-ins that become CSS variables, so that one SVG serves light pages, dark pages and paper.
_STAND_INS = {name: f"#0{index:x}0{index:x}0{index:x}" for index, name in enumerate(COLOURS_ON_WHITE, start=1)}
_PNG_DPI = 160
_TITLE_INCHES = 0.28


@dataclass(frozen=True)
class Picture:
    """What is drawn, on which panels; drawn anew for each format.

    Attributes:
        fill: draws on the panels, given row by row. It names colours by `INK`, `SOFT`, `LINE` and `SERIES` only.
        size: width and height in inches.
        panels: rows and columns of panels.
        title: a line above all, beyond `size`; none if empty.
    """

    fill: Callable[[Sequence[Axes]], None]
    size: tuple[float, float]
    panels: tuple[int, int] = (1, 1)
    title: str = ""

    def svg(self) -> str:
        """One SVG element: no size, no fonts, no colours of its own, and nothing that a browser would fetch."""
        with matplotlib.rc_context(_style(_STAND_INS)):
            figure = self._figure()
            FigureCanvasSVG(figure)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
        svg = re.sub(r"(font: [^;\"']*?px |font-family: )[^;\"]*", r"\1var(--font)", svg)
        svg = re.sub(r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|[xy]tick|legend|\w+Collection)_\d+"', "", svg)
        for name, colour in _STAND_INS.items():
            svg = svg.replace(colour, f"var(--{name})")
        return svg.strip()

    def png(self) -> bytes:
        """A PNG file on white."""
        with matplotlib.rc_context(_style(COLOURS_ON_WHITE)):
            figure = self._figure()
            FigureCanvasAgg(figure)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=_PNG_DPI, facecolor="white")
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        """What a notebook shows of it."""
        return self.png()

    def titled(self, text: str) -> Picture:
        """The same below a line that says what it is of, such as where the samples come from."""
        return replace(self, title=text)

    def _figure(self) -> Figure:
        width, height = self.size
        figure = Figure(figsize=(width, height + (_TITLE_INCHES if self.title else 0)), layout="constrained")
        below: FigureBase = figure
        if self.title:  # a figure of its own: a suptitle would lie on a legend outside the panels
            parts = figure.add_gridspec(2, 1, height_ratios=[_TITLE_INCHES, height])
            figure.add_subfigure(parts[0]).text(0.01, 0.4, self.title, va="center")
            below = figure.add_subfigure(parts[1])
        rows, columns = self.panels
        self.fill([below.add_subplot(rows, columns, index + 1) for index in range(rows * columns)])
        return figure


def log_shares(axis: Axes, shares: Sequence[float]) -> None:
    """A logarithmic x axis of percentages, with 2 and 5 between the powers of ten where there is room.

    Args:
        axis: the panel.
        shares: what is drawn on it, all above 0; at least one.
    """
    low, high = min(shares), max(shares)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.xaxis.set_major_formatter(FuncFormatter(short_percent))
    axis.xaxis.set_minor_formatter(NullFormatter())
    if high < 4 * low:  # too narrow to be sure of two ticks
        axis.set_xlim(low / 2, 2 * high if high < 0.5 else 1.1)


def stacked_ms(axis: Axes, rows: Sequence[tuple[str, Mapping[str, float]]], colours: Mapping[str, str], what: str, columns: int) -> None:
    """Horizontal bars of milliseconds, each stacked from its parts, with its sum beside it.

    Args:
        axis: drawn on.
        rows: label and milliseconds by part, from top to bottom.
        colours: part -> colour, in the order of stacking; the parts' names are the legend's. A part that no row has is left out.
        what: of the axis.
        columns: of the legend.
    """
    positions = list(range(len(rows)))
    left = [0.0] * len(rows)
    for part, colour in colours.items():
        widths = [values.get(part) or 0.0 for _, values in rows]
        if any(widths):
            axis.barh(positions, widths, left=left, color=colour, height=0.72, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    for position, total in zip(positions, left, strict=True):
        axis.annotate(f"{total:.1f} ms", (total, position), xytext=(5, 0), textcoords="offset points", va="center")
    axis.set_yticks(positions, [label for label, _ in rows])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, 1.12 * max([*left, 1e-9]))
    axis.set_xlabel(what)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=9)


def short_count(value: float, _: object = None) -> str:
    """A number of up to four digits: 12, 1.5 k, 2.2 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2g}"


def short_percent(share: float, _: object = None) -> str:
    """A share as a percentage with two digits that mean something: 0.002 -> 0.2%."""
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def _style(colours: Mapping[str, str]) -> dict[Any, Any]:
    ink, soft, line = colours["ink"], colours["soft"], colours["line"]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "fae",
        "font.size": 10,
        "axes.prop_cycle": cycler(color=list(colours.values())),
        "axes.edgecolor": line,
        "axes.labelcolor": soft,
        "axes.titlecolor": ink,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 0.6,
        "text.color": ink,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": soft,
        "ytick.labelcolor": soft,
        "legend.frameon": False,
        "legend.labelcolor": ink,
        "lines.linewidth": 1.8,
    }
