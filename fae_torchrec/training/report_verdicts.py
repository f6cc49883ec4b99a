"""What a comparison says in sentences: each run against the baseline on as many ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Report = Mapping[str, Any]


def baseline_of(names: Iterable[str]) -> str:
    """Of placements the one that the others are held against: "stock", else the first of TorchRec's own, else the first."""
    given = list(names)
    own = [name for name in given if name.startswith("stock")]
    return "stock" if "stock" in given else (own or given)[0]


def verdicts(report: Report) -> list[tuple[str, str]]:
    """Pairs of a run's placement and a sentence's rest: ("fae", ", 2 ranks: 1.20 times the speed of stock.")."""
    runs = report.get("runs") or ()
    if not runs:
        return []
    first = baseline_of(run["placement"] for run in runs)
    base = {run["ranks"]: run for run in runs if run["placement"] == first}
    pairs = [(run, base[run["ranks"]]) for run in runs if run["placement"] != first and run["ranks"] in base]
    return [(str(run["placement"]), f", {ranks_text(run)}: {', '.join(_differences(run, other))}.") for run, other in pairs]


def ranks_text(run: Mapping[str, Any]) -> str:
    """A run's ranks in words."""
    return f"{run['ranks']} rank{'s' if run['ranks'] > 1 else ''}"


def interval_text(estimate: Mapping[str, Any]) -> str:
    """A difference with its interval: "+0.0012 (-0.0010 to +0.0034)"; the value alone where the interval is not known."""
    value = f"{estimate['value']:+.4f}"
    known = estimate.get("low") is not None and estimate.get("high") is not None
    return f"{value} ({estimate['low']:+.4f} to {estimate['high']:+.4f})" if known else value


def _differences(run: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    texts = []
    for key, words in (
        ("samples_per_s", f"the speed of {base['placement']}"),
        ("step_ms", "its step time"),
        ("fast_memory_bytes", "its fast memory"),
        ("bytes_crossed_per_sample", "its bytes between ranks"),
        ("cold_bytes_per_sample", "its cold bytes"),
    ):
        if run.get(key) is not None and base.get(key):
            texts.append(f"{run[key] / base[key]:.2f} times {words}")
            texts[-1] += overlap_text(run, base, key)
    auc = (run.get("less_baseline") or {}).get("auc")
    if auc and auc.get("value") is not None:
        texts.append(f"test AUC {interval_text(auc)}")
        if auc.get("low") is not None and auc["low"] <= 0 <= auc["high"]:
            texts[-1] += ", no difference shown"
    elif run.get("test_auc") is not None and base.get("test_auc") is not None:
        texts.append(f"test AUC {run['test_auc'] - base['test_auc']:+.4f}")
    if run.get("printed_auroc") is not None and base.get("printed_auroc") is not None:
        texts.append(f"printed AUROC {run['printed_auroc'] - base['printed_auroc']:+.6f}{overlap_text(run, base, 'printed_auroc')}")
    return texts or ["no figures in common"]


def overlap_text(run: Mapping[str, Any], base: Mapping[str, Any], key: str) -> str:
    """What to add to a ratio of two runs whose figures' spreads overlap; nothing where they do not, or are not known."""
    ours, theirs = run.get(f"{key}_spread"), base.get(f"{key}_spread")
    overlaps = ours and theirs and ours[0] <= theirs[1] and theirs[0] <= ours[1]
    return " (the spreads overlap: no difference shown)" if overlaps else ""


def said(report: Report) -> list[str]:
    """What a script printed last in every run, as sentences: "fae, 2 ranks, turn 1: AUROC over test set: 0.71"."""
    return [
        f"{run['placement']}, {ranks_text(run)}, turn {each['turn'] + 1}: {' / '.join(each['said']) or 'nothing'}"
        for run in report.get("runs") or ()
        for each in run.get("each") or ()
        if "said" in each
    ]


def method_text(report: Report) -> str:
    """How often was run, in which order, and what is not timed; nothing where the report does not say."""
    repeats, warm_up = report.get("repeats"), report.get("warm_up_steps")
    if not repeats:
        return ""
    text = f"Each run {repeats} times, in turns, in another order each time; medians, with least and most."
    if repeats == 1:
        text = "Each run once." if report.get("script") else "Each run once; the range of samples/s is over fifths of the run."
    if warm_up:
        text += f" The first {warm_up} steps of a run are not in {'ms / step' if report.get('script') else 'its time'}."
    return text
