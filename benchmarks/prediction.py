"""Holds the cost model of `fae plan --what-if` against measured steps on this machine's CPU: step times and bytes between ranks.

    python benchmarks/prediction.py
    python benchmarks/prediction.py --quick      # some seconds, to see that it runs; its figures mean nothing

Configurations: budget x embedding dimension x batch size x ranks. Of each, steps of stock (table-wise; samples as they come), of FAE on hot
batches and of FAE on cold ones are measured in turns, and predicted from `fae measure`'s rates of this machine and a profile of other
samples: nothing is fitted. `epoch` is the mean of hot and cold steps by the measured, or the predicted, share of hot inputs.

time       Spearman's correlation of predicted and measured step times, over the epochs of all configurations and over all steps; and the
           ratio of both. `calibrated`: the same for every second configuration, after the others were fed back (`core.calibration`).
bytes      What the collectives send, forward, backward and dense gradients in it, as PyTorch sees them: the mean over the ranks.

About six minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from criteo_workload import Trainee, add_workload_arguments, batches_by_kind, criteo_source
from record import record_header, write_record
from scipy.stats import spearmanr
from tqdm import tqdm

from fae_torchrec.core.access_model import AccessModel
from fae_torchrec.core.calibration import Point, calibrated
from fae_torchrec.core.cost_model import CostModel, Job, Work, step_seconds
from fae_torchrec.core.hardware import Hardware
from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.distributed.local_ranks import quiet_host, run_on_local_ranks
from fae_torchrec.measure import measure
from fae_torchrec.training.traffic import CollectiveCounter

_ROOT = Path(__file__).resolve().parent.parent
_STEPS = ("stock", "hot", "cold")
_QUICK = {
    **{"scale": 0.01, "dense_arch": [32], "over_arch": [32], "profile_samples": 100_000, "batches": 2, "repeats": 2},
    **{"budgets": [0.2], "dims": [8], "batch_sizes": [64, 128], "json": _ROOT / "runs/prediction_quick.json"},
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, predicts, and returns what was written as JSON."""
    args = _arguments(argv)
    quiet_host()
    began = time.perf_counter()
    profile = _profile(args)
    machines, found = {}, []
    for ranks in args.ranks:
        machines[ranks] = Hardware.from_json(measure("cpu", ranks, [])["hardware"])
        placements = {(dim, share): _placement(args, profile, dim, share) for dim, share in product(args.dims, args.budgets)}
        for (dim, share), placement in tqdm(placements.items(), desc=f"{ranks} ranks", unit=" placements"):
            # In processes of their own: sharded models stay in memory, and the next ones would not fit beside them.
            measured = run_on_local_ranks(_measure, ranks, args, dim, placement, timeout_s=1200)
            for size in args.batch_sizes:
                of_ranks = [rank[size] for rank in measured]
                found.append(_joined(args, profile, machines[ranks], ranks, (dim, share, size), of_ranks, placement))
    record = {
        **record_header("prediction", argv),
        "seed": args.seed,
        "wall_s": round(time.perf_counter() - began, 1),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "machines": {str(ranks): machine.to_json() for ranks, machine in machines.items()},
        "summary": _summary(found, machines),
        "configurations": [{key: value for key, value in entry.items() if key != "work"} for entry in found],
    }
    write_record(args.json, record)
    for entry in found:
        times = "  ".join(
            f"{step} {1000 * entry['measured_s'][step]:7.1f} / {1000 * entry['predicted_s'][step]:7.1f}" for step in (*_STEPS, "epoch")
        )
        of = f"D={entry['dim']:<3} {entry['share']:>5.1%} B={entry['batch_size']:<5} ranks={entry['ranks']}"
        print(f"{of}: ms measured / predicted  {times}")
    for key, value in record["summary"].items():
        print(f"{key}: {value}")
    print(f"written: {args.json}")
    return record


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2], help="(default: %(default)s)")
    add("--budgets", type=float, nargs="+", default=[0.01, 0.05, 0.2], help="as shares of all tables' bytes (default: %(default)s)")
    add("--dims", type=int, nargs="+", default=[16, 64], help="embedding dimensions (default: %(default)s)")
    add("--batch-sizes", type=int, nargs="+", default=[512, 2048], help="samples per rank (default: %(default)s)")
    add("--repeats", type=int, default=15, help="timed steps of each kind (default: %(default)s)")
    add("--json", type=Path, default=_ROOT / "benchmarks/results/prediction.json", help="(default: %(default)s)")
    add("--quick", action="store_true", help="small sizes; writes runs/prediction_quick.json")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**_QUICK)
    else:
        parser.set_defaults(batches=6)
    return parser.parse_args(argv)


