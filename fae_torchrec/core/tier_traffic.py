"""Bytes that a training step is expected to read from slow memory and to exchange between ranks, under a hot set and a hot tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fae_torchrec.core.access_curve import AccessCurve
from fae_torchrec.core.access_model import AccessModel, HotShare, Independent
from fae_torchrec.core.cost_model import CostModel, HotTier, Job
from fae_torchrec.core.expected_access import TableAccess
from fae_torchrec.core.hardware import hardware_preset
from fae_torchrec.core.tables import TableSet

_ANY = hardware_preset("h100")  # how many bytes are sent is the same on all
_HOT_TIERS: Mapping[str, HotTier] = {"replicated": "replicated", "table_wise": "sharded", "row_wise": "row_wise"}


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
    """Adds up the tables; what is exchanged is the cost model's.

    Args:
        access: expected accesses by table, `expected_access`.
        hot_inputs: share of the samples that are all hot; their batches skip the cold tier.
        batch_size: samples per rank.
        ranks: that train.
        hot_tier: "replicated": the gradients of the hot rows that a global batch touches are exchanged; else hot rows are looked up where
            they lie, by all ranks. With "row_wise" every rank has a part of every bag, so that it sends as many rows as there are ranks.
    """
    hot = cold = ids = rows = 0.0
    for one in access.values():
        distinct_cold = one.cold.distinct(batch_size * ranks)
        hot += 2 * batch_size * (one.ids_per_sample - one.cold_ids_per_sample) * one.table.row_bytes
        cold += 2 * distinct_cold * one.table.row_bytes / ranks
        ids += batch_size * one.cold_ids_per_sample
        rows += distinct_cold
    exchanged = 0.0
    if ranks > 1 and access:
        model, share = _chosen(access, hot_inputs)
        job = Job(model.tables, batch_size, ranks, dense_parameters=0, dense_macs=0)
        exchanged = CostModel(job, model, _ANY).epoch(share, "uvm", split_ahead=True, hot_tier=_HOT_TIERS[hot_tier]).sent_bytes
    return TierTraffic(hot, cold, exchanged, ids, rows)


def _chosen(access: Mapping[str, TableAccess], hot_inputs: float) -> tuple[AccessModel, HotShare]:
    """The tables as the cost model has them, with the hot rows that were chosen."""
    curves, hot = {}, []
    for name, one in access.items():
        parts = (one.hot, one.seen, one.unseen)
        rates, rows = (np.concatenate([getattr(part, key) for part in parts]) for key in ("rates", "rows"))
        is_hot = np.repeat([1.0, 0.0], [len(one.hot.rows), len(one.seen.rows) + len(one.unseen.rows)])
        order = np.argsort(-rates, kind="stable")
        rates, rows, is_hot = rates[order], rows[order], is_hot[order]
        total = float(rates @ rows)
        chance = rates / total if total else np.full_like(rates, 1 / rows.sum())
        curves[name] = AccessCurve(rows, chance, one.ids_per_sample, len(rows))
        hot.append(is_hot)
    model = AccessModel(TableSet(tuple(one.table for one in access.values())), curves, Independent(), "a profile, under a hot set")
    return model, model.chosen(hot, hot_inputs)
