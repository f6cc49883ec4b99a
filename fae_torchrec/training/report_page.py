"""The report as one HTML page: style and pictures inside, nothing fetched, readable on light and dark screens and on paper."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from fae_torchrec.training.report_pictures import (
    MAX_SKEW_TABLES,
    breakdown_picture,
    budget_picture,
    loss_picture,
    skew_picture,
    throughput_picture,
)
from fae_torchrec.training.report_table import COLUMNS, NOTHING, bytes_text, count_text, percent_text

Report = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --page: #fbfbfa; --card: #ffffff; --ink: #1c2024; --soft: #5b636c; --line: #d9dde1; --tint: #f1f4f6; --accent: #0b6e6e;
  --s0: #7a8794; --s1: #c8501e; --s2: #16808a; --s3: #7d5ba6; --s4: #b58a1b; --s5: #3f7d3a; --s6: #b03a6c; --s7: #3b62a8; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --card: #1c2024; --ink: #e7eaed; --soft: #a3acb5; --line: #363d44;
  --tint: #242a2f; --accent: #5cc4c0; --s0: #93a1af; --s1: #f08a54; --s2: #4fbcc4; --s3: #b497dc; --s4: #dcb450; --s5: #7cbb74;
  --s6: #e67ba7; --s7: #7fa3e6; } }
@media print {
  :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --tint: #f2f2f2; --accent: #0b6e6e;
    --s0: #7a8794; --s1: #c8501e; --s2: #16808a; --s3: #7d5ba6; --s4: #b58a1b; --s5: #3f7d3a; --s6: #b03a6c; --s7: #3b62a8; }
  main { max-width: none !important; padding: 0 !important; }
  header, figure, tr { break-inside: avoid; }
  .scroll { overflow: visible !important; }
  table { font-size: 8pt !important; }
  th, td { padding: 3px 5px !important; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 var(--font);
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
main { max-width: 1240px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 2px 0 20px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 14px; }
.kicker { color: var(--accent); font-weight: 600; margin: 0; font-size: 13px; letter-spacing: 0.02em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 1px; background: var(--line);
  border: 1px solid var(--line); border-radius: 8px; overflow: hidden; margin: 0; }
.tiles div { background: var(--card); padding: 10px 14px; }
.tiles dt { color: var(--soft); font-size: 12px; }
.tiles dd { margin: 0; font-size: 19px; font-variant-numeric: tabular-nums; white-space: nowrap; }
section { margin-top: 40px; }
.verdicts { margin: 0 0 16px; padding-left: 20px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 12px; line-height: 1.3; vertical-align: bottom; background: var(--tint); }
tbody tr + tr td { border-top: 1px solid var(--line); }
tbody tr.group td { border-top: 2px solid var(--soft); }
.text { text-align: left; }
td small { display: block; color: var(--soft); font-size: 11.5px; }
figure { margin: 0 0 20px; padding: 16px 16px 12px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 8px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 20px; }
.pair figure { margin: 0; }
.notes dt { font-weight: 600; } .notes dd { margin: 0 0 8px; color: var(--soft); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0 0 16px; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--tint); padding: 12px 16px; border-radius: 8px; overflow-x: auto; margin: 8px 0 0; white-space: pre-wrap; }
summary { cursor: pointer; color: var(--soft); }
"""

