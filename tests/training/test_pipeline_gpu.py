"""On a GPU: the pipeline trains as a plain loop does, whatever is prefetched, and the host does not wait where it need not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.distributed.split_ahead import SplitAhead
from fae_torchrec.training.train_pipeline import FAETrainPipeline
from tests.distributed.small_model import Case, dense_optimizer, new_batch, optimizer_state, placement_of, shard, train, whole_tensors
from tests.gpu import CUDA, cuda_rank, on_device, requires_gpu, synchronisations
from tests.training.small_pipeline import new_batches, run_pipeline

pytestmark = requires_gpu

CASE = Case("rowwise_adagrad", multi_hot=False, mixed_dims=False)
SEQUENCE = "HHHCCHCMHHHHCCCHMMH"
# A cache that holds two batches of 16 samples, and one that holds a tenth of one: rows are evicted at every step, and some find no place.
TIERS: dict[str, dict[str, Any]] = {
    "uvm": {"cold_tier": "uvm", "cold_cache_bytes": 0},
    "uvm_caching": {"cold_tier": "uvm_caching"},
    "small cache": {"cold_tier": "uvm_caching", "cold_cache_bytes": 512},
    "host": {"cold_tier": "host"},
    "staged": {"cold_tier": "uvm", "cold_cache_bytes": 1 << 16},
    "few staged": {"cold_tier": "uvm", "cold_cache_bytes": 2048},  # batches with more cold rows go the other way
}


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    with cuda_rank():
        yield


def _state(model: Any) -> dict[str, torch.Tensor]:
    return {**whole_tensors(model.state_dict()), **optimizer_state(model)}


def _close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()), msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.fixture(scope="module")
def wanted() -> dict[str, torch.Tensor]:
    """What a plain loop over stock TorchRec leaves, all in the GPU's memory."""
    model = shard(CASE, None, device=CUDA)
    batches = new_batches(CASE, SEQUENCE, 0)
    train(model, on_device(batches))
    return _state(model)


@pytest.mark.parametrize("ahead", [False, True], ids=["split in the step", "split ahead"])
@pytest.mark.parametrize("lookahead", [2, 3, 5])
@pytest.mark.parametrize("tier", TIERS)
def test_pipelined_equals_stock(tier: str, lookahead: int, ahead: bool, wanted: dict[str, torch.Tensor]) -> None:
    model = shard(CASE, placement_of(CASE), device=CUDA, **TIERS[tier])
    split: Any = SplitAhead(model) if ahead else lambda batch, step: batch
    batches = [split(batch, step).pin_memory() for step, batch in enumerate(new_batches(CASE, SEQUENCE, 0))]
    pipeline = run_pipeline(model, batches, device=CUDA, lookahead=lookahead)
    _close(_state(model), wanted)
    assert (pipeline.steps.hot, pipeline.steps.other) == (SEQUENCE.count("H"), len(SEQUENCE) - SEQUENCE.count("H"))


def test_plain_batches_are_split_ahead() -> None:
    """The pipeline's own loader does it: nothing but the placement was asked for. In the stock order the result is stock's."""
    model = shard(CASE, placement_of(CASE), device=CUDA, **TIERS["staged"])
    staging = model.module.ebc._staging
    brought: list[int] = []
    bring = staging._bring
    staging._bring = lambda batch: (brought.append(1), bring(batch))
    batches = [Batch(batch.dense_features, batch.sparse_features, batch.labels) for batch in new_batches(CASE, "M" * 12, 0)]
    pipeline: Any = FAETrainPipeline(
        model, dense_optimizer(model), CUDA, placement=placement_of(CASE), batch_size=16, schedule=ShuffleSchedule("stock")
    )
    stream = iter(batches)
    for _ in batches:
        pipeline.progress(stream)
    stock = shard(CASE, None, device=CUDA)
    train(stock, on_device(new_batches(CASE, "M" * 12, 0)))
    _close(_state(model), _state(stock))
    assert len(brought) == len(batches)


def test_rows_are_prefetched_before_every_cold_batch() -> None:
    """Each cold batch but a first finds its rows announced; hot ones have none. The control: without `prefetch_pipeline` nothing is."""
    for options, expected in ((TIERS["uvm_caching"], SEQUENCE.count("C") + SEQUENCE.count("M")), (TIERS["uvm"], 0)):
        model = shard(CASE, placement_of(CASE), device=CUDA, **options)
        collection = model.module.ebc
        calls: list[int] = []
        (tier,) = collection._cold
        kernel = tier._kernels[0]
        stock = kernel.prefetch

        def prefetch(*args: Any, calls: list[int] = calls, stock: Any = stock) -> None:
            calls.append(1)
            stock(*args)

        kernel.prefetch = prefetch
        run_pipeline(model, new_batches(CASE, SEQUENCE, 0), device=CUDA)
        assert len(calls) == expected