def _tables(args: argparse.Namespace, dim: int) -> TableSet:
    rows = criteo_source(args, "train", 1).cardinalities
    return TableSet(tuple(TableSpec(f"t_{name}", count, dim, (name,)) for name, count in rows.items()))


def _profile(args: argparse.Namespace) -> PopularityProfile:
    source = criteo_source(args, "train", args.profile_samples)
    calibrator = Calibrator(_tables(args, args.dims[0]), sample_rate=0.5, seed=args.seed)
    return calibrator.run(source.batches(65_536), progress=True, total=args.profile_samples)


def _placement(args: argparse.Namespace, profile: PopularityProfile, dim: int, share: float) -> RowPlacement:
    own = profile.for_tables(_tables(args, dim))
    budget = round(share * own.tables.total_bytes)
    return RowPlacement.from_hot_set(select_hot_set(own, budget, policy="threshold", pinned_max_rows=args.pinned_max_rows))


def _measure(rank: int, args: argparse.Namespace, dim: int, placement: RowPlacement) -> dict[int, Any]:
    """Of each batch size, seconds of the steps by kind, and bytes sent; on every rank."""
    group = dist.group.WORLD
    assert group is not None
    rows = dict(criteo_source(args, "train", 1).cardinalities)
    found = {}
    for size in args.batch_sizes:
        own = argparse.Namespace(**{**vars(args), "dim": dim, "batch_size": size})
        trainees = {"stock": Trainee(None, own, rows, group), "fae": Trainee(placement, own, rows, group)}
        found[size] = _timed(rank, own, trainees, batches_by_kind(rank, group.size(), own, placement))
        del trainees
        gc.collect()
    return found