_NOTES = {
    "What is compared": (
        "Every run trains the same model from the same seed on the same samples. stock is TorchRec's own planner. fae-unsegregated changes "
        "only where rows live, so its losses should equal stock's up to rounding. fae also gathers all-hot samples into hot batches, so it "
        "sees the samples in another order: compare its AUC with the difference that another seed would make."
    ),
    "Speed": (
        "Samples/s is the whole run's, with its range over fifths of the run. Where two ranges overlap, the runs show no difference. On "
        "a machine without a GPU the hot and the cold tier are the same memory and the ranks share one processor, so samples/s is what "
        "the method costs, not what fast memory gains; bytes and rows per sample are counted, not timed, and hold on any machine."
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


class Cell(NamedTuple):
    """One cell of a table: its markup, its tooltip, and whether it is text (left) rather than a number (right)."""

    markup: str
    tip: str = ""
    words: bool = False


def html_report(report: Report) -> str:
    """The whole report as one page.

    Args:
        report: the report; every part but `runs` may be missing, and is then left out. Shares are between 0 and 1.

    Returns:
        HTML that refers to nothing outside itself.
    """
    data, placement = report.get("data") or {}, report.get("placement") or {}
    title = f"Hot and cold embeddings on {data.get('name', 'one data set')}"
    traffic = _picture(
        throughput_picture(report), "The line on a speed bar is its spread. Bytes are counted over a few batches of the same samples."
    )
    times = _picture(
        breakdown_picture(report), "Where the time of one step goes, by kind of batch. Only hot batches leave the cold tier's exchange out."
    )
    losses = _picture(
        loss_picture(report),
        "Placement alone changes no loss. Segregated batches come in another order, so that path may differ on the way.",
    )
    parts = [
        f"<header><p class='kicker'>fae_torchrec report</p><h1>{escape(title)}</h1>{_tiles(data, placement)}</header>",
        _section("Comparison", _verdicts(report) + _comparison(report)),
        _section("Speed and traffic", traffic + times),
        _section("Learning", losses),
        _section("Popularity and budget", _popularity(report)),
        _section("Placement by table", _placement_table(placement)),
        _section(
            "How to read this", f"<dl class='notes'>{''.join(f'<dt>{escape(a)}</dt><dd>{escape(b)}</dd>' for a, b in _NOTES.items())}</dl>"
        ),
        _section("Provenance", _provenance(report)),
    ]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'><title>{escape(title)}</title>"
    body = "\n".join(part for part in parts if part)
    return f"<!DOCTYPE html>\n<html lang='en'><head>{head}<style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _picture(svg: str | None, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" if svg else ""


def _tiles(data: Mapping[str, Any], placement: Mapping[str, Any]) -> str:
    """What was trained on and what the hot tier is, at a glance."""
    share = _share_text
    wanted = (
        ("train samples", data.get("train_samples"), count_text),
        ("test samples", data.get("test_samples"), count_text),
        ("tables", data.get("tables"), str),
        ("rows", data.get("rows"), count_text),
        ("all tables", data.get("bytes"), bytes_text),
        ("hot tier, per rank", placement.get("used_bytes"), bytes_text),
        ("hot rows", placement.get("hot_rows"), count_text),
        ("hot accesses, profile", placement.get("coverage"), share),
        ("hot inputs, profile", placement.get("hot_inputs"), share),
    )
    tiles = "".join(f"<div><dt>{name}</dt><dd>{escape(write(value))}</dd></div>" for name, value, write in wanted if value is not None)
    return f"<dl class='tiles'>{tiles}</dl>" if tiles else ""


def _share_text(share: float) -> str:
    return f"{percent_text(share)} %"


def _ranks(run: Mapping[str, Any]) -> str:
    return f"{run['ranks']} rank{'s' if run['ranks'] > 1 else ''}"


def _verdicts(report: Report) -> str:
    """A sentence on each run against stock on as many ranks."""
    runs = report.get("runs") or ()
    stock = {run["ranks"]: run for run in runs if run["placement"] == "stock"}
    pairs = [(run, stock[run["ranks"]]) for run in runs if run["placement"] != "stock" and run["ranks"] in stock]
    sentences = [f"<b>{escape(run['placement'])}</b>, {_ranks(run)}: {', '.join(_differences(run, base))}." for run, base in pairs]
    return f"<ul class='verdicts'>{''.join(f'<li>{text}</li>' for text in sentences)}</ul>" if sentences else ""


def _differences(run: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    texts = []
    for key, words in (
        ("samples_per_s", "the speed of stock"),
        ("fast_memory_bytes", "its fast memory"),
        ("bytes_crossed_per_sample", "its bytes between ranks"),
        ("cold_bytes_per_sample", "its cold bytes"),
    ):
        if run.get(key) is not None and base.get(key):
            texts.append(f"{run[key] / base[key]:.2f} times {words}")
            ours, theirs = run.get(f"{key}_spread"), base.get(f"{key}_spread")
            if ours and theirs and ours[0] <= theirs[1] and theirs[0] <= ours[1]:
                texts[-1] += " (the spreads overlap: no difference shown)"
    if run.get("test_auc") is not None and base.get("test_auc") is not None:
        texts.append(f"test AUC {run['test_auc'] - base['test_auc']:+.4f}")
    return texts or ["no figures in common"]


def _comparison(report: Report) -> str:
    runs = report.get("runs") or ()
    rows = []
    for index, run in enumerate(runs):
        cells = []
        for column in COLUMNS:
            text, value, spread = escape(column.cell(run)), run.get(column.key), run.get(f"{column.key}_spread")
            if spread and text != NOTHING:
                text += f"<small>{column.write(spread[0])} to {column.write(spread[1])}</small>"
            tip = f"{value:,} bytes" if column.write is bytes_text and value is not None else ""
            cells.append(Cell(text, tip, column.key == "placement"))
        rows.append((cells, "group" if index and run["ranks"] != runs[index - 1]["ranks"] else ""))
    head = [Cell(escape(column.title), column.meaning, column.key == "placement") for column in COLUMNS]
    return _table(head, rows) if rows else ""


def _popularity(report: Report) -> str:
    skew = (report.get("profile") or {}).get("skew") or ()
    rest = len(skew) - MAX_SKEW_TABLES
    more = f" The {rest} smaller tables are not drawn." if rest > 0 else ""
    pictures = _picture(skew_picture(report), f"How few rows take how many of a table's accesses, in the sampled train inputs.{more}")
    caption = f"What a budget buys, estimated before training. {_estimate(report.get('profile') or {})}"
    pictures += _picture(budget_picture(report), caption)
    return f"<div class='pair'>{pictures}</div>" if pictures else ""


def _estimate(profile: Mapping[str, Any]) -> str:
    """On which inputs the profile's figures are estimated, and what that does to them."""
    if profile.get("probe_held_out"):
        of = f"{profile['probe_samples']:,} inputs" if profile.get("probe_samples") else "inputs"
        return f"Hot inputs: on {of} that were not counted. Coverage: on the counted accesses themselves, so a little high."
    return "Both on the very inputs that were counted, so too high where hot rows were seen only once or twice."


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
    return _table(head, rows) if rows else ""


def _table(head: Sequence[Cell], rows: Iterable[tuple[Sequence[Cell], str]]) -> str:
    """A table from its head's cells and (cells, class) per row."""

    def line(cells: Sequence[Cell], tag: str) -> str:
        return "".join(
            f"<{tag}{_attribute('class', 'text' if c.words else '')}{_attribute('title', c.tip)}>{c.markup}</{tag}>" for c in cells
        )

    body = "".join(f"<tr{_attribute('class', kind)}>{line(cells, 'td')}</tr>" for cells, kind in rows)
    return f"<div class='scroll'><table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escape(value)}"' if value else ""


def _provenance(report: Report) -> str:
    """What somebody needs to run this again, and to know which saved values it belongs to."""
    facts = {
        "created": str(report.get("created") or ""),
        "command": " ".join(map(str, report.get("command") or ())),
        "versions": _listed(report.get("versions")),
        "hardware": _listed(report.get("hardware")),
        "profile": ", ".join(_profile_facts(report.get("profile") or {})),
        "placement": ", ".join(_placement_facts(report.get("placement") or {})),
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items() if text)
    config = escape(json.dumps(report["config"], indent=2, default=str)) if report.get("config") else ""
    details = f"<details><summary>the run's config</summary><pre>{config}</pre></details>" if config else ""
    return (f"<dl class='facts'>{items}</dl>" if items else "") + details


def _profile_facts(profile: Mapping[str, Any]) -> Iterator[str]:
    if profile.get("fingerprint"):
        yield str(profile["fingerprint"])
    if profile.get("num_samples") is not None and profile.get("total_samples"):
        yield f"{profile['num_samples']:,} of {profile['total_samples']:,} train samples counted"


def _placement_facts(placement: Mapping[str, Any]) -> Iterator[str]:
    if placement.get("fingerprint"):
        yield str(placement["fingerprint"])
    if placement.get("budget_bytes") is not None:
        yield f"budget {placement['budget_bytes']:,} bytes per rank"
    if placement.get("used_bytes") is not None:
        yield f"{placement['used_bytes']:,} used"
    if placement.get("threshold") is not None:
        yield f"rows with at least {placement['threshold']:,} counted accesses are hot"
    if placement.get("pinned"):
        yield f"always hot: {', '.join(map(str, placement['pinned']))}"


def _listed(values: Mapping[str, Any] | None) -> str:
    """Names and values side by side: "cores 2, ram 23.5 GiB"; what is null or empty is left out."""
    texts = []
    for name, value in (values or {}).items():
        if value not in (None, [], (), ""):
            texts.append(f"{name.removesuffix('_bytes')} {bytes_text(value)}" if name.endswith("_bytes") else f"{name} {value}")
    return ", ".join(texts)
