"""A hot batch skips the cold tier whole (counted), and a broken promise is an error on every rank."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from fae_torchrec.core.errors import HotBatchError
from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.training.traffic import CollectiveCounter
from fae_torchrec.training.train_pipeline import FAETrainPipeline
from tests.distributed.small_model import Case, dense_optimizer, new_batch, placement_of, shard, train, whole_tensors

CASE = Case()


def promised(batch: Batch) -> Batch:
    """The same batch with the promise to be hot."""
    return Batch(batch.dense_features, HotKeyedJaggedTensor.promise(batch.sparse_features), batch.labels)


def _hot(rank: int, step: int) -> Batch:
    return promised(new_batch(CASE, step, rank, hot_only=placement_of(CASE)))


def kernels_of(module: Any) -> list[Any]:
    """The fused kernels of a stock sharded collection."""
    parts = [part for lookup in module._lookups for part in lookup.modules()]
    return [part for part in parts if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen)]


def _count(rank: int) -> dict[str, Any]:
    model = shard(CASE, placement_of(CASE))
    cold_calls: Counter[str] = Counter()
    kind = "hot"
    tier = model.module.ebc._cold[0]
    cold = tier.module
    # A single rank's ids go past the stock module into its kernel.
    stages = {"input dist": tier.input_dists, "kernel": kernels_of(cold), "output dist": cold._output_dists if tier.input_dists else []}
    for stage, modules in stages.items():
        for module in modules:
            module.register_forward_hook(lambda *_, stage=stage: cold_calls.update([f"{stage}, {kind}"]))
    calls = {}
    for kind, batch in (("hot", _hot(rank, 0)), ("cold", new_batch(CASE, 1, rank))):
        with CollectiveCounter(rank, dist.get_world_size()) as counter:
            train(model, [batch])
        calls[kind] = dict(counter.calls)
    return {"calls": calls, "cold_calls": dict(cold_calls)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_hot_batch_calls_nothing_of_the_cold_tier(ranks: int) -> None:
    for counted in (seen["count"] for seen in _seen(ranks)):
        hot, cold = counted["calls"]["hot"], counted["calls"]["cold"]
        exchanges = {"input dist, cold": 1, "output dist, cold": 1} if ranks > 1 else {}
        assert counted["cold_calls"] == {"kernel, cold": 1, **exchanges}
        assert not any("alltoall" in name for name in hot), hot
        if ranks > 1:
            assert cold["alltoall_base"] > 0, "the control: a cold batch does call them"
            assert hot["allgather_base"] == 3, "counts, slots, gradients"


def _same_result(rank: int) -> Any:
    """Hot batches with and without the promise, and through the pipelines, in the same order."""
    batches = [_hot(rank, step) if step % 3 else new_batch(CASE, step, rank) for step in range(12)]
    batches[0] = _hot(rank, 0)  # the first batch a pipeline sees is hot: the cold input dist must be there all the same
    results = {}
    for name in ("plain", "promised", "pipeline", "stock pipeline"):
        model = shard(CASE, placement_of(CASE))
        if name == "plain":
            raw = [Batch(b.dense_features, b.sparse_features.permute(list(range(5))), b.labels) for b in batches]
            assert not any(isinstance(b.sparse_features, HotKeyedJaggedTensor) for b in raw)
            train(model, raw)
        elif name == "promised":
            train(model, batches)
        else:
            pipeline_type = FAETrainPipeline if name == "pipeline" else TrainPipelineSparseDist
            pipeline = pipeline_type(model, dense_optimizer(model), torch.device("cpu"))
            stream = iter(batches)
            for _ in batches:
                pipeline.progress(stream)
            with pytest.raises(StopIteration):
                pipeline.progress(stream)
            if name == "pipeline":
                results["steps"] = (pipeline.steps.hot, pipeline.steps.other)
        results[name] = whole_tensors(model.state_dict())
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_promise_and_pipeline_change_nothing(ranks: int) -> None:
    results = _seen(ranks)[0]["same result"]
    assert results["steps"] == (9, 3)
    for name in ("promised", "pipeline", "stock pipeline"):
        torch.testing.assert_close(results[name], results["plain"], rtol=1e-6, atol=1e-7)


def _break_promise(rank: int, on_rank: int) -> str:
    model = shard(CASE, placement_of(CASE))
    batch = promised(new_batch(CASE, 0, rank)) if rank == on_rank else _hot(rank, 0)
    with CollectiveCounter(rank, dist.get_world_size()) as counter:
        try:
            model(batch)
        except HotBatchError as error:
            return f"{error} after {sum(counter.calls.values())} collectives"
    return "no error"


@pytest.mark.parametrize("ranks", [1, 2])
def test_broken_promise_is_an_error_on_every_rank(ranks: int) -> None:
    for message in (seen["broken promise"] for seen in _seen(ranks)):
        assert "promised to be hot holds cold ids" in message
        assert f"{{{ranks - 1}: " in message, "it names the rank that broke it"
        assert message.endswith(f"after {ranks - 1} collectives"), "the counts themselves, and nothing else"


def _disagree(rank: int, folder: str) -> None:
    """Ends in an error: the cold rank's exchange has begun, and the process group is of no more use."""
    model = shard(CASE, placement_of(CASE))
    try:
        model(_hot(rank, 0) if rank == 0 else new_batch(CASE, 0, rank))
    except HotBatchError as error:
        Path(folder, str(rank)).write_text(str(error))
        raise


def test_ranks_that_disagree_are_told_so(tmp_path: Path) -> None:
    with pytest.raises(HotBatchError):
        run_on_local_ranks(_disagree, 2, str(tmp_path), timeout_s=120)
    for rank in range(2):
        assert "the batches of ranks [0] are promised to be hot, the others are not" in (tmp_path / str(rank)).read_text()


def _see(rank: int) -> dict[str, Any]:
    broken = _break_promise(rank, dist.get_world_size() - 1)
    return {"count": _count(rank), "same result": _same_result(rank), "broken promise": broken}


@cache
def _seen(ranks: int) -> list[dict[str, Any]]:
    return run_on_local_ranks(_see, ranks, timeout_s=60)
