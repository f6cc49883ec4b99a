"""Pictures of popularity: skew, what a budget or a threshold buys, and the hot rows; each is None if what it shows is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from fae_torchrec.core.estimate import CONFIDENCE
from fae_torchrec.training.picture import INK, LINE, SERIES, SOFT, Picture, log_shares, short_count, short_percent
from fae_torchrec.training.report_table import bytes_text

Values = Mapping[str, Any]

MAX_SKEW_TABLES = 8
"""Curves that can still be told apart in one picture."""
MAX_BAR_TABLES = 64
"""Tables with bars in one picture, the largest."""
POLICIES = ("input_aware", "threshold")
"""The selections, the default first."""

_POLICY_COLOURS = {"input_aware": SERIES[1], "threshold": SERIES[7]}
_POLICY_LINES: Mapping[str, Mapping[str, Any]] = {
    "input_aware": {"marker": "o", "markersize": 4.5},
    "threshold": {"marker": "s", "markersize": 2.5, "linestyle": (0, (3, 1.5)), "linewidth": 1.3},  # shows a line that it lies on
}
_INTERVAL_WORDS = f"{CONFIDENCE:.1%} interval of hot inputs"
_RESOLUTION_WORDS = "resolution of the sample"
_MAX_NAME = 28
_MAX_COLUMN = 31  # letters of a label, two of which fit side by side in a narrow picture


def skew_picture(profile: Values) -> Picture | None:
    """Share of a table's accesses that its most popular rows take, for the largest tables.

    Args:
        profile: the report's `profile`; its `skew` has table, rows, and the curve row_share, access_share.
    """
    skew = sorted(profile.get("skew") or (), key=lambda table: -table["rows"])[:MAX_SKEW_TABLES]
    return Picture(lambda axes: _skew(axes[0], skew), (5.6, 4.6)) if skew else None


def budget_picture(curves: Mapping[str, Sequence[Values]], placement: Values) -> Picture | None:
    """Hot inputs and coverage against the bytes of fast memory, with the budget in use marked (FAE Fig. 5).

    Args:
        curves: policy -> points, in any order: used_bytes, byte_share, hot_inputs, coverage and, for a band, low and high.
        placement: the report's `placement`: used_bytes, hot_inputs and coverage of what is in use, each optional.
    """
    drawn = {policy: _ascending(points, "byte_share") for policy, points in curves.items()}
    drawn = {policy: points for policy, points in drawn.items() if points}
    return Picture(lambda axes: _budget(axes, drawn, placement), (11.4, 3.9), (1, 2)) if drawn else None


def threshold_picture(thresholds: Sequence[Values], placement: Values) -> Picture | None:
    """Hot inputs and hot embedding bytes against the access threshold (FAE §4.1).

    Args:
        thresholds: points, in any order: threshold_percent, byte_share, hot_inputs, coverage, clamped and, for a band, low and high.
        placement: the report's `placement`; its `byte_share` is the budget's line.
    """
    points = _ascending(thresholds, "threshold_percent")[::-1]
    return Picture(lambda axes: _thresholds(axes, points, placement.get("byte_share")), (5.6, 4.6), (2, 1)) if points else None


def hot_rows_picture(placement: Values) -> Picture | None:
    """Hot rows of every table under both selections, in rows and as a share; of the `MAX_BAR_TABLES` largest if there are more.

    Args:
        placement: the report's `placement`; its `per_table` has table, rows, seen_rows and hot_rows by policy.
    """
    tables = sorted(placement.get("per_table") or (), key=lambda table: -table["rows"])[:MAX_BAR_TABLES]
    if not tables:
        return None
    pinned = set(placement.get("pinned") or ())
    return Picture(lambda axes: _hot_rows(axes, tables, pinned), (11.4, 1.5 + 0.34 * len(tables)), (1, 2))


def _ascending(points: Sequence[Values], key: str) -> list[Values]:
    """The points in order; a logarithmic axis has no place for zero."""
    return sorted((point for point in points if point[key] > 0), key=lambda point: float(point[key]))


def _skew(axis: Axes, skew: Sequence[Values]) -> None:
    for table, colour in zip(skew, SERIES, strict=False):
        points = [(row, access) for row, access in zip(table["row_share"], table["access_share"], strict=True) if row > 0]
        axis.plot(*zip(*points, strict=True), color=colour, label=f"{_short(table['table'])} ({short_count(table['rows'])} rows)")
    log_shares(axis, [row for table in skew for row in table["row_share"] if row > 0])
    _share_axis(axis)
    axis.set_xlabel("most popular rows, share of the table's rows")
    axis.set_ylabel("share of the table's accesses")
    handles, labels = axis.get_legend_handles_labels()
    _legend(axis, handles, labels, columns=2 if max(map(len, labels)) <= _MAX_COLUMN else 1)


def _budget(axes: Sequence[Axes], curves: Mapping[str, Sequence[Values]], placement: Values) -> None:
    every = [point for points in curves.values() for point in points]
    last = max(every, key=lambda point: point["byte_share"])
    used = placement.get("used_bytes")
    share = used / last["used_bytes"] * last["byte_share"] if used and last["used_bytes"] else None
    for axis, key, words in zip(axes, ("hot_inputs", "coverage"), ("hot inputs", "coverage: accesses that are hot"), strict=True):
        for policy, points in curves.items():
            _line(axis, points, "byte_share", key, policy)
        value = placement.get(key)
        if share is not None:
            axis.axvline(share, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            if value is not None:
                axis.plot([share], [value], color=INK, marker="o", markersize=6, linestyle="none")
        axis.set_title(words + (f", {value:.1%} with what is in use" if value is not None and share is not None else ""))
        log_shares(axis, [point["byte_share"] for point in every] + ([share] if share else []))
        _share_axis(axis)
        axis.set_xlabel("fast memory, share of all tables' bytes")
    axes[0].set_ylabel("share of inputs")
    axes[1].set_ylabel("share of accesses")
    handles, labels = axes[1].get_legend_handles_labels()
    if any(_has_interval(point) for point in every):
        handles, labels = [*handles, Patch(color=SOFT, alpha=0.25, linewidth=0)], [*labels, _INTERVAL_WORDS]
    if share is not None:
        handles.append(axes[0].lines[-1 if placement.get("hot_inputs") is None else -2])
        labels.append(f"in use: {bytes_text(used or 0)}, {short_percent(share)} of all bytes")
    _legend(axes[0], handles, labels, columns=4)


def _line(axis: Axes, points: Sequence[Values], x: str, y: str, policy: str) -> None:
    """One selection's curve, with its interval if it is of hot inputs."""
    colour, places = _POLICY_COLOURS.get(policy, SERIES[3]), [point[x] for point in points]
    axis.plot(places, [point[y] for point in points], color=colour, label=policy, **_POLICY_LINES.get(policy, {"marker": "o"}))
    if y == "hot_inputs":
        _band(axis, points, x, colour)


