"""The report of `fae report` as one HTML page: what is popular, and what a budget of fast memory buys, before any training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fae_torchrec.core.estimate import CONFIDENCE
from fae_torchrec.training import page
from fae_torchrec.training.page import Cell
from fae_torchrec.training.picture import Picture, short_count
from fae_torchrec.training.popularity_pictures import (
    MAX_BAR_TABLES,
    MAX_SKEW_TABLES,
    POLICIES,
    budget_picture,
    hot_rows_picture,
    skew_picture,
    threshold_picture,
)
from fae_torchrec.training.report_table import NOTHING, bytes_text, count_text

Report = Mapping[str, Any]

_TOP_SHARE = 0.01
_NOTES = {
    "Hot inputs and coverage": (
        "An input is hot if every one of its ids is a hot row: only such inputs can be trained without the cold tier. Coverage is the "
        "share of single accesses that are hot. It can be high where hot inputs are few: one cold id makes an input cold."
    ),
    "The two selections": (
        "threshold is FAE's: every row with at least so many per cent of its table's accesses is hot, a percentage as small as the budget "
        "allows. input_aware spends the same budget on the rows that complete whole inputs; its coverage may be the lower one."
    ),
    "The interval": (
        f"Hot inputs are estimated on a sample of inputs; the band holds the true share with a chance of {CONFIDENCE:.1%}. It says nothing "
        "about data that differ from those sampled, such as next week's."
    ),
    "Resolution of the sample": (
        "A threshold below one counted access means 'seen at all': the sample cannot tell such rows apart, and rows that it never saw are "
        "never hot. Where the budget in use lies beyond it, only a higher sample rate finds more rows worth making hot."
    ),
    "Bytes": (
        "Of a row's weights and optimizer state, per rank if the hot tier is replicated; the index that finds hot rows comes on top. "
        "Tables with at most placement.pinned_max_rows rows are always hot."
    ),
}


def popularity_pictures(report: Report) -> dict[str, Picture]:
    """The report's pictures by name; one whose values are missing is left out.

    Args:
        report: the report's plain values (see `fae_torchrec.popularity_report`).
    """
    profile, placement = report.get("profile") or {}, report.get("placement") or {}
    pictures = {
        "budget": budget_picture(report.get("curves") or {}, placement),
        "thresholds": threshold_picture(report.get("thresholds") or (), placement),
        "skew": skew_picture(profile),
        "hot_rows": hot_rows_picture(placement),
    }
    source = str(profile.get("source") or "")  # said in the picture itself if it is generated data: pictures travel without their page
    title = source if source.startswith("synthetic") else ""
    return {name: picture.titled(title) for name, picture in pictures.items() if picture}


def popularity_page(report: Report) -> str:
    """The whole report as one page.

    Args:
        report: the report's plain values; every part may be missing, and is then left out. Shares are between 0 and 1.

    Returns:
        HTML that refers to nothing outside itself.
    """
    profile, placement = report.get("profile") or {}, report.get("placement") or {}
    figures = {name: page.figure(picture, _caption(name, report)) for name, picture in popularity_pictures(report).items()}
    small = page.pair("".join(figures[name] for name in ("thresholds", "skew") if name in figures))
    sections = (
        page.section("What the budget buys", page.sentences([*_verdicts(placement), *_warnings(profile, placement)])),
        page.section("Budget, threshold and skew", figures.get("budget", "") + small),
        page.section("Hot rows by table", figures.get("hot_rows", "") + _tables(profile, placement)),
        page.section("Figures of the pictures", _curves(report)),
        page.section("How to read this", page.notes(_NOTES)),
        page.section("Provenance", page.facts(page.run_facts(report))),
    )
    source = str(profile.get("source") or "one data set").partition(",")[0]  # the rest of it, sizes and times, is under Provenance
    title = f"Popularity of rows in {source}"
    return page.document(title, "fae_torchrec report", _tiles(profile, placement), sections)


def _tiles(profile: Report, placement: Report) -> str:
    tables = placement.get("per_table") or ()
    wanted = (
        ("samples counted", profile.get("num_samples"), count_text),
        ("of train samples", profile.get("total_samples"), count_text),
        ("tables", len(tables) or None, str),
        ("rows", sum(table["rows"] for table in tables) or None, short_count),
        ("all tables", placement.get("all_bytes"), bytes_text),
        ("hot tier, per rank", placement.get("used_bytes"), bytes_text),
        ("hot inputs", placement.get("hot_inputs"), page.share_text),
        ("hot accesses", placement.get("coverage"), page.share_text),
    )
    return page.tiles({name: None if value is None else write(value) for name, value, write in wanted})


def _verdicts(placement: Report) -> Iterator[str]:
    """A sentence on each selection under the budget, the one in use first."""
    selections = placement.get("selections") or {}
    for policy in sorted(selections, key=lambda name: name != placement.get("policy")):
        chosen = selections[policy]
        in_use = " (in use)" if policy == placement.get("policy") else ""
        interval = f" (between {page.share_text(chosen['low'])} and {page.share_text(chosen['high'])})" if _has_interval(chosen) else ""
        used = bytes_text(chosen["used_bytes"])
        share = f", {100 * chosen['used_bytes'] / placement['all_bytes']:.2f} % of all bytes" if placement.get("all_bytes") else ""
        hot_inputs, coverage = page.share_text(chosen["hot_inputs"]), page.share_text(chosen["coverage"])
        yield f"<b>{escape(policy)}</b>{in_use}: {hot_inputs} of inputs are all hot{interval} with {used}{share}; coverage {coverage}."


def _warnings(profile: Report, placement: Report) -> Iterator[str]:
    resolution = placement.get("resolution") or {}
    if resolution.get("reached"):
        rate = resolution.get("resolving_rate")
        remedy = f" A sample rate of {rate:.2g} would resolve it." if rate and rate <= 1 else ""
        yield (
            "The resolution of the sample is reached: under this budget rows seen only once decide, and which of them are worth it is not "
            f"known.{remedy}"
        )
    if profile.get("num_samples") and not profile.get("fresh_inputs"):
        yield "All inputs were counted, so hot inputs are estimated on the very inputs that the hot rows were selected by: too high."
    if skipped := sum((profile.get("skipped") or {}).values()):
        yield f"{skipped:,} malformed lines were skipped; the files are under Provenance."


def _caption(name: str, report: Report) -> str:
    profile, placement = report.get("profile") or {}, report.get("placement") or {}
    if name == "budget":
        return f"What a budget buys under both selections, estimated before training. {page.estimated_on(profile)}"
    if name == "thresholds":
        return (
            "What an access threshold makes hot, falling to the right. At the dotted line it is one counted access: every row that the "
            "sample saw is hot, and no lower threshold means anything."
        )
    rest, words = {
        "skew": (
            len(profile.get("skew") or ()) - MAX_SKEW_TABLES,
            "How few rows take how many of a table's accesses, in the sampled inputs.",
        ),
        "hot_rows": (len(placement.get("per_table") or ()) - MAX_BAR_TABLES, "Hot rows under the budget in use. Rows are on a log axis."),
    }[name]
    return f"{words} The {rest} smaller tables are not drawn; the table of tables has them." if rest > 0 else words


def _tables(profile: Report, placement: Report) -> str:
    """Every table's figures."""
    skew = {table["table"]: table for table in profile.get("skew") or ()}
    tables = placement.get("per_table") or ()
    policies = [policy for policy in POLICIES if any(policy in table["hot_rows"] for table in tables)]
    head = [Cell("table", words=True), Cell("kind", words=True), Cell("rows"), Cell("rows seen"), Cell("accesses counted")]
    head += [Cell("top 1 % of rows take", "share of the table's accesses that its most accessed hundredth of rows takes")]
    head += [Cell(f"hot rows, {escape(policy)}") for policy in policies] + [Cell("hot bytes, in use"), Cell("all bytes")]
    rows = []
    for table in tables:
        name, hot = table["table"], table["hot_rows"]
        curve, used = skew.get(name), hot.get(placement.get("policy"))
        cells = [Cell(escape(str(name)), words=True), Cell(escape(str(table["kind"])), words=True), Cell(count_text(table["rows"]))]
        cells += [Cell(_or_nothing(table.get("seen_rows"))), Cell(_or_nothing(curve and curve.get("accesses")))]
        cells += [Cell(page.share_text(_top_share(curve)) if curve else NOTHING)]
        cells += [
            Cell(f"{count_text(hot[policy])} ({100 * hot[policy] / max(table['rows'], 1):.2f} %)" if policy in hot else NOTHING)
            for policy in policies
        ]
        cells += [Cell(_bytes(used, table)), Cell(_bytes(table["rows"], table))]
        rows.append((cells, ""))
    return page.table(head, rows) if rows else ""


