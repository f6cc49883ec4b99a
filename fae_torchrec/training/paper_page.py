"""Finished comparisons beside FAE's paper, as one HTML page, as Markdown and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from fae_torchrec.training import page
from fae_torchrec.training.page import Cell
from fae_torchrec.training.paper_given import (
    from_file,
    given,
    minutes_texts,
    paper_heads,
    scores_texts,
    shares_given,
    source_text,
    time_ratio_text,
)
from fae_torchrec.training.paper_tables import ASIDE, NOT_AT_HAND, TABLES, WORKLOADS, readings
from fae_torchrec.training.picture import SERIES, Picture
from fae_torchrec.training.report_markdown import markdown_table
from fae_torchrec.training.report_shares import shares_notes, shares_picture, shares_table
from fae_torchrec.training.report_table import NOTHING, count_text, percent_text
from fae_torchrec.training.report_verdicts import interval_text

Report = Mapping[str, Any]

_INTRO = (
    "What was trained here stands beside what the paper prints. It is never the same experiment: under each table is said what of the two "
    "can be held against each other, and what cannot."
)
_RATIOS = (
    "Bytes of FAE over bytes of the baseline: the paper's, what FAE as published would bring with this run's hot inputs (copies at swaps "
    "left out), and this run's."
)
_ALIKE = "the model and the data set are the paper's"
_WORDS = 4  # the columns of every table that are text: workload, data, placement, ranks


class _Table(NamedTuple):
    """One table, plain text; the first columns are words."""

    head: list[str]
    rows: list[list[str]]
    words: int = _WORDS


def paper_page(report: Report) -> str:
    """The whole page.

    Args:
        report: the plain values (see `fae_torchrec.paper_report`).

    Returns:
        HTML that refers to nothing outside itself.
    """
    sections = [
        page.section("What stands side by side", f"<p>{escape(_INTRO)}</p>" + _html(_facts(report)) + _listed(_differences(report)))
    ]
    for key, table in TABLES.items():
        body = _html(_TABLE_OF[key](report)) or "<p>None of the runs has figures for it.</p>"
        if key == "table7":
            body = (
                page.figure(ratio_picture(report), _RATIOS)
                + body
                + _html(_bytes(report))
                + _listed(_bytes_words(report))
                + _listed(readings())
            )
        if key == "fig14":
            body = _share_pictures(report) + body + _html(_shares_given(report))
        sections.append(page.section(f"{table.name}: {table.title}", body + page.notes(_notes(report, key))))
    notes = {text: value for each in report["comparisons"] for text, value in shares_notes(each).items()}
    sections.append(page.section("The categories of a step's time", page.notes(notes) if notes else ""))
    facts = {"created": str(report.get("created") or ""), "command": " ".join(map(str, report.get("command") or ()))}
    facts |= {f"{each['workload']}, {each['path']}": each["data"] for each in report["comparisons"]}
    facts |= {"numbers of the paper": report["numbers"]["path"]} if report.get("numbers") else {}
    sections.append(page.section("Provenance", page.facts(facts)))
    return page.document("These runs beside FAE's paper", "fae_torchrec report --paper", "", sections)


def paper_markdown(report: Report) -> str:
    """The same as Markdown, without pictures."""
    blocks = ["# These runs beside FAE's paper", _INTRO, _markdown(_facts(report)), _bullets(_differences(report))]
    for key, table in TABLES.items():
        blocks += [f"## {table.name}: {table.title}", _markdown(_TABLE_OF[key](report))]
        if key == "table7":
            blocks += [_markdown(_bytes(report)), _bullets([*_bytes_words(report), *readings()])]
        if key == "fig14":
            blocks += [_markdown(_shares_given(report))]
        blocks += [_bullets([f"{term}: {text}" for term, text in _notes(report, key).items()])]
    return "\n\n".join(block for block in blocks if block) + "\n"


def paper_lines(report: Report) -> list[str]:
    """For a terminal: a line for every run that has a baseline, with the paper's ratio of bytes, and of times if a file gives it."""
    lines = []
    for each in report["comparisons"]:
        paper = WORKLOADS[each["workload"]].ratio
        for run in each["runs"]:
            if run["time_ratio"] is None and run["bytes_ratio"] is None:
                continue
            times = time_ratio_text(report, each["workload"])
            texts = [f"{_ratio(run['time_ratio'])} times the training time of {run['baseline']}{run['time_note']}"]
            texts[0] += f" (the paper, {from_file(report)}: {times})" if times else ""
            texts += [f"{_ratio(run['bytes_ratio'])} times its bytes from outside the hot tier (the paper: {_ratio(paper, NOT_AT_HAND)})"]
            texts += [f"test AUC {interval_text(auc)}" for auc in [(run.get("less_baseline") or {}).get("auc")] if auc]
            lines.append(f"{each['workload']} ({each['data_title']}), {run['placement']}, ranks {run['ranks']}: {', '.join(texts)}")
    return lines


