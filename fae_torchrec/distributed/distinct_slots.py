"""The distinct slots of a batch, and the place of each slot among them: by a table over all slots, or by sorting where it is large."""

from __future__ import annotations

import torch

# A table over all slots beats sorting the batch's up to about this many slots per id: at 26,624 ids on one core, 0.05 ms against 1.2 ms for
# 7,000 slots and 0.3 against 1.4 for 200,000, but 1.8 against 1.3 for 2,000,000.
_SLOTS_PER_ID = 16


def distinct_slots(slots: torch.Tensor, total: int) -> torch.Tensor:
    """Lists the slots that occur.

    Args:
        slots: int64 [n], each in 0..total-1.
        total: slots there are.

    Returns:
        int64 [distinct], strictly ascending.
    """
    if total > _SLOTS_PER_ID * slots.numel():
        distinct: torch.Tensor = slots.unique()  # type: ignore[no-untyped-call]
        return distinct
    occurs = torch.zeros(total, dtype=torch.bool, device=slots.device)
    occurs[slots] = True
    return occurs.nonzero().squeeze(1)


def positions_among(distinct: torch.Tensor, slots: torch.Tensor, total: int) -> torch.Tensor:
    """Finds each slot in a list of distinct ones.

    Args:
        distinct: int64 [distinct], strictly ascending.
        slots: int64 [n], every one of them in `distinct`.
        total: slots there are.

    Returns:
        int64 [n], the index of each slot in `distinct`.
    """
    if total > _SLOTS_PER_ID * slots.numel():
        return torch.searchsorted(distinct, slots)
    positions = torch.empty(total, dtype=torch.int64, device=slots.device)
    positions[distinct] = torch.arange(distinct.numel(), device=slots.device)
    return positions[slots]
