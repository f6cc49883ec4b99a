"""Compares test AUC after reordering with the order of the data, over seeds: stock TorchRec, FAE's schedule, and the least reordering.

    python benchmarks/accuracy.py                 both data sets; about ten minutes on 2 cores
    python benchmarks/accuracy.py --seeds 0 1     fewer seeds
    python benchmarks/accuracy.py --data synthetic --mean-steps --json benchmarks/results/accuracy_mean_steps.json

For each data set the rows are profiled and placed once. Then each seed (of the start weights) is trained for the same number of epochs:

  stock         TorchRec alone, batches in the order of the data
  fae           hot and cold batches, FAE's phases: R(50), adapted to the test loss after each
  proportional  hot and cold batches, spread as finely as can be

A difference is a run's test AUC less stock's of the same seed. The schedule holds if the mean difference is within 0.002, or within its
standard error over the seeds where that is larger. Nothing here is timed.

The loader weighs every sample of an epoch alike, so that the few that are left of a kind at its end make a small step. `--mean-steps` is
the control: there each step is the mean over its samples, however few.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from record import record_header, write_record

from fae_torchrec.config import RunConfig, load_config
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.data.step_plan import StepPlan
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.experiment import run_placement
from fae_torchrec.experiment_data import open_data
from fae_torchrec.experiment_placement import place_rows

TOLERANCE = 0.002
_ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"synthetic": "examples/configs/demo.yaml", "completejourney": "examples/configs/completejourney.yaml"}
ORDERS = {"stock": ("stock", "stock"), "fae": ("fae", "fae"), "proportional": ("fae", "proportional")}
"""name -> (placement, schedule policy)."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the comparison and returns what was written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="(default: both)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the start weights (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--mean-steps", action="store_true", help="the control: a step with few samples weighs as much as a full one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the configs")
    parser.add_argument("--json", type=Path, default=_ROOT / "benchmarks/results/accuracy.json")
    args = parser.parse_args(argv)
    results = [measure(name, args.seeds, args.ranks, args.set, mean_steps=args.mean_steps) for name in args.data]
    record = {
        **record_header("accuracy", argv),
        "ranks": args.ranks,
        "seeds": args.seeds,
        "mean_steps": args.mean_steps,
        "tolerance": TOLERANCE,
        "results": results,
    }
    write_record(args.json, record)
    _print(record, args.json)
    return record


def measure(name: str, seeds: list[int], ranks: int, overrides: list[str], *, mean_steps: bool = False) -> dict[str, Any]:
    """Trains every order with every seed on one data set."""
    with tempfile.TemporaryDirectory(prefix="accuracy_") as folder:
        # A rate's feedback is the test loss of a few batches after each phase, as a user would have it.
        options = [*overrides, f"output={folder}", "compare.count_batches=1"]
        config = load_config(_ROOT / CONFIGS[name], options)
        placement = place_rows(config, open_data(config))
        jobs = []
        for seed in seeds:
            for order, (kind, policy) in ORDERS.items():
                of_job = load_config(_ROOT / CONFIGS[name], [*options, f"train.seed={seed}", f"schedule.policy={policy}"])
                jobs.append((order, kind, of_job))
        runs = run_on_local_ranks(train_all, ranks, jobs, placement, mean_steps)[0]
    orders: dict[str, Any] = {}
    for order in ORDERS:
        mine, stock = ([run for run in runs if run["order"] == each] for each in (order, "stock"))
        differences = [a["test_auc"] - b["test_auc"] for a, b in zip(mine, stock, strict=True)]
        orders[order] = {"test_auc": summary([run["test_auc"] for run in mine]), "difference": summary(differences), "runs": mine}
        allowed = max(TOLERANCE, orders[order]["difference"]["standard_error"])
        orders[order]["holds"] = abs(orders[order]["difference"]["mean"]) <= allowed
    return {"data": name, "epochs": config.train.epochs, "hot_inputs": placement.hot_inputs, "orders": orders}


def train_all(rank: int, jobs: list[tuple[str, str, RunConfig]], placement: RowPlacement, mean_steps: bool) -> list[dict[str, Any]]:
    """Trains one job after the other on this rank."""
    if mean_steps:
        weight = StepPlan.weight
        StepPlan.weight = lambda plan, *step: weight(StepPlan(plan.sizes), *step)  # type: ignore[method-assign]
    kept = ("test_auc", "test_logloss", "steps_by_kind", "samples", "swap_losses")
    runs = []
    for order, kind, config in jobs:
        entry = run_placement(rank, config, kind, placement, False)
        runs.append({"order": order, "seed": config.train.seed, **{key: entry[key] for key in kept}})
    return runs


def summary(values: list[float]) -> dict[str, float]:
    """Mean, spread and standard error of the mean."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    error = spread / math.sqrt(len(values))
    return {
        "mean": statistics.fmean(values),
        "standard_deviation": spread,
        "standard_error": error,
        "min": min(values),
        "max": max(values),
    }


def _print(record: dict[str, Any], path: Path) -> None:
    for result in record["results"]:
        print(f"{result['data']}, {result['epochs']} epoch(s), {len(record['seeds'])} seeds, {record['ranks']} ranks")
        for order, of_order in result["orders"].items():
            auc, difference = of_order["test_auc"], of_order["difference"]
            print(
                f"  {order:<13} test AUC {auc['mean']:.4f} (sd {auc['standard_deviation']:.4f}, {auc['min']:.4f} to {auc['max']:.4f})"
                + (
                    ""
                    if order == "stock"
                    else f"  less stock {difference['mean']:+.4f} (se {difference['standard_error']:.4f})"
                    f"  {'holds' if of_order['holds'] else 'DOES NOT HOLD'}"
                )
            )
    print(path)


if __name__ == "__main__":
    main()
