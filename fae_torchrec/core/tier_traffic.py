"""Bytes that a training step is expected to read from slow memory and to exchange between ranks, under a hot set and a hot tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fae_torchrec.core.expected_access import TableAccess

_ID_BYTES, _LENGTH_BYTES, _PACKED_ROW_BYTES = 8, 4, 8
_VALUE_BYTES = 4  # pooled rows and gradients are fp32


@dataclass(frozen=True)
class TierTraffic:
    """Expected bytes per rank and training step, forward and backward together, over hot and cold batches as the data have them.

    Attributes:
        hot_bytes: rows read and written in fast memory.
        cold_bytes: rows read and written in slow memory, each distinct row of the ranks' batch once.
        exchanged_bytes: ids, pooled rows and gradients that a rank sends to the others.
        cold_ids: ids of a rank's batch that are cold.
        cold_rows: distinct cold rows of all ranks' batch, over all tables.
    """

    hot_bytes: float
    cold_bytes: float
    exchanged_bytes: float
    cold_ids: float
    cold_rows: float

    def seconds(self, fast: float, slow: float, network: float) -> float:
        """Seconds that the bytes take one after the other.

        Args:
            fast: bytes/s of fast memory.
            slow: bytes/s between a rank and slow memory.
            network: bytes/s that a rank sends.
        """
        return self.hot_bytes / fast + self.cold_bytes / slow + self.exchanged_bytes / network


def tier_traffic(access: Mapping[str, TableAccess], hot_inputs: float, batch_size: int, ranks: int, hot_tier: str) -> TierTraffic:
    """Adds up the tables.

    Args:
        access: expected accesses by table, `expected_access`.
        hot_inputs: share of the samples that are all hot; their batches skip the cold tier.
        batch_size: samples per rank.
        ranks: that train.
        hot_tier: "replicated": the gradients of the hot rows that a global batch touches are exchanged; else hot rows are looked up where
            they lie, by all ranks. With "row_wise" every rank has a part of every bag, so that it sends as many rows as there are ranks.
    """
    others, cold_batches = (ranks - 1) / ranks, 1 - hot_inputs
    hot = cold = exchanged = ids = rows = 0.0
    for one in access.values():
        row_bytes, value_bytes = one.table.row_bytes, one.table.dim * _VALUE_BYTES
        distinct_cold = one.cold.distinct(batch_size * ranks)
        hot += 2 * batch_size * (one.ids_per_sample - one.cold_ids_per_sample) * row_bytes
        cold += 2 * distinct_cold * row_bytes / ranks
        ids += batch_size * one.cold_ids_per_sample
        rows += distinct_cold
        bags = 2 * batch_size * len(one.table.feature_names) * (value_bytes + _LENGTH_BYTES / 2) * others
        if one.hot_rows < one.table.rows:  # an all-hot table has no feature in the cold exchange
            exchanged += cold_batches * bags + batch_size * one.cold_ids_per_sample * _ID_BYTES * others
        if one.hot_rows and hot_tier == "replicated":
            own, union = one.hot.distinct(batch_size), one.hot.distinct(batch_size * ranks)
            exchanged += min((ranks - 1) * own, 2 * others * union) * (value_bytes + _PACKED_ROW_BYTES)
        elif one.hot_rows:
            exchanged += (
                bags * (ranks if hot_tier == "row_wise" else 1)
                + batch_size * (one.ids_per_sample - one.cold_ids_per_sample) * _ID_BYTES * others
            )
    return TierTraffic(hot, cold, exchanged, ids, rows)
