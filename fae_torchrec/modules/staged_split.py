"""StagedSplit: the split, ahead on the host, of a collection whose cold rows are brought beside the hot ones for their batch's step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.modules.bag_split import BagSplit
from fae_torchrec.modules.tier_split import AheadIds, StagedRows


class StagedSplit(BagSplit):
    """Gives cold ids slots of a staging area behind the hot rows of their group's merged table, as if they were hot for one batch.

    Args:
        *args: as BagSplit, on the CPU.
        first_home: by table, its first row among the homes of its group's cold rows.
        capacity: by group, rows of a half of its staging area.
        **kwargs: as BagSplit.
    """

    def __init__(self, *args: Any, first_home: Mapping[str, int], capacity: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first_home = torch.tensor([first_home.get(lookup.table, 0) for lookup in self.lookups])
        self._capacity = list(capacity)
        self._ends = list(accumulate(len(group.lookups) for group in self.groups))

    def ahead(self, features: KeyedJaggedTensor, *, promised_hot: bool = False, half: int = 0) -> AheadIds:
        """Splits one batch.

        Args:
            features: as `BagSplit.ahead`.
            promised_hot: as there.
            half: of the staging area, 0 or 1; not that of the batch with cold ids before.

        Returns:
            With `staged`; as `BagSplit.ahead` gives it if the batch is hot, or its cold rows are more than a half holds.
        """
        if promised_hot:
            return super().ahead(features, promised_hot=True)
        found = self._found(features)
        cold = (found.slots < 0).nonzero().squeeze(1)
        ends = found.offsets[:: max(found.samples, 1)][1:].contiguous()  # of the lookups, among the ids
        lookup = torch.searchsorted(ends, cold, right=True)
        home = found.values.index_select(0, cold) + self._first_home.index_select(0, lookup)
        cuts = torch.searchsorted(lookup, torch.tensor([0, *self._ends])).tolist()
        rows = []
        for group, first, capacity, start, stop in zip(self.groups, self.first_slots, self._capacity, cuts, cuts[1:], strict=False):
            distinct, place = torch.unique(home[start:stop], return_inverse=True)
            if distinct.numel() > capacity:
                return super().ahead(features)
            found.slots[cold[start:stop]] = place + (first + group.num_slots + half * capacity)
            rows.append(distinct)
        ids = self._arranged(found, None, None, torch.zeros(1, dtype=torch.int64))
        return self._sent(ids, found.samples, StagedRows(rows, half))
