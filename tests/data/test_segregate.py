"""The Input Classifier against a slow count by hand; cutting and joining batches loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.batches import HotKeyedJaggedTensor, is_hot_batch
from fae_torchrec.data.segregate import check_ids, concat_batches, hot_samples, plain_batch, select_samples

Bag = list[int]

# Table "shared" is looked up by two features, feature "b" looks up two tables, table "all" is all hot and "none" all cold.
TABLES = TableSet(
    (
        TableSpec("shared", rows=6, dim=4, feature_names=("a", "b")),
        TableSpec("wide", rows=9, dim=4, feature_names=("b",)),
        TableSpec("all", rows=4, dim=4, feature_names=("c",)),
        TableSpec("none", rows=3, dim=4, feature_names=("d",)),
    )
)
HOT = {"shared": [0, 2, 3], "wide": [2, 3, 5, 8], "all": [0, 1, 2, 3], "none": []}
PLACEMENT = RowPlacement(
    tables=TABLES,
    hot_ids={name: np.array(ids, dtype=np.int64) for name, ids in HOT.items()},
    hot_set_fingerprint="by hand",
    budget_bytes=0,
    hot_inputs=0.0,
    coverage=0.0,
)
ROWS = {"a": 6, "b": 6, "c": 4, "d": 3, "ignored": 1000}


def make_batch(samples: list[dict[str, Bag]], *, keys: tuple[str, ...] = tuple(ROWS), weighted: bool = False, start: int = 0) -> Batch:
    """Sample i has the dense value and the label start + i; the weight of an id in sample i is start + i + id / 1000."""
    bags = [sample[key] for key in keys for sample in samples]
    values = [x for bag in bags for x in bag]
    weights = [start + i + x / 1000 for key in keys for i, sample in enumerate(samples) for x in sample[key]]
    numbers = torch.arange(start, start + len(samples), dtype=torch.float32)
    return Batch(
        dense_features=numbers.unsqueeze(1).repeat(1, 2),
        sparse_features=KeyedJaggedTensor(
            keys=list(keys),
            values=torch.tensor(values, dtype=torch.int64),
            lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
            weights=torch.tensor(weights, dtype=torch.float32) if weighted else None,
            stride=len(samples),
        ),
        labels=numbers,
    )


def unpack(batch: Batch) -> list[tuple[float, float, dict[str, Bag], dict[str, list[float]]]]:
    """Label, dense value, ids and weights of each sample, one by one."""
    kjt = batch.sparse_features
    rows = []
    for i in range(kjt.stride()):
        ids: dict[str, Bag] = {}
        weights: dict[str, list[float]] = {}
        for key in list(kjt.keys()):
            jagged = kjt[key]
            begin, end = jagged.offsets()[i : i + 2].tolist()
            ids[key] = jagged.values()[begin:end].tolist()
            if kjt.weights_or_none() is not None:
                weights[key] = jagged.weights()[begin:end].tolist()
        rows.append((batch.labels[i].item(), batch.dense_features[i, 1].item(), ids, weights))
    return rows


def slowly_hot(sample: dict[str, Bag]) -> bool:
    return all(x in HOT[table] for table, feature in TABLES.lookups for x in sample[feature])


def bags(rows: int, hot: list[int], one_hot: bool) -> st.SearchStrategy[Bag]:
    ids = st.integers(0, rows - 1) | st.sampled_from(hot) if hot else st.integers(0, rows - 1)
    return st.lists(ids, min_size=int(one_hot), max_size=1 if one_hot else 3)


def samples(one_hot: bool, max_size: int = 7) -> st.SearchStrategy[list[dict[str, Bag]]]:
    hot = {"a": HOT["shared"], "b": [2, 3], "c": HOT["all"], "d": [], "ignored": []}
    return st.lists(st.fixed_dictionaries({key: bags(rows, hot[key], one_hot) for key, rows in ROWS.items()}), max_size=max_size)


any_samples = st.booleans().flatmap(samples)


def test_hot_samples_by_hand() -> None:
    rows: list[dict[str, Bag]] = [
        {"a": [0], "b": [2], "c": [1], "d": [], "ignored": [999]},  # all hot
        {"a": [1], "b": [2], "c": [1], "d": [], "ignored": [0]},  # a is cold
        {"a": [0, 2, 1], "b": [], "c": [], "d": [], "ignored": []},  # one of three is cold
        {"a": [], "b": [], "c": [], "d": [], "ignored": []},  # nothing is cold
        {"a": [0], "b": [0], "c": [1], "d": [], "ignored": []},  # b is hot in "shared", cold in "wide"
        {"a": [0], "b": [5], "c": [1], "d": [], "ignored": []},  # b is cold in "shared", hot in "wide"
        {"a": [3, 3], "b": [3, 2], "c": [3, 0], "d": [], "ignored": [5]},  # all hot
        {"a": [0], "b": [2], "c": [1], "d": [0], "ignored": []},  # d has no hot rows
    ]
    mask = hot_samples(make_batch(rows).sparse_features, PLACEMENT)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [True, False, False, True, False, False, True, False]


@settings(deadline=None, max_examples=150)
@given(rows=any_samples)
def test_hot_samples_equals_a_slow_loop(rows: list[dict[str, Bag]]) -> None:
    assert hot_samples(make_batch(rows).sparse_features, PLACEMENT).tolist() == [slowly_hot(row) for row in rows]


def test_hot_samples_finds_both_kinds_where_a_constant_answer_would_not() -> None:
    # Negative control for the property above: the generated samples must not be all of one kind.
    rng = np.random.default_rng(0)
    rows: list[dict[str, Bag]] = [{key: [int(rng.integers(n))] for key, n in ROWS.items() if key != "d"} | {"d": []} for _ in range(300)]
    wanted = [slowly_hot(row) for row in rows]
    assert 10 < sum(wanted) < 290
    assert hot_samples(make_batch(rows).sparse_features, PLACEMENT).tolist() == wanted


def test_lengths_and_offsets_only_tensors_are_the_same() -> None:
    kjt = make_batch([{"a": [0], "b": [2], "c": [1], "d": [], "ignored": [4]}, {"a": [1], "b": [], "c": [0], "d": [], "ignored": []}])
    offsets = kjt.sparse_features.offsets()
    other = KeyedJaggedTensor(keys=list(ROWS), values=kjt.sparse_features.values(), offsets=offsets, stride=2)
    assert hot_samples(other, PLACEMENT).tolist() == [True, False]


def test_one_sample_with_many_keys_and_no_keys_at_all() -> None:
    assert hot_samples(make_batch([]).sparse_features, PLACEMENT).shape == (0,)
    nothing = RowPlacement(TableSet(()), {}, "by hand", 0, 0.0, 0.0)
    assert hot_samples(make_batch([{"x": [1]}, {"x": [2]}], keys=("x",)).sparse_features, nothing).tolist() == [True, True]


@pytest.mark.parametrize("bad", [-1, 6, 2**40])
def test_an_id_out_of_range_names_table_id_and_range(bad: int) -> None:
    kjt = make_batch([{"a": [0], "b": [2, bad], "c": [1], "d": [], "ignored": [7]}]).sparse_features
    with pytest.raises(DataError, match=rf"table 'shared', feature 'b'.*{bad}\b.*0\.\.5"):
        hot_samples(kjt, PLACEMENT)


def test_ids_of_all_hot_tables_are_checked_too() -> None:
    kjt = make_batch([{"a": [0], "b": [2], "c": [4], "d": [], "ignored": [7]}]).sparse_features
    with pytest.raises(DataError, match=r"table 'all'.*id 4 .*0\.\.3"):
        hot_samples(kjt, PLACEMENT)


def test_a_missing_feature_names_it_and_what_there_is() -> None:
    kjt = make_batch([{"a": [0], "b": [2], "d": [0]}], keys=("a", "b", "d")).sparse_features
    with pytest.raises(DataError, match=r"feature 'c' of table 'all'.*\['a', 'b', 'd'\]"):
        check_ids(kjt, TABLES)


def test_ragged_lengths_and_unequal_strides_are_refused() -> None:
    long = KeyedJaggedTensor(keys=["a"], values=torch.tensor([0, 1, 2]), lengths=torch.tensor([1, 1]), stride=2)
    with pytest.raises(DataError, match=r"ragged lengths: 2 bags that cover 2 ids.*3 ids"):
        check_ids(long, TABLES)
    uneven = KeyedJaggedTensor(
        keys=["a", "b"], values=torch.tensor([0, 1, 2]), lengths=torch.tensor([1, 1, 1]), stride_per_key_per_rank=[[1], [2]]
    )
    with pytest.raises(DataError, match="differ in stride"):
        select_samples(Batch(torch.zeros(2, 1), uneven, torch.zeros(2)), torch.tensor([0]))


@settings(deadline=None, max_examples=100)
@given(rows=any_samples, weighted=st.booleans(), data=st.data())
def test_select_samples_takes_exactly_these(rows: list[dict[str, Bag]], weighted: bool, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=10) if rows else st.just([]))
    batch = make_batch(rows, weighted=weighted)
    taken = select_samples(batch, torch.tensor(index, dtype=torch.int64))
    everything = unpack(batch)
    assert unpack(taken) == [everything[i] for i in index]
    kjt = taken.sparse_features
    assert kjt.values().dtype == torch.int64
    assert kjt.lengths().dtype == torch.int32
    assert (kjt.weights_or_none() is not None) == weighted


def test_select_samples_does_not_share_memory_with_the_batch() -> None:
    batch = make_batch([{"a": [0], "b": [2], "c": [1], "d": [0], "ignored": [4]}])
    taken = select_samples(batch, torch.tensor([0]))
    batch.sparse_features.values().zero_()
    batch.labels.fill_(9)
    assert taken.sparse_features.values().tolist() == [0, 2, 1, 0, 4]
    assert taken.labels.tolist() == [0]


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(any_samples, min_size=1, max_size=4), weighted=st.booleans())
def test_concat_batches_keeps_all_samples_in_order(parts: list[list[dict[str, Bag]]], weighted: bool) -> None:
    batches, start = [], 0
    for rows in parts:
        batches.append(make_batch(rows, weighted=weighted, start=start))
        start += len(rows)
    joined = concat_batches(batches)
    assert joined.sparse_features.stride() == start
    assert unpack(joined) == [row for batch in batches for row in unpack(batch)]


def test_concat_batches_refuses_what_cannot_be_joined() -> None:
    row: dict[str, Bag] = {"a": [0], "b": [2]}
    one, other = make_batch([row], keys=("a", "b")), make_batch([row], keys=("b", "a"))
    with pytest.raises(DataError, match="at least one"):
        concat_batches([])
    with pytest.raises(DataError, match=r"\['a', 'b'\] and \['b', 'a'\]"):
        concat_batches([one, other])
    with pytest.raises(DataError, match="1 of 2 batches have per-sample weights"):
        concat_batches([one, make_batch([row], keys=("a", "b"), weighted=True)])


def test_cutting_and_joining_drop_the_promise() -> None:
    batch = make_batch([{"a": [0], "b": [2], "c": [1], "d": [], "ignored": [4]}], weighted=True)
    hot = Batch(batch.dense_features, HotKeyedJaggedTensor.promise(batch.sparse_features), batch.labels)
    assert is_hot_batch(hot)
    for made in (select_samples(hot, torch.tensor([0])), concat_batches([hot]), concat_batches([hot, hot]), plain_batch(hot)):
        assert not is_hot_batch(made)
        assert unpack(made)[0] == unpack(batch)[0]
    assert plain_batch(batch) is batch


@pytest.mark.parametrize("one_hot", [True, False])
def test_int32_ids_are_taken_as_torchrecs_own_loader_gives_them(one_hot: bool) -> None:
    rows: list[dict[str, Bag]] = [{"a": [0], "b": [2 + i % 3], "c": [1 + i % 2], "d": [0] if one_hot or i else []} for i in range(8)]
    wide = make_batch(rows, keys=("a", "b", "c", "d"))
    kjt = wide.sparse_features
    narrow = KeyedJaggedTensor(keys=kjt.keys(), values=kjt.values().int(), lengths=kjt.lengths(), stride=8)
    assert hot_samples(narrow, PLACEMENT).tolist() == hot_samples(kjt, PLACEMENT).tolist()
    narrow.values()[3] = -1
    with pytest.raises(DataError, match="id -1"):
        hot_samples(narrow, PLACEMENT)


def test_a_missing_feature_of_one_hot_samples_is_named() -> None:
    with pytest.raises(DataError, match="'d' of table"):
        hot_samples(make_batch([{"a": [0], "b": [2], "c": [1]}], keys=("a", "b", "c")).sparse_features, PLACEMENT)
