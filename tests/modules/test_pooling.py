"""combine_tiers and block_permutation against expected values by hand."""

from __future__ import annotations

import torch
from torchrec.modules.embedding_configs import PoolingType

from fae_torchrec.core.tables import TableKind
from fae_torchrec.modules.pooling import block_permutation, combine_tiers
from fae_torchrec.modules.tier_split import Lookup


def _lookup(name: str, dim: int, kind: TableKind) -> Lookup:
    return Lookup(table=name, feature=name, name=name, key=f"{name}@{name}", dim=dim, pooling=PoolingType.SUM, kind=kind)


LOOKUPS = [_lookup("h", 1, TableKind.HOT), _lookup("s", 2, TableKind.SPLIT), _lookup("c", 1, TableKind.COLD)]
HOT = torch.tensor([[1.0, 2.0, 3.0]])  # h, s
COLD = torch.tensor([[10.0, 20.0, 30.0]])  # s, c


def test_tiers_add_where_they_overlap() -> None:
    pooled = combine_tiers(LOOKUPS, HOT, COLD, None)
    assert pooled.keys() == ["h", "s", "c"]
    assert pooled.length_per_key() == [1, 2, 1]
    assert pooled.values().tolist() == [[1, 12, 23, 30]]


def test_means_are_divided_once() -> None:
    pooled = combine_tiers(LOOKUPS, HOT, COLD, torch.tensor([[1.0, 2.0, 2.0, 5.0]]))
    assert pooled.values().tolist() == [[1, 6, 11.5, 6]]


def test_a_hot_batch_has_zeros_under_cold_lookups() -> None:
    assert combine_tiers(LOOKUPS, HOT, None, None).values().tolist() == [[1, 2, 3, 0]]
    assert combine_tiers(LOOKUPS[:2], HOT, None, None).values() is HOT, "nothing to pad, nothing copied"


def test_one_tier_alone() -> None:
    assert combine_tiers(LOOKUPS[1:], None, COLD, None).values() is COLD
    hot_and_cold = [LOOKUPS[0], LOOKUPS[2]]
    assert combine_tiers(hot_and_cold, HOT[:, :1], COLD[:, 2:], None).values().tolist() == [[1, 30]]


def test_gradients_reach_both_tiers() -> None:
    hot, cold = HOT.clone().requires_grad_(), COLD.clone().requires_grad_()
    (combine_tiers(LOOKUPS, hot, cold, None).values() * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert hot.grad is not None and hot.grad.tolist() == [[1, 2, 3]]
    assert cold.grad is not None and cold.grad.tolist() == [[2, 3, 4]]


def test_block_permutation() -> None:
    dims = {"x": 1, "y": 2, "z": 1}
    permute = block_permutation(["z", "x", "y"], ["x", "y", "z"], dims, torch.device("cpu"))
    assert permute is not None
    assert permute(torch.tensor([[9.0, 1.0, 2.0, 3.0]])).tolist() == [[1, 2, 3, 9]]
    assert block_permutation(["x", "y"], ["x", "y"], dims, torch.device("cpu")) is None
