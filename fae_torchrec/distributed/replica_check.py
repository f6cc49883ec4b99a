"""Checks that the replicas of the hot rows are bit-identical on all ranks, by checksums of weights and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from fae_torchrec.core.errors import ReplicaError
from fae_torchrec.distributed.homes import LocalTable
from fae_torchrec.distributed.process_group import all_gather_single

_AT_A_TIME = 1 << 24  # elements, which bounds what a check takes beside the tables: 16 bytes each
_BITS: Mapping[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(tables: Iterable[LocalTable], group: dist.ProcessGroup | None) -> None:
    """Compares the ranks' replicas. Collective: all ranks take part; 16 bytes a tensor travel.

    Args:
        tables: this rank's hot rows, the same tables on every rank.
        group: the ranks; nothing is compared with None or a single rank.

    Raises:
        ReplicaError: on every rank alike: names the tensors and the ranks that differ from rank 0.
    """
    if group is None or group.size() == 1:
        return
    named = {f"{table.table}/{name}": tensor for table in tables for name, tensor in table.tensors().items()}
    mine = torch.stack([checksum(tensor) for tensor in named.values()])
    everyone = mine.new_empty(group.size() * mine.numel())
    all_gather_single(everyone, mine.view(-1), group=group)
    same = (everyone.view(group.size(), *mine.shape) == everyone.view(group.size(), *mine.shape)[:1]).all(dim=2)
    if not same.all():
        differing = {name: (~same[:, i]).nonzero().squeeze(1).tolist() for i, name in enumerate(named) if not same[:, i].all()}
        raise ReplicaError(
            f"the replicas of hot rows differ from rank 0's (tensor: ranks): {differing}; the ranks must start from the same weights, take "
            "the same steps, and write to hot rows through the module alone; load a checkpoint to make them alike again"
        )


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Two sums over the bits of a tensor, int64 [2]: of its elements, and of its elements by place, so that exchanged ones are noticed."""
    bits = tensor.contiguous().view(-1).view(_BITS[tensor.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for first in range(0, bits.numel(), _AT_A_TIME):
        part = bits[first : first + _AT_A_TIME].to(torch.int64)
        sums[0] += part.sum()
        sums[1] += part.mul_(torch.arange(first + 1, first + 1 + part.numel(), device=part.device)).sum()
    return sums
