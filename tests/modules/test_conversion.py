"""Stock tensors <-> hot and cold tensors."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.modules.conversion import hot_rows_of, merge_into_stock


def test_by_hand() -> None:
    stock = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    ids = torch.tensor([1, 3])
    hot = hot_rows_of(stock, ids)
    assert hot.tolist() == [[1], [3]]
    hot += 10
    assert stock.tolist() == [[0], [1], [2], [3]], "a copy"
    merged = merge_into_stock(stock, hot, ids)
    assert merged.tolist() == [[0], [11], [2], [13]]
    assert stock.tolist() == [[0], [1], [2], [3]], "a new tensor"


@given(st.sets(st.integers(0, 19)), st.booleans())
def test_there_and_back_is_bitwise(ids: set[int], rowwise: bool) -> None:
    """Also one value per row (row-wise optimizer state), NaN and signed zeros."""
    stock = torch.randn(20) if rowwise else torch.randn(20, 3)
    stock[0], stock[1] = torch.nan, -0.0
    hot_ids = torch.tensor(sorted(ids), dtype=torch.int64)
    hot = hot_rows_of(stock, hot_ids)
    stale = stock.clone()
    stale[hot_ids] = 7.0
    assert torch.equal(merge_into_stock(stale, hot, hot_ids).view(torch.int32), stock.view(torch.int32))
