"""BagSplit against a reference that walks the ids one by one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.modules import slot_index
from fae_torchrec.modules.bag_split import BagSplit
from fae_torchrec.modules.lookups import hot_groups
from fae_torchrec.modules.slot_index import COMPACT_ABOVE_ROWS, BitmapSlotIndex, DenseSlotIndex, HashSlotIndex
from fae_torchrec.modules.tier_split import TieredIds
from tests.modules.small_tables import ALL_COLD, ALL_HOT, FEATURES, HOT, KEYS, ROWS, batch, configs, placement_of

CPU = torch.device("cpu")
Bags = dict[str, list[list[int]]]


class Part(NamedTuple):
    """The bags of one lookup in one tier: ids or slots, and their weights."""

    ids: list[list[int]]
    weights: list[list[float]]


def new_split(
    tables: list[EmbeddingBagConfig],
    placement: RowPlacement,
    mode: BoundsCheckMode = BoundsCheckMode.IGNORE,
    compact: int = COMPACT_ABOVE_ROWS,
) -> BagSplit:
    return BagSplit(hot_groups(tables, placement), tables, placement, CPU, mode, compact)


def reference(
    bags: Bags, weights: Mapping[str, list[list[float]]], placement: RowPlacement, split: BagSplit
) -> tuple[dict[str, Part], dict[str, Part]]:
    """Hot parts (rows of the group's merged table) and cold parts (ids) by lookup key, one id at a time; an id beyond its table is 0."""
    first_slot = {}
    for group in split.groups:
        slot = 1
        for table, rows in group.tables:
            first_slot[table] = slot
            slot += rows
    hot: dict[str, Part] = {}
    cold: dict[str, Part] = {}
    for table, features in FEATURES.items():
        slot_of = {row: slot for slot, row in enumerate(placement.hot_ids[table].tolist())}
        for feature in features:
            parts = {True: Part([], []), False: Part([], [])}
            for bag, bag_weights in zip(bags[feature], weights[feature], strict=True):
                for part in parts.values():
                    part.ids.append([])
                    part.weights.append([])
                for raw, weight in zip(bag, bag_weights, strict=True):
                    i = raw if 0 <= raw < ROWS[table] else 0
                    parts[True].ids[-1].append(first_slot[table] + slot_of[i] if i in slot_of else 0)
                    parts[True].weights[-1].append(weight)
                    if i not in slot_of:
                        parts[False].ids[-1].append(i)
                        parts[False].weights[-1].append(weight)
            hot[f"{feature}@{table}"], cold[f"{feature}@{table}"] = parts[True], parts[False]
    return hot, cold


def hot_parts(split: BagSplit, ids: TieredIds, samples: int) -> dict[str, Part]:
    """The hot bags as nested lists, by lookup."""
    parts = {}
    for group, bags in zip(split.groups, ids.hot, strict=True):
        cuts = bags.offsets.tolist()
        weights = [1.0] * bags.slots.numel() if bags.weights is None else bags.weights.tolist()
        assert len(cuts) == samples * len(group.lookups) + 1
        for position, lookup in enumerate(group.lookups):
            of_lookup = [sample * len(group.lookups) + position for sample in range(samples)]
            parts[lookup.key] = Part(
                [bags.slots[cuts[bag] : cuts[bag + 1]].tolist() for bag in of_lookup],
                [weights[cuts[bag] : cuts[bag + 1]] for bag in of_lookup],
            )
    return parts


def cold_parts(split: BagSplit, ids: TieredIds, samples: int) -> dict[str, Part]:
    """The packed cold bags unpacked again, by lookup; checks that no bag with a cold id follows an empty one."""
    if ids.cold is None or ids.cold_at is None:
        return {}
    parts = {}
    for lookup, at in zip(split.cold_lookups, ids.cold_at.tolist(), strict=True):
        jagged = ids.cold.to_dict()[lookup.key]
        lengths = jagged.lengths().tolist()
        assert lengths == sorted(lengths, key=lambda length: length == 0), "packed"
        weights = jagged.weights_or_none()
        values = jagged.values().split(lengths)
        weighted = [torch.ones(length) for length in lengths] if weights is None else weights.split(lengths)
        part = Part([[] for _ in range(samples)], [[] for _ in range(samples)])
        for sample, value, weight in zip(at, values, weighted, strict=True):
            assert 0 <= sample < samples
            if value.numel():
                assert not part.ids[sample], "a sample's bag once"
                part.ids[sample], part.weights[sample] = value.tolist(), weight.tolist()
        parts[lookup.key] = part
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
    compact=st.sampled_from([COMPACT_ABOVE_ROWS, 0]),
    hashed=st.booleans(),
)
def test_every_id_goes_to_its_tier_once(
    bags: Bags, hot: Mapping[str, list[int]], weighted: bool, dtype: torch.dtype, keys: list[str], compact: int, hashed: bool
) -> None:
    bags = {**bags, "unused": [[1] for _ in bags["a"]]}
    samples = len(bags["a"])
    count = sum(len(bag) for key in keys for bag in bags[key])
    flat = torch.arange(count, dtype=torch.float32) / 8
    numbers = iter(flat.tolist())
    weights = {key: [[next(numbers) if weighted else 1.0 for _ in bag] for bag in bags[key]] for key in keys}
    tables = configs()
    placement = placement_of(tables, hot)
    kjt = batch(bags, keys=keys, dtype=dtype, weights=flat if weighted else None)
    given_ids = kjt.values().clone()
    # As on a GPU where few rows are hot.
    with mock.patch.object(slot_index, "slot_index_kind", return_value=HashSlotIndex) if hashed else nullcontext():
        split = new_split(tables, placement, compact=compact)
    assert isinstance(split.index, HashSlotIndex if hashed else DenseSlotIndex if compact else BitmapSlotIndex)
    ids = split(kjt)
    expected_hot, expected_cold = reference(bags, weights, placement, split)
    assert hot_parts(split, ids, samples) == expected_hot
    assert cold_parts(split, ids, samples) == {lookup.key: expected_cold[lookup.key] for lookup in split.cold_lookups}
    widest = max((sum(1 for bag in expected_cold[x.key].ids if bag) for x in split.cold_lookups), default=1)
    assert ids.cold is None or ids.cold.stride() == max(widest, 1), "no more bags than the lookup with the most"
    assert ids.misses.tolist() == [0]
    assert ids.lengths is None
    assert torch.equal(kjt.values(), given_ids), "the batch itself is left as it was"


