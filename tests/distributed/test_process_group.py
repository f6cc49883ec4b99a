"""Counts gathered and rows summed between ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.process_group import gather_counts, sum_of_disjoint

BITS = {
    torch.float32: torch.tensor([1.5, -0.0, torch.nan, torch.inf, 1e-45, -3.0]),
    torch.float16: torch.tensor([1.5, -0.0, torch.nan, -torch.inf, 6e-8, -3.0], dtype=torch.float16),
    torch.bfloat16: torch.tensor([1.5, -0.0, torch.nan, 2.0, 3.0, -3.0], dtype=torch.bfloat16),
    torch.int64: torch.tensor([2**62 + 1, -1, 0, 5, 6, 7]),
}


def _see(rank: int) -> dict[str, Any]:
    group = dist.group.WORLD
    agree = gather_counts(group)
    seen: dict[str, Any] = {"counts": [agree(np.array([10 * rank, 2**40 + rank, step])) for step in range(2)]}
    for dtype, values in BITS.items():
        mine = torch.zeros(3, 2, dtype=dtype)
        mine.view(-1)[rank::2] = values[rank::2]
        sum_of_disjoint(mine, group)
        seen[str(dtype)] = mine
    return seen


def test_on_two_ranks() -> None:
    for seen in run_on_local_ranks(_see, 2, timeout_s=60):
        for step, counts in enumerate(seen["counts"]):
            assert counts.dtype == np.int64
            assert counts.tolist() == [[0, 2**40, step], [10, 2**40 + 1, step]]
        for dtype, values in BITS.items():
            assert seen[str(dtype)].dtype == dtype
            assert torch.equal(seen[str(dtype)].view(-1).view(torch.uint8), values.view(torch.uint8)), "bit for bit, NaN and -0.0 too"


def test_alone() -> None:
    assert gather_counts(None)(np.array([3, 4])).tolist() == [[3, 4]]
    tensor = torch.tensor([1.0, -0.0])
    sum_of_disjoint(tensor, None)
    assert tensor.tolist() == [1.0, 0.0]
