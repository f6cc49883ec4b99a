"""What `two_hosts.py` measured, summed up: statistics of rounds, the target, and a table for the terminal. No torch here."""

from __future__ import annotations

from typing import Any

import numpy as np
from sharded_step_summary import KINDS, pair_statistics

TARGET_MBIT, TARGET_SPEED = 1000, 1.4
"""At this rate of the link a step of hot batches is at least so many times as fast as stock's."""
STAGES = ("step", "pipelined")
LIMITS = {"loss": 1e-4}


def summarised(run: dict[str, Any], seed: int) -> dict[str, Any]:
    """One rate's ranks: times of the slower rank, bytes of both."""
    ranks = run["ranks"]
    summary: dict[str, Any] = {
        "mbit": run["mbit"],
        "link": ranks[0]["link"],
        "loss_difference": max(rank["loss_difference"] for rank in ranks),
        "dense": {
            "parameters": ranks[0]["dense"]["parameters"],
            "all_reduce_ms": 1e3 * float(np.median(_slowest(rank["dense"]["seconds"] for rank in ranks))),
            "bytes": float(np.median(np.sum([rank["dense"]["sent_bytes"] for rank in ranks], axis=0))),
        },
    }
    for stage in STAGES:
        summary[stage] = {kind: _compared([rank[stage][kind] for rank in ranks], seed) for kind in KINDS}
        for kind in KINDS:
            payload = {name: sum(rank["collectives"][kind][name]["sent_bytes"] for rank in ranks) for name in ("stock", "fae")}
            found = summary[stage][kind]
            found["payload_bytes"] = payload
            saved = {name: _saved_ms(ranks[0], kind, name) for name in ("stock", "fae")}
            found["speed_if_both_ways_at_once"] = (found["stock_ms"] - saved["stock"]) / (found["fae_ms"] - saved["fae"])
    epochs = [rank["epoch"] for rank in ranks]
    summary["epoch"] = {**_compared(epochs, seed), "steps": epochs[0]["steps"]}
    summary["epoch"]["samples"] = {name: sum(epoch["samples"][name] for epoch in epochs) for name in ("stock", "fae")}
    return summary


def _saved_ms(rank: dict[str, Any], kind: str, name: str) -> float:
    """What a step would save if gloo's all-to-all and all-gather used both directions of the link at once, as its all-reduce does.

    Gloo tells the other rank that it is ready to receive behind what it sends, so that these two send by turns unless the ranks begin
    at the same moment. What was sent by each over what the link was seen to carry under it, less the same under all-reduce.
    """
    link, sent = rank["link"], rank["collectives"][kind][name]["by_collective"]
    uses = {"alltoall_base": "all_to_all_mbit", "allgather_base": "all_gather_mbit"}
    return sum(8e-3 * sent.get(collective, 0) * (1 / link[use] - 1 / link["all_reduce_mbit"]) for collective, use in uses.items())


def _slowest(of_ranks: Any) -> Any:
    return np.max(list(of_ranks), axis=0)


def _compared(ranks: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Both placements' seconds, and the bytes that both hosts sent: medians over the rounds, and the rounds' spread."""
    seconds = {name: _slowest(rank["seconds"][name] for rank in ranks) for name in ("stock", "fae")}
    sent = {name: np.sum([rank["sent_bytes"][name] for rank in ranks], axis=0) for name in ("stock", "fae")}
    return {
        **pair_statistics(**seconds, seed=seed),
        **{f"{name}_ms_quartiles": (1e3 * np.quantile(found, [0.25, 0.75])).tolist() for name, found in seconds.items()},
        "bytes": {name: float(np.median(found)) for name, found in sent.items()},
        "bytes_ratio": float(np.median(sent["fae"]) / np.median(sent["stock"])),
    }


def judged_targets(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets: speed of hot batches at 1 Gbit/s, with and without pipelines; both trained alike."""
    targets = []
    for entry in summary:
        if entry["mbit"] == TARGET_MBIT:
            for stage in STAGES:
                speed = entry[stage]["hot"]["speed"]
                what = f"{TARGET_MBIT} Mbit/s, {stage} of hot batches, stock time / fae time"
                targets.append({"what": what, "value": speed, "at_least": TARGET_SPEED, "passed": speed >= TARGET_SPEED})
        loss = entry["loss_difference"]
        what = f"{entry['mbit']} Mbit/s, relative difference of the losses of the first steps"
        targets.append({"what": what, "value": loss, "at_most": LIMITS["loss"], "passed": loss <= LIMITS["loss"]})
    return targets


def record_text(record: dict[str, Any]) -> str:
    """The figures for a terminal: the workload, a line for each rate, stage and kind, a line for each target."""
    placed, options = record["placement"], record["options"]
    lines = [
        f"{placed['tables']} tables, {placed['rows']:,} rows, {placed['bytes'] / 2**20:,.0f} MiB; D={options['dim']}, "
        f"B={options['batch_size']} on each of 2 hosts, {options['optimizer']}",
        f"{options['hot_tier']} hot tier: {placed['hot_bytes'] / 2**20:.1f} MiB = {placed['byte_share']:.1%} of the bytes; "
        f"{placed['hot_inputs']:.0%} of the inputs are hot",
    ]
    for entry in record["summary"]:
        link, dense = entry["link"], entry["dense"]
        lines += [
            "",
            f"link of {entry['mbit']} Mbit/s, round trip {link['round_trip_us']:.0f} us" if entry["mbit"] else "no limit",
            "carries of each direction, Mbit/s: "
            + ", ".join(f"{name.removesuffix('_mbit').replace('_', ' ')} {value:.0f}" for name, value in link.items() if "mbit" in name),
            f"the dense part's {dense['parameters']:,} gradients alone: {dense['bytes'] / 1e6:.2f} MB, {dense['all_reduce_ms']:.1f} ms",
            f"{'':78}{'if both':>14}",
            f"{'stage':<11}{'kind':<7}{'stock MB':>10}{'fae MB':>9}{'ratio':>8}{'stock ms':>10}{'fae ms':>9}{'speed':>8}{'(95 %)':>14}"
            f"{'ways at once':>14}",
        ]
        for stage in STAGES:
            for kind in KINDS:
                found = entry[stage][kind]
                lines.append(f"{_line(stage, kind, found)}{found['speed_if_both_ways_at_once']:>14.2f}")
        epoch, steps = entry["epoch"], entry["epoch"]["steps"]
        lines.append(_line("epoch", "", epoch) + f"   {steps['fae']['hot']} hot and {steps['fae']['cold']} cold steps")
    lines.append("")
    for target in record["targets"]:
        limit = f">= {target['at_least']:g}" if "at_least" in target else f"<= {target['at_most']:g}"
        lines.append(f"{'ok  ' if target['passed'] else 'MISS'} {target['what']}: {target['value']:.4g} ({limit})")
    return "\n".join(lines)


def _line(stage: str, kind: str, found: dict[str, Any]) -> str:
    low, high = found["speed_interval_95"]
    return (
        f"{stage:<11}{kind:<7}{found['bytes']['stock'] / 1e6:>10.2f}{found['bytes']['fae'] / 1e6:>9.2f}{found['bytes_ratio']:>8.3f}"
        f"{found['stock_ms']:>10.1f}{found['fae_ms']:>9.1f}{found['speed']:>8.3f}{f'({low:.2f}-{high:.2f})':>14}"
    )