def ratio_picture(report: Report) -> Picture | None:
    """FAE's bytes over the baseline's: the paper's, and these runs'."""
    bars = []
    for name in dict.fromkeys(each["workload"] for each in report["comparisons"]):
        workload = WORKLOADS[name]
        if workload.ratio is not None:
            bars.append((f"{name}, paper, {workload.title}", workload.ratio, SERIES[0]))
        for each in report["comparisons"]:
            for run in each["runs"] if each["workload"] == name else ():
                if run["bytes_ratio"] is not None:
                    label = f"{name}, {run['placement']}, ranks {run['ranks']}"
                    if run["hot_inputs"] is not None:
                        bars.append((f"{label}, as published (1 - hot inputs)", 1 - run["hot_inputs"], SERIES[4]))
                    bars.append((f"{label}, {each['data_title']}", run["bytes_ratio"], SERIES[1]))

    def draw(axes: Sequence[Axes]) -> None:
        axis, positions = axes[0], list(range(len(bars)))
        axis.barh(positions, [value for _, value, _ in bars], color=[colour for _, _, colour in bars], height=0.72)
        for position, (_, value, _) in zip(positions, bars, strict=True):
            axis.annotate(f"{value:.3f}", (value, position), xytext=(5, 0), textcoords="offset points", va="center")
        axis.set_yticks(positions, [label for label, _, _ in bars])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_xlim(0, 1.15 * max(value for _, value, _ in bars))
        axis.set_xlabel("bytes of FAE / bytes of the baseline")

    return Picture(draw, (11.4, 0.9 + 0.36 * len(bars))) if bars else None


def _facts(report: Report) -> _Table:
    head = ["workload", "data", "model", "device", "train samples", "epochs", "batch size", "rows", "machine"]
    rows = [
        [
            each["workload"], each["data_title"], WORKLOADS[each["workload"]].model, str(each["device"]), count_text(each["train_samples"]),
            str(each["epochs"]), str(each["batch_size"]), count_text(each["rows"]), page.listed(each["hardware"]),
        ]
        for each in report["comparisons"]
    ]  # fmt: skip
    return _Table(head, rows)


def _differences(report: Report) -> list[str]:
    """How each comparison differs from the paper's workload."""
    texts = []
    for each in report["comparisons"]:
        found = [*each["unlike"], *(f"the runs did not do the same work: {text}" for text in each["not_comparable"])]
        if each["synthetic"]:
            found.append(f"the samples are synthetic ({each['data']}), not the paper's file")
        if each["scale"] not in (None, 1):
            found.append(f"the tables have {100 * each['scale']:g} % of the published rows")
        texts.append(f"{each['workload']} ({each['path']}): {'; '.join(found) if found else _ALIKE}.")
    return [*texts, *([ASIDE] if any(WORKLOADS[each["workload"]].data == "terabyte" for each in report["comparisons"]) else [])]


def _scores(report: Report) -> _Table:
    head = [
        "workload",
        "data",
        "placement",
        "ranks",
        "accuracy %",
        "AUC",
        "logloss",
        "AUC less baseline (95 %)",
        *paper_heads(report, "table4"),
    ]
    rows = []
    for each, run in _runs(report, "test_auc"):
        auc = (run.get("less_baseline") or {}).get("auc")
        scores = [_spread(run, "test_accuracy", percent_text), *(_spread(run, key, _four) for key in ("test_auc", "test_logloss"))]
        rows.append([*_first(each, run), *scores, interval_text(auc) if auc else NOTHING, *scores_texts(report, each["workload"])])
    return _Table(head, rows)


def _times(report: Report) -> _Table:
    head = ["workload", "data", "placement", "ranks", "samples/s", "training s", "time / baseline's"]
    head += paper_heads(report, "table5", ", minutes")
    ratios = [f"paper, FAE / baseline ({from_file(report)})"] if given(report, "table5") else []
    rows = [
        [
            *_first(each, run),
            _spread(run, "samples_per_s", count_text),
            _figure(run["train_s"]),
            f"{_ratio(run['time_ratio'])}{run['time_note']}",
            *minutes_texts(report, each["workload"]),
            *(time_ratio_text(report, each["workload"]) or NOTHING for _ in ratios),
        ]
        for each, run in _runs(report, "samples_per_s")
    ]
    return _Table(head + ratios, rows)


