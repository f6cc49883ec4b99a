"""Ranks as threads of this process, over real gloo: for what exchanges tensors and needs no default process group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def run_on_threads(function: Callable[[dist.ProcessGroup], T], world_size: int) -> list[T | Exception]:
    """Calls `function(group)` on every rank; a few milliseconds, where processes take seconds.

    Returns:
        What each rank returned or raised, in rank order.
    """
    store = dist.HashStore()

    def one(rank: int) -> T | Exception:
        group = dist.ProcessGroup(store, rank, world_size)
        gloo = dist.ProcessGroupGloo(store, rank, world_size, timedelta(seconds=30))
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        try:
            return function(group)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))