def _bytes(rows: int | None, table: Report) -> str:
    return NOTHING if rows is None else bytes_text(rows * table["row_bytes"])


def _or_nothing(value: float | None) -> str:
    return NOTHING if value is None else count_text(value)


def _top_share(curve: Report) -> float:
    """The share of accesses at `_TOP_SHARE` of the rows, or at one row if the table has fewer: read off between two points."""
    rows, accesses = curve["row_share"], curve["access_share"]
    after = next((index for index, share in enumerate(rows) if share >= _TOP_SHARE), len(rows) - 1)
    if after == 0:
        return float(accesses[0])
    part = (_TOP_SHARE - rows[after - 1]) / (rows[after] - rows[after - 1])
    return float(accesses[after - 1] + part * (accesses[after] - accesses[after - 1]))


def _curves(report: Report) -> str:
    """What the curves are drawn from, folded away."""
    texts = [
        _folded(f"budgets, {policy}", [("fast memory", lambda point: bytes_text(point["used_bytes"])), *_SHARES], points)
        for policy, points in (report.get("curves") or {}).items()
        if points
    ]
    if report.get("thresholds"):
        columns = [
            ("threshold", lambda point: f"{point['threshold_percent']:.3g} %" + (" (one access)" if point.get("clamped") else "")),
            ("hot rows", lambda point: count_text(point["hot_rows"])),
            *_SHARES,
        ]
        texts.append(_folded("access thresholds", columns, report["thresholds"]))
    return "".join(texts)


_SHARES = [
    ("of all bytes", lambda point: f"{100 * point['byte_share']:.3f} %"),
    ("hot inputs", lambda point: page.share_text(point["hot_inputs"])),
    ("interval", lambda point: f"{page.share_text(point['low'])} to {page.share_text(point['high'])}" if _has_interval(point) else NOTHING),
    ("coverage", lambda point: page.share_text(point["coverage"])),
]


def _folded(title: str, columns: Sequence[tuple[str, Any]], points: Sequence[Report]) -> str:
    rows = [([Cell(escape(write(point))) for _, write in columns], "") for point in points]
    body = page.table([Cell(name) for name, _ in columns], rows)
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _has_interval(point: Report) -> bool:
    return point.get("low") is not None and point.get("high") is not None
