"""Hot sets: by hand, and against the definition computed row by row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core import histogram
from fae_torchrec.core.errors import BudgetError, ConfigError, DataError, FingerprintError
from fae_torchrec.core.hot_set import HotSet, hot_inputs_curve, pinned_tables, select_hot_set
from fae_torchrec.core.popularity import PopularityProfile, ProbeSample
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec

# Rows of 4, 8 and 12 bytes.
SPECS = [("a", 1), ("b", 2), ("c", 3)]


def _profile(*counts: list[int]) -> PopularityProfile:
    """One table per list of counts; the probe holds one sample that looks up row 0 of every table."""
    tables = TableSet(
        tuple(
            TableSpec(name, len(rows), dim, (f"f_{name}",), optimizer=Optimizer.SGD)
            for (name, dim), rows in zip(SPECS, counts, strict=False)
        )
    )
    features = [feature for _, feature in tables.lookups]
    return PopularityProfile(
        tables=tables,
        counts={table.name: np.array(rows, dtype=np.int64) for table, rows in zip(tables, counts, strict=True)},
        probe=ProbeSample({f: np.zeros(1, np.int64) for f in features}, {f: np.ones(1, np.int64) for f in features}, 1),
        num_samples=10,
        total_samples=200,
        sample_rate=0.05,
        seed=7,
        source="by hand",
    )


def _hot(hot_set: HotSet) -> dict[str, list[int]]:
    return {name: ids.tolist() for name, ids in hot_set.hot_ids.items()}


def _by_definition(profile: PopularityProfile, budget: int, pinned_max_rows: int) -> tuple[dict[str, list[int]], int]:
    """The selection as its docstring states it, one row and one threshold at a time."""
    tables = profile.tables
    hot = {t.name: set(range(t.rows)) if t.rows <= pinned_max_rows else set() for t in tables}
    left = budget - sum(t.total_bytes for t in tables if t.rows <= pinned_max_rows)
    rows = [(t, row, int(profile.counts[t.name][row])) for t in tables if t.rows > pinned_max_rows for row in range(t.rows)]
    threshold = 1
    while sum(t.row_bytes for t, _, count in rows if count >= threshold) > left:
        threshold += 1
    for t, row, count in rows:
        if count >= threshold:
            hot[t.name].add(row)
            left -= t.row_bytes
    for t, row, count in rows:
        if count == threshold - 1 >= 1 and t.row_bytes <= left:
            hot[t.name].add(row)
            left -= t.row_bytes
    return {name: sorted(ids) for name, ids in hot.items()}, threshold


def test_the_most_accessed_rows_of_all_tables_by_hand() -> None:
    profile = _profile([9, 1, 7, 0, 3], [0, 8, 3, 3, 3])  # rows of 4 and of 8 bytes
    hot_set = select_hot_set(profile, 4 + 8 + 4, pinned_max_rows=0)  # 9, 8 and 7
    assert _hot(hot_set) == {"a": [0, 2], "b": [1]}
    assert (hot_set.threshold, hot_set.used_bytes, hot_set.budget_bytes, hot_set.pinned) == (4, 16, 16, ())
    assert hot_set.coverage == 24 / 37 and hot_set.policy == "threshold" and hot_set.profile_fingerprint == profile.fingerprint


def test_ties_fill_the_rest_in_table_order_then_by_id() -> None:
    profile = _profile([9, 1, 7, 0, 3], [0, 8, 3, 3, 3])
    # 13 bytes are left of 29: row 4 of a (4 bytes), row 2 of b (8 bytes), one byte stays unused.
    hot_set = select_hot_set(profile, 29, pinned_max_rows=0)
    assert _hot(hot_set) == {"a": [0, 2, 4], "b": [1, 2]}
    assert (hot_set.threshold, hot_set.used_bytes) == (4, 28)


def test_a_table_whose_row_does_not_fit_is_passed_over() -> None:
    profile = _profile([1, 1], [2, 2, 2], [2, 2])
    swapped = replace(profile, tables=TableSet(profile.tables.tables[::-1]))  # rows of 12, 8, 4 bytes
    hot_set = select_hot_set(swapped, 11, pinned_max_rows=0)
    assert _hot(hot_set) == {"c": [], "b": [0], "a": []}  # 3 bytes are left, and a's rows are below the ties' count


def test_rows_never_seen_are_never_hot() -> None:
    hot_set = select_hot_set(_profile([0, 2, 0], [0, 0, 0]), 10**9, pinned_max_rows=0)
    assert _hot(hot_set) == {"a": [1], "b": []}
    assert (hot_set.threshold, hot_set.used_bytes, hot_set.coverage) == (1, 4, 1.0)


def test_small_tables_are_pinned_unseen_rows_included() -> None:
    hot_set = select_hot_set(_profile([0, 0], [9, 8, 7]), 2 * 4 + 8, pinned_max_rows=2)
    assert _hot(hot_set) == {"a": [0, 1], "b": [0]}
    assert hot_set.pinned == ("a",) and hot_set.used_bytes == 16


def test_a_table_of_which_every_row_is_selected_is_all_hot() -> None:
    hot_set = select_hot_set(_profile([5, 6]), 8, pinned_max_rows=0)
    assert _hot(hot_set) == {"a": [0, 1]} and hot_set.pinned == ()


def test_no_budget_at_all_is_no_hot_row() -> None:
    hot_set = select_hot_set(_profile([5, 6], [9, 1]), 0, pinned_max_rows=0)
    assert _hot(hot_set) == {"a": [], "b": []}
    assert (hot_set.threshold, hot_set.used_bytes, hot_set.coverage, hot_set.hot_inputs) == (10, 0, 0.0, 0.0)


def test_too_small_a_budget_says_what_is_needed() -> None:
    profile = _profile([0, 0], [9, 8, 7], [1] * 9)
    assert [t.name for t in pinned_tables(profile.tables, 3)] == ["a", "b"]
    with pytest.raises(BudgetError, match=r"31 bytes.*2 pinned tables.*need 32 bytes"):
        select_hot_set(profile, 31, pinned_max_rows=3)
    assert select_hot_set(profile, 32, pinned_max_rows=3).used_bytes == 32
    with pytest.raises(BudgetError, match="need 0 bytes"):
        select_hot_set(profile, -1, pinned_max_rows=0)
    with pytest.raises(ConfigError, match="at least 0, received -1"):
        select_hot_set(profile, 32, pinned_max_rows=-1)


def test_tables_of_1024_rows_are_pinned_by_default() -> None:
    profile = _profile([0] * 1024, [0] * 1025)
    assert select_hot_set(profile, 10**6).pinned == ("a",)


ROWS = st.lists(st.one_of(st.integers(0, 6), st.just(40)), min_size=1, max_size=8)


@given(st.lists(ROWS, min_size=1, max_size=3), st.integers(0, 200), st.integers(0, 3), st.sampled_from([1, 3, 1 << 16]))
def test_the_selection_is_its_definition(counts: list[list[int]], spare: int, pinned_max_rows: int, clip: int) -> None:
    profile = _profile(*counts)
    budget = sum(t.total_bytes for t in pinned_tables(profile.tables, pinned_max_rows)) + spare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histogram, "_LEVEL_CLIP", clip)  # 1 and 3: most rows are above the clip of the tally
        hot_set = select_hot_set(profile, budget, pinned_max_rows=pinned_max_rows)
    expected, threshold = _by_definition(profile, budget, pinned_max_rows)
    assert _hot(hot_set) == expected and hot_set.threshold == threshold
    assert hot_set.used_bytes == sum(t.row_bytes * len(expected[t.name]) for t in profile.tables) <= budget
    assert hot_set.coverage == profile.coverage(hot_set.hot_ids)
    assert hot_set.hot_inputs == profile.hot_inputs(hot_set.hot_ids)


def test_the_curve_is_the_selection_at_every_budget() -> None:
    profile = _profile([9, 1, 7, 0, 3], [0, 8, 3, 3, 3], [2, 2])
    budgets = [60, 24, 25, 100, 10**6]
    curve = hot_inputs_curve(profile, budgets, pinned_max_rows=2)
    hot_sets = [select_hot_set(profile, budget, pinned_max_rows=2) for budget in budgets]
    assert curve == [(h.used_bytes, h.hot_inputs, h.coverage) for h in hot_sets]
    assert len({used for used, _, _ in curve}) > 2
    with pytest.raises(BudgetError, match="need 24 bytes"):
        hot_inputs_curve(profile, [60, 23], pinned_max_rows=2)


def test_a_saved_hot_set_comes_back(tmp_path: Path) -> None:
    hot_set = select_hot_set(_profile([9, 1, 7, 0, 3], [0, 8]), 20, pinned_max_rows=2)
    hot_set.save(tmp_path / "hot.npz")
    back = HotSet.load(tmp_path / "hot.npz")
    assert _hot(back) == _hot(hot_set) and back.fingerprint == hot_set.fingerprint
    scalars = ("tables", "pinned", "budget_bytes", "used_bytes", "threshold", "policy", "coverage", "hot_inputs", "profile_fingerprint")
    assert [getattr(back, name) for name in scalars] == [getattr(hot_set, name) for name in scalars]


def test_an_altered_hot_set_is_told(tmp_path: Path) -> None:
    path = tmp_path / "hot.npz"
    hot_set = select_hot_set(_profile([9, 1, 7]), 8, pinned_max_rows=0)
    hot_set.save(path)
    with np.load(path) as archive:
        members = dict(archive)
    members["hot_ids.0"][-1] = 1  # [0, 1] instead of [0, 2]: still a set of rows
    np.savez(path, **members)
    with pytest.raises(FingerprintError, match=hot_set.fingerprint):
        HotSet.load(path)
    with pytest.raises(DataError, match="holds a hot set, not a popularity profile"):
        PopularityProfile.load(path)


def test_the_fingerprint_names_the_parent_and_the_selection() -> None:
    hot_set = select_hot_set(_profile([9, 1, 7]), 8, pinned_max_rows=0)
    changes = [{"profile_fingerprint": "x"}, {"budget_bytes": 9}, {"threshold": 3}, {"hot_ids": {"a": np.array([0, 1])}}]
    assert len({hot_set.fingerprint, *(replace(hot_set, **change).fingerprint for change in changes)}) == 5