def _band(axis: Axes, points: Sequence[Values], x: str, colour: str) -> None:
    points = [point for point in points if _has_interval(point)]
    if len(points) == 1:  # an area of one point is nothing
        axis.vlines(points[0][x], points[0]["low"], points[0]["high"], color=colour, linewidth=1.2)
    elif points:
        low, high = ([point[end] for point in points] for end in ("low", "high"))
        axis.fill_between([point[x] for point in points], low, high, color=colour, alpha=0.25, linewidth=0)


def _has_interval(point: Values) -> bool:
    return point.get("low") is not None and point.get("high") is not None


def _thresholds(axes: Sequence[Axes], points: Sequence[Values], budget: float | None) -> None:
    inputs, size = axes
    colour = _POLICY_COLOURS["threshold"]
    places = [point["threshold_percent"] for point in points]
    inputs.plot(places, [point["coverage"] for point in points], color=SERIES[2], linewidth=1.2, marker=".", label="coverage")
    inputs.plot(places, [point["hot_inputs"] for point in points], color=colour, marker="o", markersize=3.5, label="hot inputs")
    _band(inputs, points, "threshold_percent", colour)
    held = [point for point in points if point["byte_share"] > 0]
    x, y = [point["threshold_percent"] for point in held], [point["byte_share"] for point in held]
    size.plot(x, y, color=SERIES[3], marker="D", markersize=3.5, label="hot embedding bytes")
    clamped = [point["threshold_percent"] for point in points if point.get("clamped")]
    for axis in axes:
        if clamped:
            axis.axvline(min(clamped), color=INK, linewidth=1.2, linestyle=(0, (1, 2)), label=_RESOLUTION_WORDS)
        log_shares(axis, [place / 100 for place in places])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda percent, _: f"{percent:.3g}%"))
        low, high = min(places), max(places)
        pad = max((high / low) ** 0.04, 1.3)
        axis.set_xlim(high * pad, low / pad)  # falling: as in the picture of budgets, more is hot to the right
    inputs.tick_params(labelbottom=False)
    _share_axis(inputs)
    inputs.set_ylabel("share of inputs,\nof accesses")
    if budget:
        size.axhline(budget, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"in use: {short_percent(budget)} of all bytes")
    if y:
        _log_y(size, [*y, *([budget] if budget else [])])
    size.set_ylabel("share of\nall bytes")
    size.set_xlabel("access threshold, per cent of a table's accesses (falling)")
    handles, labels = inputs.get_legend_handles_labels()
    if any(_has_interval(point) for point in points):
        handles.append(Patch(color=colour, alpha=0.25, linewidth=0))
        labels.append(_INTERVAL_WORDS)
    for handle, label in zip(*size.get_legend_handles_labels(), strict=True):
        if label not in labels:
            handles.append(handle)
            labels.append(label)
    _legend(inputs, handles, labels, columns=2)


