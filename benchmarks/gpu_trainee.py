"""One placement of benchmarks/gpu.py as something that trains: the sharded DLRM, its pipeline, and the clocks around it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from gpu_data import NUM_DENSE
from gpu_scenarios import Machine, Memory, Placement, Workload
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.types import CacheAlgorithm, CacheParams, ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.distributed.homes import whole_table
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.training.dlrm import build_dlrm
from fae_torchrec.training.shard import build_optimizer
from fae_torchrec.training.train_pipeline import FAETrainPipeline

DENSE_ARCH, OVER_ARCH = [512, 256], [1024, 1024, 512, 256, 1]  # MLPerf's DLRM, the last dense layer as wide as the tables
_FUSED = {"hbm": "fused", "uvm": "fused_uvm", "caching": "fused_uvm_caching"}


class Staged(nn.Module):
    """A DLRM with its loss, or its embedding stage alone: the same tables, the same gradient at every step, no dense part.

    Attributes:
        gradient: [samples, columns], of the embedding stage; None trains the whole model.
    """

    def __init__(self, dlrm: nn.Module) -> None:
        super().__init__()
        self.dlrm = dlrm
        self.gradient: torch.Tensor | None = None

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        """The loss and what DLRMTrain gives beside it."""
        if self.gradient is None:
            output: tuple[torch.Tensor, Any] = self.dlrm(batch)
            return output
        pooled = self.dlrm.model.sparse_arch.embedding_bag_collection(batch.sparse_features)
        return _fixed_gradient(pooled.values(), self.gradient), None


class _FixedGradient(torch.autograd.Function):
    """A loss of zero whose gradient is given: nothing is computed between forward and backward of the tables."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.gradient = gradient
        return values.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradient, None


