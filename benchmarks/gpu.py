"""On one GPU: hot/cold tables against all-HBM, UVM, UVM caching (with and without prefetch) and host tables, at equal bytes of HBM.

    python benchmarks/gpu.py --dry-run          # the matrix and the bytes of every placement; needs no GPU
    python benchmarks/gpu.py                    # under eight minutes on an H200
    python benchmarks/gpu.py --only "Zipf 1.05, batch 16,384, 1.0%" --trace runs/gpu_trace
    python benchmarks/gpu.py --device cpu --quick    # a try of the script without a GPU; its figures mean nothing

A DLRM with MLPerf's dense part (TF32) over 26 one-hot tables of Criteo's shape, row-wise Adagrad. Every table's accesses follow a Zipf law
(or are uniform), independently of the other tables': the least favourable case for whole hot samples. The hot set is selected from a
profile of other samples. `budget` is what the hot rows and the cached rows together, or the cached rows alone, may take of HBM.

samples/s    Blocks of one epoch through each placement's own pipeline, in turns, by CUDA events; medians. FAE's epoch is the mix of hot and
             cold batches that its loader makes of the same samples, interleaved (`proportional`).
embedding    The same with the tables alone: forward, backward with a fixed gradient and the fused update, nothing dense.
bytes        Static HBM by torch's allocator, peak while training, rows over the link counted from the ids, caches by FBGEMM's counters.

"UVM caching + prefetch" is PrefetchTrainPipelineSparseDist with an LRU cache. What is tuned at the same bytes: which small tables lie whole
in HBM. FAE's cold rows lie in UVM and are staged for their batch; the staging area counts against the budget. The batches of all placements
but "streamed" and "from a store" are made before, in pinned memory; FAE's are split by tier then too. Managed memory never exceeds what
the card has free.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_scenarios import (
    BASE,
    FAE,
    FAE_AHEAD,
    FAE_HOST,
    FAE_STORE,
    FAE_STREAM,
    GIB,
    HBM,
    HOST,
    USUAL,
    Comparison,
    Machine,
    comparisons,
    groups,
    matrix_text,
)
from record import record_header, write_record

_ROOT = Path(__file__).resolve().parent.parent
H200_BYTES = 139 * GIB
_RUN = ("created", "command", "hardware")  # a comparison keeps those of its own run


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Prints the matrix, or measures it and returns what was written as JSON."""
    args = _arguments(argv)
    found = [comparison for comparison in _comparisons(args) if not args.only or any(text in comparison.name for text in args.only)]
    machine = _machine(args)
    if args.dry_run:
        print(matrix_text(found, machine))
        return None
    cut = {comparison.name: groups(comparison, machine) for comparison in found}
    return _measured(args, argv, found, cut, machine)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="print the matrix with the bytes of every placement, and end")
    add("--cross", action="store_true", help="all combinations instead of one thing varied at a time; hours")
    add("--only", nargs="+", default=[], metavar="TEXT", help="only workloads whose name contains one of these")
    add("--placements", nargs="+", default=[], metavar="NAME", help="only these, beside all-HBM")
    add("--table-gb", type=float, default=20.0, help="bytes of all tables, weights and state (default: %(default)s)")
    add("--rounds", type=int, default=3, help="timed blocks of each placement (default: %(default)s)")
    add("--samples", type=int, default=1 << 19, help="of an epoch (default: %(default)s)")
    add("--profile-samples", type=int, default=1 << 22, help="that hot sets are selected from (default: %(default)s)")
    add("--minutes", type=float, default=7.5, help="after which nothing more is begun (default: %(default)s)")
    add("--host-gib", type=float, help="memory of the host (default: what the machine says)")
    add("--seed", type=int, default=0, help="of data and weights (default: %(default)s)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu only tries the script (default: %(default)s)")
    add("--no-ddp", action="store_true", help="leave DistributedDataParallel out, which one rank does not need and most scripts have")
    add("--trace", type=Path, metavar="DIR", help="write a profile of some steps of the placements of the first comparison there")
    add("--resume", action="store_true", help="keep the comparisons that the JSON has of such a machine and measure the others")
    add("--json", type=Path, default=_ROOT / "benchmarks/results/gpu.json", help="(default: %(default)s)")
    add("--quick", action="store_true", help="tiny tables and batches; writes runs/gpu_quick.json")
    if parser.parse_known_args(argv)[0].quick:
        quick = {"table_gb": 0.02, "rounds": 1, "samples": 4096, "profile_samples": 1 << 18, "json": _ROOT / "runs/gpu_quick.json"}
        parser.set_defaults(**quick)
    return parser.parse_args(argv)