@settings(max_examples=50, deadline=None)
@given(bags=batches(), hot=st.sampled_from([HOT, ALL_HOT]))
def test_a_promise_is_counted_against(bags: Bags, hot: Mapping[str, list[int]]) -> None:
    tables = configs()
    placement = placement_of(tables, hot)
    split = new_split(tables, placement)
    raw, promised = split(batch(bags)), split(batch(bags), promised_hot=True)
    cold = 0 if raw.cold is None else raw.cold.values().numel()
    assert promised.misses.tolist() == [cold]
    assert promised.misses.dtype == torch.int64
    assert promised.cold is None and promised.cold_at is None
    if not cold:
        samples = len(bags["a"])
        assert hot_parts(split, promised, samples) == hot_parts(split, raw, samples)


def test_an_id_beyond_its_table_is_an_error_where_it_is_one_for_stock() -> None:
    tables = configs()
    split = new_split(tables, placement_of(tables), BoundsCheckMode.FATAL)
    bags: Bags = {"a": [[1]], "b": [[2, 12]], "c": [[8]], "d": [[0]]}
    with pytest.raises(RuntimeError, match="num_rows"):
        split(batch(bags))


def test_groups_hold_tables_of_one_dim_and_have_room_for_all_cold_ones() -> None:
    tables = configs(PoolingType.MEAN)
    groups = hot_groups(tables, placement_of(tables))
    assert [(group.dim, group.tables) for group in groups] == [(3, (("big", 3),)), (2, (("tiny", 4), ("other", 2)))]
    assert [[lookup.key for lookup in group.lookups] for group in groups] == [["b@big", "c@big", "d@frozen"], ["a@tiny", "c@other"]]
    names = [lookup.name for group in groups for lookup in group.lookups]
    assert names == ["b", "c@big", "d", "a", "c@other"], "stock names: only shared features are qualified"
    assert all(lookup.mean for group in groups for lookup in group.lookups)
    apart = hot_groups(tables, placement_of(tables), alike=lambda config: config.name)
    assert [group.tables for group in apart] == [(("big", 3),), (("tiny", 4),), (("other", 2),)]