def _log_y(axis: Axes, shares: Sequence[float]) -> None:
    low, high = min(shares), max(shares)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,), numticks=6))
    axis.yaxis.set_major_formatter(FuncFormatter(short_percent))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(low / 2, 2 * high)


def _hot_rows(axes: Sequence[Axes], tables: Sequence[Values], pinned: set[str]) -> None:
    counts, shares = axes
    places = list(range(len(tables)))
    policies = [policy for policy in POLICIES if any(policy in table["hot_rows"] for table in tables)]
    thickness = 0.78 / max(len(policies), 1)
    handles: list[Any] = [counts.barh(places, [table["rows"] for table in tables], color=LINE, height=0.9)]
    labels = ["rows of the table"]
    seen = [(place, table["seen_rows"]) for place, table in zip(places, tables, strict=True) if table.get("seen_rows")]
    if seen:
        at, rows = zip(*seen, strict=True)
        handles += counts.plot(rows, at, color=INK, marker="|", markersize=11, linestyle="none")
        labels.append("rows that the sample saw")
    for index, policy in enumerate(policies):
        spots = [place + (index - (len(policies) - 1) / 2) * thickness for place in places]
        hot = [table["hot_rows"].get(policy, 0) for table in tables]
        handles.append(counts.barh(spots, hot, color=_POLICY_COLOURS[policy], height=0.88 * thickness))
        labels.append(f"hot rows, {policy}")
        share = [rows / max(table["rows"], 1) for rows, table in zip(hot, tables, strict=True)]
        shares.barh(spots, share, color=_POLICY_COLOURS[policy], height=0.88 * thickness)
        for spot, part, table in zip(spots, share, tables, strict=True):
            if table["table"] not in pinned:
                _note(shares, "none" if part == 0 else short_percent(part), part, spot, 7.5 if len(policies) > 1 else 9)
    for place, table in zip(places, tables, strict=True):
        if table["table"] in pinned:
            _note(shares, "always hot", 1.0, place, 9)
    for axis in axes:
        axis.set_ylim(len(tables) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
    counts.set_yticks(places, [_short(table["table"]) for table in tables])
    shares.set_yticks(places, [""] * len(tables))
    _log_rows(counts, max(table["rows"] for table in tables))
    shares.set_xlim(0, 1.18)
    shares.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    shares.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    counts.set_xlabel("rows")
    shares.set_xlabel("hot rows, share of the table's rows")
    _legend(counts, handles, labels, columns=4)


def _log_rows(axis: Axes, most: int) -> None:
    """A logarithmic axis of rows that begins below one row, so that one row has a bar."""
    axis.set_xscale("log")
    axis.set_xlim(0.7, 1.3 * max(most, 10))
    axis.xaxis.set_major_locator(LogLocator(numticks=12))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(short_count))


def _note(axis: Axes, text: str, x: float, y: float, size: float) -> None:
    axis.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=size)


def _share_axis(axis: Axes) -> None:
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_ylim(0, 1.02)


def _legend(axis: Axes, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """Above all panels, where it hides nothing."""
    axis.figure.legend(list(handles), list(labels), loc="outside upper left", ncols=columns, fontsize=9)


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"
