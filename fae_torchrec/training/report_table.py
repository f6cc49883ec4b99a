"""The comparison's columns, and the comparison as aligned text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fae_torchrec.training.report_verdicts import interval_text

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
        words: whether it is text, which stands left.
    """

    title: str
    key: str
    write: Callable[[Any], str]
    meaning: str
    words: bool = False

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
        words=True,
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


def _bytes_by_name(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {count_text(count)}" for name, count in counts.items()) or "none"


def _range_text(ends: Sequence[float]) -> str:
    return f"{ends[0]:.4f} to {ends[1]:.4f}"


def _less_auc(less: Mapping[str, Any]) -> str:
    return interval_text(less["auc"])


def _less_logloss(less: Mapping[str, Any]) -> str:
    return interval_text(less["logloss"])


DETAILS = (
    *COLUMNS[:2],
    Column("hot lookups %", "hot_lookups", percent_text, "share of all lookups that the hot tier serves: its hit rate"),
    Column("cache hits %", "cache_hits", percent_text, "share of the distinct rows of a step that the cache of UVM caching held"),
    Column("fast memory, allocated", "fast_memory_allocated_bytes", bytes_text, "hot rows and index as they lie in memory, fullest rank"),
    Column("cold memory", "cold_memory_bytes", bytes_text, "planned: tables outside fast memory, with optimizer state, fullest rank"),
    Column("cold memory, allocated", "cold_memory_allocated_bytes", bytes_text, "these tables as they lie in memory, fullest rank"),
    Column("host memory, peak", "host_peak_bytes", bytes_text, "resident memory of the largest rank's process while it trained"),
    Column("GPU memory, peak", "device_peak_bytes", bytes_text, "allocated by torch on the fullest GPU while it trained"),
    Column("bytes by collective / sample", "bytes_crossed_by_collective", _bytes_by_name, "what the bytes between ranks are made of", True),
    Column("test AUC, 95 %", "test_auc_interval", _range_text, "DeLong's interval, over test samples and over seeds if they vary"),
    Column("less baseline", "less_baseline", _less_auc, "test AUC less the baseline's, paired by test sample (DeLong), 95 %"),
    Column("logloss less baseline", "less_baseline", _less_logloss, "test log loss less the baseline's, paired by test sample, 95 %"),
)
"""The columns of the second table: memory, hit rates, links, and scores with their intervals."""


SCRIPT_COLUMNS = (
    *COLUMNS[:2],
    Column("samples/s", "samples_per_s", count_text, "of the whole training, all ranks together, evaluation left out"),
    Column("ms / step", "step_ms", _decimals(2), "median over the steps after the warm-up"),
    Column("hot batches %", "hot_batches", percent_text, "share of the training steps that left the cold tier alone"),
    Column("hot rows", "hot_bytes", bytes_text, "fast memory that the hot rows take on each rank, with optimizer state"),
    Column(
        "bytes not asked of the cold tier / sample", "spared_bytes_per_sample", count_text, "rows of hot steps, of tables with cold rows"
    ),
    Column("host memory, peak", "host_peak_bytes", bytes_text, "resident memory of rank 0's process"),
    Column("GPU memory, peak", "device_peak_bytes", bytes_text, "allocated by torch on rank 0"),
    Column("printed AUROC", "printed_auroc", _decimals(6), "what the script itself printed last of it"),
)
"""The columns of a comparison of somebody's own script."""


def columns_of(report: Mapping[str, Any]) -> tuple[Column, ...]:
    """The columns of a report's first table; of a script only those of which a run has the figure."""
    if not report.get("script"):
        return COLUMNS
    return tuple(column for column in SCRIPT_COLUMNS if any(column.cell(run) != NOTHING for run in report.get("runs") or ()))


def details_of(report: Mapping[str, Any]) -> tuple[Column, ...]:
    """The columns of a report's second table of which a run has the figure; none if only the first table's are there, and for scripts."""
    if report.get("script"):
        return ()
    runs, shown = report.get("runs") or (), {column.key for column in COLUMNS}
    columns = tuple(column for column in DETAILS if any(column.cell(run) != NOTHING for run in runs))
    return columns if any(column.key not in shown for column in columns) else ()


def spread_text(column: Column, run: Mapping[str, Any]) -> str:
    """The least and the most of a figure: "12,000 to 12,900"; nothing where the run has none or both are written alike."""
    spread = run.get(f"{column.key}_spread")
    ends = [column.write(end) for end in spread] if spread and column.cell(run) != NOTHING else []
    return f"{ends[0]} to {ends[1]}" if ends and ends[0] != ends[1] else ""


def text_table(report: Mapping[str, Any]) -> str:
    """The comparison for a terminal, one line per run.

    Args:
        report: the report; only `runs` is read, and whether it is of a script.

    Returns:
        Aligned lines without a final newline: titles over a few lines, a rule, the runs.
    """
    columns = columns_of(report)
    titles = [_wrapped(column.title) for column in columns]
    height = max(len(title) for title in titles)
    head = [[""] * (height - len(title)) + title for title in titles]
    rows = [[column.cell(run) for column in columns] for run in report.get("runs") or ()]
    widths = [max(len(text) for text in (*title, *(row[index] for row in rows))) for index, title in enumerate(titles)]
    lines = [[title[line] for title in head] for line in range(height)] + [["-" * width for width in widths]] + rows
    return "\n".join("  ".join(map(_aligned, columns, line, widths)).rstrip() for line in lines)


def _aligned(column: Column, text: str, width: int) -> str:
    return text.ljust(width) if column.words else text.rjust(width)


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
