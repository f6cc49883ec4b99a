"""Row ids: ranges and order are checked, slots are found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.row_ids import check_ids, checked_hot_ids, find_slots, hot_bytes
from fae_torchrec.core.tables import TableSet, TableSpec

TABLES = TableSet((TableSpec("a", 4, 8, ("fa",)), TableSpec("b", 3, 4, ("fb",))))


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_ids_in_range_pass() -> None:
    check_ids("a", _ids(0, 3, 3, 1), 4)
    check_ids("a", _ids(), 4)
    check_ids("a", np.zeros((2, 3), dtype=np.int64), 1)
    check_ids("a", np.arange(20, dtype=np.int64)[::-3], 20)


@pytest.mark.parametrize(("bad", "position"), [(4, 2), (-1, 0), (2**62, 1), (-(2**63), 3)])
def test_the_first_id_out_of_range_is_named(bad: int, position: int) -> None:
    ids = _ids(0, 1, 2, 3, -7)
    ids[position] = bad
    with pytest.raises(DataError, match=rf"table 'a': id {bad} \(number {position} of 5\).*0\.\.3"):
        check_ids("table 'a'", ids, 4)


def test_ids_of_another_type_are_refused() -> None:
    with pytest.raises(DataError, match="int64, received float64"):
        check_ids("a", np.zeros(2), 4)


def test_hot_ids_come_back_in_table_order() -> None:
    assert list(checked_hot_ids(TABLES, {"b": _ids(), "a": _ids(0, 2)})) == ["a", "b"]


@pytest.mark.parametrize(
    ("hot_ids", "message"),
    [
        ({"a": _ids(0)}, r"missing \['b'\], unknown \[\]"),
        ({"a": _ids(0), "b": _ids(), "c": _ids()}, r"missing \[\], unknown \['c'\]"),
        ({"a": _ids(0, 4), "b": _ids()}, "'a': id 4 "),
        ({"a": _ids(2, 1), "b": _ids()}, "'a' must be a vector in ascending order"),
        ({"a": _ids(1, 1), "b": _ids()}, "'a' must be a vector in ascending order"),
        ({"a": _ids(1, 2).reshape(1, 2), "b": _ids()}, "'a' must be a vector"),
        ({"a": np.array([0.0]), "b": _ids()}, "'a': ids must be int64"),
    ],
)
def test_hot_ids_that_are_no_sorted_set_are_refused(hot_ids: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        checked_hot_ids(TABLES, hot_ids)


@given(st.sets(st.integers(0, 50)), st.lists(st.integers(0, 50)))
def test_slots_are_positions_among_the_hot_ids(hot: set[int], ids: list[int]) -> None:
    ordered = sorted(hot)
    expected = [ordered.index(i) if i in hot else -1 for i in ids]
    slots = find_slots(_ids(*ordered), _ids(*ids))
    assert slots.dtype == np.int64 and slots.tolist() == expected


def test_slots_keep_the_shape() -> None:
    assert find_slots(_ids(5), _ids(5, 1, 5, 5).reshape(2, 2)).tolist() == [[0, -1], [0, 0]]


def test_hot_bytes_by_hand() -> None:
    assert hot_bytes(TABLES, {"a": _ids(1, 3), "b": _ids(0)}) == 2 * (8 * 4 + 4) + (4 * 4 + 4)
