"""The bytes that the hot tier takes, by hand and against the index itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
from torchrec.distributed.sharding_plan import placement as device_of_rank
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardMetadata

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec
from fae_torchrec.distributed.fast_memory import fast_memory_bytes, left_of
from fae_torchrec.modules.slot_index import new_slot_index

TABLES = TableSet(
    (
        TableSpec("all hot", 10, 8, ("a",), "fp16", Optimizer.ADAM),
        TableSpec("split", 100, 4, ("b",), "fp32", Optimizer.ADAGRAD),
        TableSpec("cold", 1000, 4, ("c",), "fp32", Optimizer.SGD),
    )
)


def placement(tables: TableSet = TABLES, **hot: int) -> RowPlacement:
    hot_ids = {table.name: np.arange(hot.get(table.name.replace(" ", "_"), 0)) for table in tables}
    return RowPlacement(tables=tables, hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


def sharding(*rows: int) -> ParameterSharding:
    starts = np.cumsum([0, *rows]).tolist()
    shards = [
        ShardMetadata(shard_offsets=[starts[rank], 0], shard_sizes=[count, 4], placement=device_of_rank("cpu", rank, 2))
        for rank, count in enumerate(rows)
    ]
    return ParameterSharding("row_wise", "fused", list(range(len(rows))), EnumerableShardingSpec(shards))


def test_replicated_rows() -> None:
    # Adam on 8 fp16 weights: 16 bytes of weights, 64 of state; Adagrad on 4 fp32 weights: 16 and 16. The index: int32 for every row.
    expected = {"hot rows": 10 * (16 + 64) + 30 * (16 + 16), "index": 4 * (10 + 100 + 1000)}
    assert fast_memory_bytes(placement(all_hot=10, split=30)) == expected
    assert expected["hot rows"] == placement(all_hot=10, split=30).hot_bytes
    all_cold_is_stock = fast_memory_bytes(placement(all_hot=10), [[TABLES["all hot"]], [TABLES["split"], TABLES["cold"]]])
    assert all_cold_is_stock == {"hot rows": 800, "index": 40}


def test_the_model_decides_what_a_row_takes() -> None:
    wider = [[TableSpec("all hot", 10, 16, ("a",), "fp32", Optimizer.SGD)]]
    assert fast_memory_bytes(placement(all_hot=10), wider) == {"hot rows": 10 * 64, "index": 40}


def test_sharded_rows() -> None:
    hot = {"all hot": sharding(10, 0), "split": sharding(18, 12)}
    by_rank = [fast_memory_bytes(placement(all_hot=10, split=30), None, hot, rank) for rank in range(2)]
    assert by_rank == [{"hot rows": 10 * 80 + 18 * 32, "index": 4440}, {"hot rows": 12 * 32, "index": 4440}]


def test_the_index_is_the_one_that_is_made() -> None:
    ids = [torch.arange(10), torch.arange(0, 100, 3), torch.arange(0)]
    made = new_slot_index([10, 100, 1000], ids, torch.device("cpu")).index_bytes
    assert fast_memory_bytes(placement(all_hot=10, split=34))["index"] == made
    large = TableSet((TableSpec("split", 100_000_000, 4, ("a",)),))
    assert fast_memory_bytes(placement(large, split=5))["index"] == 12 * 100_000_000 // 64, "a bitmap: a word and a count for 64 rows"


def test_what_is_left_of_a_topology() -> None:
    whole = Topology(world_size=2, local_world_size=2, compute_device="cpu", ddr_cap=1000)
    left = left_of(whole, lambda rank: {"hot rows": 100 * rank, "index": 7})
    assert [device.storage.ddr for device in left.devices] == [993, 893]
    assert [device.storage.ddr for device in whole.devices] == [1000, 1000], "the caller's topology stays as it was"
    on_cuda = left_of(Topology(2, "cuda", hbm_cap=1000, ddr_cap=50), lambda rank: {"hot rows": 1000})
    assert [(device.storage.hbm, device.storage.ddr) for device in on_cuda.devices] == [(0, 50), (0, 50)]
    message = (
        r"hot tier takes 1,001 bytes on rank 1 \(hot rows 994, index 7\), which has 1,000 bytes of ddr; select the hot set under a smaller"
    )
    with pytest.raises(PlannerError, match=message) as error:
        left_of(whole, lambda rank: {"hot rows": 994 * rank, "index": 7})
    assert error.value.error_type is PlannerErrorType.INSUFFICIENT_STORAGE