@pytest.mark.parametrize("lookahead", [2, 5])
@pytest.mark.parametrize("tier", TIERS)
def test_detached_evaluated_saved_and_loaded_with_batches_in_flight(tier: str, lookahead: int) -> None:
    batches, other = new_batches(CASE, "HCHHCCHHMC", 0), new_batch(CASE, 77, 0).to(CUDA)

    def disturbed(model: Any, step: int, saved: dict[int, Any]) -> None:
        model.eval()
        with torch.no_grad():
            model(other)
        model.train()
        saved[step] = whole_tensors(model.state_dict())
        if step == 6:
            model.load_state_dict({key: value.clone() for key, value in saved[1].items()})

    ours: dict[int, Any] = {}
    plain: dict[int, Any] = {}
    model = shard(CASE, placement_of(CASE), device=CUDA, **TIERS[tier])
    split: Any = SplitAhead(model) if "staged" in tier else lambda batch, step: batch
    fed = [split(batch, step).pin_memory() for step, batch in enumerate(batches)]
    run_pipeline(model, fed, lambda step, pipeline: disturbed(pipeline.detach(), step, ours), device=CUDA, lookahead=lookahead)
    model = shard(CASE, placement_of(CASE), device=CUDA, **TIERS["uvm"])
    for step, batch in enumerate(on_device(batches), start=1):
        train(model, [batch])
        disturbed(model, step, plain)
    for step, state in plain.items():
        _close(ours[step], state)


@pytest.mark.parametrize("tier", ["uvm_caching", "small cache", "staged"])
def test_state_read_between_steps_without_detaching(tier: str, wanted: dict[str, torch.Tensor]) -> None:
    model = shard(CASE, placement_of(CASE), device=CUDA, **TIERS[tier])
    split: Any = SplitAhead(model) if tier == "staged" else lambda batch, step: batch
    batches = [split(batch, step) for step, batch in enumerate(new_batches(CASE, SEQUENCE, 0))]
    run_pipeline(model, batches, lambda step, pipeline: model.state_dict(), device=CUDA)
    _close(_state(model), wanted)


def test_evaluations_leave_the_cache_unlocked() -> None:
    model = shard(CASE, placement_of(CASE), device=CUDA, **TIERS["uvm_caching"])
    kernels = [kernel for tier in model.module.ebc._cold for kernel in tier.cache._kernels]
    model.eval()
    with torch.no_grad():
        for step in range(5):
            model(new_batch(CASE, step, 0).to(CUDA))
    assert kernels and all(int(kernel.lxu_cache_locking_counter.abs().sum()) == 0 for kernel in kernels)
    model.train()
    run_pipeline(model, new_batches(CASE, SEQUENCE, 0), device=CUDA)
    assert all(int(kernel.lxu_cache_locking_counter.abs().sum()) == 0 for kernel in kernels)


def test_host_synchronisations() -> None:
    """Split ahead, a step never waits. Split in the step, it waits once: for the count of broken promises, or that of cold ids.

    The control is stock, whose input dist waits for counts even on one rank.
    """
    found: dict[str, list[Counter[str]]] = {}
    for name in ("stock", "hot", "cold", "hot, ahead", "cold, ahead", "cold, ahead, staged"):
        tier = TIERS["staged" if "staged" in name else "uvm"]
        model = shard(CASE, None if name == "stock" else placement_of(CASE), device=CUDA, **({} if name == "stock" else tier))
        split: Any = SplitAhead(model) if "ahead" in name else lambda batch, step: batch
        kinds = {"stock": "M", "hot": "H", "cold": "C"}[name.partition(",")[0]] * 12
        batches = new_batches(CASE, kinds, 0)
        for batch in batches:
            batch.sparse_features.length_per_key()  # as a loader's batches have it
        batches = [split(batch, step).pin_memory() for step, batch in enumerate(batches)]
        pipeline: Any = (TrainPipelineSparseDist if name == "stock" else FAETrainPipeline)(model, dense_optimizer(model), CUDA)
        stream = iter(batches)
        for _ in range(6):
            pipeline.progress(stream)
        found[name] = []
        for _ in range(3):
            with synchronisations() as seen:
                pipeline.progress(stream)
            found[name].append(Counter(seen))
    waits = {name: max(sum(step.values()) for step in steps) for name, steps in found.items()}
    where = {name: dict(steps[-1]) for name, steps in found.items()}
    assert [waits[name] for name in waits if "ahead" in name] == [0, 0, 0], where
    assert (waits["hot"], waits["cold"]) == (1, 1), where
    assert waits["stock"] > 1, where
