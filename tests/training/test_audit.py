"""The audit: cold accesses against a slow count, hot batches without a cold row, fewer bytes for hot batches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.segregate import hot_samples
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.audit import KindAudit, audit, cold_accesses
from tests.training.small_run import BATCH_SIZE, CPU, Samples, new_loader, new_model, new_placement, sharded

SAMPLES = Samples(649)
TABLES = model_tables(new_model())
PLACEMENT = new_placement(TABLES)
DIM = 32  # wide rows: embeddings are most of what is exchanged


def slow_cold_accesses(kjt: KeyedJaggedTensor, tables: TableSet, placement: RowPlacement | None) -> tuple[int, int]:
    """Id by id."""
    rows = row_bytes = 0
    for table in tables:
        hot = set() if placement is None else set(placement.hot_ids[table.name].tolist())
        for feature in table.feature_names:
            for row in kjt[feature].values().tolist():
                if row not in hot:
                    rows += 1
                    row_bytes += table.dim * 4 + table.optimizer.state_bytes_per_row(table.dim)
    return rows, row_bytes


@pytest.mark.parametrize("placement", [PLACEMENT, None], ids=["fae", "stock"])
def test_cold_accesses(placement: RowPlacement | None) -> None:
    for batch in list(SAMPLES.batches(100)):
        counted = cold_accesses(batch.sparse_features, TABLES, placement)
        assert counted == slow_cold_accesses(batch.sparse_features, TABLES, placement)
        assert counted[0] > 0


def test_cold_accesses_by_hand() -> None:
    """t_b has ids 0..59 hot: 60 and 299 are cold; t_c ids 0..23: 24 is; t_d ids 0..11: 12 is; a row is 4 fp32."""
    kjt = KeyedJaggedTensor(
        keys=["d", "b", "x", "c", "a"],  # in any order, with a feature that no table looks up
        values=torch.tensor([12, 0, 60, 299, 59, 77, 78, 24, 23, 5, 5]),
        lengths=torch.tensor([1, 1, 2, 1, 1, 1, 2, 0, 1, 1]),
    )
    assert cold_accesses(kjt, TABLES, PLACEMENT) == (4, 4 * 16)
    assert cold_accesses(kjt, TABLES, None) == (9, 9 * 16)
    without_b = new_placement(model_tables(new_model(), leave=["t_b"]))
    assert cold_accesses(kjt, TABLES, without_b) == (5, 5 * 16), "every lookup of a table left to stock counts: three of b"


def _audit(rank: int) -> dict[str, Any]:
    group = dist.group.WORLD
    audits: dict[str, Any] = {}
    for name, policy in (("stock", "stock"), ("fae", "fixed"), ("fae-unsegregated", "stock")):
        unsharded = new_model(dim=DIM)
        tables = model_tables(unsharded)
        placement = None if name == "stock" else new_placement(tables)
        model, optimizer = sharded(unsharded, placement)
        loader = new_loader(SAMPLES, new_placement(tables), ShuffleSchedule(policy))
        audits[name] = audit(model, optimizer, loader, tables, placement, CPU, group)
    return audits


@cache
def audited(ranks: int) -> list[dict[str, dict[str, KindAudit]]]:
    return run_on_local_ranks(_audit, ranks, timeout_s=240)


both = pytest.mark.parametrize("ranks", [1, 2])


@both
def test_sums_over_ranks(ranks: int) -> None:
    """Every sample of the source is in exactly one kind; rows, bytes and hot samples are those of a count over the whole source."""
    used = next(iter(SAMPLES.batches(SAMPLES.num_samples // ranks * ranks)))
    tables = model_tables(new_model(dim=DIM))
    for name, kinds in audited(ranks)[0].items():
        assert [rank[name] for rank in audited(ranks)] == [kinds] * ranks, "the same on every rank"
        assert kinds.keys() == ({"hot", "cold"} if name == "fae" else {"mixed"})
        placement = None if name == "stock" else new_placement(tables)
        hot = 0 if placement is None else int(hot_samples(used.sparse_features, placement).sum())
        rows, row_bytes = slow_cold_accesses(used.sparse_features, tables, placement)
        sums = {part: sum(getattr(kind, part) for kind in kinds.values()) for part in ("samples", "hot_samples", "cold_rows", "cold_bytes")}
        assert sums == {"samples": used.labels.numel(), "hot_samples": hot, "cold_rows": rows, "cold_bytes": row_bytes}
        for kind in kinds.values():
            assert min(kind.input_dist_ms, kind.backward_ms, kind.optimizer_ms) > 0
            assert kind.forward_ms >= 0


@both
def test_kinds_of_fae(ranks: int) -> None:
    kinds = audited(ranks)[0]["fae"]
    hot, cold = kinds["hot"], kinds["cold"]
    assert (hot.hot_samples, hot.cold_rows, hot.cold_bytes) == (hot.samples, 0, 0)
    assert cold.hot_samples == 0
    assert cold.cold_rows >= cold.samples, "every cold sample has a cold row"
    for kind in (hot, cold):  # the last batch of each kind is smaller
        assert (kind.steps - 2 * ranks) * BATCH_SIZE < kind.samples < kind.steps * BATCH_SIZE


def test_bytes_that_cross() -> None:
    for rank in audited(1):
        assert all(kind.crossed_bytes == 0 for kinds in rank.values() for kind in kinds.values()), "one rank has nobody to send to"
    audits = audited(2)[0]
    per_sample = {name: {kind: sums.crossed_bytes / sums.samples for kind, sums in kinds.items()} for name, kinds in audits.items()}
    assert 0 < per_sample["fae"]["hot"] < per_sample["fae"]["cold"]
    # What every step reduces however it is placed: the gradients of the dense part, once.
    dense = sum(parameter.numel() * 4 for name, parameter in new_model(dim=DIM).named_parameters() if "embedding_bags" not in name)
    assert all(crossed > dense / BATCH_SIZE for kinds in per_sample.values() for crossed in kinds.values())