@torch.fx.wrap  # type: ignore[untyped-decorator]
def _fixed_gradient(values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A loss; torchrec's pipelines trace the model, so that its size is not known everywhere."""
    loss: torch.Tensor = _FixedGradient.apply(values, gradient[: values.shape[0]])  # type: ignore[no-untyped-call]
    return loss


class HostBags(nn.Module):
    """Stock tables on the host: looked up by FBGEMM's CPU kernel, the pooled rows copied to the GPU."""

    def __init__(self, workload: Workload, bags: Any, device: torch.device) -> None:
        super().__init__()
        self._device = device
        plan = {f"t_{name}": whole_table(rows, workload.dim, 0, torch.device("cpu")) for name, rows in workload.rows.items()}
        group = dist.new_group(backend="gloo")
        sharder = EmbeddingBagCollectionSharder()
        # Kept out of the registry: nothing here goes to the GPU.
        self.__dict__["sharded"] = sharder.shard(bags, plan, ShardingEnv.from_process_group(group), torch.device("cpu"))
        self.__dict__["sharded"].reset_parameters()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pools ids on the CPU."""
        pooled = self.__dict__["sharded"](features).wait()
        return KeyedTensor(pooled.keys(), pooled.length_per_key(), pooled.values().to(self._device))


class Trainee:
    """One model under one placement.

    Args:
        placement: where its rows lie.
        workload: its tables.
        rows: which are hot, of "fae".
        device: where to train; a CPU for a try without a GPU.
        ddp: whether DistributedDataParallel is around the dense part.

    Attributes:
        device: as given.
        static_bytes: of the GPU's memory, taken by building it.
    """

    def __init__(self, placement: Placement, workload: Workload, rows: RowPlacement | None, device: torch.device, *, ddp: bool) -> None:
        before = allocated(device)
        self.device = device
        self._shape = len(workload.rows) * workload.dim
        dense_arch = [*DENSE_ARCH, workload.dim]
        dlrm = build_dlrm(
            workload.rows, NUM_DENSE, workload.dim, dense_arch, OVER_ARCH, Optimizer.ROWWISE_ADAGRAD, 0.01, 0, torch.device("meta")
        )
        arch: Any = dlrm.model.sparse_arch
        for config in arch.embedding_bag_collection.embedding_bag_configs():
            config.init_fn = _start  # no clock minds what the weights are, and drawing 20 GB on the host takes minutes
        if placement.kind == "host":
            self.bags: Any = HostBags(workload, arch.embedding_bag_collection, device)
            arch.embedding_bag_collection = self.bags
            self.model: Any = Staged(dlrm).to(device)
            self.optimizer: Any = torch.optim.Adagrad(self.model.parameters(), lr=0.01)
        else:
            self.model = _sharded(Staged(dlrm), placement, workload, rows, device, ddp=ddp)
            self.optimizer = build_optimizer(self.model, 0.01)
            self.bags = self.model.module.dlrm.model.sparse_arch.embedding_bag_collection
        self.static_bytes = allocated(device) - before

    def use(self, samples: int | None) -> None:
        """Trains the whole model from now on, or its embedding stage alone, with batches of at most so many samples."""
        module = self.model if isinstance(self.model, Staged) else self.model.module
        module.gradient = None if samples is None else self.gradient(samples)

    def gradient(self, samples: int) -> torch.Tensor:
        """A gradient of the pooled rows."""
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(samples, self._shape, device=self.device, generator=generator) / samples

    def direct_step(self, batch: Batch) -> None:
        """One step without a pipeline."""
        self.optimizer.zero_grad()
        loss, _ = self.model(batch)
        loss.sum().backward()
        self.optimizer.step()

    def cache_kernels(self) -> list[Any]:
        """FBGEMM's kernels that cache rows."""
        lookups = [lookup for module in _sharded_parts(self.bags) for lookup in module._lookups]
        kernels = [kernel for lookup in lookups for kernel in lookup.modules() if hasattr(kernel, "lxu_cache_weights")]
        return [kernel for kernel in kernels if kernel.lxu_cache_weights.numel()]


class Runner:
    """A trainee's endless stream of steps through its pipeline, over the same batches again and again.

    Args:
        trainee: the model; several runners may share it, one at a time.
        placement: which pipeline.
        batches: of one epoch.
        again: makes the iterator of each pass; default: the same batches.

    Attributes:
        trainee: as given.
        placement: as given.
        batches: as given.
        steps: batches of an epoch.
        samples: of an epoch.
        largest: samples of the largest batch.
        prefetches: whether the pipeline prefetches rows into a cache.
    """

    def __init__(
        self, trainee: Trainee, placement: Placement, batches: list[Batch], again: Callable[[], Iterable[Batch]] | None = None
    ) -> None:
        self.trainee, self.placement = trainee, placement
        self.batches = batches
        self.steps = len(batches)
        self.largest = max(batch.labels.numel() for batch in batches)
        self.prefetches = placement.pipeline == "prefetch" or (placement.kind == "fae" and placement.cold == "uvm_caching")
        self.samples = sum(batch.labels.numel() for batch in batches)
        self._stream = cycle(batches) if again is None else _passes(again)
        self._pipeline: Any = None

    def run(self, steps: int) -> float:
        """Trains; returns milliseconds from the first step's begin to the last one's end, on a GPU as its own clock sees them."""
        device = self.trainee.device
        if device.type == "cpu":
            begin = time.perf_counter()
            for _ in range(steps):
                self._step()
            return 1000 * (time.perf_counter() - begin)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            self._step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _step(self) -> None:
        if self.placement.pipeline == "none":
            batch, device = next(self._stream), self.trainee.device
            self.trainee.direct_step(Batch(batch.dense_features.to(device), batch.sparse_features, batch.labels.to(device)))
            return
        if self._pipeline is None:
            self._pipeline = self._new_pipeline()
        self._pipeline.progress(self._stream)

    def _new_pipeline(self) -> Any:
        model, optimizer, device = self.trainee.model, self.trainee.optimizer, self.trainee.device
        if self.placement.pipeline == "fae":
            return FAETrainPipeline(model, optimizer, device, lookahead=self.placement.lookahead)
        kind = PrefetchTrainPipelineSparseDist if self.placement.pipeline == "prefetch" else TrainPipelineSparseDist
        return kind(model, optimizer, device)

    def release(self) -> None:
        """Lets the model go, for another runner: batches in flight are trained first, for caches have their rows announced."""
        if self._pipeline is None:
            return
        none: Iterator[Batch] = iter(())
        with suppress(StopIteration):
            while True:
                self._pipeline.progress(none)
        self._pipeline.detach()
        if self.placement.pipeline == "prefetch":
            self._pipeline = None  # TorchRec's does not attach itself again


class ModelPool:
    """Models that stay for the next comparison as long as the machine has room.

    Args:
        machine: its memory.
        device: where to train.
        ddp: as Trainee.
    """

    def __init__(self, machine: Machine, device: torch.device, *, ddp: bool) -> None:
        self._machine, self._device, self._ddp = machine, device, ddp
        self._models: dict[tuple[object, ...], tuple[Trainee, Memory]] = {}  # the least lately used first

    def get(self, placement: Placement, workload: Workload, rows: RowPlacement | None, needed: Iterable[tuple[object, ...]]) -> Trainee:
        """The model of a placement.

        Args:
            placement: where its rows lie.
            workload: its tables.
            rows: which are hot, of "fae".
            needed: keys of models that must stay.
        """
        key, memory, needed = placement.model_key(workload), placement.memory(workload), set(needed)
        if key in self._models:
            self._models[key] = self._models.pop(key)
            return self._models[key][0]
        for other in [other for other in self._models if other not in needed]:
            if sum((taken for _, taken in self._models.values()), memory).fits(self._machine):
                break
            del self._models[other]
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        self._models[key] = Trainee(placement, workload, rows, self._device, ddp=self._ddp), memory
        return self._models[key][0]


def _start(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.fill_(0.01)


def _passes(again: Callable[[], Iterable[Batch]]) -> Iterator[Batch]:
    while True:
        yield from again()


def _sharded_parts(bags: Any) -> Iterable[Any]:
    """The stock sharded modules in a sharded collection."""
    if isinstance(bags, HostBags):
        return []
    return [tier.module for tier in bags._stock_tiers()] if hasattr(bags, "_stock_tiers") else [bags]


def allocated(device: torch.device) -> int:
    """Bytes of a GPU's memory that torch has given out."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def _sharded(
    model: nn.Module, placement: Placement, workload: Workload, rows: RowPlacement | None, device: torch.device, *, ddp: bool
) -> Any:
    caps: dict[str, int] = {"ddr_cap": 2**40}
    if device.type == "cuda":
        caps["hbm_cap"] = torch.cuda.get_device_properties(device).total_memory
    topology = Topology(world_size=1, local_world_size=1, compute_device=device.type, **caps)
    if placement.kind == "fae":
        assert rows is not None
        has_cache = placement.cold != "host" or placement.cache_share
        cache = round(placement.cache_share * workload.budget_bytes) if has_cache else None
        planner: Any = FAEShardingPlanner(
            rows, topology=topology, batch_size=workload.batch_size, cold_tier=placement.cold, cold_cache_bytes=cache
        )
    else:
        constraints = {f"t_{name}": _constraint(placement, workload, count) for name, count in workload.rows.items()}
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=workload.batch_size, constraints=constraints)
    sharders = get_fae_sharders()  # exactly stock's for a stock plan
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders, init_data_parallel=ddp)
    if not ddp:
        sharded.module.to(device)  # which is what DistributedModelParallel leaves to the wrapper
    return sharded


def _constraint(placement: Placement, workload: Workload, rows: int) -> ParameterConstraints:
    """What one table may be under a stock placement."""
    if placement.kind != "caching" or rows <= placement.whole_rows:
        kernel = "fused" if placement.kind == "caching" else _FUSED[placement.kind]
        return ParameterConstraints(sharding_types=["table_wise"], compute_kernels=[kernel])
    cached = sum(count for count in workload.rows.values() if count > placement.whole_rows)
    slots = (workload.budget_bytes - placement.whole_bytes(workload)) / (4 * workload.dim + 20)
    cache = CacheParams(CacheAlgorithm.LRU, load_factor=slots / cached, prefetch_pipeline=placement.pipeline == "prefetch")
    return ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused_uvm_caching"], cache_params=cache)
