"""The hot/cold EmbeddingCollection gives, trains and saves what stock's sharded one does, beside an EmbeddingBagCollection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.embedding import EmbeddingCollectionAwaitable, ShardedEmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from fae_torchrec.core.errors import HotBatchError
from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.sharded_embedding import ShardedFAEEmbeddingCollection
from fae_torchrec.training.traffic import CollectiveCounter
from fae_torchrec.training.train_pipeline import FAETrainPipeline
from tests.distributed.sequence_model import HOT, NAMES, ROWS, Setup, new_batch, placement_of, shard
from tests.distributed.small_model import LEARNING_RATE, dense_optimizer, optimizer_state, train, whole_tensors

STEPS = 9
ALL_HOT = tuple(ROWS.items())
SETUPS = {
    "sgd": Setup("sgd"),
    "adagrad, int32 ids": Setup("adagrad", ids=torch.int32),
    "row-wise adagrad": Setup("rowwise_adagrad"),
    "all hot": Setup("adagrad", hot=ALL_HOT),
    "some left to stock": Setup("rowwise_adagrad", left=("frozen", "wide")),
    "nearly all cold": Setup("adagrad", hot=tuple({**dict.fromkeys(HOT, 0), "big": 1}.items())),
}
MAIN = SETUPS["row-wise adagrad"]


def _batches(setup: Setup, rank: int) -> list[Batch]:
    """Mixed and hot ones; the first is hot, and one has no ids on rank 0."""
    return [new_batch(setup, step, rank, hot=step % 3 == 0) for step in range(STEPS)]


def _raw(batch: Batch) -> Batch:
    """The same batch without the promise."""
    return Batch(batch.dense_features, batch.sparse_features.permute(list(range(5))), batch.labels)


def _plain(sequences: Mapping[str, JaggedTensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    return {name: (jagged.values().detach(), jagged.lengths(), jagged.weights_or_none()) for name, jagged in sequences.items()}


def _looked_up(model: DistributedModelParallel, features: KeyedJaggedTensor) -> dict[str, Any]:
    with torch.no_grad():
        return _plain(model.module.ec(features).wait())


def _train(setup: Setup, rank: int, *, ours: bool, learning_rate: float = LEARNING_RATE) -> dict[str, Any]:
    model = shard(setup, placement_of(setup) if ours else None)
    expected = ShardedFAEEmbeddingCollection if ours else ShardedEmbeddingCollection
    assert type(model.module.ec) is expected
    for group in model.fused_optimizer.param_groups:
        group["lr"] = learning_rate
    losses = train(model, [batch if ours else _raw(batch) for batch in _batches(setup, rank)])
    features = new_batch(setup, STEPS, rank).sparse_features
    return {
        "losses": losses,
        "weights": whole_tensors(model.state_dict()),
        "optimizer": optimizer_state(model),
        "outputs": _looked_up(model, features),
        "keys": sorted(model.state_dict()),
        "shards": {k: tuple(v.metadata().size) for k, v in model.state_dict().items() if isinstance(v, ShardedTensor)},
        "lengths": dict(zip(features.keys(), features.lengths().view(5, -1), strict=True)),
    }


def _without_empty(state: dict[str, Any]) -> dict[str, Any]:
    """The fused optimizer's state by table; torch.distributed.checkpoint loses a table without any, unless rank 0 has it."""
    return {key: value for key, value in state["state"].items() if value}


