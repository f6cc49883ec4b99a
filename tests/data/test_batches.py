"""The promise that a batch is hot: kept by copies, dropped by everything that could change the ids."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.data.batches import AheadKeyedJaggedTensor, HotKeyedJaggedTensor, is_hot_batch

CPU = torch.device("cpu")


def make_kjt(weighted: bool = False) -> KeyedJaggedTensor:
    """Two keys, three samples: a = [1] [] [2 3], b = [4] [5] [6]."""
    return KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.tensor([1, 2, 3, 4, 5, 6]),
        lengths=torch.tensor([1, 0, 2, 1, 1, 1], dtype=torch.int32),
        weights=torch.arange(6, dtype=torch.float32) if weighted else None,
        stride=3,
    )


def make_batch(kjt: KeyedJaggedTensor) -> Batch:
    return Batch(dense_features=torch.ones(3, 2), sparse_features=kjt, labels=torch.zeros(3))


def assert_same(actual: KeyedJaggedTensor, expected: KeyedJaggedTensor) -> None:
    assert actual.keys() == expected.keys()
    assert actual.stride() == expected.stride()
    assert actual.values().tolist() == expected.values().tolist()
    assert actual.lengths().tolist() == expected.lengths().tolist()
    weights, wanted = actual.weights_or_none(), expected.weights_or_none()
    assert (weights is None) == (wanted is None)
    if weights is not None and wanted is not None:
        assert weights.tolist() == wanted.tolist()


def test_promise_marks_without_copying_and_leaves_the_original_plain() -> None:
    plain = make_kjt()
    hot = HotKeyedJaggedTensor.promise(plain)
    assert is_hot_batch(make_batch(hot))
    assert not is_hot_batch(make_batch(plain))
    assert type(plain) is KeyedJaggedTensor
    assert hot.values().data_ptr() == plain.values().data_ptr()
    assert_same(hot, plain)


KEEP: dict[str, Callable[[KeyedJaggedTensor], KeyedJaggedTensor]] = {
    "to": lambda kjt: kjt.to(CPU),
    "to non-blocking": lambda kjt: kjt.to(CPU, non_blocking=True),
    "to with dtype": lambda kjt: kjt.to(CPU, dtype=torch.float32),
    "pickle": lambda kjt: pickle.loads(pickle.dumps(kjt)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "promise again": HotKeyedJaggedTensor.promise,
    "Batch.to": lambda kjt: make_batch(kjt).to(CPU).sparse_features,
    "Batch pickled": lambda kjt: pickle.loads(pickle.dumps(make_batch(kjt))).sparse_features,
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", KEEP)
def test_copies_keep_the_promise_and_the_content(name: str, weighted: bool) -> None:
    plain = make_kjt(weighted)
    kept = KEEP[name](HotKeyedJaggedTensor.promise(plain))
    assert type(kept) is HotKeyedJaggedTensor
    assert_same(kept, plain)


@pytest.mark.parametrize("name", sorted(set(KEEP) - {"promise again"}))
def test_copies_of_a_plain_tensor_promise_nothing(name: str) -> None:
    assert type(KEEP[name](make_kjt())) is KeyedJaggedTensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning memory needs a CUDA device")
def test_pinned_memory_keeps_the_promise() -> None:
    batch = make_batch(HotKeyedJaggedTensor.promise(make_kjt(weighted=True))).pin_memory()
    assert is_hot_batch(batch)
    assert batch.sparse_features.values().is_pinned()
    assert is_hot_batch(batch.to(torch.device("cuda"), non_blocking=True))


def test_pin_memory_keeps_the_promise_whatever_the_host_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a CUDA device TorchRec cannot pin: let the tensors stand in for their pinned copies.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    plain = make_kjt(weighted=True)
    pinned = make_batch(HotKeyedJaggedTensor.promise(plain)).pin_memory()
    assert is_hot_batch(pinned)
    assert_same(pinned.sparse_features, plain)


DROP: dict[str, Callable[[KeyedJaggedTensor], KeyedJaggedTensor]] = {
    "permute": lambda kjt: kjt.permute([1, 0]),
    "split": lambda kjt: kjt.split([1, 1])[0],
    "concat": lambda kjt: KeyedJaggedTensor.concat([kjt.split([1, 1])[0], kjt.split([1, 1])[1]]),
    "from_jt_dict": lambda kjt: KeyedJaggedTensor.from_jt_dict(kjt.to_dict()),
    "empty_like": KeyedJaggedTensor.empty_like,
    "flatten_lengths": lambda kjt: kjt.flatten_lengths(),
}


@pytest.mark.parametrize("name", DROP)
def test_other_operations_drop_the_promise(name: str) -> None:
    assert type(DROP[name](HotKeyedJaggedTensor.promise(make_kjt()))) is KeyedJaggedTensor


def test_splitting_off_nothing_is_the_tensor_itself() -> None:
    # TorchRec returns the same object for a split of all keys; the ids are all still there and still hot.
    hot = HotKeyedJaggedTensor.promise(make_kjt())
    assert hot.split([2])[0] is hot


def test_what_was_made_ahead_comes_along_and_is_kept_for_streams() -> None:
    class Ahead:
        def __init__(self, where: str) -> None:
            self.where, self.streams = where, []  # type: ignore[var-annotated]

        def to(self, device: torch.device, non_blocking: bool) -> Ahead:
            return Ahead(f"{self.where}, {device}, {non_blocking}")

        def record_stream(self, stream: object) -> None:
            self.streams.append(stream)

    for kind in (HotKeyedJaggedTensor, AheadKeyedJaggedTensor):
        kjt = KeyedJaggedTensor(["a"], torch.tensor([1]), lengths=torch.tensor([1]))
        made = kind.of(HotKeyedJaggedTensor.promise(kjt), {"c": Ahead("host")})
        moved = made.to(torch.device("cpu"), non_blocking=True)
        assert type(moved) is kind and moved.ahead["c"].where == "host, cpu, True"
        with mock.patch.object(KeyedJaggedTensor, "record_stream") as plain:
            moved.record_stream("a stream")
        assert moved.ahead["c"].streams == ["a stream"] and plain.call_count == 1
        assert type(moved.permute([0])) is KeyedJaggedTensor
    assert moved is not made
    assert kind.of(kjt, {}).to(torch.device("cpu")).ahead == {}
