"""Kinds as the loader counts them, whatever the ids of the leftovers."""

from __future__ import annotations

import pytest
import torch
from torchrec.datasets.utils import Batch

from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.data.batches import is_hot_batch
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.segregate import hot_samples, select_samples
from fae_torchrec.training.batch_kinds import with_kinds
from tests.training.small_run import Samples, new_model, placement_of

PLACEMENT = placement_of(new_model())


def hot_and_cold(hot: int, cold: int) -> Batch:
    """So many samples of each kind, hot first."""
    whole = Samples(400).whole
    mask = hot_samples(whole.sparse_features, PLACEMENT)
    return select_samples(whole, torch.cat([mask.nonzero().view(-1)[:hot], (~mask).nonzero().view(-1)[:cold]]))


def kinds(policy: str, hot: int, cold: int) -> list[str]:
    loader = HotColdDataLoader([hot_and_cold(hot, cold)], PLACEMENT, schedule=ShuffleSchedule(policy), batch_size=8)
    for _ in range(2):  # a second pass counts from zero again
        pairs = list(with_kinds(loader))
    assert [kind == "hot" for kind, _ in pairs] == [is_hot_batch(batch) for _, batch in pairs]
    return [kind for kind, _ in pairs]


@pytest.mark.parametrize(
    ("hot", "cold", "expected"),
    [
        (16, 8, ["cold", "hot", "hot"]),  # nothing left over
        (16, 11, ["cold", "hot", "hot", "mixed"]),  # the leftovers are all cold, and still leftovers
        (19, 8, ["cold", "hot", "hot", "mixed"]),  # all hot
        (3, 2, ["mixed"]),
        (0, 0, []),
    ],
)
def test_kinds(hot: int, cold: int, expected: list[str]) -> None:
    assert kinds("fixed", hot, cold) == expected
    assert kinds("stock", hot, cold) == ["mixed"] * -(-(hot + cold) // 8)
