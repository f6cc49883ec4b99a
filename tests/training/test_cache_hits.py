"""CacheHits without a GPU: FBGEMM's two operators answer as on one, a kernel's cache is made up; nothing is counted without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fae_torchrec.training import cache_hits
from fae_torchrec.training.cache_hits import CacheHits


class MadeUpKernel(nn.Module):
    """Two cached tables of 4 and 6 rows, and one of 5 that is not cached; rows 1 and 7 of the joint range lie in the cache."""

    lxu_cache_weights = torch.zeros(2, 4)
    cache_hash_size_cumsum = torch.tensor([0, 4, -1, 10])
    total_cache_hash_size = 10
    lxu_cache_state = torch.tensor([1, 7])

    def forward(self, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return indices


def linearize(starts: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Id by id; of a table that is not cached: the first number beyond."""
    samples = (offsets.numel() - 1) // (starts.numel() - 1)
    found = []
    for bag in range(offsets.numel() - 1):
        start = int(starts[bag // samples])
        found += [start + int(row) if start >= 0 else int(starts[-1]) for row in indices[offsets[bag] : offsets[bag + 1]]]
    return torch.tensor(found)


def look_up(rows: torch.Tensor, state: torch.Tensor, beyond: int) -> torch.Tensor:
    return torch.tensor([state.tolist().index(row) if row in state.tolist() else -1 for row in rows.tolist()], dtype=torch.int32)


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids 1, 1, 3 of the first table, 3 and 5 of the second, 0 of the third: rows 1, 3, 7 and 9 of the range, of which 1 and 7 hit."""
    fake: Any = type("ops", (), {"linearize_cache_indices": staticmethod(linearize), "lxu_cache_lookup": staticmethod(look_up)})
    monkeypatch.setattr(torch.ops, "fbgemm", fake)
    kernel = MadeUpKernel()
    monkeypatch.setattr(cache_hits, "_kernels", lambda model: iter([kernel]))
    hits = CacheHits(nn.Module())
    indices, offsets = torch.tensor([1, 1, 3, 3, 5, 0]), torch.tensor([0, 2, 3, 4, 5, 6, 6])
    with hits.watching():
        kernel(indices, offsets)
        kernel(indices=indices, offsets=offsets)
    kernel(indices, offsets)
    assert (hits.rows, hits.hits) == (8, 4), "the third call is not watched"


def test_the_operators_are_there() -> None:
    """Names of FBGEMM that this module calls; on a CPU they are declared, not run."""
    for name in ("linearize_cache_indices", "lxu_cache_lookup"):
        assert hasattr(torch.ops.fbgemm, name)
