"""Small agreements between ranks: counts gathered and rows broadcast, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

# torch 2.13 renamed it and warns at every call of the old name; torch 2.11 has the old one alone.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Gathers tensors of one size from all ranks into one tensor: (output, input, group=, async_op=)."""


def gather_counts(group: dist.ProcessGroup | None, device: torch.device | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """What a HotColdDataLoader takes as `agree`: an all-gather of a few int64 counts.

    Args:
        group: the ranks that train together, or None outside a process group (then the caller is alone). A CPU (gloo) group keeps
            the agreement off the device's stream.
        device: where the group communicates; default CPU.

    Returns:
        A function int64 [k] -> int64 [world, k]; every rank must call it the same number of times.
    """

    def agree(counts: np.ndarray) -> np.ndarray:
        if group is None or group.size() == 1:
            return counts[None]
        mine = torch.as_tensor(counts, device=device)
        world = torch.empty(group.size() * mine.numel(), dtype=mine.dtype, device=device)
        all_gather_single(world, mine, group=group)
        return world.view(group.size(), -1).cpu().numpy()

    return agree


def sum_of_disjoint(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Adds tensors of which at most one rank holds a non-zero value per element, in place and bit for bit.

    The sum runs over bytes, so that signed zeros, NaNs and every dtype arrive as they left.

    Args:
        tensor: contiguous, the same shape on every rank; zero bytes where this rank has nothing to say.
        group: the ranks; nothing happens with None or a single rank.
    """
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor.view(-1).view(torch.uint8), group=group)