def _comparisons(args: argparse.Namespace) -> list[Comparison]:
    base = replace(BASE, table_bytes=args.table_gb * 1e9)
    if args.quick:
        base = replace(base, dim=16, batch_size=256, budget=0.05)
    if args.device == "cpu":
        ours = (replace(placement, cold="host") for placement in (FAE, FAE_AHEAD, FAE_STREAM, FAE_STORE))  # there is no UVM
        return [Comparison(base, (HBM, HOST, FAE_HOST, *ours))]
    found = comparisons(cross=args.cross, base=base)[: 1 if args.quick else None]
    if args.placements:
        kept = (HBM.name, *args.placements)
        found = [replace(c, placements=tuple(p for p in c.placements if p.name in kept)) for c in found]
        found = [comparison for comparison in found if len(comparison.placements) > 1]
    return found


def _machine(args: argparse.Namespace) -> Machine:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if args.host_gib is None else round(args.host_gib * GIB)
    if args.dry_run and not torch.cuda.is_available():
        return Machine(H200_BYTES, max(host, 128 * GIB))  # the machine it is meant for
    card = torch.cuda.mem_get_info()[0] if args.device == "cuda" else host
    return Machine(card, host)


def _measured(
    args: argparse.Namespace, argv: list[str] | None, found: Sequence[Comparison], cut: dict[str, Any], machine: Machine
) -> dict[str, Any]:
    from fbgemm_gpu import __version__ as fbgemm_version
    from gpu_measure import Measurement, Options  # these import fbgemm_gpu, which --dry-run need not wait for
    from gpu_trace import tracer

    from fae_torchrec.distributed.local_ranks import quiet_host

    quiet_host()
    torch.backends.cuda.matmul.allow_tf32 = True
    began = time.monotonic()
    device = torch.device(args.device, 0 if args.device == "cuda" else None)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    options = Options(
        samples=args.samples,
        rounds=args.rounds,
        profile_samples=args.profile_samples,
        seed=args.seed,
        deadline=began + 60 * args.minutes,
        device=device,
        ddp=not args.no_ddp,
        trace=None if args.trace is None else tracer(args.trace, [placement.name for placement in USUAL]),
    )
    measurement = Measurement(
        options, machine, lambda text: print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)
    )
    record = {
        **record_header("gpu", argv),
        "seed": args.seed,
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else "none",
        "machine": vars(machine),
        "tf32": True,
        "ddp": not args.no_ddp,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "skipped": [],
        "comparisons": [],
    }
    record["versions"]["fbgemm_gpu"] = fbgemm_version
    if args.resume:
        record["comparisons"] = _kept(args.json, record)
    have = {entry["name"] for entry in record["comparisons"]}
    try:
        for comparison in found:
            name = comparison.name
            if name in have:
                continue
            if time.monotonic() > options.deadline:
                record["skipped"].append(name)
                continue
            entry = measurement.run(comparison, cut[name])
            record["comparisons"].append({**entry, "run": {key: record[key] for key in _RUN}})
            measurement.options = replace(options, trace=None)
            record["wall_s"] = round(time.monotonic() - began, 1)
            write_record(args.json, record)  # after each: a run that is cut off keeps what it has
    finally:
        dist.destroy_process_group()
    print(json.dumps({entry["name"]: _medians(entry) for entry in record["comparisons"]}, indent=1))
    print(f"written: {args.json}")
    return record


def _kept(path: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons of an earlier run on such a machine."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    unlike = [key for key in ("schema", "gpu", "versions", "seed", "ddp") if before[key] != record[key]]
    if unlike:
        told = "; ".join(f"{key}: {before[key]} there, {record[key]} here" for key in unlike)
        raise SystemExit(f"--resume: {path} was measured otherwise ({told}); give another --json, or leave --resume out")
    kept: list[dict[str, Any]] = before["comparisons"]
    return kept


def _medians(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [round(values[f"{stage}_median"] or 0) for stage in ("samples_per_s", "embedding_samples_per_s")]
        for name, values in entry["placements"].items()
    }


if __name__ == "__main__":
    main()
