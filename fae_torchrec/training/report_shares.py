"""Where a step's time goes, as the comparison's report shows it: lines, a table, a picture, and what the categories are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fae_torchrec.training.picture import LINE, SERIES, Picture, stacked_ms
from fae_torchrec.training.report_table import percent_text
from fae_torchrec.training.report_verdicts import ranks_text
from fae_torchrec.training.step_shares import CATEGORIES

Report = Mapping[str, Any]

_COLOURS = {
    "transfer": SERIES[3],
    "embedding_exchange": SERIES[1],
    "input_dist": SERIES[4],
    "forward": SERIES[7],
    "backward": SERIES[2],
    "dense_all_reduce": SERIES[6],
    "optimizer": SERIES[5],
    "other": SERIES[0],
    "idle": LINE,
}
_NAMES = {"embedding_sync": "embedding sync at swaps", "transfer": "host-device transfer", "dense_all_reduce": "dense all-reduce"}
_BRIEF = 0.05  # shares below are not in a line
_HOW = (
    "Steps of every kind after training, under torch.profiler, through the pipeline that trained; a profiled step is slower than a timed "
    "one. On a CPU: the time of the thread that trains, all ranks together. On a GPU: the time of its kernels and copies, by the operator "
    "that launched them."
)


def shares_of(report: Report) -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    """Every run that was profiled, with each kind of batch and its part of `step_shares`."""
    for run in report.get("runs") or ():
        for kind in ("hot", "cold", "mixed"):
            if found := (run.get("step_shares") or {}).get(kind):
                yield run, kind, found


def shares_lines(report: Report) -> list[str]:
    """For a terminal: "fae, 2 ranks, a hot step of 21.9 ms: backward 55.0 %, forward 30.1 %"; only what is worth a word."""
    lines = []
    for run, kind, found in shares_of(report):
        parts = sorted(((share, name) for name, share in found["shares"].items() if share >= _BRIEF), reverse=True)
        texts = ", ".join(f"{_words(name)} {percent_text(share)} %" for share, name in parts)
        lines.append(f"{run['placement']}, {ranks_text(run)}, a {kind} step of {found['step_ms']:.1f} ms: {texts}")
    return lines


def shares_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows, plain text; the first three columns are words. No rows where nothing was profiled."""
    names = [name for name in CATEGORIES if name == "embedding_sync" or any(found["shares"].get(name) for _, _, found in shares_of(report))]
    head = ["placement", "ranks", "batches", "ms / step", *(f"{_words(name)} %" for name in names)]
    rows = [
        [str(run["placement"]), str(run["ranks"]), kind, f"{found['step_ms']:.2f}", *(percent_text(found["shares"][n]) for n in names)]
        for run, kind, found in shares_of(report)
    ]
    return head, rows


def shares_picture(report: Report) -> Picture | None:
    """Milliseconds of a step by category, a bar for every run and kind of batch."""
    rows = [
        (f"{run['placement']}, {ranks_text(run)}, {kind}", {_words(name): ms for name, ms in found["milliseconds"].items()})
        for run, kind, found in shares_of(report)
    ]
    colours = {_words(name): colour for name, colour in _COLOURS.items()}
    height = 1.5 + 0.32 * len(rows)
    return (
        Picture(lambda axes: stacked_ms(axes[0], rows, colours, "milliseconds of one profiled step", 5), (11.4, height)) if rows else None
    )


def shares_notes(report: Report) -> dict[str, str]:
    """What is in the categories: term -> text; nothing where nothing was profiled."""
    if not any(shares_of(report)):
        return {}
    return {"How the shares were taken": _HOW, **{_words(name): f"{meaning}." for name, meaning in CATEGORIES.items()}}


def _words(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " "))
