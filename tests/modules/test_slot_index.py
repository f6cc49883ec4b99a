"""All slot indexes against a dict filled row by row, at the edges of a word, and against their stated bytes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.modules import slot_index
from fae_torchrec.modules.slot_index import BitmapSlotIndex, DenseSlotIndex, HashSlotIndex, new_slot_index, slot_index_kind

CPU = torch.device("cpu")
KINDS = [DenseSlotIndex, BitmapSlotIndex, HashSlotIndex]
Tables = list[tuple[int, list[int]]]  # rows and hot ids of each table


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def build(kind: type, tables: Tables) -> torch.nn.Module:
    return kind([rows for rows, _ in tables], [ids(*hot) for _, hot in tables], CPU)


def slots_by_dict(tables: Tables) -> list[int]:
    """The second, slower method: walk the tables row by row, numbering the hot rows as they come."""
    slot_of: dict[tuple[int, int], int] = {}
    for table, (_, hot) in enumerate(tables):
        for row in hot:
            slot_of[table, row] = len(slot_of)
    return [slot_of.get((table, row), -1) for table, (rows, _) in enumerate(tables) for row in range(rows)]


@st.composite
def some_tables(draw: st.DrawFn) -> Tables:
    tables: Tables = []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129]) | st.integers(0, 300))
        hot = draw(st.sampled_from(["all", "none", "some", "last"]))
        chosen = {"all": set(range(rows)), "none": set(), "last": set(range(rows)[-1:])}
        tables.append((rows, sorted(chosen[hot] if hot in chosen else draw(st.sets(st.integers(0, rows - 1))) if rows else [])))
    return tables


@settings(max_examples=150, deadline=None)
@given(some_tables(), st.randoms(use_true_random=False))
@example([], None)
@example([(1, [0])], None)
@example([(64, [63])], None)
@example([(64, list(range(64)))], None)
@example([(65, [63, 64])], None)
@example([(63, [62]), (2, [0, 1]), (128, [62, 126, 127])], None)
def test_every_slot_is_what_a_dict_says(tables: Tables, random: object) -> None:
    expected = slots_by_dict(tables)
    order = list(range(len(expected))) * 2  # repeats, and (below) any order
    if random is not None:
        random.shuffle(order)  # type: ignore[attr-defined]
    for kind in KINDS:
        found = build(kind, tables)(ids(*order))
        assert found.dtype == (torch.int64 if kind is HashSlotIndex else torch.int32)
        assert found.tolist() == [expected[row] for row in order], kind.__name__


@pytest.mark.parametrize("kind", KINDS)
def test_slots_by_hand(kind: type) -> None:
    index = build(kind, [(3, [1]), (1, []), (2, [0, 1]), (70, [57, 58, 69])])  # the space's rows 63 and 64 are the last table's 57 and 58
    assert index(torch.arange(7)).tolist() == [-1, 0, -1, -1, 1, 2, -1]
    assert index(ids(75, 64, 63, 63, 62)).tolist() == [5, 4, 3, 3, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_random_large_space_against_searchsorted(kind: type) -> None:
    rows = [200_000, 1, 130_001]
    generator = torch.Generator().manual_seed(3)
    hot = [
        torch.nonzero(torch.rand(count, generator=generator) < share).flatten() for count, share in zip(rows, (0.02, 1.0, 0.9), strict=True)
    ]
    keys = torch.cat([hot[0], hot[1] + rows[0], hot[2] + rows[0] + rows[1]])
    row = torch.randint(sum(rows), (50_000,), generator=generator)
    found = torch.searchsorted(keys, row).clamp(max=keys.numel() - 1)
    assert torch.equal(kind(rows, hot, CPU)(row).long(), torch.where(keys[found] == row, found, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_building_in_small_chunks_changes_nothing(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: Tables = [(130, list(range(130))), (70, [3, 63, 64, 69])]
    monkeypatch.setattr(slot_index, "_BUILD_IDS", 3)
    assert build(kind, tables)(torch.arange(200)).tolist() == slots_by_dict(tables)


def test_popcount_of_every_bit_and_of_patterns() -> None:
    signed = [0, -1, 1, -(2**63), 2**63 - 1, 0x5555555555555555, ~0x5555555555555555, *(1 << bit for bit in range(63))]
    expected = [(word & (2**64 - 1)).bit_count() for word in signed]
    assert slot_index._popcount_(ids(*signed)).tolist() == expected


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128, 1_000_000])
@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_bytes_are_as_stated(rows: int, share: float) -> None:
    hot = torch.arange(round(rows * share))
    dense, bitmap = DenseSlotIndex([rows], [hot], CPU), BitmapSlotIndex([rows], [hot], CPU)
    assert dense.index_bytes <= 4 * rows
    assert bitmap.index_bytes <= 1.5 * rows / 8 + 12  # the issue also allows 12 bytes a hot row: a bitmap needs none
    hashed = HashSlotIndex([rows], [hot], CPU)
    assert hashed.index_bytes <= 16 * max(len(hot), 1) + 16
    for index in (dense, bitmap, hashed):
        assert index.index_bytes == index.bytes_of(rows, len(hot))
        assert index.index_bytes == sum(buffer.untyped_storage().nbytes() for buffer in index.buffers())  # no hidden larger storage


def test_small_spaces_are_dense_and_large_ones_bitmaps() -> None:
    tables: Sequence[torch.Tensor] = [ids(0, 5), ids(2)]
    assert isinstance(new_slot_index([6, 4], tables, CPU), DenseSlotIndex)
    assert isinstance(new_slot_index([6, 4], tables, CPU, compact_above_rows=10), DenseSlotIndex)
    assert isinstance(new_slot_index([6, 4], tables, CPU, compact_above_rows=9), BitmapSlotIndex)


def test_on_a_gpu_few_hot_rows_are_hashed() -> None:
    rows = 1_000_000
    for slots, compact, expected in (
        (rows // 17, 2 * rows, HashSlotIndex),  # 16 bytes a hot row, a fourth of 4 bytes a row at most
        (rows // 15, 2 * rows, DenseSlotIndex),
        (rows // 15, rows - 1, BitmapSlotIndex),
        (rows // 17, rows - 1, HashSlotIndex),
        (rows // 17, 0, BitmapSlotIndex),
    ):
        assert slot_index_kind(rows, slots, "cuda", compact) is expected
    assert slot_index_kind(rows, 10, "cpu", 2 * rows) is DenseSlotIndex
    assert slot_index_kind(2**31, 10, "cuda") is BitmapSlotIndex, "the hash holds rows as int32"


@pytest.mark.parametrize("kind", KINDS)
def test_index_is_no_part_of_a_checkpoint_and_follows_its_module(kind: type) -> None:
    index = build(kind, [(70, [0, 63, 69])])
    assert index.state_dict() == {}
    assert list(index.parameters()) == []
    assert copy.deepcopy(index).half()(ids(69, 1)).tolist() == [2, -1]
    assert all(buffer.is_meta for buffer in copy.deepcopy(index).to("meta").buffers())


@pytest.mark.parametrize("kind", [DenseSlotIndex, BitmapSlotIndex])  # the hash finds none there
@pytest.mark.parametrize("row", [-1, 64])
def test_rows_outside_the_space_are_refused_by_the_kernel(kind: type, row: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        build(kind, [(64, [0, 63])])(ids(row))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "hot", "message"),
    [
        ([5], [], "rows of 1 tables and the hot ids of 0"),
        ([5], [ids(1, 5)], r"number 0 run from 1 to 5; allowed: strictly ascending ids in 0\.\.4"),
        ([9, 5], [ids(), ids(-1)], "number 1 run from -1"),
        ([5], [ids(3, 1)], "strictly ascending"),
        ([5], [ids(1, 1)], "strictly ascending"),
        ([5], [ids(1).int()], "int64 vector, received torch.int32"),
        ([5], [ids(1).view(1, 1)], r"received torch.int64 of shape \(1, 1\)"),
    ],
)
def test_wrong_hot_ids_are_errors(kind: type, rows: list[int], hot: list[torch.Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        kind(rows, hot, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_hot_rows_for_int32(kind: type) -> None:
    half = ids(0).expand(2**30)  # takes no memory: the count is refused before anything is read
    with pytest.raises(ConfigError, match=r"2147483648 hot rows.*at most 2147483647"):
        kind([2**30, 2**30], [half, half], CPU)


@pytest.mark.parametrize("buffer", ["words", "before"])
def test_a_single_wrong_bit_is_seen(buffer: str) -> None:
    """The negative control: the comparison above fails for a bitmap with one bit flipped."""
    tables: Tables = [(200, [0, 63, 64, 127, 199])]
    index = build(BitmapSlotIndex, tables)
    getattr(index, buffer)[1] ^= 1
    assert index(torch.arange(200)).tolist() != slots_by_dict(tables)
