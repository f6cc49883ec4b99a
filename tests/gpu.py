"""What the tests on a GPU share: when they run, a process group of one rank, batches on the device, and what synchronised with the host."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

CUDA = torch.device("cuda", 0)
requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
B = TypeVar("B")


@contextmanager
def cuda_rank() -> Iterator[None]:
    """A process group of one NCCL rank."""
    torch.cuda.set_device(CUDA)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_device(batches: Iterable[B]) -> list[B]:
    """The batches on the GPU."""
    moved: list[Any] = [batch.to(CUDA) for batch in batches]  # type: ignore[attr-defined]
    return moved


@contextmanager
def synchronisations() -> Iterator[list[str]]:
    """Collects, while it lasts, where the host waited for the device: "file:line" of the Python line, once for each time.

    torch's own debug mode: it sees copies to the host and the like, not waits for events and streams that a program asks for.
    """
    found: list[str] = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.extend(f"{item.filename}:{item.lineno}" for item in caught if "synchronizing CUDA operation" in str(item.message))
