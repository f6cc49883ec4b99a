"""How long a plan of many tables on many ranks takes, and its peak memory, from a profile of skewed accesses.

    python benchmarks/plan_scale.py

Each measurement is a process of its own: it makes the profile, then plans with `FAEShardingPlanner.from_profile(budget="auto")` on ranks
that are not there. The peak is the process's, imports and profile in it; the time is that of `plan` and of its explanation alone. What
stock's planner takes for the same tables (all of them fused or in UVM, its own search) is asked for with --stock, and ended after a minute.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record_header, write_record
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from fae_torchrec.core.hardware import hardware_preset
from fae_torchrec.core.input_sample import InputSample
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_counts import RowCounts
from fae_torchrec.core.tables import TableSet
from fae_torchrec.distributed.hardware_topology import hardware_topology
from fae_torchrec.distributed.local_ranks import quiet_host
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables

_RESULT = Path(__file__).resolve().parent / "results" / "plan_scale.json"
_STOCK_LIMIT_S = 60
TARGETS = {"seconds": 60.0, "peak_bytes": 2e9}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the measurement and returns what was written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["100x8", "1000x8", "1000x64", "1000x256"], metavar="TABLESxRANKS")
    parser.add_argument("--hardware", default="h100", help="a preset (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1024, help="per rank (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=4096, help="inputs counted, and as many kept to judge (default: %(default)s)")
    parser.add_argument("--max-rows", type=float, default=2e7, help="of the largest table (default: %(default)s)")
    parser.add_argument("--stock", action="store_true", help=f"also stock's planner, for at most {_STOCK_LIMIT_S} s each")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, default=_RESULT)
    parser.add_argument("--one", metavar="TABLESxRANKS", help=argparse.SUPPRESS)
    parser.add_argument("--planner", choices=("fae", "stock"), default="fae", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        measured = measure(args)
        print(json.dumps(measured))
        return measured
    runs = []
    for size in args.sizes:
        for planner in ("fae", "stock") if args.stock else ("fae",):
            runs.append(_in_own_process(args, size, planner))
            print({key: value for key, value in runs[-1].items() if key != "choices"})
    met = all(
        run["seconds"] <= TARGETS["seconds"] and run["peak_bytes"] <= TARGETS["peak_bytes"] for run in runs if run["planner"] == "fae"
    )
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "one", "planner")}
    record = {**record_header("plan_scale", argv), "settings": settings, "targets": TARGETS, "met": met, "runs": runs}
    write_record(args.json, record)
    print(f"targets met: {met}; {args.json}")
    return record


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Plans once in this process."""
    quiet_host()
    tables, ranks = map(int, args.one.split("x"))
    model = new_model(tables, int(args.max_rows))
    specs = model_tables(model)
    topology = hardware_topology(hardware_preset(args.hardware), ranks)
    result = {"planner": args.planner, "tables": tables, "ranks": ranks, "table_bytes": specs.total_bytes}
    if args.planner == "stock":
        constraints = {name: ParameterConstraints(compute_kernels=["fused", "fused_uvm"]) for name in specs.names}
        stock = EmbeddingShardingPlanner(topology=topology, batch_size=args.batch_size, constraints=constraints, stats=[])
        start = time.perf_counter()
        stock.plan(model, get_default_sharders())
        return {**result, "seconds": time.perf_counter() - start, "peak_bytes": _peak_bytes()}
    profile = new_profile(specs, args.samples, args.seed)
    before = _peak_bytes()
    planner = FAEShardingPlanner.from_profile(profile, topology=topology, batch_size=args.batch_size, stats=[])
    start = time.perf_counter()
    planner.plan(model, get_fae_sharders())
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    explanation = planner.explanation
    return {
        **result,
        "seconds": seconds,
        "explain_seconds": time.perf_counter() - start,
        "peak_bytes": _peak_bytes(),
        "peak_bytes_before": before,
        "hot_tier": explanation.hot_tier,
        "hot_bytes": explanation.hot_bytes,
        "coverage": explanation.coverage,
        "least_left": explanation.tightest.left,
        "choices": [[choice.what, choice.chosen, choice.because] for choice in explanation.choices],
    }


def new_model(tables: int, max_rows: int) -> nn.Module:
    """One collection on the meta device, from 100 rows to `max_rows`, evenly on a logarithmic axis, and a dense layer."""
    rows = np.geomspace(100, max_rows, tables).astype(int)
    configs = [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=int(n), embedding_dim=64, feature_names=[f"f{i}"]) for i, n in enumerate(rows)
    ]
    model = nn.ModuleDict({"ebc": EmbeddingBagCollection(tables=configs, device=torch.device("meta")), "over": nn.Linear(1024, 1024)})
    apply_optimizer_in_backward(RowWiseAdagrad, model["ebc"].parameters(), {"lr": 0.1})
    return model


def new_profile(tables: TableSet, samples: int, seed: int) -> PopularityProfile:
    """One id per sample and table, small ids the more popular, with a density like 1 / id."""
    rng = np.random.default_rng(seed)
    ones = np.ones(samples, dtype=np.int64)

    def draw() -> InputSample:
        values = {
            table.feature_names[0]: np.minimum(table.rows ** rng.random(samples) - 1, table.rows - 1).astype(np.int64) for table in tables
        }
        return InputSample(values, dict.fromkeys(values, ones), samples)

    counted, fresh = draw(), draw()
    counts = {}
    for table in tables:
        ids, times = np.unique(counted.values[table.feature_names[0]], return_counts=True)
        counts[table.name] = RowCounts(table.rows, ids, times)
    return PopularityProfile(tables, counts, counted, fresh, samples, 2 * samples, 0.5, seed, "generated")


def _in_own_process(args: argparse.Namespace, size: str, planner: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", size, "--planner", planner, "--hardware", args.hardware, "--seed", str(args.seed)]
    command += ["--batch-size", str(args.batch_size), "--samples", str(args.samples), "--max-rows", str(args.max_rows)]
    try:
        limit = _STOCK_LIMIT_S + 30 if planner == "stock" else None
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=limit)
    except subprocess.TimeoutExpired:
        tables, ranks = map(int, size.split("x"))
        return {"planner": planner, "tables": tables, "ranks": ranks, "ended_after_s": _STOCK_LIMIT_S + 30}
    except subprocess.CalledProcessError as error:
        tables, ranks = map(int, size.split("x"))
        if planner == "fae":
            raise RuntimeError(error.stderr) from error
        return {"planner": planner, "tables": tables, "ranks": ranks, "failed": error.stderr.strip().splitlines()[-1][:200]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
