"""The comparison's columns, and the comparison as aligned text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NOTHING = "-"
"""What stands for a figure that does not apply (stock TorchRec has no hot inputs)."""

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_TITLE_WIDTH = 9


def bytes_text(count: float) -> str:
    """A number of bytes with a binary unit and three digits: 1536 -> "1.50 KiB"."""
    unit = 0
    while abs(count) >= 1024 and unit < len(_BYTE_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    if unit == 0:
        return f"{count:.0f} B"
    return f"{count:.{2 if abs(count) < 10 else 1 if abs(count) < 100 else 0}f} {_BYTE_UNITS[unit]}"


def count_text(value: float) -> str:
    """A number with its thousands apart, and one decimal if it is small: 12345.6 -> "12,346", 3.25 -> "3.2"."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:,.1f}"


def percent_text(share: float) -> str:
    """A share between 0 and 1 as a percentage without its sign: 0.504 -> "50.4"."""
    return f"{100 * share:.1f}"


def _decimals(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


@dataclass(frozen=True)
class Column:
    """One column of the comparison.

    Attributes:
        title: its heading, with the unit.
        key: the run's key.
        write: how a value is written.
        meaning: what it says, in a few words.
    """

    title: str
    key: str
    write: Callable[[Any], str]
    meaning: str

    def cell(self, run: Mapping[str, Any]) -> str:
        """This column's text for one run; `NOTHING` if the figure is missing, null or not finite."""
        value = run.get(self.key)
        return NOTHING if value is None or (isinstance(value, float) and not math.isfinite(value)) else self.write(value)


COLUMNS = (
    Column("ranks", "ranks", str, "processes; each trains its own share of every step's samples"),
    Column(
        "placement",
        "placement",
        str,
        "stock: TorchRec's own planner; fae: hot and cold rows and batches; fae-unsegregated: hot and cold rows, stock batch order",
    ),
    Column("samples/s", "samples_per_s", count_text, "samples trained per second, all ranks together: of the run, and over its fifths"),
    Column("hot inputs %", "hot_inputs", percent_text, "share of the samples whose every id is hot"),
    Column("hot batches %", "hot_batches", percent_text, "share of the steps that left the cold tier alone"),
    Column("fast-memory bytes", "fast_memory_bytes", bytes_text, "per rank: hot rows with optimizer state, and the index that finds them"),
    Column(
        "bytes crossed ranks / sample",
        "bytes_crossed_per_sample",
        count_text,
        "all collectives: ids, pooled rows, gradients, the dense part's too (the same in every run)",
    ),
    Column("cold rows / sample", "cold_rows_per_sample", _decimals(2), "rows looked up outside the hot tier"),
    Column("cold bytes / sample", "cold_bytes_per_sample", count_text, "bytes of those rows"),
    Column("train loss", "train_loss", _decimals(4), "mean log loss over the last epoch"),
    Column("test AUC", "test_auc", _decimals(4), "area under the ROC curve on the test samples; 0.5 is guessing"),
    Column("test logloss", "test_logloss", _decimals(4), "log loss on the test samples"),
)
"""The comparison's columns, in order."""


def text_table(report: Mapping[str, Any]) -> str:
    """The comparison for a terminal, one line per run.

    Args:
        report: the report; only `runs` is read.

    Returns:
        Aligned lines without a final newline: titles over a few lines, a rule, the runs.
    """
    titles = [_wrapped(column.title) for column in COLUMNS]
    height = max(len(title) for title in titles)
    head = [[""] * (height - len(title)) + title for title in titles]
    rows = [[column.cell(run) for column in COLUMNS] for run in report.get("runs") or ()]
    widths = [max(len(text) for text in (*title, *(row[index] for row in rows))) for index, title in enumerate(titles)]
    lines = [[title[line] for title in head] for line in range(height)] + [["-" * width for width in widths]] + rows
    return "\n".join("  ".join(map(_aligned, COLUMNS, line, widths)).rstrip() for line in lines)


def _aligned(column: Column, text: str, width: int) -> str:
    return text.ljust(width) if column.key == "placement" else text.rjust(width)


def _wrapped(title: str) -> list[str]:
    """A title as short lines, the unit last: "bytes crossed ranks / sample" -> "bytes crossed", "ranks", "/ sample"."""
    what, slash, unit = title.partition(" / ")
    lines: list[str] = []
    for word in what.split(" "):
        if lines and len(lines[-1]) + 1 + len(word) <= _TITLE_WIDTH and word != "%":
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [*lines, f"/ {unit}"] if slash else lines
