"""Distinct slots and positions: the table and the sort give what a set gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.distributed import distinct_slots as module
from fae_torchrec.distributed.distinct_slots import distinct_slots, positions_among


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=30), st.lists(st.integers(0, 40), max_size=30), st.sampled_from([0, 10**6]))
def test_both_ways_are_those_of_a_set(mine: list[int], others: list[int], slots_per_id: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLOTS_PER_ID", slots_per_id)  # 0 always sorts; the other takes the table unless there is no id
        slots, everyone = torch.tensor(mine, dtype=torch.int64), torch.tensor(mine + others, dtype=torch.int64)
        distinct = distinct_slots(everyone, 41)
        positions = positions_among(distinct, slots, 41)
    assert distinct.dtype == positions.dtype == torch.int64
    assert distinct.tolist() == sorted(set(mine + others))
    assert [distinct[p].item() for p in positions] == mine
