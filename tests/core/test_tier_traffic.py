"""Bytes of a step by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fae_torchrec.core.expected_access import AccessRates, TableAccess
from fae_torchrec.core.tables import Optimizer, TableSpec
from fae_torchrec.core.tier_traffic import tier_traffic

NONE = AccessRates(np.zeros(0), np.zeros(0))
ONCE = AccessRates(np.array([1.0]), np.array([1.0]))  # a row that a sample has once in the mean, and next to every batch


def _split() -> TableAccess:
    """2 ids a sample of one feature, half of them hot; rows of 4 weights (16 bytes) and no optimizer state."""
    table = TableSpec("t", 10, 4, ("f",), optimizer=Optimizer.SGD)
    return TableAccess(table, 1, (2.0,), (1.0,), ONCE, ONCE, NONE)


def test_one_rank_exchanges_nothing() -> None:
    traffic = tier_traffic({"t": _split()}, 0.25, 8, 1, "replicated")
    assert traffic.hot_bytes == 2 * 8 * 1 * 16
    assert traffic.cold_bytes == pytest.approx(2 * 1 * 16, rel=1e-3), "one distinct row, read and written"
    assert (traffic.exchanged_bytes, traffic.cold_ids) == (0, 8)
    assert traffic.cold_rows == pytest.approx(1, rel=1e-3)


def test_two_ranks() -> None:
    """A quarter of the samples is hot: these have two hot ids; the others 2/3 hot ones and 4/3 cold ones. All batches have both rows."""
    replicated = tier_traffic({"t": _split()}, 0.25, 8, 2, "replicated")
    # Cold bags are packed: those of 8 that have a cold id among two. Half of it goes to the other rank: ids of 8 bytes, lengths of 4,
    # pooled rows and gradients of 16.
    bags = 8 * (1 - (1 - 2 / 3) ** 2)
    cold = (8 * 8 * 4 / 3 + 4 * bags + 2 * 16 * bags) / 2
    # The hot row's gradient is gathered: 16 bytes, its slot (4), and the counts of two groups' numbers (24).
    hot_row = 16 + 4 + 24
    assert replicated.exchanged_bytes == pytest.approx(hot_row + 0.75 * cold, rel=1e-3)
    # Sharded: hot ids, lengths and pooled rows of all bags go where the row lies.
    bags_of = {"table_wise": 8 * (4 + 2 * 16), "row_wise": 8 * (4 + 2 * 2 * 16)}
    for hot_tier, size in bags_of.items():
        hot, hot_of_cold = (size + 8 * 8 * 2) / 2, (size + 8 * 8 * 2 / 3) / 2
        found = tier_traffic({"t": _split()}, 0.25, 8, 2, hot_tier)
        assert found.exchanged_bytes == pytest.approx(0.25 * hot + 0.75 * (hot_of_cold + cold), rel=1e-3)
    whole = tier_traffic({"t": _split().all_hot()}, 0.25, 8, 2, "replicated")
    assert whole.exchanged_bytes == pytest.approx(2 * 20 + 24, rel=1e-3), "an all-hot table has no part in the cold exchange"
    assert whole.cold_bytes == 0


def test_seconds() -> None:
    traffic = tier_traffic({"t": _split()}, 0.25, 8, 1, "replicated")
    assert traffic.seconds(fast=256, slow=16, network=1) == pytest.approx(1 + 2, rel=1e-3)
