"""The paper's numbers as a reader wrote them down (`--numbers`), in the words of the page: theirs, never ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fae_torchrec.training.paper_tables import NOT_AT_HAND, PaperTable
from fae_torchrec.training.report_table import NOTHING

Report = Mapping[str, Any]

_SHARES = {
    "embedding_sync": "embedding sync", "transfer": "CPU-GPU transfer", "optimizer": "optimizer", "backward": "backward",
    "forward": "forward",
}  # fmt: skip
_BARS = {"baseline": "baseline", "fae_hot": "FAE, hot", "fae_cold": "FAE, cold"}


def given(report: Report, table: str) -> Mapping[str, Any]:
    """What the file gives of "table4", "table5" or "fig14": workload -> numbers; empty without a file."""
    found: Mapping[str, Any] = (report.get("numbers") or {}).get(table) or {}
    return found


def from_file(report: Report) -> str:
    """The label of given numbers: from FILE, by its name alone."""
    return f"from {Path(report['numbers']['path']).name}"


def paper_heads(report: Report, table: str, unit: str = "") -> list[str]:
    """The titles of the paper's two columns; they say whose numbers stand below."""
    label = f"{unit} ({from_file(report)})" if given(report, table) else ""
    return [f"paper, {scheme}{label}" for scheme in ("baseline", "FAE")]


def scores_texts(report: Report, workload: str) -> list[str]:
    """Table 4: the baseline's and FAE's scores, such as "78.5 %, AUC 0.8, logloss 0.45"; or that they are not at hand."""
    return [_scores((given(report, "table4").get(workload) or {}).get(scheme) or {}) for scheme in ("baseline", "fae")]


def minutes_texts(report: Report, workload: str) -> list[str]:
    """Table 5: the baseline's and FAE's minutes, such as "100" or "1 GPU: 100; 2 GPUs: 80"; or that they are not at hand."""
    return [_by_gpus((given(report, "table5").get(workload) or {}).get(scheme)) or NOT_AT_HAND for scheme in ("baseline", "fae")]


def time_ratio_text(report: Report, workload: str) -> str:
    """Table 5: FAE's minutes over the baseline's; empty where the file does not give both."""
    return _by_gpus((given(report, "table5").get(workload) or {}).get("time_ratio"), 3)


def shares_given(report: Report) -> tuple[list[str], list[list[str]]]:
    """Fig. 14: head and rows, plain text, of the workloads that were compared; the first three columns are words."""
    compared = dict.fromkeys(each["workload"] for each in report["comparisons"])
    bars = [
        (name, title, shares)
        for name in compared
        for bar, title in _BARS.items()
        if (shares := (given(report, "fig14").get(name) or {}).get(bar))
    ]
    if not bars:
        return [], []
    names = [name for name in _SHARES if any(name in shares for _, _, shares in bars)]
    rows = [[name, from_file(report), title, *(_number(shares.get(key)) for key in names)] for name, title, shares in bars]
    return ["workload", "the paper", "time of", *(f"{_SHARES[name]} %" for name in names)], rows


def source_text(report: Report, key: str, table: PaperTable) -> str:
    """Where the numbers of one of the paper's tables are from."""
    if not (workloads := given(report, key)):
        return table.source
    whose = f"the word of whoever wrote {report['numbers']['path']}, not checked against the paper here"
    return f"Given with --numbers for {', '.join(workloads)}: {whose}. Looked up by this project: {table.source}"


def _scores(scores: Mapping[str, float]) -> str:
    words = {"accuracy": "{} %", "auc": "AUC {}", "logloss": "logloss {}"}
    return ", ".join(text.format(_number(scores[key])) for key, text in words.items() if key in scores) or NOT_AT_HAND


def _by_gpus(value: Any, digits: int | None = None) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{gpus} GPU{'' if gpus == '1' else 's'}: {_number(each, digits)}" for gpus, each in value.items())
    return "" if value is None else _number(value, digits)


def _number(value: float | None, digits: int | None = None) -> str:
    """As it was typed, or with so many digits after the point."""
    if value is None:
        return NOTHING
    return f"{value:.10g}" if digits is None else f"{value:.{digits}f}"
