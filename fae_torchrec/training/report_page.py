"""The report of `fae compare` as one HTML page: style and pictures inside, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fae_torchrec.training import page
from fae_torchrec.training.page import Cell
from fae_torchrec.training.popularity_pictures import MAX_SKEW_TABLES, budget_picture, skew_picture
from fae_torchrec.training.report_pictures import breakdown_picture, loss_picture, throughput_picture
from fae_torchrec.training.report_shares import shares_notes, shares_picture, shares_table
from fae_torchrec.training.report_table import Column, bytes_text, columns_of, count_text, details_of, spread_text
from fae_torchrec.training.report_verdicts import method_text, said, verdicts

Report = Mapping[str, Any]

_NOTES = {
    "What is compared": (
        "Every run trains the same model from the same seed on the same samples. stock is TorchRec's own planner. fae-unsegregated changes "
        "only where rows live, so its losses should equal stock's up to rounding. fae also gathers all-hot samples into hot batches, so it "
        "sees the samples in another order: compare its AUC with the difference that another seed would make."
    ),
    "Speed": (
        "Samples/s is the whole run's, with its range over fifths of the run; of runs that were repeated, in turns, it is the median, with "
        "the least and the most. The first steps of a run are not timed. Where two ranges overlap, the runs show no difference. On "
        "a machine without a GPU the hot and the cold tier are the same memory and the ranks share one processor, so samples/s is what "
        "the method costs, not what fast memory gains; bytes and rows per sample are counted, not timed, and hold on any machine."
    ),
    "Scores": (
        "Intervals hold the true value with a chance of 95 %. AUC: DeLong's method; a difference is paired, sample by sample. They "
        "tell what other test samples would change; where each repeat had a seed of its own, also what other start weights would. With one "
        "seed a difference outside its interval may still be the order of the batches."
    ),
    "Fast memory": (
        "Bytes that the plan puts into fast memory on the rank that has most: hot rows (weights and optimizer state), the index that finds "
        "them and, on a GPU, tables that lie in its memory whole. stock has no budget: those tables are all it has there. A replicated hot "
        "tier is on every rank, a sharded one is spread over them. On a CPU all memory is the same, and only the hot tier counts."
    ),
    "Hot inputs and hot batches": (
        "A sample is hot if every one of its ids is hot; a batch is hot if every one of its samples is. In stock order almost no batch is "
        "hot, which is why fae-unsegregated has hot rows but hardly a hot batch. The table counts them while training; the figures marked "
        "profile are the estimate before it."
    ),
}


_SCRIPT_NOTES = {
    "What is compared": (
        "The same script with the same arguments, in processes of its own each time. stock runs it as it is; fae replaces TorchRec's "
        "planner, sharders and pipeline. Samples, training steps and evaluation steps are equal; which samples share a batch differs."
    ),
    "Speed": (
        "Samples/s is of the whole training, evaluation left out. ms / step is the median step after the warm-up: at its first step fae "
        "reads the batches of a whole window, which later steps need not read. Where two ranges overlap, no difference is shown. On a "
        "machine without a GPU the hot and the cold tier are the same memory: speed is what the method costs, not what fast memory gains."
    ),
}


def html_report(report: Report) -> str:
    """The whole report as one page.

    Args:
        report: the report; every part but `runs` may be missing, and is then left out. Shares are between 0 and 1.

    Returns:
        HTML that refers to nothing outside itself.
    """
    profile, placement, data = (report.get(part) or {} for part in ("profile", "placement", "data"))
    traffic = page.figure(
        throughput_picture(report), "The line on a speed bar is its spread. Bytes are counted over a few batches of the same samples."
    )
    times = page.figure(
        breakdown_picture(report), "Where the time of one step goes, by kind of batch. Only hot batches leave the cold tier's exchange out."
    )
    losses = page.figure(
        loss_picture(report),
        "Placement alone changes no loss. Segregated batches come in another order, so that path may differ on the way.",
    )
    sections = (
        page.section("Not comparable: the runs did not do the same work", _told(report, "not_comparable")),
        page.section("Warnings", _told(report, "warnings")),
        page.section(
            "Comparison",
            page.sentences(_verdicts(report)) + _comparison(report, columns_of(report)) + _told(report, "notes") + _method(report),
        ),
        page.section("Memory, hit rates, links and scores", _comparison(report, details_of(report))),
        page.section("What the script printed last", page.sentences([escape(line) for line in said(report)])),
        page.section("Speed and traffic", traffic + times),
        page.section("Where a step's time goes", _shares(report)),
        page.section("Learning", losses),
        page.section("Popularity and budget", _popularity(profile, placement)),
        page.section("Placement by table", _placement_table(placement)),
        page.section("How to read this", page.notes(_SCRIPT_NOTES if report.get("script") else _NOTES)),
        page.section("Provenance", _provenance(report)),
    )
    title = report.get("title") or f"Hot and cold embeddings on {data.get('name', 'one data set')}"
    return page.document(title, "fae_torchrec report", _tiles(data, placement), sections)


def _tiles(data: Mapping[str, Any], placement: Mapping[str, Any]) -> str:
    """What was trained on and what the hot tier is, at a glance."""
    wanted = (
        ("train samples", data.get("train_samples"), count_text),
        ("test samples", data.get("test_samples"), count_text),
        ("tables", data.get("tables"), str),
        ("rows", data.get("rows"), count_text),
        ("all tables", data.get("bytes"), bytes_text),
        ("hot tier, per rank", placement.get("used_bytes"), bytes_text),
        ("hot rows", placement.get("hot_rows"), count_text),
        ("hot accesses, profile", placement.get("coverage"), page.share_text),
        ("hot inputs, profile", placement.get("hot_inputs"), page.share_text),
    )
    return page.tiles({name: None if value is None else write(value) for name, value, write in wanted})


def _verdicts(report: Report) -> list[str]:
    """A sentence on each run against the baseline on as many ranks."""
    return [f"<b>{escape(name)}</b>{escape(rest)}" for name, rest in verdicts(report)]


def _method(report: Report) -> str:
    text = method_text(report)
    return f"<p>{escape(text)}</p>" if text else ""


def _told(report: Report, part: str) -> str:
    return page.sentences([escape(text) for text in report.get(part) or ()])


def _comparison(report: Report, columns: Sequence[Column]) -> str:
    runs = report.get("runs") or ()
    rows = []
    for index, run in enumerate(runs):
        cells = []
        for column in columns:
            text, value = escape(column.cell(run)), run.get(column.key)
            if spread := spread_text(column, run):
                text += f"<small>{spread}</small>"
            tip = f"{value:,} bytes" if column.write is bytes_text and value is not None else ""
            cells.append(Cell(text, tip, column.words))
        rows.append((cells, "group" if index and run["ranks"] != runs[index - 1]["ranks"] else ""))
    head = [Cell(escape(column.title), column.meaning, column.words) for column in columns]
    return page.table(head, rows) if rows and columns else ""


def _shares(report: Report) -> str:
    head, rows = shares_table(report)
    if not rows:
        return ""
    cells = [([Cell(escape(text), words=at in (0, 2)) for at, text in enumerate(row)], "") for row in rows]
    table = page.table([Cell(escape(title), words=at in (0, 2)) for at, title in enumerate(head)], cells)
    picture, data = shares_picture(report), str((report.get("data") or {}).get("name") or "")
    assert picture is not None
    shown = page.figure(
        picture.titled(data if data.startswith("synthetic") else ""),
        "Embeddings are not synchronised between hot and cold batches, so no bar has such a part.",
    )
    return shown + table + page.notes(shares_notes(report))


def _popularity(profile: Mapping[str, Any], placement: Mapping[str, Any]) -> str:
    rest = len(profile.get("skew") or ()) - MAX_SKEW_TABLES
    more = f" The {rest} smaller tables are not drawn." if rest > 0 else ""
    skew = page.figure(skew_picture(profile), f"How few rows take how many of a table's accesses, in the sampled train inputs.{more}")
    curves = {placement.get("policy") or "hot rows": placement.get("curve") or ()}
    caption = f"What a budget buys, estimated before training. {page.estimated_on(profile)}"
    return page.figure(budget_picture(curves, placement), caption) + page.pair(skew)


def _placement_table(placement: Mapping[str, Any]) -> str:
    tables = placement.get("per_table") or ()
    head = [Cell("table", words=True), Cell("kind", words=True)]
    head += [Cell(name) for name in ("rows", "hot rows", "hot rows %", "hot bytes", "all bytes")]
    rows = [
        (
            [
                Cell(escape(str(table["table"])), words=True),
                Cell(escape(str(table["kind"])), words=True),
                Cell(count_text(table["rows"])),
                Cell(count_text(table["hot_rows"])),
                Cell(f"{100 * table['hot_rows'] / max(table['rows'], 1):.2f}"),
                Cell(bytes_text(table["bytes_hot"]), f"{table['bytes_hot']:,} bytes"),
                Cell(bytes_text(table["bytes_all"]), f"{table['bytes_all']:,} bytes"),
            ],
            "",
        )
        for table in tables
    ]
    return page.table(head, rows) if rows else ""


def _provenance(report: Report) -> str:
    """What somebody needs to run this again, and to know which saved values it belongs to."""
    config = escape(json.dumps(report["config"], indent=2, default=str)) if report.get("config") else ""
    details = f"<details><summary>the run's config</summary><pre>{config}</pre></details>" if config else ""
    return page.facts(page.run_facts(report)) + details
