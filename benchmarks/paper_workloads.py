"""Trains the paper's eight workloads with stock TorchRec and with FAE on two ranks, and sets their test scores side by side.

    python benchmarks/paper_workloads.py                      all eight; about half an hour on 2 cores
    python benchmarks/paper_workloads.py --only rmc1 kaggle   some; what the JSON has of the others stays in it
    python benchmarks/paper_workloads.py --print              the table of what was measured, nothing is trained

Each is one `fae compare` of its config in examples/configs, with the samples generated to the shape of the paper's data set (synthetic: no
figure here is of the paper's own data), and keeps the command that made it; the JSON's head is the last call's. The four data shapes
(Taobao, Criteo Kaggle, Criteo Terabyte, Avazu) are trained from three start weights, stock and FAE from the same each time; the four SYN
models, which share Criteo Kaggle's shape, from one.

FAE holds on a shape if its mean test AUC and its mean test log loss are within 0.002 of stock's. Beside each mean stands the least and the
most of the seeds. Samples/s are not the point here: other programs may have shared the cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import record_header, write_record

TOLERANCE = 0.002
_ROOT = Path(__file__).resolve().parent.parent
_FIGURES = ("test_auc", "test_logloss", "test_accuracy", "bytes_crossed_per_sample", "cold_rows_per_sample", "cold_bytes_per_sample")
_PLAIN = ("placement", "ranks", "steps", "samples", "hot_inputs", "hot_batches", "hot_lookups", "fast_memory_bytes", "cold_memory_bytes")

_SAMPLES = ("data.synthetic.train_samples=524288", "data.synthetic.test_samples=131072", "profile.sample_rate=0.25")
_TAOBAO = (
    *("data.synthetic.scale=0.1", "data.synthetic.train_samples=1048576", "data.synthetic.test_samples=131072"),
    "profile.sample_rate=1.0",  # its budget holds most rows, and a row that was not seen cannot be hot
)
_SEEDS = ("compare.repeats=3", "compare.vary_seed=true")
_SHAPE = (*_SAMPLES, *_SEEDS)
_FEW = ("data.synthetic.train_samples=131072", "data.synthetic.test_samples=65536", "profile.sample_rate=0.5")
WORKLOADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rmc1": ("RMC1: TBSM, Taobao's shape", (*_TAOBAO, *_SEEDS)),
    "kaggle": ("RMC2: DLRM, Criteo Kaggle's shape", _SHAPE),
    # Its batches are twice as large: as many steps.
    "terabyte": ("RMC3: DLRM, Criteo Terabyte's shape", (*_SHAPE, "data.synthetic.train_samples=1048576")),
    "avazu_synthetic": ("RMC4: DLRM, Avazu's shape", (*_SHAPE, "data.synthetic.scale=0.1", "profile.sample_rate=0.5")),
    "syn_m1": ("SYN-M1: DLRM, Criteo Kaggle's shape", _FEW),
    "syn_m2": ("SYN-M2: DLRM, Criteo Kaggle's shape", _FEW),
    "syn_m3": ("SYN-M3: DLRM, Criteo Kaggle's shape", _FEW),
    "syn_m4": ("SYN-M4: DLRM, Criteo Kaggle's shape", _FEW),
}
"""Config -> title, and what is overridden for a machine of 2 cores: a small share of the samples, all else is the config's own."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the comparisons and returns what was written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="(default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of every config")
    parser.add_argument("--json", type=Path, default=_ROOT / "benchmarks/results/paper_workloads.json", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="keep the reports of `fae compare` in a folder each under this one")
    parser.add_argument("--print", action="store_true", help="only print the table of the JSON")
    args = parser.parse_args(argv)
    record = json.loads(args.json.read_text()) if args.json.exists() else {"workloads": {}}
    if not args.print:
        for name in args.only:
            record["workloads"][name] = measure(name, args.set, args.output)
            ordered = {each: record["workloads"][each] for each in WORKLOADS if each in record["workloads"]}
            record = {**record_header("paper_workloads", argv), "tolerance": TOLERANCE, "workloads": ordered}
            write_record(args.json, record)
    print(table(record))
    return record


