"""TierJoin and join_groups against expected values by hand."""

from __future__ import annotations

import torch

from fae_torchrec.core.tables import TableKind
from fae_torchrec.modules.lookups import HotGroup, Lookup
from fae_torchrec.modules.pooling import TierJoin, join_groups

CPU = torch.device("cpu")


def _lookup(name: str, dim: int, kind: TableKind, *, mean: bool = False) -> Lookup:
    return Lookup(table=name, feature=name, name=name, key=f"{name}@{name}", dim=dim, mean=mean, kind=kind)


LOOKUPS = [_lookup("h", 2, TableKind.HOT), _lookup("s", 4, TableKind.SPLIT), _lookup("c", 2, TableKind.COLD)]


def _join(*, mean: bool = False) -> TierJoin:
    lookups = [LOOKUPS[0], _lookup("s", 4, TableKind.SPLIT, mean=mean), LOOKUPS[2]]
    # The cold tier gives its columns in another order than its lookups are in.
    return TierJoin(lookups, ["c@c", "s@s"], ["s@s", "c@c"], CPU)


HOT = torch.tensor([[1.0, 1, 2, 2, 3, 3, 0, 0], [4.0, 4, 5, 5, 6, 6, 0, 0]])  # h, s, c
COLD = torch.tensor([[10.0, 10, 20, 20, 30, 30], [40.0, 40, 50, 50, 60, 60]])  # c, s
AT = torch.tensor([[1, 0], [0, 1]])  # the samples of the packed bags of s, of c


def test_packed_bags_are_added_to_their_samples() -> None:
    hot = HOT.clone()
    joined = _join()(hot, COLD, _join().units(AT), None)
    assert joined.tolist() == [[1, 1, 52, 52, 63, 63, 10, 10], [4, 4, 25, 25, 36, 36, 40, 40]]
    assert joined.data_ptr() == hot.data_ptr(), "in place"
    keyed = _join().keyed(joined)
    assert keyed.keys() == ["h", "s", "c"]
    assert keyed.length_per_key() == [2, 4, 2]
    assert keyed["s"].tolist() == [[52, 52, 63, 63], [25, 25, 36, 36]]


def test_means_are_divided_once_by_the_length_of_the_whole_bag() -> None:
    joined = _join(mean=True)(HOT.clone(), COLD, _join().units(AT), torch.tensor([[9, 2, 9], [9, 0, 9]]))
    assert joined.tolist() == [[1, 1, 26, 26, 31.5, 31.5, 10, 10], [4, 4, 25, 25, 36, 36, 40, 40]], "an empty bag is divided by one"


def test_a_hot_batch_is_the_hot_tiers_output() -> None:
    hot = HOT.clone()
    assert _join()(hot, None, None, None).data_ptr() == hot.data_ptr(), "nothing copied"


def test_gradients_reach_both_tiers() -> None:
    hot, cold = HOT.clone().requires_grad_(), COLD.clone().requires_grad_()
    weights = torch.arange(16.0).view(2, 8)
    (_join()(hot * 1, cold, _join().units(AT), None) * weights).sum().backward()
    assert hot.grad is not None and torch.equal(hot.grad, weights)
    assert cold.grad is not None
    assert cold.grad.tolist() == [[6, 7, 10, 11, 12, 13], [14, 15, 2, 3, 4, 5]]


def test_groups_lie_side_by_side() -> None:
    groups = [HotGroup(2, (("h", 3),), (LOOKUPS[0],)), HotGroup(1, (("t", 2),), (_lookup("t", 1, TableKind.HOT),) * 2)]
    parts = [torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0], [6], [7], [8]])]
    assert join_groups(parts, groups).tolist() == [[1, 2, 5, 6], [3, 4, 7, 8]]
    assert join_groups(parts[:1], groups[:1]) is parts[0]
