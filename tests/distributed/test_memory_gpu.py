"""On a GPU: where the bytes lie. Hot rows and their index in the GPU's memory, as many as planned; cold rows in UVM or on the host."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.distributed.fast_memory import fast_memory_bytes
from fae_torchrec.distributed.homes import local_tables
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables
from tests.gpu import CUDA, cuda_rank, requires_gpu

pytestmark = requires_gpu

ROWS, HOT, DIM = 400_000, 20_000, 64


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    with cuda_rank():
        yield


def _sharded(cold_tier: str, **options: Any) -> tuple[Any, RowPlacement, int]:
    """The sharded collection, its placement and the bytes of the GPU's memory that it took."""
    gc.collect()  # models hold themselves in cycles: the one before must not go while this one comes
    before = torch.cuda.memory_allocated()
    table = EmbeddingBagConfig(name="t", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["f"])
    model: nn.Module = nn.ModuleDict({"ebc": EmbeddingBagCollection([table], device=torch.device("meta"))})
    apply_optimizer_in_backward(RowWiseAdagrad, model.parameters(), {"lr": 0.1})
    hot_ids = {"t": np.arange(0, ROWS, ROWS // HOT)}
    placement = RowPlacement(model_tables(model), hot_ids, "by hand", 0, 0.0, 0.0)
    topology = Topology(world_size=1, local_world_size=1, compute_device="cuda")
    planner = FAEShardingPlanner(placement, topology, 16, cold_tier=cold_tier, **options)
    sharders = get_fae_sharders()
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, device=CUDA, plan=plan, sharders=sharders)
    torch.cuda.synchronize()
    return sharded.module["ebc"], placement, torch.cuda.memory_allocated() - before


STATE_BYTES = 4 * ROWS  # FBGEMM keeps the row-wise optimizer state of UVM tables in the GPU's memory


@pytest.mark.parametrize(
    ("cold_tier", "options", "beside"),
    [
        ("uvm", {"cold_cache_bytes": 0}, STATE_BYTES),
        # Cached rows with their bookkeeping, and FBGEMM's map from row to table.
        ("uvm_caching", {"cold_cache_bytes": 4 << 20}, STATE_BYTES + 4 * ROWS + (4 << 20)),
        # Two halves of rows beside the hot ones, and a number for each.
        ("uvm", {"cold_cache_bytes": 4 << 20}, STATE_BYTES + (4 << 20) + 8 * (4 << 20) // (4 * DIM + 4)),
        ("host", {}, 0),
    ],
)
def test_where_the_bytes_lie(cold_tier: str, options: dict[str, Any], beside: int) -> None:
    collection, placement, taken = _sharded(cold_tier, **options)
    planned = sum(fast_memory_bytes(placement, device_type="cuda").values())
    assert planned == HOT * (4 * DIM + 4) + 16 * HOT + 16, "hot rows with their state, and a hash of them"
    # FBGEMM's small tensors and the allocator's rounding add some.
    assert planned + beside <= taken < planned + beside + (512 << 10)
    assert taken < 0.4 * ROWS * 4 * DIM, "the control: far less than the whole table"
    (hot,) = list(collection._hot.tables())
    (cold,) = list(local_tables(collection._cold[0].module._lookups))
    assert (hot.weights.device.type, cold.weights.device.type) == ("cuda", "cpu" if cold_tier == "host" else "cuda")
    is_uvm = torch.ops.fbgemm.is_uvm_tensor
    assert not is_uvm(hot.weights)
    assert cold_tier == "host" or is_uvm(cold.weights)
    assert tuple(cold.weights.shape) == (ROWS, DIM)
