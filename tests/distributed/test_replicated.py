"""The replicated hot tier at its edges: no hot id, ids beyond a table, evaluation, other batch sizes, half precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.replicated import _own_rows, _sum_by_slot
from fae_torchrec.modules.tier_split import HotBags
from tests.distributed.small_model import Case, new_batch, placement_of, shard, train, whole_tensors

KEYS = ["a", "b", "c", "d", "e"]
Bags = dict[str, list[list[int]]]
NONE: Bags = {key: [[], []] for key in KEYS}
COLD_BIG = [i for i in range(200) if i not in placement_of(Case()).hot_ids["big"]][:5]

# Bags of rank 0 and of rank 1.
EDGES: dict[str, tuple[Bags, Bags]] = {
    "no id on any rank": (NONE, NONE),
    "no id on rank 1": ({**NONE, "a": [[3], [3, 5]], "b": [[0, 7], []]}, NONE),
    "no hot id on any rank": ({**NONE, "b": [COLD_BIG, []], "d": [[1], [2, 2]]}, {**NONE, "d": [[1], [4]]}),
    "no hot id on rank 0": ({**NONE, "b": [COLD_BIG[:2], COLD_BIG[1:]]}, {**NONE, "a": [[1], [1]], "c": [[], [5, 6, 7]]}),
    "hot ids of one dim alone": ({**NONE, "a": [[1], [2]]}, {**NONE, "a": [[2], []]}),
    "ids beyond an all-hot table": ({**NONE, "a": [[3], [9]]}, {**NONE, "a": [[7, 10**6], [0]], "b": [[0], [1]]}),
    "ids beyond a split table": ({**NONE, "b": [[300], [3]]}, {**NONE, "e": [[121, 5], []]}),
    "other batch sizes": ({**NONE, "a": [[3], [1]], "c": [[5], [80]]}, {key: [[2, 1]] for key in KEYS}),
}


def _batch(bags: Bags) -> Batch:
    values = torch.tensor([i for key in KEYS for bag in bags[key] for i in bag], dtype=torch.int64)
    lengths = torch.tensor([len(bag) for key in KEYS for bag in bags[key]], dtype=torch.int32)
    size = len(bags["a"])
    return Batch(torch.ones(size, 3), KeyedJaggedTensor(KEYS, values, lengths=lengths), torch.arange(size, dtype=torch.float32))


def _both(seen: dict[str, Any], name: str, case: Case, run: Callable[[DistributedModelParallel], Any]) -> None:
    seen[name] = [run(shard(case, placement)) for placement in (None, placement_of(case))]


def _trained(batches: list[Batch], model: DistributedModelParallel) -> Any:
    losses = train(model, batches)
    return losses, whole_tensors(model.state_dict())


def _evaluated(case: Case, rank: int, model: DistributedModelParallel) -> Any:
    """Trains, evaluates without and with gradients switched off, and trains on."""
    train(model, [new_batch(case, 0, rank)])
    model.eval()
    evaluated = []
    for batch in (new_batch(case, 1, rank), new_batch(case, 2, rank, size=3), _batch(EDGES["no id on rank 1"][rank])):
        with torch.no_grad():
            evaluated.append(model(batch)[0].item())
        evaluated.append(model(batch)[0].item())
    state = whole_tensors(model.state_dict())
    model.train()
    return (
        evaluated,
        state,
        train(model, [new_batch(case, 3, rank, size=5), new_batch(case, 4, rank, size=1)]),
        whole_tensors(model.state_dict()),
    )


def _hot_evaluation(case: Case, rank: int, model: DistributedModelParallel) -> Any:
    batch = new_batch(case, 0, rank, hot_only=placement_of(case))
    if hasattr(model.module.ebc, "placement"):
        batch = Batch(batch.dense_features, HotKeyedJaggedTensor.promise(batch.sparse_features), batch.labels).to(torch.device("cpu"))
        assert isinstance(batch.sparse_features, HotKeyedJaggedTensor), "the promise survives Batch.to"
    model.eval()
    with torch.no_grad():
        return model(batch)[0].item()


def _see(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, bags in EDGES.items():
        _both(seen, name, Case(), partial(_trained, [_batch(bags[rank]), new_batch(Case(), 0, rank)]))
    _both(seen, "mean, no id on rank 1", Case(pooling=PoolingType.MEAN), partial(_trained, [_batch(EDGES["no id on rank 1"][rank])]))
    _both(seen, "evaluation", Case(optimizer="adagrad"), partial(_evaluated, Case(optimizer="adagrad"), rank))
    _both(seen, "hot evaluation", Case(), partial(_hot_evaluation, Case(), rank))
    return seen


@cache
def _seen(ranks: int) -> list[dict[str, Any]]:
    return run_on_local_ranks(_see, ranks, timeout_s=120)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [*EDGES, "mean, no id on rank 1", "evaluation", "hot evaluation"])
def test_edges_equal_stock(name: str, ranks: int) -> None:
    for seen in _seen(ranks):
        stock, ours = seen[name]
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


def test_gradients_are_summed_over_the_distinct_slots() -> None:
    """Bags [3, 1], [], [3]; the gradient of slot 1 is bag 0's, that of slot 3 both bags', by weight."""
    bags = HotBags(torch.tensor([3, 1, 3]), torch.tensor([0, 2, 2, 3]), torch.tensor([2.0, 3.0, 5.0]))
    distinct, how = _own_rows(bags)
    assert distinct.tolist() == [1, 3]
    grad = torch.tensor([[1.0], [10.0], [100.0]])
    assert _sum_by_slot(grad, how).tolist() == [[3], [502]]
    none = HotBags(torch.empty(0, dtype=torch.int64), torch.tensor([0, 0]), None)
    distinct, how = _own_rows(none)
    assert _sum_by_slot(torch.ones(1, 4), how).shape == (0, 4)
    none = HotBags(torch.empty(0, dtype=torch.int64), torch.tensor([0]), None)
    assert _sum_by_slot(torch.empty(0, 4), _own_rows(none)[1]).shape == (0, 4)


def test_a_batch_promised_hot_keeps_its_promise_and_its_ids() -> None:
    kjt = _batch(EDGES["no id on rank 1"][0]).sparse_features
    moved = HotKeyedJaggedTensor.promise(kjt).to(torch.device("cpu"), non_blocking=True)
    assert isinstance(moved, HotKeyedJaggedTensor)
    assert torch.equal(moved.values(), kjt.values())
    assert not isinstance(moved.permute([1, 0, 2, 3, 4]), HotKeyedJaggedTensor)
    assert isinstance(nn.Identity()(moved), HotKeyedJaggedTensor)
