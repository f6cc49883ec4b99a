"""Row placements: a bijection between hot rows and slots, whatever the hot set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError, DataError, FingerprintError
from fae_torchrec.core.hot_set import HotSet
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind, TableSet, TableSpec

TABLES = TableSet((TableSpec("all", 3, 8, ("fa",)), TableSpec("some", 6, 4, ("fs",)), TableSpec("none", 5, 4, ("fn",))))


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _placement(some: np.ndarray | None = None, tables: TableSet = TABLES) -> RowPlacement:
    hot_ids = {"all": _ids(0, 1, 2), "some": _ids(1, 4, 5) if some is None else some, "none": _ids()}
    return RowPlacement(tables, hot_ids, hot_set_fingerprint="3f2a", budget_bytes=1000, hot_inputs=0.25, coverage=0.5)


def test_kinds_rows_and_bytes_by_hand() -> None:
    placement = _placement()
    assert [placement.kind(name) for name in TABLES.names] == [TableKind.HOT, TableKind.SPLIT, TableKind.COLD]
    assert [placement.hot_rows(name) for name in TABLES.names] == [3, 3, 0]
    assert placement.hot_bytes == 3 * (8 * 4 + 4) + 3 * (4 * 4 + 4)


def test_slots_and_ids_by_hand() -> None:
    placement = _placement()
    assert placement.slots("some", _ids(0, 1, 2, 3, 4, 5, 4)).tolist() == [-1, 0, -1, -1, 1, 2, 1]
    assert placement.ids("some", _ids(2, 0, 2)).tolist() == [5, 1, 5]
    assert placement.is_hot("some", _ids(0, 1, 5, 1).reshape(2, 2)).tolist() == [[False, True], [True, True]]
    assert placement.is_hot("all", _ids(2, 0)).tolist() == [True, True]
    assert placement.is_hot("none", _ids(4)).tolist() == [False]
    assert placement.ids("none", _ids()).tolist() == []


@given(st.sets(st.integers(0, 5)))
def test_slots_and_ids_undo_each_other(hot: set[int]) -> None:
    placement = _placement(_ids(*sorted(hot)))
    ids = np.arange(6)
    slots = placement.slots("some", ids)
    is_hot = placement.is_hot("some", ids)
    assert {int(i) for i in ids[is_hot]} == hot
    np.testing.assert_array_equal(slots >= 0, is_hot)
    np.testing.assert_array_equal(placement.ids("some", slots[is_hot]), ids[is_hot])
    every_slot = np.arange(placement.hot_rows("some"))
    np.testing.assert_array_equal(placement.slots("some", placement.ids("some", every_slot)), every_slot)
    assert slots.dtype == placement.ids("some", every_slot).dtype == np.int64 and is_hot.dtype == np.bool_


@pytest.mark.parametrize("table", TABLES.names)
@pytest.mark.parametrize("bad", [-1, 6])
def test_ids_that_are_no_rows_are_refused(table: str, bad: int) -> None:
    for ask in (_placement().slots, _placement().is_hot):
        with pytest.raises(DataError, match=rf"'{table}': id {bad} .*0\.\.{TABLES[table].rows - 1}"):
            ask(table, _ids(bad))


def test_slots_that_do_not_exist_are_refused() -> None:
    for slot in (-1, 3):
        with pytest.raises(DataError, match=rf"slots of table 'some': id {slot} .*0\.\.2"):
            _placement().ids("some", _ids(slot))
    with pytest.raises(DataError, match="'none' is all cold"):
        _placement().ids("none", _ids(0))


@pytest.mark.parametrize("some", [_ids(1, 1), _ids(4, 1), _ids(6), _ids(-1), np.array([True])])
def test_what_is_no_bijection_is_refused(some: np.ndarray) -> None:
    with pytest.raises(DataError, match="'some'"):
        _placement(some)


def test_from_hot_set_keeps_the_parent_and_the_forecast() -> None:
    hot_set = HotSet(
        tables=TABLES, hot_ids=_placement().hot_ids, pinned=("all",), budget_bytes=999, used_bytes=168, threshold=4,
        policy="threshold", coverage=0.75, hot_inputs=0.5, hot_inputs_interval=(0.4, 0.6), resolution_reached=False, resolving_rate=0.05,
        profile_fingerprint="p",
    )  # fmt: skip
    placement = RowPlacement.from_hot_set(hot_set)
    assert (placement.hot_set_fingerprint, placement.budget_bytes) == (hot_set.fingerprint, 999)
    assert (placement.coverage, placement.hot_inputs, placement.hot_bytes) == (0.75, 0.5, 168)
    assert placement.hot_inputs_interval == (0.4, 0.6)
    assert placement.fingerprint == _placement().fingerprint  # another parent, the same rows in the same places


def test_the_fingerprint_names_where_rows_are() -> None:
    renamed = TableSet((TABLES["all"], TABLES["some"], TableSpec("none", 5, 4, ("other",))))
    wider = TableSet((TABLES["all"], TABLES["some"], TableSpec("none", 5, 400, ("fn",))))
    moved, other = _placement(_ids(1, 4)), _placement(tables=renamed)
    assert len({_placement().fingerprint, moved.fingerprint, other.fingerprint}) == 3
    assert _placement(tables=wider).fingerprint == _placement().fingerprint


def test_other_tables_are_told_apart() -> None:
    placement = _placement()
    placement.check_tables(TABLES)
    given_tables = TableSet((TABLES["all"], TableSpec("some", 7, 4, ("fs",)), TABLES["none"]))
    with pytest.raises(FingerprintError, match="'some' with 6 rows") as caught:
        placement.check_tables(given_tables)
    assert all(part in str(caught.value) for part in (placement.fingerprint, TABLES.fingerprint, given_tables.fingerprint, "7 rows"))


def test_a_saved_placement_comes_back(tmp_path: Path) -> None:
    placement = _placement()
    placement.is_hot("some", _ids(0))  # the mask is no part of the value
    placement.save(tmp_path / "placement.npz")
    back = RowPlacement.load(tmp_path / "placement.npz")
    assert back.fingerprint == placement.fingerprint and back.tables == TABLES
    assert (back.hot_set_fingerprint, back.budget_bytes, back.hot_inputs, back.coverage) == ("3f2a", 1000, 0.25, 0.5)
    for name in TABLES.names:
        np.testing.assert_array_equal(back.hot_ids[name], placement.hot_ids[name])
        assert back.hot_ids[name].dtype == np.int64


def test_altered_or_missing_placements_are_told(tmp_path: Path) -> None:
    path = tmp_path / "placement.npz"
    with pytest.raises(ConfigError, match="row placement"):
        RowPlacement.load(path)
    _placement().save(path)
    with pytest.raises(DataError, match="holds a row placement, not a hot set"):
        HotSet.load(path)
    with np.load(path) as archive:
        members = dict(archive)
    members["hot_ids.1"][0] = 0
    np.savez(path, **members)
    with pytest.raises(FingerprintError, match=_placement().fingerprint):
        RowPlacement.load(path)
    members["hot_ids.1"][0] = 5
    np.savez(path, **members)
    with pytest.raises(DataError, match=r"placement\.npz: hot ids of table 'some' must be a vector in ascending order"):
        RowPlacement.load(path)
