"""SequenceSplit against a reference that walks the ids one by one, and its rows joined again."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.modules.lookups import hot_groups
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.modules.sequence_split import SequenceIds, SequenceSplit, join_rows
from tests.modules.small_tables import ALL_COLD, ALL_HOT, FEATURES, HOT, KEYS, ROWS, batch, placed

CPU = torch.device("cpu")
DIM = 3
ORDER = ("big", "tiny", "frozen", "other")
Bags = dict[str, list[list[int]]]


def sequence_configs() -> list[EmbeddingConfig]:
    return [EmbeddingConfig(name=n, num_embeddings=ROWS[n], embedding_dim=DIM, feature_names=FEATURES[n]) for n in ORDER]


def placement_of(hot: Mapping[str, list[int]] = HOT) -> RowPlacement:
    return placed(model_tables(EmbeddingCollection(sequence_configs(), torch.device("meta"))), hot)


def new_split(placement: RowPlacement, *, two_groups: bool = False, mode: BoundsCheckMode = BoundsCheckMode.IGNORE) -> SequenceSplit:
    tables = sequence_configs()
    groups = hot_groups(tables, placement, lambda config: config.name == "other" if two_groups else None)
    return SequenceSplit(groups, tables, placement, CPU, mode)


@st.composite
def batches(draw: st.DrawFn) -> Bags:
    """Bags by feature; ids also beyond every table on both sides."""
    size = draw(st.integers(1, 4))
    ids = st.integers(-3, 16) | st.sampled_from([0, 3, 5, 8, 11, 10**6])
    return {key: draw(st.lists(st.lists(ids, max_size=4), min_size=size, max_size=size)) for key in KEYS}


def reference(bags: Bags, placement: RowPlacement, split: SequenceSplit) -> tuple[list[list[list[int]]], list[int], dict[str, list[int]]]:
    """By group, the row of the merged table for every id; where cold ids stand among all; cold ids by lookup."""
    hot: list[list[list[int]]] = []
    cold_at: list[int] = []
    cold: dict[str, list[int]] = {lookup.key: [] for lookup in split.cold_lookups}
    count = 0
    for group in split.groups:
        first, slot_of = 1, {}
        for table, rows in group.tables:
            slot_of.update({(table, row): first + slot for slot, row in enumerate(placement.hot_ids[table].tolist())})
            first += rows
        hot.append([])
        for lookup in group.lookups:
            for id_or_not in (i for bag in bags[lookup.feature] for i in bag):
                i = id_or_not if 0 <= id_or_not < ROWS[lookup.table] else 0
                slot = slot_of.get((lookup.table, i))
                hot[-1].append([slot or 0])
                if slot is None:
                    cold_at.append(count)
                    cold[lookup.key].append(i)
                count += 1
    return hot, cold_at, cold


def hot_slots(ids: SequenceIds) -> list[list[list[int]]]:
    parts = []
    for bags in ids.hot:
        assert bags.weights is None
        parts.append([slots.tolist() for slots in bags.slots.split(bags.offsets.diff().tolist())])
    return parts


@settings(max_examples=80, deadline=None)
@given(
    bags=batches(),
    hot=st.sampled_from([HOT, ALL_HOT, ALL_COLD]),
    two_groups=st.booleans(),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.int64, torch.int32]),
    keys=st.permutations([*KEYS, "unused"]),
)
def test_every_id_goes_to_its_tier_once(
    bags: Bags, hot: Mapping[str, list[int]], two_groups: bool, weighted: bool, dtype: torch.dtype, keys: list[str]
) -> None:
    placement = placement_of(hot)
    split = new_split(placement, two_groups=two_groups)
    assert len(split.groups) == (2 if two_groups and hot is not ALL_COLD else 1)
    bags = {**bags, "unused": [[1] for _ in bags["a"]]}
    count = sum(len(bag) for key in keys for bag in bags[key])
    kjt = batch(bags, keys=keys, dtype=dtype, weights=torch.rand(count) if weighted else None)
    before = kjt.values().clone()
    ids = split(kjt)
    expected_hot, expected_at, expected_cold = reference(bags, placement, split)
    assert hot_slots(ids) == expected_hot
    if split.cold_lookups:
        assert ids.cold_at.tolist() == expected_at
        assert ids.cold.weights_or_none() is None
        assert ids.cold.values().dtype == torch.int64
        # Lengths and counts are handed to the KeyedJaggedTensor: read them apart.
        lengths = ids.cold.lengths().view(len(split.cold_lookups), -1)
        assert ids.cold.length_per_key() == lengths.sum(1).tolist() == [len(part) for part in expected_cold.values()]
        assert {key: part.values().tolist() for key, part in ids.cold.to_dict().items()} == expected_cold
        assert ids.cold.stride() == len(bags["a"])
    else:
        assert ids.cold is None and ids.cold_at is None and not expected_at
    assert ids.misses.tolist() == [0]
    assert ids.lengths.tolist() == [[len(bag) for bag in bags[lookup.feature]] for lookup in split.lookups]
    assert ids.lengths.dtype == torch.int32
    assert ids.length_per_lookup == ids.lengths.sum(1).tolist()
    assert torch.equal(kjt.values(), before), "the batch itself is left as it was"


@settings(max_examples=40, deadline=None)
@given(bags=batches(), hot=st.sampled_from([HOT, ALL_HOT]), two_groups=st.booleans())
def test_a_promise_is_counted_against(bags: Bags, hot: Mapping[str, list[int]], two_groups: bool) -> None:
    placement = placement_of(hot)
    split = new_split(placement, two_groups=two_groups)
    promised = split(batch(bags), promised_hot=True)
    expected_hot, expected_at, _ = reference(bags, placement, split)
    assert promised.misses.tolist() == [len(expected_at)]
    assert promised.cold is None and promised.cold_at is None
    if not expected_at:
        assert hot_slots(promised) == expected_hot


@pytest.mark.parametrize("two_groups", [False, True])
@pytest.mark.parametrize("hot", [HOT, ALL_HOT, ALL_COLD], ids=["some hot", "all hot", "all cold"])
def test_joined_rows_are_the_tables_rows(hot: Mapping[str, list[int]], two_groups: bool) -> None:
    """Hot ids' rows and zeros from one side, cold ids' rows from the other; gradients reach the row of every id."""
    placement = placement_of(hot)
    split = new_split(placement, two_groups=two_groups)
    bags = {"a": [[1, 3], []], "b": [[5, 2, 5], [11]], "c": [[], [8, 0, 3]], "d": [[6], [6, 0]]}
    stock = EmbeddingCollection(sequence_configs())
    tables = {name: table.weight.detach().clone().requires_grad_() for name, table in stock.embeddings.items()}
    ids = split(batch(bags))
    expected_hot, _, expected_cold = reference(bags, placement, split)
    slot_rows = [
        torch.cat([tables[table][torch.from_numpy(placement.hot_ids[table])] for table, _ in group.tables] or [torch.zeros(0, DIM)])
        for group in split.groups
    ]
    zero = torch.zeros(DIM)
    parts = zip(expected_hot, slot_rows, strict=True)
    hot_rows = torch.stack([rows[slots[0] - 1] if slots[0] else zero for group, rows in parts for slots in group])
    cold = None
    if ids.cold is not None:
        cold = ids.cold.to_dict()
        tables_of = {lookup.key: lookup.table for lookup in split.lookups}
        for key, jagged in cold.items():
            jagged._values = tables[tables_of[key]][torch.tensor(expected_cold[key], dtype=torch.int64)]
    joined = ids.by_lookup(join_rows(hot_rows, cold, ids), split.lookups)
    expected = stock(batch(bags))
    names = {lookup.key: lookup.name for lookup in split.lookups}
    assert list(joined) == [lookup.key for lookup in split.lookups]
    for key, jagged in joined.items():
        assert torch.equal(jagged.values(), expected[names[key]].values()), key
        assert torch.equal(jagged.lengths(), expected[names[key]].lengths()), key
        assert jagged.weights_or_none() is None
    factors = {key: torch.rand(jagged.values().shape) for key, jagged in joined.items()}
    torch.stack([(joined[key].values() * factor).sum() for key, factor in factors.items()]).sum().backward()
    torch.stack([(expected[names[key]].values() * factor).sum() for key, factor in factors.items()]).sum().backward()
    for name, table in stock.embeddings.items():
        torch.testing.assert_close(tables[name].grad, table.weight.grad)


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("promised", [False, True])
def test_a_batch_without_ids(samples: int, promised: bool) -> None:
    split = new_split(placement_of())
    none = KeyedJaggedTensor(KEYS, torch.empty(0, dtype=torch.int64), lengths=torch.zeros(4 * samples, dtype=torch.int32), stride=samples)
    ids = split(none, promised_hot=promised)
    assert [bags.offsets.tolist() for bags in ids.hot] == [[0]]
    assert ids.misses.tolist() == [0]
    assert ids.lengths.shape == (5, samples)
    assert promised or (ids.cold.stride() == samples and not ids.cold.values().numel() and not ids.cold_at.numel())
    rows = ids.by_lookup(torch.zeros(0, DIM), split.lookups)
    assert all(part.values().shape == (0, DIM) and part.lengths().tolist() == [0] * samples for part in rows.values())


def test_batches_with_other_orders_of_keys() -> None:
    split = new_split(placement_of())
    bags = {"a": [[1]], "b": [[5, 2]], "c": [[8]], "d": [[6]], "z": [[0]]}

    def seen(keys: list[str]) -> list[list[int]]:
        ids = split(batch(bags, keys=keys))
        return [ids.hot[0].slots.tolist(), ids.cold.values().tolist(), ids.cold_at.tolist()]

    expected = seen(KEYS)
    # Lookups b@big, c@big, a@tiny, c@other, d@frozen; big's slots 0..2 are rows 0, 5, 11, tiny's 3..6, other's 7 and 8 are rows 3 and 8.
    assert expected == [[2, 0, 0, 5, 9, 0], [2, 8, 6], [1, 2, 5]], "a slot's row is one more, the cold ids' row is 0"
    for keys in (["d", "c", "b", "a"], ["z", "a", "b", "c", "d"], KEYS, ["b", "z", "d", "a", "c"]):
        assert seen(keys) == expected, keys


def test_missing_features_are_named() -> None:
    bags: Bags = {"a": [[1]], "d": [[1]]}
    with pytest.raises(DataError, match=r"lacks the features \['b', 'c'\]; it has \['a', 'd'\]; feed every feature"):
        new_split(placement_of())(batch(bags, keys=["a", "d"]))


def test_variable_stride_is_refused() -> None:
    ragged = KeyedJaggedTensor(
        KEYS, torch.zeros(5, dtype=torch.int64), lengths=torch.ones(5, dtype=torch.int32), stride_per_key_per_rank=[[1], [2], [1], [1]]
    )
    with pytest.raises(DataError, match=r"variable stride.*pass the same number of bags for every feature"):
        new_split(placement_of())(ragged)


def test_it_is_not_saved() -> None:
    assert new_split(placement_of()).state_dict() == {}
