"""Bytes of a step by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fae_torchrec.core.expected_access import AccessRates, TableAccess
from fae_torchrec.core.tables import Optimizer, TableSpec
from fae_torchrec.core.tier_traffic import tier_traffic

NONE = AccessRates(np.zeros(0), np.zeros(0))
ALWAYS = AccessRates(np.array([50.0]), np.array([1.0]))  # a row that every batch has


def _split() -> TableAccess:
    """2 ids a sample of one feature, half of them hot; rows of 4 weights (16 bytes) and no optimizer state."""
    table = TableSpec("t", 10, 4, ("f",), optimizer=Optimizer.SGD)
    return TableAccess(table, 1, (2.0,), (1.0,), ALWAYS, ALWAYS, NONE)


def test_one_rank_exchanges_nothing() -> None:
    traffic = tier_traffic({"t": _split()}, 0.25, 8, 1, "replicated")
    assert traffic.hot_bytes == 2 * 8 * 1 * 16
    assert traffic.cold_bytes == pytest.approx(2 * 1 * 16), "one distinct row, read and written"
    assert (traffic.exchanged_bytes, traffic.cold_ids) == (0, 8)
    assert traffic.cold_rows == pytest.approx(1)


def test_two_ranks() -> None:
    replicated = tier_traffic({"t": _split()}, 0.25, 8, 2, "replicated")
    # Cold batches are 3/4 of all: pooled rows and gradients of 16 bytes and a length (4), half of them for the other rank; an id of 8.
    cold = 0.75 * (2 * 8 * (16 + 2) / 2) + 8 * 1 * 8 / 2
    # The hot row's gradient: gathered, one row of 16 bytes and 8 of packing.
    assert replicated.exchanged_bytes == pytest.approx(cold + 24)
    sharded = tier_traffic({"t": _split()}, 0.25, 8, 2, "table_wise")
    assert sharded.exchanged_bytes == pytest.approx(cold + 2 * 8 * 18 / 2 + 8 * 1 * 8 / 2)
    whole = tier_traffic({"t": _split().all_hot()}, 0.25, 8, 2, "replicated")
    assert whole.exchanged_bytes == pytest.approx(2 * 24), "an all-hot table has no part in the cold exchange"
    assert whole.cold_bytes == 0


def test_seconds() -> None:
    traffic = tier_traffic({"t": _split()}, 0.25, 8, 1, "replicated")
    assert traffic.seconds(fast=256, slow=16, network=1) == pytest.approx(1 + 2)