def _round_trip(rank: int, folder: str) -> dict[str, Any]:
    """Stock, trained -> ours -> stock, and a step further in each; the state is bit for bit the same on the way."""

    def state(model: DistributedModelParallel) -> dict[str, torch.Tensor]:
        return {**whole_tensors(model.state_dict()), **optimizer_state(model)}

    def hand_over(giver: DistributedModelParallel, taker: DistributedModelParallel, name: str) -> None:
        """Through a checkpoint, for stock's planner and ours put tables on different ranks."""
        given, taken = ({"model": m.state_dict(), "optimizer": _without_empty(m.fused_optimizer.state_dict())} for m in (giver, taker))
        checkpoint.save(given, checkpoint_id=f"{folder}/{name}")
        checkpoint.load(taken, checkpoint_id=f"{folder}/{name}")
        taker.load_state_dict(taken["model"])
        state = taker.fused_optimizer.state_dict()
        taker.fused_optimizer.load_state_dict({**state, "state": {**state["state"], **taken["optimizer"]}})

    stock, ours, back = shard(MAIN, None), shard(MAIN, placement_of(MAIN)), shard(MAIN, None)
    train(ours, [new_batch(MAIN, 20, rank)])  # what it has learned before is to be forgotten
    train(stock, [_raw(batch) for batch in _batches(MAIN, rank)])
    seen = {"stock": state(stock)}
    hand_over(stock, ours, "stock")
    seen["ours"] = state(ours)
    hand_over(ours, back, "ours")
    seen["back"] = state(back)
    for name, model in (("stock", stock), ("ours", ours), ("back", back)):
        train(model, [new_batch(MAIN, 30, rank), _raw(new_batch(MAIN, 31, rank, hot=True))])
        seen[f"{name}, trained on"] = state(model)
    return seen


def _count(rank: int) -> dict[str, Any]:
    """What is called of the cold tier, and which collectives, in the training steps of one hot and one mixed batch."""
    model = shard(MAIN, placement_of(MAIN))
    cold_calls: Counter[str] = Counter()
    kind = "hot"
    cold = model.module.ec._cold[0].module
    for stage, modules in (("input dist", cold._input_dists), ("lookup", cold._lookups), ("output dist", cold._output_dists)):
        for module in modules:
            module.register_forward_hook(lambda *_, stage=stage: cold_calls.update([f"{stage}, {kind}"]))
    calls = {}
    for kind, batch in (("hot", new_batch(MAIN, 0, rank, hot=True)), ("mixed", new_batch(MAIN, 1, rank))):
        with CollectiveCounter(rank, dist.get_world_size()) as counter:
            train(model, [batch])
        calls[kind] = dict(counter.calls)
    return {"calls": calls, "cold calls": dict(cold_calls)}


def _break_promise(rank: int) -> str:
    """The last rank breaks it."""
    model = shard(MAIN, placement_of(MAIN))
    broken = rank == dist.get_world_size() - 1
    batch = new_batch(MAIN, 1, rank, hot=not broken)
    features = HotKeyedJaggedTensor.promise(batch.sparse_features)
    with CollectiveCounter(rank, dist.get_world_size()) as counter:
        try:
            model.module.ec(features)
        except HotBatchError as error:
            return f"{error} after {sum(counter.calls.values())} collectives"
    return "no error"


def _pipeline(rank: int) -> dict[str, Any]:
    model = shard(MAIN, placement_of(MAIN))
    pipeline = FAETrainPipeline(model, dense_optimizer(model), torch.device("cpu"))
    stream = iter(_batches(MAIN, rank))
    for _ in range(STEPS):
        pipeline.progress(stream)
    with pytest.raises(StopIteration):
        pipeline.progress(stream)
    pipelined = [type(module).__name__ for module in pipeline._pipelined_modules]
    return {
        "steps": (pipeline.steps.hot, pipeline.steps.other),
        "pipelined": pipelined,
        "weights": whole_tensors(model.state_dict()),
    }


def _see(rank: int, folder: str) -> dict[str, Any]:
    awaitable = shard(MAIN, None).module.ec(new_batch(MAIN, 0, rank).sparse_features)
    assert type(awaitable) is EmbeddingCollectionAwaitable and type(awaitable.wait()) is dict, "what we give in its place is a dict too"
    return {
        "ours": {name: _train(setup, rank, ours=True) for name, setup in SETUPS.items()},
        "stock": {name: _train(setup, rank, ours=False) for name, setup in SETUPS.items()},
        "perturbed": _train(MAIN, rank, ours=True, learning_rate=LEARNING_RATE * 1.001),
        "round trip": _round_trip(rank, folder),
        "count": _count(rank),
        "broken promise": _break_promise(rank),
        "pipeline": _pipeline(rank),
    }


