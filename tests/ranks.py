"""Runs a function on real gloo ranks, in processes of their own, and brings its results back to the parent."""

from __future__ import annotations

import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 180.0) -> list[Any]:
    """Calls `function(rank, *args)` on every rank of a gloo group and returns the results in rank order.

    Args:
        function: a module-level function (it is pickled); its result is written with torch.save.
        world_size: number of ranks.
        *args: passed on.
        timeout_s: after which the ranks are killed and the test fails: a hang is a failure, not a wait.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(_rank_main, (function, world_size, port, folder, timeout_s, args), world_size, join=False, start_method="spawn")
        try:
            deadline = time.monotonic() + timeout_s
            while not context.join(1.0):  # false while any rank still runs
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} did not end within {timeout_s} s on {world_size} ranks")
        finally:
            for process in context.processes:
                process.kill()
        results = [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(world_size)]
    for rank, (_, error) in enumerate(results):
        assert error is None, f"rank {rank}:\n{error}"
    return [result for result, _ in results]


def _rank_main(rank: int, function: Callable[..., Any], world_size: int, port: int, folder: str, timeout_s: float, args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    result, error = None, None
    try:
        result = function(rank, *args)
    except Exception:
        error = traceback.format_exc()
    torch.save((result, error), Path(folder, str(rank)))
    if error is None:
        dist.barrier()
    dist.destroy_process_group()
