"""Times what a machine's ranks can do: the dense part, rows of tables, the link, collectives, and what a training step takes besides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen

from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.segregate import hot_samples, select_samples
from fae_torchrec.data.synthetic import SyntheticCriteo
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.dlrm import build_dlrm
from fae_torchrec.training.shard import build_optimizer, shard_model

_REPEATS = 7
_TABLE_ROWS = 1_000_000
_BATCH, _TABLES = 2_048, 8
_DIMS = (16, 128)
_LAYERS = (512, 512, 256, 1)
_SMALL, _LARGE = 8, 8 * 2**20  # bytes of a collective


def rank_device(rank: int, device_type: str) -> torch.device:
    """The device of a rank of this machine."""
    return torch.device("cpu") if device_type == "cpu" else torch.device(device_type, rank)


def dense_flops(device: torch.device) -> float:
    """Floating-point operations per second of an MLP's training step."""
    widths = (512, *_LAYERS)
    layers: list[torch.nn.Module] = []
    for before, after in pairwise(widths):
        layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers).to(device)
    samples = torch.randn(_BATCH, widths[0], device=device)
    macs = sum(before * after for before, after in pairwise(widths))
    return 6 * macs * _BATCH / _seconds(lambda: model(samples).sum().backward(), device)


def row_rates(device: torch.device, location: EmbeddingLocation) -> tuple[float, float]:
    """Seconds of a row and bytes/s of rows that are pooled and trained, from tables of two widths with uniform accesses.

    Args:
        device: that trains.
        location: where the rows lie.

    Returns:
        Seconds per row, at least 0, and bytes per second.
    """
    times, rows = [], 0.0
    for dim in _DIMS:
        on_device = ComputeDevice.CPU if device.type == "cpu" else ComputeDevice.CUDA
        kernel = SplitTableBatchedEmbeddingBagsCodegen(
            [(_TABLE_ROWS, dim, location, on_device)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            feature_table_map=[0] * _TABLES,
            device=device,
        )
        ids = torch.randint(_TABLE_ROWS, (_BATCH * _TABLES,), device=device, generator=torch.Generator(device).manual_seed(0))
        offsets = torch.arange(_BATCH * _TABLES + 1, device=device)

        def step(kernel: Any = kernel, ids: torch.Tensor = ids, offsets: torch.Tensor = offsets) -> None:
            kernel(ids, offsets).sum().backward()

        times.append(_seconds(step, device))
        rows = float(ids.numel() + torch.bincount(ids).count_nonzero())
    # As the cost model counts: a read for each lookup, a read and a write with the state for each update, pooled rows and gradients.
    moved = [4 * dim * rows + 4 * (dim + 2) * (rows - _BATCH * _TABLES) + 2 * 4 * dim * _BATCH * _TABLES for dim in _DIMS]
    per_byte = max(times[1] - times[0], 0.05 * times[1]) / (moved[1] - moved[0])
    return max(times[0] - per_byte * moved[0], 0.0) / rows, 1 / per_byte


def collective_rates(rank: int, device_type: str) -> tuple[float, float]:
    """Seconds of a collective and bytes/s that a rank sends; on every rank of the default group at once."""
    device = rank_device(rank, device_type)
    world = dist.get_world_size()
    if world == 1:
        return 0.0, float("inf")

    def exchange(size: int) -> float:
        sent = torch.zeros(-(-size // (4 * world)) * world, device=device)
        received = torch.empty_like(sent)
        return _seconds(lambda: dist.all_to_all_single(received, sent), device)

    small, large = exchange(_SMALL), exchange(_LARGE)
    return small, _LARGE * (world - 1) / world / max(large - small, 1e-9)


def step_rates(rank: int, device_type: str) -> Mapping[str, float]:
    """What a step takes besides its rows and products, of a DLRM on Criteo's tables: by steps of one sample, and of one batch.

    Returns:
        step_s, tier_s and split_id_s as `Hardware` has them.
    """
    device, group = rank_device(rank, device_type), dist.group.WORLD
    assert group is not None
    source = SyntheticCriteo("kaggle", scale=0.002, num_samples=1 << 17)

    def dlrm(where: torch.device) -> Any:
        return build_dlrm(dict(source.cardinalities), 13, 16, [64, 16], [64, 1], Optimizer.ROWWISE_ADAGRAD, 0.05, 0, where)

    profile = Calibrator(model_tables(dlrm(torch.device("meta"))), sample_rate=0.5).run(source.batches(8192))
    placement = RowPlacement.from_hot_set(select_hot_set(profile, profile.tables.total_bytes // 10))
    batch = next(iter(source.batches(8 * _BATCH)))
    is_hot = hot_samples(batch.sparse_features, placement)
    hot, cold = (select_samples(batch, chosen.nonzero().squeeze(1)[:_BATCH]) for chosen in (is_hot, ~is_hot))
    one = select_samples(cold, torch.tensor([0]))
    hot_one = select_samples(hot, torch.tensor([0]))
    trainees = {name: shard_model(dlrm(torch.device("cpu")), rows, _BATCH, device, group) for name, rows in _placements(placement)}

    def seconds(name: str, given: Any, *, promised: bool = False) -> float:
        model = trainees[name]
        optimizer = build_optimizer(model, 0.01)
        moved = given.to(device)
        if promised:
            moved = type(moved)(moved.dense_features, HotKeyedJaggedTensor.promise(moved.sparse_features), moved.labels)

        def step() -> None:
            optimizer.zero_grad()
            model(moved)[0].backward()
            optimizer.step()

        return _seconds(step, device)

    stock_one, cold_one = seconds("stock", one), seconds("fae", one)
    tier_s = max(cold_one - seconds("fae", hot_one, promised=True), 0.1 * stock_one)
    split = seconds("fae", hot, promised=True) - seconds("stock", hot)
    ids = hot.labels.numel() * len(source.cardinalities)
    return {"step_s": max(stock_one - tier_s, 0.1 * stock_one), "tier_s": tier_s, "split_id_s": max(split, 0.0) / ids}


def cache_id_seconds(device: torch.device) -> float:
    """Seconds of FBGEMM's cache per id that it looks up; all rows fit. 0 on a CPU, which has none."""
    if device.type == "cpu":
        return 0.0
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(_TABLE_ROWS, _DIMS[0], EmbeddingLocation.MANAGED_CACHING, ComputeDevice.CUDA)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        cache_load_factor=1.0,
        device=device,
    )
    ids = torch.randint(_TABLE_ROWS, (_BATCH * _TABLES,), device=device, generator=torch.Generator(device).manual_seed(0))
    offsets = torch.arange(ids.numel() + 1, device=device)

    def prefetch() -> None:
        kernel.prefetch(ids, offsets)
        kernel.lxu_cache_locations_list.clear()

    return _seconds(prefetch, device) / ids.numel()


def _placements(placement: RowPlacement) -> list[tuple[str, RowPlacement | None]]:
    return [("stock", None), ("fae", placement)]


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median of some calls, the device's work in it."""
    times = []
    for number in range(_REPEATS + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number > 1:
            times.append(time.perf_counter() - began)
    return statistics.median(times)