@pytest.fixture(scope="module", params=[1, 2], ids="ranks={}".format)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank saw of all this, in one start of the ranks; if that fails, it fails once for all tests."""
    return run_on_local_ranks(_see, request.param, str(tmp_path_factory.mktemp("checkpoints")), timeout_s=200)


def _assert_equal(ours: Mapping[str, torch.Tensor], stock: Mapping[str, torch.Tensor]) -> None:
    """Within 1e-5 relative; a value that cancelled to almost nothing, within a millionth of its tensor's largest."""
    assert ours.keys() == stock.keys()
    for key, expected in stock.items():
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(ours[key], expected, rtol=1e-5, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", SETUPS)
def test_training_equals_stock(name: str, seen: list[dict[str, Any]]) -> None:
    ours, stock = seen[0]["ours"][name], seen[0]["stock"][name]
    torch.testing.assert_close(ours["losses"], stock["losses"], rtol=1e-5, atol=0)
    _assert_equal(ours["weights"], stock["weights"])
    _assert_equal(ours["optimizer"], stock["optimizer"])
    assert ours["keys"] == stock["keys"]
    assert ours["shards"] == stock["shards"]
    assert ours["shards"]["ec.embeddings.big.weight"] == (200, 4)


def test_another_learning_rate_would_be_seen(seen: list[dict[str, Any]]) -> None:
    """A control: a thousandth more, in every table."""
    ours, stock = seen[0]["perturbed"]["weights"], seen[0]["stock"]["row-wise adagrad"]["weights"]
    for key in (f"ec.embeddings.{table}.weight" for table in ROWS if table != "pooled"):
        with pytest.raises(AssertionError, match="not close"):
            _assert_equal({key: ours[key]}, {key: stock[key]})


@pytest.mark.parametrize("name", SETUPS)
def test_output_is_stocks(name: str, seen: list[dict[str, Any]]) -> None:
    for of_rank in seen:
        ours, stock = of_rank["ours"][name]["outputs"], of_rank["stock"][name]["outputs"]
        assert list(ours) == NAMES
        assert ours.keys() == stock.keys()
        for key, (values, lengths, weights) in ours.items():
            torch.testing.assert_close(values, stock[key][0], rtol=1e-5, atol=1e-6)
            assert values.dtype == stock[key][0].dtype
            assert lengths.dtype == stock[key][1].dtype
            assert torch.equal(lengths, of_rank["ours"][name]["lengths"][key.split("@")[0]])
            assert torch.equal(lengths, stock[key][1])
            assert weights is None and stock[key][2] is None


def test_stock_to_ours_to_stock(seen: list[dict[str, Any]]) -> None:
    trip = seen[0]["round trip"]
    for name in ("ours", "back"):
        assert trip[name].keys() == trip["stock"].keys()
        for key, value in trip["stock"].items():
            assert torch.equal(trip[name][key], value), key
        _assert_equal(trip[f"{name}, trained on"], trip["stock, trained on"])
    key = "ec.embeddings.big.weight"
    assert not torch.equal(trip["stock"][key], trip["stock, trained on"][key]), "the control: a step changes it"


def test_hot_batch_calls_nothing_of_the_cold_tier(seen: list[dict[str, Any]]) -> None:
    for counted in (of_rank["count"] for of_rank in seen):
        hot, mixed = counted["calls"]["hot"], counted["calls"]["mixed"]
        assert counted["cold calls"] == {"input dist, mixed": 1, "lookup, mixed": 1, "output dist, mixed": 1}
        assert not any("alltoall" in name for name in hot), hot
        if len(seen) > 1:
            assert mixed["alltoall_base"] > 0, "the control: a mixed batch does call them"


def test_broken_promise_is_an_error_on_every_rank(seen: list[dict[str, Any]]) -> None:
    for message in (of_rank["broken promise"] for of_rank in seen):
        assert "promised to be hot holds cold ids" in message
        assert f"{{{len(seen) - 1}: " in message, "it names the rank that broke it"
        assert message.endswith(f"after {len(seen) - 1} collectives"), "the counts themselves, and nothing else"


def test_both_collections_through_the_pipeline(seen: list[dict[str, Any]]) -> None:
    for pipeline in (of_rank["pipeline"] for of_rank in seen):
        assert pipeline["steps"] == (3, 6)
        assert sorted(pipeline["pipelined"]) == ["ShardedFAEEmbeddingBagCollection", "ShardedFAEEmbeddingCollection"]
    _assert_equal(seen[0]["pipeline"]["weights"], seen[0]["stock"]["row-wise adagrad"]["weights"])
