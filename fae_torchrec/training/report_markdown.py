"""The comparison as Markdown, for an issue or a chat: what cannot be compared, warnings, the tables, the sentences, where it ran."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fae_torchrec.training.report_shares import shares_table
from fae_torchrec.training.report_table import Column, columns_of, details_of, spread_text
from fae_torchrec.training.report_verdicts import method_text, said, verdicts

Report = Mapping[str, Any]


def markdown_report(report: Report) -> str:
    """The report as one Markdown text (tables as GitHub has them).

    Args:
        report: as `html_report` takes it, without numbers that are not finite.

    Returns:
        The text, with a final newline.
    """
    runs = report.get("runs") or ()
    data = report.get("data") or {}
    blocks = [f"# {report.get('title') or 'fae compare on ' + str(data.get('name', 'one data set'))}"]
    problems = report.get("not_comparable") or ()
    if problems:
        blocks += ["**NOT COMPARABLE: the runs did not do the same work.**", _listed(problems)]
    if report.get("warnings"):
        blocks += ["**Warnings**", _listed(report["warnings"])]
    blocks += [_table(columns_of(report), runs)] if runs else []
    if details := details_of(report):
        blocks += ["Memory on the fullest rank, where lookups are served, what crosses between ranks, scores with 95 % intervals:"]
        blocks += [_table(details, runs)]
    sentences = [f"**{_plain(name)}**{_plain(rest)}" for name, rest in verdicts(report)]
    blocks += [_listed(sentences, escape=False)] if sentences else []
    if lines := said(report):
        blocks += ["What the script printed last:", _listed(lines)]
    shares, steps = shares_table(report)
    if steps:
        blocks += ["Where the time of a profiled step goes:", markdown_table(shares, steps, words=(0, 2))]
    blocks += [_listed(report["notes"])] if report.get("notes") else []
    blocks += [method_text(report)]
    blocks += [_listed(_provenance(report), escape=False)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = ()) -> str:
    """A table.

    Args:
        head: titles.
        rows: cells, plain text.
        words: columns that are text and stand left; the others stand right.
    """
    rule = [":---" if index in words else "---:" for index in range(len(head))]
    lines = [[_plain(cell) for cell in line] for line in (head, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _table(columns: Sequence[Column], runs: Iterable[Mapping[str, Any]]) -> str:
    words = [index for index, column in enumerate(columns) if column.words]
    return markdown_table([column.title for column in columns], [[_cell(column, run) for column in columns] for run in runs], words=words)


def _cell(column: Column, run: Mapping[str, Any]) -> str:
    text, spread = column.cell(run), spread_text(column, run)
    return f"{text} ({spread})" if spread else text


def _provenance(report: Report) -> Iterator[str]:
    if report.get("command"):
        yield f"command: `{' '.join(map(str, report['command']))}`"
    for part in ("versions", "hardware"):
        values = {name: value for name, value in (report.get(part) or {}).items() if value not in (None, [], (), "")}
        if values:
            yield f"{part}: {_plain(', '.join(f'{name} {value}' for name, value in values.items()))}"
    for part in ("profile", "placement"):
        if (report.get(part) or {}).get("fingerprint"):
            yield f"{part}: {report[part]['fingerprint']}"
    if report.get("created"):
        yield f"created: {report['created']}"


def _listed(lines: Iterable[str], *, escape: bool = True) -> str:
    return "\n".join(f"- {_plain(line) if escape else line}" for line in lines)


def _plain(text: str) -> str:
    """Plain text as Markdown: what would be markup is escaped."""
    for mark in ("\\", "|", "*", "_", "<", "`"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
