"""Writes the page about benchmarks/gpu.py's measurements from its JSON: docs/gpu.md and its pictures.

    python benchmarks/gpu_page.py

What is measured is told in words by figures of the JSON alone; what the matrix has and the JSON lacks is listed as not yet run.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_pictures import base_picture, sweep_picture
from gpu_scenarios import BASE, FAE, HBM, PREFETCH, UVM, comparisons

_ROOT = Path(__file__).resolve().parent.parent
_GOALS = {"hbm": 0.95, "prefetch": 1.3, "stage": 3.0}
_TIE = 0.05  # what counts as no difference


def main(argv: list[str] | None = None) -> None:
    """Writes page and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, default=_ROOT / "benchmarks/results/gpu.json", help="what was measured (default: %(default)s)")
    add("--page", type=Path, default=_ROOT / "docs/gpu.md", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    record = json.loads(args.json.read_text())
    images = args.page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, picture in (("gpu_base.png", base_picture(record)), ("gpu_sweeps.png", sweep_picture(record))):
        if picture is not None:
            _write(images / name, picture.png())
            drawn.append(name)
    _write(args.page, page(record, drawn).encode())
    print(f"written: {args.page}, {', '.join(drawn)}")


def page(record: dict[str, Any], pictures: Sequence[str]) -> str:
    """The page's text.

    Args:
        record: of benchmarks/gpu.py.
        pictures: file names of those that were drawn.
    """
    found = record["comparisons"]
    parts = [_head(record), _goals(found)]
    parts += [f"![Measured side by side](images/{name})" for name in pictures]
    parts += [_outcomes(found), *(_comparison(entry) for entry in found), _not_run(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    ddp = "" if record["ddp"] else " without DistributedDataParallel,"
    return f"""# On a GPU

<!-- Written by benchmarks/gpu_page.py from benchmarks/results/gpu.json: change these. -->

One {record["gpu"]}, {record["hardware"]["cpus"]} cores of a host that others use too ({record["hardware"]["processor"]}), {versions};{ddp}
{record["created"][:10]}.

    python benchmarks/gpu.py            # measures, writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --resume   # what is missing of it
    python benchmarks/gpu_page.py       # writes this page

A DLRM with MLPerf's dense part over 26 one-hot tables of Criteo's shape, 20 GB with row-wise Adagrad; every table's accesses follow a Zipf
law of its own, independent of the others', which is the least favourable case for whole hot samples. Placements take the same bytes of the
GPU's memory for rows: hot ones and the staging area of cold ones (FAE), or a cache (UVM caching). Placements of one table took turns in one
run; a figure is the median of its blocks, and the spread is given because the step of a fast placement waits for a host that is not idle.
`samples/s` is the whole training step through each placement's pipeline, `embedding stage` the tables alone (through the pipeline, and by
the GPU's own clock, without what the host takes). Batches are made, and FAE's split by tier, before; "streamed" does it meanwhile."""


def _goals(found: Sequence[dict[str, Any]]) -> str:
    entry = _named(found, BASE.name)
    if entry is None:
        return ""
    placements = entry["placements"]
    fae, hbm, uvm = (placements[name] for name in (FAE.name, HBM.name, UVM.name))
    rival_name, rival = max(
        ((name, placement) for name, placement in placements.items() if name.startswith(PREFETCH.name)), key=lambda item: _rate(item[1])
    )
    ratios = {"hbm": _rate(fae) / _rate(hbm), "prefetch": _rate(fae) / _rate(rival), "stage": _stage_ms(uvm) / _stage_ms(fae)}
    words = {
        "hbm": "samples/s of all-HBM",
        "prefetch": f"samples/s of the best UVM caching + prefetch that was measured ({rival_name})",
        "stage": "the GPU's time for the embedding stage of plain UVM",
    }
    lines = ["## The goals", "", f"At {entry['workload']['name']}: FAE against", "", "| | goal | measured | |", "|---|---|---|---|"]
    for key, goal in _GOALS.items():
        lines.append(f"| {words[key]} | {goal:g} | {ratios[key]:.2f} | {'met' if ratios[key] >= goal else '**missed**'} |")
    if ratios["prefetch"] < _GOALS["prefetch"]:
        lines += ["", _why_missed(entry, rival)]
    return "\n".join(lines)


def _why_missed(entry: dict[str, Any], rival: dict[str, Any]) -> str:
    placements = entry["placements"]
    fae, hbm = placements[FAE.name], placements[HBM.name]
    size = entry["workload"]["batch_size"]
    step = {name: 1000 * size / _rate(placement) for name, placement in (("fae", fae), ("hbm", hbm), ("rival", rival))}
    text = (
        f"Why the second is missed: all tables in HBM would have missed it too, at {_rate(hbm) / _rate(rival):.2f}. A step of FAE takes "
        f"{step['fae']:.1f} ms, one of all-HBM {step['hbm']:.1f} ms, one of the rival {step['rival']:.1f} ms."
    )
    kernels = [placement.get("profile", {}).get("kernels_ms") for placement in (fae, rival)]
    if all(kernels):
        text += (
            f" By the profiler the GPU works {kernels[0]:.1f} ms of FAE's step and {kernels[1]:.1f} ms of the rival's: the rival's step "
            "is the GPU's, FAE's and all-HBM's are the host's, which queues a DLRM's kernels through Python, DistributedDataParallel and "
            f"TorchRec's pipeline. Where the host is no limit the two are {kernels[1] / kernels[0]:.2f} apart."
        )
    return text


def _outcomes(found: Sequence[dict[str, Any]]) -> str:
    """Where FAE wins, ties and loses, by samples/s."""
    told: dict[str, list[str]] = {"wins against": [], "ties with": [], "loses against": []}
    for entry in found:
        placements = entry["placements"]
        ours = placements.get(FAE.name)
        if ours is None:
            continue
        for name, other in placements.items():
            if other["kind"] == "fae" or not other.get("samples_per_s_median"):
                continue
            ratio = _rate(ours) / _rate(other)
            outcome = "ties with" if abs(ratio - 1) <= _TIE else ("wins against" if ratio > 1 else "loses against")
            told[outcome].append(f"{name} ({ratio:.2f}; {entry['name']})")
    lines = ["## Where it wins, ties and loses", "", f"By samples/s; a tie is within {_TIE:.0%}."]
    lines += [f"\n- FAE {outcome} {'; '.join(those) or 'none of those measured'}." for outcome, those in told.items()]
    streamed = [(entry, entry["placements"]["FAE, streamed"]) for entry in found if "FAE, streamed" in entry["placements"]]
    for entry, placement in streamed:
        ratio = _rate(placement) / _rate(entry["placements"][FAE.name])
        if ratio < 1 - _TIE:
            lines.append(
                f"\nBeside training, the loader that segregates and splits by tier gives {_rate(placement):,.0f} samples/s, "
                f"{ratio:.2f} of what FAE trains when its batches are ready ({entry['name']}): it is the feed that limits then."
            )
    return "\n".join(lines)


def _comparison(entry: dict[str, Any]) -> str:
    workload, placements = entry["workload"], entry["placements"]
    lines = [
        f"## {entry['name']}",
        "",
        "| placement | samples/s (least to most) | to all-HBM | embedding stage, samples/s | by the GPU's clock: step + what runs beside "
        "the step before | HBM at rest | rows over the link a step: brought, taken back |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, placement in placements.items():
        if not placement.get("samples_per_s_median"):
            continue
        spread = f"{min(placement['samples_per_s']) / 1e6:.2f} to {max(placement['samples_per_s']) / 1e6:.2f}"
        clock = f"{_stage_ms(placement):.2f} + {_stage_ms(placement, 'prefetch'):.2f} ms" if placement.get("device_ms") else ""
        stage = placement.get("embedding_samples_per_s_median")
        lines.append(
            f"| {name} | {_rate(placement) / 1e6:.2f} M ({spread}) | {_rate(placement) / _rate(placements[HBM.name]):.2f} | "
            f"{'' if not stage else f'{stage / 1e6:.2f} M'} | {clock} | {placement['static_hbm_bytes'] / 2**30:.2f} GiB | "
            f"{_link_rows(placement, entry)} |"
        )
    fae = placements.get(FAE.name)
    if fae is not None:
        lines += [
            "",
            f"{fae['hot_batches']:.0%} of FAE's batches are hot, and {fae['coverage']:.1%} of the ids. A row has {workload['dim']} floats "
            "and its state. What lies in HBM at rest is more than the budget: FBGEMM keeps the row-wise state of all rows of UVM there "
            "and, with a cache, a map of them.",
        ]
    return "\n".join(lines)


def _link_rows(placement: dict[str, Any], entry: dict[str, Any]) -> str:
    """Rows over the link: counted from the ids, or by FBGEMM's cache."""
    if placement["kind"] == "hbm":
        return "0"
    if placement["kind"] in ("uvm", "host"):
        touched = entry["rows_touched"]
        return f"{touched['distinct']:,.0f} to {touched['lookups']:,.0f} and again {touched['distinct']:,.0f}, {touched['distinct']:,.0f}"
    if placement["kind"] == "caching" and "cache" in placement:
        return f"{placement['cache']['misses']:,.0f}, as many (evicted)"
    if placement["kind"] == "fae" and placement["cold"] == "uvm":
        rows = (1 - placement["hot_batches"]) * placement["cold_rows"]["distinct"]
        return f"{rows:,.0f}, as many"
    return ""


def _not_run(found: Sequence[dict[str, Any]]) -> str:
    """What the matrix has and the JSON lacks."""
    lines = []
    for comparison in comparisons():
        entry = _named(found, comparison.name)
        have = {} if entry is None else entry["placements"]
        lacking = [placement.name for placement in comparison.placements if placement.name not in have]
        if entry is None:
            lines.append(f"- {comparison.name}")
        elif lacking:
            lines.append(f"- {comparison.name}: {'; '.join(lacking)}")
    return "\n".join(["## Not yet run", "", *(lines or ["Nothing: the whole matrix was measured."])])


def _named(found: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((entry for entry in found if entry["name"] == name), None)


def _rate(placement: dict[str, Any]) -> float:
    rate: float = placement["samples_per_s_median"]
    return rate


def _stage_ms(placement: dict[str, Any], part: str = "step") -> float:
    """The GPU's own time of the embedding stage, of hot and cold batches as the epoch has them."""
    by_kind = placement["device_ms"]
    if set(by_kind) == {"hot", "cold"}:
        hot: float = placement["hot_batches"]
        return hot * by_kind["hot"][part] + (1 - hot) * by_kind["cold"][part]
    (only,) = by_kind.values()
    value: float = only[part]
    return value


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
