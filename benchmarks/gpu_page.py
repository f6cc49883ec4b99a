"""Writes the page about benchmarks/gpu.py's measurements from its JSON: docs/gpu.md and its pictures.

    python benchmarks/gpu_page.py

What is measured is told in words by figures of the JSON alone; what the matrix has and the JSON lacks is listed as not yet run. A second
JSON, `gpu.py --no-ddp` on the base workload, stands beside in the goals.
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
    add("--no-ddp", type=Path, default=_ROOT / "benchmarks/results/gpu_no_ddp.json", help="measured with --no-ddp (default: %(default)s)")
    add("--page", type=Path, default=_ROOT / "docs/gpu.md", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    record = json.loads(args.json.read_text())
    bare = json.loads(args.no_ddp.read_text()) if args.no_ddp.exists() else None
    images = args.page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, picture in (("gpu_base.png", base_picture(record)), ("gpu_sweeps.png", sweep_picture(record))):
        if picture is not None:
            _write(images / name, picture.png())
            drawn.append(name)
    _write(args.page, page(record, drawn, bare).encode())
    print(f"written: {args.page}, {', '.join(drawn)}")


def page(record: dict[str, Any], pictures: Sequence[str], bare: dict[str, Any] | None = None) -> str:
    """The page's text.

    Args:
        record: of benchmarks/gpu.py.
        pictures: file names of those that were drawn.
        bare: of another run, with --no-ddp.
    """
    found = record["comparisons"]
    parts = [_head(record), _goals(found, [] if bare is None else bare["comparisons"])]
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
the GPU's own clock, without what the host takes). Batches are made, and FAE's split by tier, before; "streamed" does it meanwhile. They
repeat after an epoch of {record["options"]["samples"]:,} samples, which favours a cache of all its rows (5 % and 10 % in HBM)."""


def _goals(found: Sequence[dict[str, Any]], bare: Sequence[dict[str, Any]]) -> str:
    entry = _named(found, BASE.name)
    if entry is None:
        return ""
    runs = [entry] + [other for other in [_named(bare, BASE.name)] if other is not None]
    ratios = [_ratios(run["placements"]) for run in runs]
    words = {
        "hbm": "samples/s of all-HBM",
        "prefetch": f"samples/s of the best UVM caching + prefetch that was measured ({_rival(entry['placements'])})",
        "stage": "the GPU's time for the embedding stage of plain UVM",
    }
    without = "; without DistributedDataParallel, which one rank does not need" if len(runs) > 1 else ""
    head = f"| | goal | measured{without} | |"
    lines = ["## The goals", "", f"At {entry['workload']['name']}: FAE against", "", head, "|---|---|---|---|"]
    missed = []
    for key, goal in _GOALS.items():
        met = [ratio[key] >= goal for ratio in ratios]
        outcome = "met" if all(met) else ("**missed** in one of the runs" if any(met) else "**missed**")
        lines.append(f"| {words[key]} | {goal:g} | {'; '.join(f'{ratio[key]:.2f}' for ratio in ratios)} | {outcome} |")
        if not all(met):
            missed.append(key)
    for run, ratio in zip(runs, ratios, strict=True):
        if {"hbm", "prefetch"} & set(missed):
            title = "Why" if run is entry else "Without DistributedDataParallel"
            lines += ["", f"{title}: {_why_missed(run, ratio)}"]
    return "\n".join(lines)


def _rival(placements: dict[str, Any]) -> str:
    """The name of the fastest variant of UVM caching + prefetch."""
    return max((name for name in placements if name.startswith(PREFETCH.name)), key=lambda name: _rate(placements[name]))


def _ratios(placements: dict[str, Any]) -> dict[str, float]:
    """What the goals are about."""
    fae, hbm, uvm, rival = (placements[name] for name in (FAE.name, HBM.name, UVM.name, _rival(placements)))
    return {"hbm": _rate(fae) / _rate(hbm), "prefetch": _rate(fae) / _rate(rival), "stage": _stage_ms(uvm) / _stage_ms(fae)}


def _why_missed(entry: dict[str, Any], ratios: dict[str, float]) -> str:
    placements = entry["placements"]
    size = entry["workload"]["batch_size"]
    those = {"FAE": placements[FAE.name], "all-HBM": placements[HBM.name], "the rival": placements[_rival(placements)]}
    step = {name: 1000 * size / _rate(placement) for name, placement in those.items()}
    text = "a step takes " + ", ".join(f"{step[name]:.1f} ms ({name})" for name in those)
    kernels = {name: placement.get("profile", {}).get("kernels_ms") for name, placement in those.items()}
    if all(kernels.values()):
        idle = {name: 1 - kernels[name] / step[name] for name in those}
        sums = ", ".join(f"{kernels[name]:.1f} ms ({name})" for name in those)
        text += (
            f", and the profiler sums the GPU's kernels and copies, on all streams, to {sums}. It waits at least {_share(idle['FAE'])} of "
            f"FAE's step and {_share(idle['all-HBM'])} of all-HBM's for the host, which queues a DLRM's kernels through Python and "
            f"TorchRec's pipeline, and {_share(idle['the rival'])} of the rival's. By the GPU's work alone FAE would be at "
            f"{kernels['all-HBM'] / kernels['FAE']:.2f} of all-HBM and {kernels['the rival'] / kernels['FAE']:.2f} of the rival"
        )
    others = _rate(those["all-HBM"]) / _rate(those["the rival"])
    return f"{text}. All tables in HBM are at {others:.2f} of the rival, FAE at {ratios['prefetch']:.2f}."


def _share(value: float) -> str:
    return f"{max(value, 0):.0%}"


def _outcomes(found: Sequence[dict[str, Any]]) -> str:
    """Where FAE wins, ties and loses, by samples/s."""
    told: dict[str, list[str]] = {"wins against": [], "ties with": [], "loses against": []}
    for entry in found:
        placements = entry["placements"]
        ours, of = placements, entry["name"]
        if FAE.name not in placements:  # held against all-HBM there, and all-HBM against FAE where both took turns
            same = _named(found, entry["workload"]["name"])
            if same is None or FAE.name not in same["placements"]:
                continue
            ours, of = same["placements"], f"{of}: each against all-HBM of its own run"
        for name, other in placements.items():
            if other["kind"] == "fae" or not other.get("samples_per_s_median") or (ours is not placements and name == HBM.name):
                continue
            ratio = _rate(ours[FAE.name]) / _rate(ours[HBM.name]) / (_rate(other) / _rate(placements[HBM.name]))
            outcome = "ties with" if abs(ratio - 1) <= _TIE else ("wins against" if ratio > 1 else "loses against")
            told[outcome].append(f"{name} ({ratio:.2f}; {of})")
    lines = ["## Where it wins, ties and loses", "", f"By samples/s; a tie is within {_TIE:.0%}."]
    for outcome, those in told.items():
        lines += ["", f"FAE {outcome}{'' if those else ' none of those measured.'}", "", *(f"- {one}" for one in those)]
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
