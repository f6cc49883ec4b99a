"""What `sharded_step.py` measured, summed up: statistics of pairs, the targets, and a table for the terminal. No torch here."""

from __future__ import annotations

from typing import Any

import numpy as np

KINDS = ("mixed", "hot", "cold")
BYTE_LIMITS = {"hot": 0.30, "mixed": 0.85}
"""fae's embedding bytes over stock's, at most."""
SPEED_LIMITS = {"mixed": 0.97, "hot": 1.0}
"""Stock's time over fae's, at least."""


def joined_ranks(ranks: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """One run out of what its ranks measured: times of the slowest rank, bytes of all."""
    first = ranks[0]
    run = {key: first[key] for key in ("threads", "plans", "batches")}
    run["memory"] = [rank["memory"] for rank in ranks]
    run["loss_difference"] = max(rank["loss_difference"] for rank in ranks)
    for stage in ("step", "embedding"):
        run[stage] = {}
        for kind in KINDS:
            slowest = {name: np.max([rank[stage][kind][name] for rank in ranks], axis=0) for name in ("stock", "fae")}
            run[stage][kind] = {**pair_statistics(**slowest, seed=seed), **{f"{k}_s": np.round(v, 6).tolist() for k, v in slowest.items()}}
    if "bytes" in first:
        run["bytes"] = {key: first["bytes"][key] for key in ("barriers", "foreign_per_s")}
        for kind in KINDS:
            run["bytes"][kind] = {
                name: {
                    **first["bytes"][kind][name],
                    "collectives": np.sum([rank["bytes"][kind][name]["collectives"] for rank in ranks], axis=0).tolist(),
                }
                for name in ("stock", "fae")
            }
    return run


def pair_statistics(stock: Any, fae: Any, seed: int) -> dict[str, Any]:
    """Medians of both, and fae's speed relative to stock: the median of the pairs' ratios, its quartiles and a bootstrap interval.

    Args:
        stock: seconds, float [pairs].
        fae: seconds of the same pairs.
        seed: of the bootstrap.
    """
    ratios = np.asarray(stock) / np.asarray(fae)
    draws = np.random.default_rng(seed).integers(len(ratios), size=(4000, len(ratios)))
    return {
        "pairs": len(ratios),
        "stock_ms": 1e3 * float(np.median(stock)),
        "fae_ms": 1e3 * float(np.median(fae)),
        "speed": float(np.median(ratios)),
        "speed_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        "speed_interval_95": np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975]).tolist(),
        "speed_of_medians": float(np.median(stock) / np.median(fae)),
    }


def summarised(runs: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """All runs of one rank count, their pairs and batches taken together."""
    summary: dict[str, Any] = {"ranks": runs[0]["ranks"]}
    memory = [of_rank for run in runs for of_rank in run["memory"]]
    summary["memory"] = max(memory, key=lambda found: abs(found["allocated_over_planned"] - 1))  # the rank farthest from its plan
    summary["loss_difference"] = max(run["loss_difference"] for run in runs)
    for stage in ("step", "embedding"):
        summary[stage] = {}
        for kind in KINDS:
            every = {name: np.concatenate([run[stage][kind][f"{name}_s"] for run in runs]) for name in ("stock", "fae")}
            speeds = [run[stage][kind]["speed"] for run in runs]
            summary[stage][kind] = {**pair_statistics(**every, seed=seed), "speed_by_run": speeds}
    if "bytes" in runs[0]:
        summary["bytes"] = {}
        for kind in KINDS:
            median = {
                (name, what): float(np.median(np.concatenate([run["bytes"][kind][name][what] for run in runs])))
                for name in ("stock", "fae")
                for what in ("loopback", "collectives", "whole_step")
            }
            summary["bytes"][kind] = {
                "stock": median["stock", "loopback"],
                "fae": median["fae", "loopback"],
                "ratio": median["fae", "loopback"] / median["stock", "loopback"],
                "ratio_of_collectives": median["fae", "collectives"] / median["stock", "collectives"],
                "dense": {name: median[name, "whole_step"] - median[name, "loopback"] for name in ("stock", "fae")},
                "loopback_over_collectives": {name: median[name, "loopback"] / median[name, "collectives"] for name in ("stock", "fae")},
            }
    return summary


def judged_targets(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    targets = []
    for entry in summary:

        def add(what: str, value: float, low: float | None, high: float | None, ranks: int = entry["ranks"]) -> None:
            passed = (low is None or value >= low) and (high is None or value <= high)
            targets.append({"ranks": ranks, "what": what, "value": value, "at_least": low, "at_most": high, "passed": passed})

        for kind, limit in BYTE_LIMITS.items() if "bytes" in entry else ():
            add(f"embedding bytes, {kind} batches, fae / stock", entry["bytes"][kind]["ratio"], None, limit)
        for kind, limit in SPEED_LIMITS.items():
            add(f"step speed, {kind} batches, stock time / fae time", entry["step"][kind]["speed"], limit, None)
        add("fast memory, allocated / planned", entry["memory"]["allocated_over_planned"], 0.98, 1.02)
        add("id -> slot index, bytes per row", entry["memory"]["index_bytes_per_row"], None, 4.0)
        add("relative difference of the losses of the first steps", entry["loss_difference"], None, 1e-4)
    return targets


def record_text(record: dict[str, Any]) -> str:
    """The figures for a terminal: the workload, a line for each rank count and kind, a line for each target."""
    placed, options = record["placement"], record["options"]
    mib = 2**20
    lines = [
        f"{placed['tables']} tables, {placed['rows']:,} rows, {placed['bytes'] / mib:,.0f} MiB; D={options['dim']}, "
        f"B={options['batch_size']} per rank, {options['optimizer']}",
        f"{options['hot_tier']} hot tier: {placed['hot_rows']:,} rows, {placed['hot_bytes'] / mib:.1f} MiB = {placed['byte_share']:.1%} of "
        f"the bytes; {placed['hot_inputs']:.0%} of the inputs are hot, {placed['coverage']:.0%} of the accesses",
        "",
        f"{'':16}{'embedding bytes a step':^28}{'train step':^41}{'embedding alone':^41}",
        f"{'ranks kind':<16}{'stock MB':>10}{'fae MB':>10}{'ratio':>8}" + f"{'stock ms':>11}{'fae ms':>9}{'speed':>7} {'(95 %)':>13}" * 2,
    ]
    for entry in record["summary"]:
        for kind in KINDS:
            found = entry.get("bytes", {}).get(kind)
            moved = (
                f"{found['stock'] / 1e6:>10.2f}{found['fae'] / 1e6:>10.2f}{found['ratio']:>8.3f}"
                if found
                else f"{'-':>10}" * 2 + f"{'-':>8}"
            )
            lines.append(f"{entry['ranks']:>5} {kind:<10}{moved}" + "".join(_timed(entry[stage][kind]) for stage in ("step", "embedding")))
    lines.append("")
    for target in record["targets"]:
        limits = [f"{sign} {target[key]:g}" for key, sign in (("at_least", ">="), ("at_most", "<=")) if target[key] is not None]
        verdict = "ok  " if target["passed"] else "MISS"
        lines.append(f"{verdict} ranks {target['ranks']}: {target['what']}: {target['value']:.4g} ({', '.join(limits)})")
    return "\n".join(lines)


def _timed(found: dict[str, Any]) -> str:
    low, high = found["speed_interval_95"]
    return f"{found['stock_ms']:>11.1f}{found['fae_ms']:>9.1f}{found['speed']:>7.3f} {f'({low:.2f}-{high:.2f})':>13}"
