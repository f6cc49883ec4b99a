"""TierSplit against a reference that walks the ids one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind
from fae_torchrec.modules.tier_split import TieredIds, TierSplit, lookups_by_tier, tier_configs
from tests.modules.small_tables import ALL_COLD, ALL_HOT, FEATURES, HOT, KEYS, ROWS, batch, configs, placement_of

CPU = torch.device("cpu")
Bags = dict[str, list[list[int]]]


class Part(NamedTuple):
    """The bags of one lookup in one tier: ids or slots, and their weights."""

    ids: list[list[int]]
    weights: list[list[float]]


def reference(bags: Bags, weights: Mapping[str, list[list[float]]], placement: RowPlacement) -> tuple[dict[str, Part], dict[str, Part]]:
    """Hot and cold parts by lookup key, one id at a time."""
    hot: dict[str, Part] = {}
    cold: dict[str, Part] = {}
    for table, features in FEATURES.items():
        slot_of = {row: slot for slot, row in enumerate(placement.hot_ids[table].tolist())}
        kind = placement.kind(table)
        for feature in features:
            parts = {True: Part([], []), False: Part([], [])}
            for bag, bag_weights in zip(bags[feature], weights[feature], strict=True):
                for part in parts.values():
                    part.ids.append([])
                    part.weights.append([])
                for i, weight in zip(bag, bag_weights, strict=True):
                    to_hot = kind is TableKind.HOT or i in slot_of  # an all-hot table has no cold tier to send anything to
                    parts[to_hot].ids[-1].append(slot_of.get(i, i) if to_hot else i)
                    parts[to_hot].weights[-1].append(weight)
            if kind is not TableKind.COLD:
                hot[f"{feature}@{table}"] = parts[True]
            if kind is not TableKind.HOT:
                cold[f"{feature}@{table}"] = parts[False]
    return hot, cold


def parts_of(kjt: KeyedJaggedTensor | None) -> dict[str, Part]:
    """A KeyedJaggedTensor as nested lists."""
    if kjt is None:
        return {}
    parts = {}
    for key, jagged in kjt.to_dict().items():
        lengths = jagged.lengths().tolist()
        weights = jagged.weights_or_none()
        ids = [x.tolist() for x in jagged.values().split(lengths)]
        parts[key] = Part(ids, [[1.0] * len(bag) for bag in ids] if weights is None else [x.tolist() for x in weights.split(lengths)])
    return parts


@st.composite
def batches(draw: st.DrawFn) -> Bags:
    """Bags by feature; ids also beyond every table on both sides."""
    size = draw(st.integers(1, 4))
    ids = st.integers(-3, 16) | st.sampled_from([0, 3, 5, 8, 11, 10**6])
    return {key: draw(st.lists(st.lists(ids, max_size=4), min_size=size, max_size=size)) for key in KEYS}


@settings(max_examples=80, deadline=None)
@given(
    bags=batches(),
    hot=st.sampled_from([HOT, ALL_HOT, ALL_COLD]),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.int64, torch.int32]),
    keys=st.permutations([*KEYS, "unused"]),
)
def test_every_id_goes_to_its_tier_once(
    bags: Bags, hot: Mapping[str, list[int]], weighted: bool, dtype: torch.dtype, keys: list[str]
) -> None:
    bags = {**bags, "unused": [[1] for _ in bags["a"]]}
    count = sum(len(bag) for key in keys for bag in bags[key])
    flat = torch.arange(count, dtype=torch.float32) / 8
    numbers = iter(flat.tolist())
    weights = {key: [[next(numbers) if weighted else 1.0 for _ in bag] for bag in bags[key]] for key in keys}
    tables = configs()
    placement = placement_of(tables, hot)
    kjt = batch(bags, keys=keys, dtype=dtype, weights=flat if weighted else None)
    ids = TierSplit(tables, placement, CPU)(kjt)
    expected_hot, expected_cold = reference(bags, weights, placement)
    assert parts_of(ids.hot) == expected_hot
    assert parts_of(ids.cold) == expected_cold
    assert ids.misses.tolist() == [0]
    assert ids.divisor is None
    for part in (ids.hot, ids.cold):
        assert part is None or part.values().dtype == dtype
        assert part is None or (part.weights_or_none() is not None) == weighted
    assert parts_of(kjt) == {key: Part(bags[key], weights[key]) for key in keys}, "the batch itself is left as it was"


@settings(max_examples=50, deadline=None)
@given(bags=batches(), hot=st.sampled_from([HOT, ALL_HOT]))
def test_a_promise_is_counted_against(bags: Bags, hot: Mapping[str, list[int]]) -> None:
    tables = configs()
    placement = placement_of(tables, hot)
    split = TierSplit(tables, placement, CPU)
    raw, promised = split(batch(bags)), split(batch(bags), promised_hot=True)
    cold = 0 if raw.cold is None else raw.cold.values().numel()
    assert promised.misses.tolist() == [cold]
    assert promised.misses.dtype == torch.int64
    assert promised.cold is None
    assert promised.hot is not None
    assert promised.hot.keys() == raw.hot.keys()
    # A broken promise still gives slots that exist, so that nothing is read out of bounds before the error is raised.
    for key, part in parts_of(promised.hot).items():
        table = key.split("@")[1]
        if placement.kind(table) is TableKind.SPLIT:
            assert all(0 <= slot < placement.hot_rows(table) for bag in part.ids for slot in bag)
    if not cold:
        assert parts_of(promised.hot) == parts_of(raw.hot)


def test_ids_out_of_range_are_never_another_tables_slot() -> None:
    """`big` has 12 rows and hot row 0 of the next split table is its row 3, key 12 + 3 = 15 of the index; and the other way round."""
    tables = configs(order=("big", "other", "tiny", "frozen"))
    bags = {"a": [[]], "b": [[15, 20, -1, 12]], "c": [[-1, -7]], "d": [[]]}
    ids = TierSplit(tables, placement_of(tables), CPU)(batch(bags))
    cold = parts_of(ids.cold)
    assert cold["b@big"].ids == [[15, 20, -1, 12]]
    assert cold["c@other"].ids == [[-1, -7]]
    assert all(not bag for part in parts_of(ids.hot).values() for bag in part.ids)


def test_lookups_and_tier_tables_are_in_tier_order() -> None:
    tables = configs(PoolingType.MEAN)
    placement = placement_of(tables)
    lookups = lookups_by_tier(tables, placement)
    assert [lookup.key for lookup in lookups] == ["a@tiny", "b@big", "c@big", "c@other", "d@frozen"]
    assert [lookup.name for lookup in lookups] == ["a", "b", "c@big", "c@other", "d"], "stock names: only shared features are qualified"
    assert [lookup.dim for lookup in lookups] == [2, 3, 3, 2, 3]
    hot = tier_configs(tables, placement, hot=True)
    cold = tier_configs(tables, placement, hot=False)
    assert [(config.name, config.num_embeddings) for config in hot] == [("tiny", 4), ("big", 3), ("other", 2)]
    assert [(config.name, config.num_embeddings) for config in cold] == [("big", 12), ("other", 9), ("frozen", 7)]
    assert {config.pooling for config in [*hot, *cold]} == {PoolingType.SUM}
    assert hot[1].feature_names == ["b@big", "c@big"]
    assert [config.feature_names for config in tables] == [FEATURES[config.name] for config in tables], (
        "the stock configs stay as they were"
    )


def test_tier_tables_keep_what_else_a_config_says() -> None:
    table = EmbeddingBagConfig(
        name="big", num_embeddings=12, embedding_dim=3, feature_names=["b"], init_fn=torch.nn.init.ones_, need_pos=True
    )
    for hot in (True, False):
        (tier,) = tier_configs([table], placement_of([table]), hot=hot)
        assert tier.init_fn is torch.nn.init.ones_
        assert tier.need_pos


def test_the_divisor_is_the_length_of_the_whole_bag() -> None:
    tables = configs()
    tables[0].pooling = PoolingType.MEAN  # big
    bags = {"a": [[1, 1], []], "b": [[0, 1, 2], []], "c": [[5], [3, 8]], "d": [[], [1, 2, 3, 4]]}
    ids = TierSplit(tables, placement_of(tables), CPU)(batch(bags))
    # columns: a@tiny 2, b@big 3, c@big 3, c@other 2, d@frozen 3
    assert ids.divisor is not None
    assert ids.divisor.tolist() == [[1, 1, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1]]


def _values(ids: TieredIds) -> list[list[int]]:
    return [part.values().tolist() for part in (ids.hot, ids.cold) if part is not None]


def test_batches_with_other_orders_of_keys() -> None:
    tables = configs()
    placement = placement_of(tables)
    split = TierSplit(tables, placement, CPU)
    bags = {"a": [[1]], "b": [[5, 2]], "c": [[8]], "d": [[6]], "z": [[0]]}
    expected = _values(split(batch(bags)))
    for keys in (["d", "c", "b", "a"], ["z", "a", "b", "c", "d"], KEYS, ["b", "z", "d", "a", "c"]):
        assert _values(split(batch(bags, keys=keys))) == expected, keys


def test_a_batch_without_samples() -> None:
    tables = configs(PoolingType.MEAN)
    none = KeyedJaggedTensor(KEYS, torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int32), stride=0)
    ids = TierSplit(tables, placement_of(tables), CPU)(none)
    assert ids.hot is not None and ids.hot.stride() == 0
    assert ids.divisor is not None and ids.divisor.shape == (0, 13)


def test_missing_features_are_named() -> None:
    tables = configs()
    split = TierSplit(tables, placement_of(tables), CPU)
    bags: Bags = {"a": [[1]], "d": [[1]]}
    with pytest.raises(DataError, match=r"lacks the features \['b', 'c'\]; it has \['a', 'd'\]; feed every feature"):
        split(batch(bags, keys=["a", "d"]))


def test_variable_stride_is_refused() -> None:
    tables = configs()
    ragged = KeyedJaggedTensor(
        KEYS, torch.zeros(5, dtype=torch.int64), lengths=torch.ones(5, dtype=torch.int32), stride_per_key_per_rank=[[1], [2], [1], [1]]
    )
    with pytest.raises(DataError, match=r"variable stride.*pass the same number of bags for every feature"):
        TierSplit(tables, placement_of(tables), CPU)(ragged)


def test_the_index_is_small_and_not_saved() -> None:
    tables = configs()
    split = TierSplit(tables, placement_of(tables), CPU)
    assert split.state_dict() == {}
    assert split.hot_keys.tolist() == [0, 5, 11, 12 + 3, 12 + 8]
    assert split.index_bytes == sum(b.numel() * b.element_size() for b in split.buffers()) > 8 * 5
    assert ROWS["tiny"] == 4 and np.all(split.hot_keys.numpy() >= 0)