def measure(name: str, overrides: list[str], output: Path | None) -> dict[str, Any]:
    """One workload by `fae compare` in a process of its own, and what its report says.

    Raises:
        subprocess.CalledProcessError: it did not end with code 0.
    """
    title, options = WORKLOADS[name]
    with tempfile.TemporaryDirectory(prefix="paper_") as folder:
        where = folder if output is None else str(output / name)
        given = [*options, "compare.placements=[stock, fae]", "compare.ranks=[2]", *overrides]
        shown = ["--config", f"examples/configs/{name}.yaml", *(part for item in given for part in ("--set", item))]
        command = [sys.executable, "-m", "fae_torchrec.cli", "compare", *shown, "--output", where]
        print(f"{title}: {shlex.join(['fae', 'compare', *shown])}", file=sys.stderr)
        subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.DEVNULL)
        report = json.loads(Path(where, "report.json").read_text())
    return summary(title, shlex.join(["fae", "compare", *shown]), report)


def summary(title: str, command: str, report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report.

    Args:
        title: of the workload.
        command: that made the report.
        report: of `fae compare`, with the placements "stock" and "fae" on one number of ranks.

    Returns:
        "title", "command", "created", "data", "budget_bytes", "budget_share", "runs" (by placement), and "less_stock": by score "mean",
        "low" and "high" over the seeds and whether it "holds".
    """
    runs = {run["placement"]: run for run in report["runs"]}
    kept = {
        name: {
            **{key: run[key] for key in _PLAIN if key in run},
            **{key: run.get(key) for key in (*_FIGURES, "less_baseline")},
            "each": run["each"],
        }
        for name, run in runs.items()
    }
    less = {}
    for score in ("test_auc", "test_logloss"):
        pairs = zip(runs["fae"]["each"], runs["stock"]["each"], strict=True)
        differences = [ours[score] - theirs[score] for ours, theirs in pairs]
        mean = sum(differences) / len(differences)
        less[score] = {"mean": mean, "low": min(differences), "high": max(differences), "holds": abs(mean) <= TOLERANCE}
    placement, data = report["placement"], report["data"]
    return {
        "title": title,
        "command": command,
        "created": report["created"],
        "data": data,
        "seeds": len(runs["fae"]["each"]),
        "budget_bytes": placement["budget_bytes"],
        "budget_share": placement["budget_bytes"] / data["bytes"],
        "hot_share": placement["used_bytes"] / data["bytes"],
        "runs": kept,
        "less_stock": less,
    }


def table(record: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    head = ("workload", "rows", "train samples", "seeds", "hot bytes %", "hot batches %", "AUC, stock", "AUC, FAE", "less stock")
    head = (*head, "log loss, stock", "log loss, FAE", "less stock", "bytes between ranks, FAE / stock", "cold rows, FAE / stock")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in record["workloads"].values():
        stock, fae = one["runs"]["stock"], one["runs"]["fae"]
        cells = [one["title"], f"{one['data']['rows']:,}", f"{one['data']['train_samples']:,}", str(one["seeds"])]
        cells += [f"{100 * one['hot_share']:.1f}", f"{100 * fae['hot_batches']:.1f}"]
        for score in ("test_auc", "test_logloss"):
            cells += [_spread([each[score] for each in run["each"]], "{:.4f}") for run in (stock, fae)]
            less = one["less_stock"][score]
            cells.append(_spread([less["low"], less["high"]], "{:+.4f}", less["mean"]))
        cells += [f"{fae[key] / stock[key]:.3f}" for key in ("bytes_crossed_per_sample", "cold_rows_per_sample")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float], write: str, mean: float | None = None) -> str:
    """The mean with the least and the most, "0.7412 (0.7401-0.7423)"; the mean alone of one."""
    text = write.format(sum(values) / len(values) if mean is None else mean)
    return text if max(values) == min(values) else f"{text} ({write.format(min(values))} to {write.format(max(values))})"


if __name__ == "__main__":
    main()