def _transfers(report: Report) -> _Table:
    head = [
        "workload", "data", "placement", "ranks", "hot inputs %", "bytes / sample", "GiB / epoch", "bytes / baseline's", "1 - hot inputs",
        "paper, DLRM GB", "paper, FAE GB", "paper, FAE / DLRM",
    ]  # fmt: skip
    rows = []
    for each, run in _runs(report, "sample_bytes"):
        workload = WORKLOADS[each["workload"]]
        published = [NOTHING if gb is None else f"{gb}" for gb in (workload.host_gb, workload.fae_gb)]
        hot = run["hot_inputs"]
        own = [NOTHING if hot is None else percent_text(hot), count_text(run["sample_bytes"]), f"{run['epoch_gib']:.3g}"]
        own += [_ratio(run["bytes_ratio"]), _ratio(None if hot is None else 1 - hot)]
        rows.append([*_first(each, run), *own, *published, _ratio(workload.ratio)])
    return _Table(head, rows)


def _step_shares(report: Report) -> _Table:
    """Of all comparisons, with the same categories."""
    everything = {"runs": [run for each in report["comparisons"] for run in each["runs"]]}
    head, rows = shares_table(everything)
    of_rows = [(each["workload"], each["data_title"]) for each in report["comparisons"] for _ in shares_table(each)[1]]
    return _Table(["workload", "data", *head], [[*names, *row] for names, row in zip(of_rows, rows, strict=True)], words=5)


def _shares_given(report: Report) -> _Table:
    """Of Fig. 14, what --numbers gives."""
    return _Table(*shares_given(report), words=3)


_TABLE_OF = {"table4": _scores, "table5": _times, "table7": _transfers, "fig14": _step_shares}


def _bytes(report: Report) -> _Table:
    """The counts of benchmarks/paper_bytes.py."""
    found = (report.get("bytes") or {}).get("shapes") or {}
    head = ["data", "GPUs", "scheme", "GiB over PCIe", "/ tables on host", "GiB in host memory", "/ tables on host"]
    rows = []
    for shape, of_gpus in found.items():
        for gpus, schemes in of_gpus.items():
            base = schemes["stock_host"]
            for scheme, moved in schemes.items():
                texts = [text for key in ("pcie", "tier") for text in (f"{moved[key]:.2f}", _ratio(moved[key] / base[key]))]
                rows.append([f"synthetic, shape of {shape}", gpus, scheme.replace("_", " "), *texts])
    return _Table(head, rows, words=3)


def _bytes_words(report: Report) -> list[str]:
    counted = report.get("bytes")
    if not counted:
        return []
    texts = [
        f"Counted from ids by benchmarks/paper_bytes.py ({counted['path']}), on synthetic samples, for an epoch as long as the paper's: "
        "rows and gradients in both directions, and copies of hot rows at swaps. Nothing was trained or timed."
    ]
    return [*texts, *(["These counts are of a --quick run: its figures mean nothing."] if counted["quick"] else [])]


def _share_pictures(report: Report) -> str:
    pictures = []
    for each in report["comparisons"]:
        if picture := shares_picture(each):
            pictures.append(page.figure(picture.titled(f"{each['workload']}, {each['data']}"), f"{each['workload']}: {each['path']}"))
    return "".join(pictures)


def _notes(report: Report, key: str) -> dict[str, str]:
    table = TABLES[key]
    return {"Comparable": table.alike, "Not comparable": table.unlike, "The paper's numbers": source_text(report, key, table)}


def _runs(report: Report, key: str) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Every run that has a figure, with its comparison."""
    return ((each, run) for each in report["comparisons"] for run in each["runs"] if run.get(key) is not None)


def _first(each: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    return [each["workload"], each["data_title"], run["placement"], str(run["ranks"])]


def _spread(run: Mapping[str, Any], key: str, write: Any) -> str:
    """A figure, and the least and the most of its repeats."""
    value, spread = run.get(key), run.get(f"{key}_spread")
    if value is None:
        return NOTHING
    ends = [write(end) for end in spread] if spread and (run.get("repeats") or 1) > 1 else []
    return f"{write(value)} ({ends[0]} to {ends[1]})" if ends and ends[0] != ends[1] else str(write(value))


def _four(value: float) -> str:
    return f"{value:.4f}"


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.1f}"


def _ratio(value: float | None, nothing: str = NOTHING) -> str:
    return nothing if value is None else f"{value:.3f}"


def _html(table: _Table) -> str:
    if not table.rows:
        return ""
    rows = [([Cell(escape(text), words=at < table.words) for at, text in enumerate(row)], "") for row in table.rows]
    return page.table([Cell(escape(title), words=at < table.words) for at, title in enumerate(table.head)], rows)


def _markdown(table: _Table) -> str:
    return markdown_table(table.head, table.rows, words=range(table.words)) if table.rows else ""


def _listed(texts: Sequence[str]) -> str:
    return page.sentences([escape(text) for text in texts])


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)