def test_the_length_of_the_whole_bag_comes_along_for_means() -> None:
    tables = configs()
    tables[0].pooling = PoolingType.MEAN  # big
    bags = {"a": [[1, 1], []], "b": [[0, 1, 2], []], "c": [[5], [3, 8]], "d": [[], [1, 2, 3, 4]]}
    ids = new_split(tables, placement_of(tables))(batch(bags))
    assert ids.lengths is not None
    assert ids.lengths.tolist() == [[3, 1, 0, 2, 1], [0, 2, 4, 0, 2]]  # b@big, c@big, d@frozen, a@tiny, c@other


def test_batches_with_other_orders_of_keys_and_sizes() -> None:
    tables = configs()
    split = new_split(tables, placement_of(tables))
    bags = {"a": [[1]], "b": [[5, 2]], "c": [[8]], "d": [[6]], "z": [[0]]}
    expected = hot_parts(split, split(batch(bags)), 1), cold_parts(split, split(batch(bags)), 1)
    for keys in (["d", "c", "b", "a"], ["z", "a", "b", "c", "d"], KEYS, ["b", "z", "d", "a", "c"]):
        ids = split(batch(bags, keys=keys))
        assert (hot_parts(split, ids, 1), cold_parts(split, ids, 1)) == expected, keys
    for size in range(1, 12):
        ids = split(batch({key: value * size for key, value in bags.items()}))
        assert cold_parts(split, ids, size) == {key: Part(x.ids * size, x.weights * size) for key, x in expected[1].items()}


def test_a_batch_without_samples() -> None:
    tables = configs(PoolingType.MEAN)
    none = KeyedJaggedTensor(KEYS, torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int32), stride=0)
    ids = new_split(tables, placement_of(tables))(none)
    assert [bags.offsets.tolist() for bags in ids.hot] == [[0], [0]]
    assert ids.lengths is not None and ids.lengths.shape == (0, 5)


def test_missing_features_are_named() -> None:
    tables = configs()
    split = new_split(tables, placement_of(tables))
    bags: Bags = {"a": [[1]], "d": [[1]]}
    with pytest.raises(DataError, match=r"lacks the features \['b', 'c'\]; it has \['a', 'd'\]; feed every feature"):
        split(batch(bags, keys=["a", "d"]))


def test_variable_stride_is_refused() -> None:
    tables = configs()
    ragged = KeyedJaggedTensor(
        KEYS, torch.zeros(5, dtype=torch.int64), lengths=torch.ones(5, dtype=torch.int32), stride_per_key_per_rank=[[1], [2], [1], [1]]
    )
    with pytest.raises(DataError, match=r"variable stride.*leave these tables to stock sharding \(stock_tables\)"):
        new_split(tables, placement_of(tables))(ragged)


def test_the_index_is_small_and_not_saved() -> None:
    tables = configs()
    split = new_split(tables, placement_of(tables))
    assert split.state_dict() == {}
    assert split.index_bytes == 4 * sum(ROWS.values())