def _timed(rank: int, args: argparse.Namespace, trainees: dict[str, Trainee], batches: dict[str, Any]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {step: [] for step in _STEPS}
    sent: dict[str, list[float]] = {step: [] for step in _STEPS}
    for number in range(args.repeats + args.batches):
        for step in _STEPS:
            kind, trainee = ("mixed", trainees["stock"]) if step == "stock" else (step, trainees["fae"])
            batch = trainee.fresh(batches[kind][number % args.batches], kind)
            if number < args.batches:  # the warm-up, and each batch's bytes
                with CollectiveCounter(rank, dist.get_world_size()) as counter:
                    trainee.step(batch)
                if number or args.batches == 1:  # stock's input dist is made at its first batch, with exchanges of its own
                    sent[step].append(counter.total_bytes)
                continue
            dist.barrier()
            began = time.perf_counter()
            trainee.step(batch)
            seconds[step].append(time.perf_counter() - began)
    return {"seconds": seconds, "sent": sent, "dense": _dense(trainees["stock"])}


def _dense(trainee: Trainee) -> tuple[int, int]:
    """Parameters of the dense part, and of them those that are multiplied."""
    dense = {name: p for name, p in trainee.model.named_parameters() if "embedding_bags" not in name}
    return sum(p.numel() for p in dense.values()), sum(p.numel() for p in dense.values() if p.dim() == 2)


def _joined(
    args: argparse.Namespace,
    profile: PopularityProfile,
    machine: Hardware,
    ranks: int,
    key: tuple[int, float, int],
    of_ranks: list[dict[str, Any]],
    placement: RowPlacement,
) -> dict[str, Any]:
    """One configuration, measured and predicted."""
    dim, share, size = key
    tables = _tables(args, dim)
    parameters, multiplied = of_ranks[0]["dense"]
    features = len(tables) + 1
    job = Job(tables, size, ranks, parameters, multiplied + features * features * dim)
    access = AccessModel.from_profile(profile, tables, args.pinned_max_rows)
    model = CostModel(job, access, machine)
    hot = access.share(placement.budget_bytes, args.pinned_max_rows)
    work = {"stock": model.stock("host"), "hot": _fae(model, hot, "hot"), "cold": _fae(model, hot, "cold")}
    slowest = {step: np.array([rank["seconds"][step] for rank in of_ranks]).max(axis=0).tolist() for step in _STEPS}
    measured = {step: statistics.median(values) for step, values in slowest.items()}
    predicted = {step: step_seconds(done, machine) for step, done in work.items()}
    measured["epoch"] = placement.hot_inputs * measured["hot"] + (1 - placement.hot_inputs) * measured["cold"]
    predicted["epoch"] = step_seconds(work["hot"].mixed(work["cold"], hot.hot_inputs), machine)
    sent = {step: statistics.mean(statistics.mean(rank["sent"][step]) for rank in of_ranks) for step in _STEPS}
    return {
        "dim": dim,
        "share": share,
        "batch_size": size,
        "ranks": ranks,
        "hot_inputs": {"measured": placement.hot_inputs, "predicted": hot.hot_inputs},
        "coverage": {"measured": placement.coverage, "predicted": float(hot.coverage.mean())},
        "measured_s": measured,
        "spread_s": {step: [min(values), max(values)] for step, values in slowest.items()},
        "predicted_s": predicted,
        "sent_bytes": {step: {"measured": sent[step], "predicted": work[step].sent_bytes} for step in _STEPS},
        "work": work,
    }


def _fae(model: CostModel, hot: Any, kind: Any) -> Work:
    return model.fae(hot, kind, "host", split_ahead=False)


def _summary(found: list[dict[str, Any]], machines: dict[int, Hardware]) -> dict[str, Any]:
    epochs = [(entry["predicted_s"]["epoch"], entry["measured_s"]["epoch"]) for entry in found]
    steps = [(entry["predicted_s"][step], entry["measured_s"][step]) for entry in found for step in _STEPS]
    errors = [
        abs(entry["sent_bytes"][step]["predicted"] / entry["sent_bytes"][step]["measured"] - 1)
        for entry in found
        for step in _STEPS
        if entry["ranks"] > 1
    ]
    return {
        "configurations": len(found),
        "rank_correlation_epochs": _correlation(epochs),
        "rank_correlation_steps": _correlation(steps),
        "time_ratio_epochs": _ratios(epochs),
        "time_ratio_steps": _ratios(steps),
        "bytes_error_median": statistics.median(errors) if errors else None,
        "bytes_error_worst": max(errors) if errors else None,
        "calibrated": _calibrated(found, machines),
    }


def _calibrated(found: list[dict[str, Any]], machines: dict[int, Hardware]) -> dict[str, Any]:
    """The steps of every second configuration, after the others were fed back."""
    pairs = []
    for ranks, machine in machines.items():
        own = [entry for entry in found if entry["ranks"] == ranks]
        points = [Point(entry["work"][step], entry["measured_s"][step]) for entry in own[::2] for step in _STEPS]
        better = calibrated(replace(machine), points)
        pairs += [(step_seconds(entry["work"][step], better), entry["measured_s"][step]) for entry in own[1::2] for step in _STEPS]
    return {"steps": len(pairs), "rank_correlation": _correlation(pairs), "time_ratio": _ratios(pairs)}


def _correlation(pairs: list[tuple[float, float]]) -> float | None:
    if len(pairs) < 3:
        return None
    return round(float(spearmanr(*zip(*pairs, strict=True)).statistic), 4)


def _ratios(pairs: list[tuple[float, float]]) -> dict[str, float] | None:
    """Predicted over measured: median, least, most."""
    if not pairs:
        return None
    ratios = [predicted / measured for predicted, measured in pairs]
    return {"median": round(statistics.median(ratios), 3), "least": round(min(ratios), 3), "most": round(max(ratios), 3)}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
