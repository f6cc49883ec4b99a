"""Compares FAE with stock TorchRec where the ranks are on two machines with a slow network between them: step time and counted bytes.

    sudo python benchmarks/two_hosts.py
    sudo python benchmarks/two_hosts.py --quick                # some seconds, to see that it runs; its figures mean nothing
    sudo python benchmarks/two_hosts.py --mbit 1000 10000 0    # also faster links; 0 is without a limit

Two network namespaces stand for the machines (`ip netns`), a veth pair for the cable, and `tc` (tbf) limits both directions. Each has one
rank, and gloo talks over the cable alone. Both share this machine's cores and memory: only the network is that of two machines. Without
root, `ip` or `tc` nothing is measured, and a message says so.

A DLRM over synthetic Criteo Kaggle tables is trained by `stock` (TorchRec's planner, table-wise) and by `fae` (hot rows replicated), side
by side in the same processes, in blocks of steps that take turns. Samples are of the test split, the hot set is counted on the train split.

step       zero_grad, forward, backward, optimizer step. The same batches for both: `hot` (every id of every sample is hot), `mixed`
           (samples as they come; fae goes through both tiers) and `cold` (every sample has a cold id).
pipelined  the same steps by each one's pipeline, TrainPipelineSparseDist and FAETrainPipeline, which overlap the input dist.
epoch      a pass over the same samples by each one's pipeline, in stock's order by stock, as HotColdDataLoader's hot and cold batches
           (schedule `proportional`) by fae. Batches are made before: loading is not timed.
bytes      What left the hosts through the cable (the interface's tx_bytes), both together: embeddings, and the dense part's gradients,
           which DistributedDataParallel all-reduces, under both. Beside it the payload of all collectives of a step.
dense      Step and bytes of what is the same for both: the all-reduce of the dense part's gradients alone.

if both ways at once   An estimate: the speed if gloo's all-to-all and all-gather used both directions of the link at once, as its
           all-reduce does; gloo lets the ranks send by turns.

A block's time is the slowest rank's. Speed is stock's time over fae's, round by round: above 1, fae is faster. Before the ranks are trained
they measure the link: what it carries of each direction under gloo's collectives, and a round trip. A link that carries more than its limit
is an error.

About five minutes and 7 GB of memory on two cores for one rate. What else runs on the machine takes cores from both; where it cannot be
stopped, `nice -n -15` in front keeps it away. Load and niceness are in the JSON.
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from criteo_workload import QUICK, add_workload_arguments, described, planned
from record import record_header, write_record
from two_hosts_link import INTERFACE, NoLinkError, two_hosts
from two_hosts_rank import work
from two_hosts_summary import judged_targets, record_text, summarised

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.distributed.local_ranks import quiet_host

_ROOT = Path(__file__).resolve().parent.parent
_QUICK = {**QUICK, "rounds": 2, "steps": 2, "epoch_batches": 6, "epochs": 2, "json": _ROOT / "runs/two_hosts_quick.json"}


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison and writes the JSON.

    Returns:
        0, or 2 where no such link can be made (one message on standard error).
    """
    args = _arguments(argv)
    if args.worker:
        work(*args.worker)
        return 0
    quiet_host()
    started = time.perf_counter()
    try:
        with two_hosts(args.mbit[0]):  # before anything takes time
            pass
        tables, placement, rows = planned(args)
        runs = [_run(mbit, args, placement, rows) for mbit in args.mbit]
    except NoLinkError as error:
        print(f"two_hosts.py: {error}", file=sys.stderr)
        return 2
    summary = [summarised(run, args.seed) for run in runs]
    record = {
        **record_header("two_hosts", argv),
        "seed": args.seed,
        "wall_s": round(time.perf_counter() - started, 1),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "worker"},
        "placement": described(tables, placement),
        "targets": judged_targets(summary),
        "summary": summary,
        "runs": runs,
    }
    write_record(args.json, record)
    print(f"{record_text(record)}\nwritten: {args.json}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    add = parser.add_argument
    add("--mbit", type=int, nargs="+", default=[1000], help="rates of the link, 10^6 bits per second each way (default: %(default)s)")
    add("--rounds", type=int, default=12, help="timed rounds, in which each placement takes its turn (default: %(default)s)")
    add("--steps", type=int, default=3, help="steps of a kind in a round (default: %(default)s)")
    add("--epoch-batches", type=int, default=24, help="batches per rank of the data's order that an epoch has (default: %(default)s)")
    add("--epochs", type=int, default=4, help="timed epochs of each placement (default: %(default)s)")
    add("--timeout-s", type=float, default=1800.0, help="after which a run's ranks are killed (default: %(default)s)")
    add("--json", type=Path, default=_ROOT / "benchmarks/results/two_hosts.json")
    add("--quick", action="store_true", help="small sizes instead of the defaults above; writes runs/two_hosts_quick.json")
    add("--worker", nargs=2, help=argparse.SUPPRESS)  # a rank: folder, number
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**_QUICK)
    return parser.parse_args(argv)


def _run(mbit: int, args: argparse.Namespace, placement: RowPlacement, rows: dict[str, int]) -> dict[str, Any]:
    """One rate: a rank on each host; what they measured."""
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, two_hosts(mbit) as link:
        Path(folder, "task").write_bytes(pickle.dumps((args, mbit, placement, rows)))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
            **{"GLOO_SOCKET_IFNAME": INTERFACE, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"},
        }
        ranks = [
            subprocess.Popen(
                link.on(rank, [sys.executable, __file__, "--worker", folder, str(rank)]), env={**environment, "RANK": str(rank)}
            )
            for rank in (0, 1)
        ]
        try:
            deadline = time.monotonic() + args.timeout_s
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the ranks did not end within {args.timeout_s:.0f} s")
                time.sleep(0.2)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(rank.returncode for rank in ranks):
            raise RuntimeError(f"the ranks ended with exit codes {[rank.returncode for rank in ranks]}; their messages are above")
        measured = [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in (0, 1)]
    load = {"load_average_before": before, "load_average_after": os.getloadavg()[0], "niceness": os.nice(0)}
    return {"mbit": mbit, **load, "ranks": measured}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else it would leave the namespaces
    sys.exit(main())
