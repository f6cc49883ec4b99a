"""Runs a function on ranks of this machine, each in a process of its own, and brings the results back."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]  # private, torch 2.13
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes
from torchrec.distributed.planner.types import PlannerError

from fae_torchrec.core.errors import FAEError

_POLL_S = 1.0


def run_on_local_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, device_type: str = "cpu", timeout_s: float | None = None
) -> list[Any]:
    """Calls `function(rank, *args)` on every rank of a new default process group (gloo on CPU, nccl on CUDA).

    Args:
        function: a module-level function; it and its arguments are pickled, and so are its results.
        world_size: number of ranks; they share this machine's cores.
        *args: passed on.
        device_type: "cpu" or "cuda" (rank r on device r).
        timeout_s: after which the ranks are killed; also the process group's timeout. None waits as long as it takes.

    Returns:
        The results in rank order.

    Raises:
        TimeoutError: the ranks took longer.
        FAEError: a rank was killed from outside.
        Exception: what the first failing rank raised, with that rank's traceback as a note in `__cause__`; the other ranks are killed.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        # GNU OpenMP's idle threads spin 300,000 times, which starves whatever shares the cores, the other ranks first: one busy neighbour
        # made a run up to 20 times slower. At 1,000 it is half as fast then, and as fast as before on a quiet machine.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(  # type: ignore[no-untyped-call]
            _rank_main, (function, world_size, folder, device_type, timeout_s, args), world_size, join=False, start_method="spawn"
        )
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while not context.join(_POLL_S):  # false while any rank still runs; raises as soon as one has failed
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} did not end within {timeout_s} s on {world_size} ranks; the ranks were killed")
        except (ProcessRaisedException, ProcessExitedException) as failure:
            raise _killed(context.processes) or _own_error(folder, failure) from failure
        finally:
            for process in context.processes:
                process.kill()
                process.join()  # it is gone, and writes no more, when the folder is removed
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(world_size)]


def _killed(ranks: list[Any]) -> FAEError | None:
    """Of ranks that have ended, the first that a signal ended which is not how the others are ended then (SIGTERM)."""
    for rank, process in enumerate(ranks):
        if process.exitcode is not None and process.exitcode < 0 and process.exitcode != -signal.SIGTERM:
            name = signal.Signals(-process.exitcode).name
            return FAEError(
                f"rank {rank} was killed by {name}: most often the machine's memory was full; see the kernel's log, and take smaller "
                "batches or buffers, or fewer ranks"
            )
    return None


def _own_error(folder: str, failure: Exception) -> Exception:
    """The exception that a rank raised itself, not the one that its end caused in another rank."""
    errors = sorted(Path(folder).glob("error*"), key=lambda path: path.stat().st_mtime)
    for path in errors:
        try:
            error = pickle.loads(path.read_bytes())
        except Exception:  # an exception that cannot be read back: its text is in `failure`
            continue
        if isinstance(error, Exception):
            return error
    return failure


def _rank_main(
    rank: int, function: Callable[..., Any], world_size: int, folder: str, device_type: str, timeout_s: float | None, args: tuple[Any, ...]
) -> None:
    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # torch asks for SIGINT when the parent ends, which a shell's background jobs ignore
    quiet_host()
    # What torchrun would set; TorchRec asks for the local world size.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timeout
    )
    try:
        result = function(rank, *args)
        Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()  # nobody leaves while another still talks
    except Exception as error:
        if not isinstance(error, (FAEError, PlannerError)):  # those are told in one message by whoever started the ranks
            traceback.print_exc()
        Path(folder, f"error{rank}").write_bytes(pickle.dumps(error))
        raise
    finally:
        dist.destroy_process_group()


def world_size_of_environment() -> int:
    """Number of ranks that torchrun (or another launcher) says there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def launched_group(device_type: str) -> Iterator[dist.ProcessGroup | None]:
    """The default process group of the launcher's ranks, or None where no launcher (torchrun, torchx) started this process.

    Args:
        device_type: "cpu" (gloo) or "cuda" (nccl, and this process takes the device of its local rank).
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield None
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a torchrun that is killed leaves its ranks behind: they would go on beside the next attempt
        _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if device_type == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's agent keeps one store for all its attempts (torch 2.13, pytorch#135712): without a prefix of their own, restarted
        # ranks find the addresses of killed ones there, and fail or hang. With several agents the counts of restarts need not agree.
        agents = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", agents)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    else:
        dist.init_process_group(backend)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def from_first_rank(make: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """What `make` returns on the group's rank 0, on every rank; what it raises there is raised on every rank. Collective.

    Args:
        make: called on rank 0 alone; what it returns or raises is pickled.
        group: the ranks.
    """
    outcome: list[Any] = [None, None]
    if group.rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def merged_on_first_rank(part: Callable[[], Any], merge: Callable[[list[Any]], Any], group: dist.ProcessGroup) -> Any:
    """What `merge` makes of all ranks' parts, on every rank; the first error of any rank is raised on all. Collective.

    Args:
        part: called on every rank; what it returns or raises is pickled and sent to rank 0.
        merge: called on rank 0, from the parts in the order of the ranks to the result.
        group: the ranks.
    """
    mine: list[Any] = [None, None]
    try:
        mine[0] = part()
    except Exception as error:
        mine[1] = error
    outcomes: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(mine, outcomes, dst=dist.get_global_rank(group, 0), group=group)

    def merged() -> Any:
        assert outcomes is not None
        for _, error in outcomes:
            if error is not None:
                raise error
        return merge([result for result, _ in outcomes])

    return from_first_rank(merged, group)


def quiet_host() -> None:
    """Silences what TorchRec and torch say about their own insides at every start; errors stay."""
    logging.getLogger().setLevel(logging.ERROR)  # TorchRec's planner warns on the root logger
    for name in ("torchrec", "torch.fx", "torch.distributed", "torch.multiprocessing", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("torch", "torchrec", "fbgemm_gpu", "torchmetrics"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?$")
