"""Hot sets: what a budget buys under both policies, what is always hot and never hot, and the savable value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core.candidates import pinned_tables
from fae_torchrec.core.errors import BudgetError, ConfigError, DataError, FingerprintError
from fae_torchrec.core.hot_set import POLICIES, HotSet, Policy, hot_inputs_curve, select_hot_set, threshold_curve
from fae_torchrec.core.popularity import PopularityProfile
from tests.core.small_profiles import Inputs, profile_of_counts, profile_of_inputs, small_tables

both_policies = pytest.mark.parametrize("policy", POLICIES)

# Row 0 of both tables is the most accessed, but no input has both; a1 and b1 come together.
APART: Inputs = [*([[0], [k]] for k in range(2, 7)), *([[k], [0]] for k in range(2, 7)), *([[[1], [1]]] * 4)]


def _hot(hot_set: HotSet) -> dict[str, list[int]]:
    return {name: ids.tolist() for name, ids in hot_set.hot_ids.items()}


def test_the_policies_by_hand() -> None:
    profile = profile_of_inputs(small_tables([9, 9], dims=(1, 1)), APART)
    by_threshold = select_hot_set(profile, 8, policy="threshold", pinned_max_rows=0)
    assert _hot(by_threshold) == {"a": [0], "b": [0]}
    assert (by_threshold.threshold, by_threshold.policy, by_threshold.hot_inputs) == (100 * 5 / 14, "threshold", 0.0)
    assert by_threshold.coverage == 10 / 28
    aware = select_hot_set(profile, 8, pinned_max_rows=0)
    assert _hot(aware) == {"a": [1], "b": [1]}
    assert (aware.threshold, aware.policy, aware.hot_inputs, aware.coverage) == (None, "input_aware", 4 / 14, 8 / 28)
    for hot_set in (by_threshold, aware):
        assert (hot_set.used_bytes, hot_set.budget_bytes, hot_set.pinned) == (8, 8, ())
        assert hot_set.hot_inputs_interval[0] <= hot_set.hot_inputs <= hot_set.hot_inputs_interval[1]
        assert hot_set.profile_fingerprint == profile.fingerprint


def test_there_are_no_other_policies() -> None:
    with pytest.raises(ConfigError, match=r"policy 'random' is not one of \['input_aware', 'threshold'\]"):
        select_hot_set(profile_of_counts([1]), 8, policy="random")  # type: ignore[arg-type]


def test_sizes_estimated_from_chunks_keep_the_budget_and_come_close() -> None:
    """A table of 200,000 rows, Zipf counts: the interval's upper end leaves a part of the budget unused."""
    rows = 200_000
    counts = (50_000 / np.arange(1, rows + 1)).astype(np.int64).tolist()
    profile = profile_of_counts(counts)
    budget = 4 * 1_000
    exact, estimated = (select_hot_set(profile, budget, policy="threshold", sizes=how, pinned_max_rows=0) for how in ("exact", "estimated"))
    assert exact.used_bytes == budget and 0.6 * budget < estimated.used_bytes < budget
    assert set(_hot(estimated)["a"]) < set(_hot(exact)["a"])
    with pytest.raises(ConfigError, match="sizes 'guessed' is not one of"):
        select_hot_set(profile, budget, sizes="guessed")  # type: ignore[arg-type]


def test_hot_inputs_are_those_of_fresh_inputs_where_there_are_any() -> None:
    tables = small_tables([4], dims=(1,))
    fresh: Inputs = [[[0]], [[1]], [[3]], [[3]]]
    hot_set = select_hot_set(profile_of_inputs(tables, [[[0]], [[1]], [[0]]], fresh), 8, pinned_max_rows=0)
    assert _hot(hot_set) == {"a": [0, 1]} and hot_set.hot_inputs == 0.5 and hot_set.coverage == 1.0


def test_input_aware_is_never_worse_than_threshold_on_the_counted_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the search finds: here it finds the worst there is."""
    profile = profile_of_inputs(small_tables([9, 9], dims=(1, 1)), [[[0], [0]]] * 3 + [[[1], [1]]])
    nothing = [np.zeros(4, dtype=np.bool_)]
    monkeypatch.setattr("fae_torchrec.core.hot_set.input_aware_masks", lambda candidates, rooms: nothing)
    hot_set = select_hot_set(profile, 8, pinned_max_rows=0)
    assert _hot(hot_set) == {"a": [0], "b": [0]} and hot_set.threshold == 75.0


@both_policies
def test_rows_never_seen_are_never_hot(policy: Policy) -> None:
    hot_set = select_hot_set(profile_of_counts([0, 2, 0], [0, 0, 0]), 10**9, policy=policy, pinned_max_rows=0)
    assert _hot(hot_set) == {"a": [1], "b": []}
    assert (hot_set.used_bytes, hot_set.coverage) == (4, 1.0)


def test_a_budget_beyond_what_the_sample_tells_apart_is_reported() -> None:
    profile = profile_of_counts([0, 2, 1, 0, 1, 4], [0, 0, 0])
    told = [
        (hot.resolution_reached, hot.resolving_rate) for hot in (select_hot_set(profile, budget, pinned_max_rows=0) for budget in (8, 12))
    ]
    assert told[0] == (False, 0.05), "two rows were seen more than once, and two fit"
    assert told[1][0] and told[1][1] == pytest.approx(0.05 * 1.5), "growth 2 * 1 / 2: half as much again needs a rate of half as much again"


@both_policies
def test_small_tables_are_pinned_unseen_rows_included(policy: Policy) -> None:
    hot_set = select_hot_set(profile_of_counts([0, 0], [9, 8, 7]), 2 * 4 + 8, policy=policy, pinned_max_rows=2)
    assert _hot(hot_set) == {"a": [0, 1], "b": [0]}
    assert hot_set.pinned == ("a",) and hot_set.used_bytes == 16


def test_a_table_of_which_every_row_is_selected_is_all_hot() -> None:
    hot_set = select_hot_set(profile_of_counts([5, 6]), 8, pinned_max_rows=0)
    assert _hot(hot_set) == {"a": [0, 1]} and hot_set.pinned == ()


@both_policies
def test_no_budget_at_all_is_no_hot_row(policy: Policy) -> None:
    hot_set = select_hot_set(profile_of_counts([5, 6], [9, 1]), 0, policy=policy, pinned_max_rows=0)
    assert _hot(hot_set) == {"a": [], "b": []}
    assert (hot_set.threshold, hot_set.used_bytes, hot_set.coverage, hot_set.hot_inputs) == (None, 0, 0.0, 0.0)


def test_a_budget_is_a_whole_number_of_any_type(tmp_path: Path) -> None:
    """Not a number would hold everything: no sum of bytes exceeds it."""
    profile = profile_of_counts([5, 0, 2], [0, 0, 7, 1])
    for budget in (float("nan"), 1e3):
        with pytest.raises(ConfigError, match="whole number of bytes"):
            select_hot_set(profile, budget, pinned_max_rows=0)  # type: ignore[arg-type]
    hot_set = select_hot_set(profile, np.int64(8), pinned_max_rows=0)  # type: ignore[arg-type]
    hot_set.save(tmp_path / "hot.npz")
    assert HotSet.load(tmp_path / "hot.npz").fingerprint == hot_set.fingerprint


def test_too_small_a_budget_says_what_is_needed() -> None:
    profile = profile_of_counts([0, 0], [9, 8, 7], [1] * 9)
    assert [t.name for t in pinned_tables(profile.tables, 3)] == ["a", "b"]
    with pytest.raises(BudgetError, match=r"31 bytes.*2 pinned tables.*need 32 bytes"):
        select_hot_set(profile, 31, pinned_max_rows=3)
    assert select_hot_set(profile, 32, pinned_max_rows=3).used_bytes == 32
    with pytest.raises(BudgetError, match="need 0 bytes"):
        select_hot_set(profile, -1, pinned_max_rows=0)
    with pytest.raises(ConfigError, match="at least 0, received -1"):
        select_hot_set(profile, 32, pinned_max_rows=-1)


def test_tables_of_1024_rows_are_pinned_by_default() -> None:
    profile = profile_of_counts([0] * 1024, [0] * 1025)
    assert select_hot_set(profile, 10**6).pinned == ("a",)


ROWS = st.lists(st.one_of(st.integers(0, 6), st.just(40)), min_size=1, max_size=8)


@both_policies
@given(counts=st.lists(ROWS, min_size=1, max_size=3), spare=st.integers(0, 200), pinned_max_rows=st.integers(0, 3))
def test_a_budget_is_kept_and_what_is_said_of_a_set_is_true(
    policy: Policy, counts: list[list[int]], spare: int, pinned_max_rows: int
) -> None:
    profile = profile_of_counts(*counts)
    budget = sum(t.total_bytes for t in pinned_tables(profile.tables, pinned_max_rows)) + spare
    hot_set = select_hot_set(profile, budget, policy=policy, pinned_max_rows=pinned_max_rows)
    hot = _hot(hot_set)
    assert hot_set.used_bytes == sum(t.row_bytes * len(hot[t.name]) for t in profile.tables) <= budget
    assert hot_set.coverage == profile.coverage(hot_set.hot_ids)
    assert hot_set.hot_inputs == profile.hot_inputs(hot_set.hot_ids).value
    unseen = [
        (t.name, row) for t in profile.tables if t.rows > pinned_max_rows for row in hot[t.name] if not profile.counts[t.name].dense()[row]
    ]
    assert unseen == []


@both_policies
def test_the_curve_is_the_selection_at_every_budget(policy: Policy) -> None:
    profile = profile_of_counts([9, 1, 7, 0, 3], [0, 8, 3, 3, 3], [2, 2])
    budgets = [60, 24, 25, 100, 10**6]
    curve = hot_inputs_curve(profile, budgets, 2, policy=policy)
    hot_sets = [select_hot_set(profile, budget, policy=policy, pinned_max_rows=2) for budget in budgets]
    assert curve == [(h.used_bytes, h.hot_inputs, h.hot_inputs_interval, h.coverage) for h in hot_sets]
    assert len({point.used_bytes for point in curve}) > 2
    with pytest.raises(BudgetError, match="need 24 bytes"):
        hot_inputs_curve(profile, [60, 23], 2, policy=policy)


def test_the_threshold_curve_by_hand() -> None:
    tables = small_tables([4, 4], dims=(1, 1))
    inputs: Inputs = [[[0], [0]], [[0], [0]], [[0], [1]], [[1], [2]]]  # shares: a 75, 25; b 50, 25, 25
    curve = threshold_curve(profile_of_inputs(tables, inputs), pinned_max_rows=0, points=50)
    assert [(p.threshold_percent, p.hot_rows, p.used_bytes, p.hot_inputs, p.coverage) for p in curve] == [
        (75.0, 1, 4, 0.0, 3 / 8),
        (50.0, 2, 8, 0.5, 5 / 8),
        (25.0, 5, 20, 1.0, 1.0),
    ]
    assert [p.threshold_percent for p in threshold_curve(profile_of_inputs(tables, inputs), 0, points=2)] == [75.0, 25.0]
    assert threshold_curve(profile_of_inputs(tables, inputs), pinned_max_rows=4) == []


def test_a_saved_hot_set_comes_back(tmp_path: Path) -> None:
    hot_set = select_hot_set(profile_of_counts([9, 1, 7, 0, 3], [0, 8]), 20, pinned_max_rows=2)
    hot_set.save(tmp_path / "hot.npz")
    back = HotSet.load(tmp_path / "hot.npz")
    assert _hot(back) == _hot(hot_set) and back.fingerprint == hot_set.fingerprint
    scalars = [name for name in HotSet.__dataclass_fields__ if name != "hot_ids"]
    assert [getattr(back, name) for name in scalars] == [getattr(hot_set, name) for name in scalars] and len(scalars) == 12


def test_an_altered_hot_set_is_told(tmp_path: Path) -> None:
    path = tmp_path / "hot.npz"
    hot_set = select_hot_set(profile_of_counts([9, 1, 7]), 8, policy="threshold", pinned_max_rows=0)
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
    hot_set = select_hot_set(profile_of_counts([9, 1, 7]), 8, policy="threshold", pinned_max_rows=0)
    changes = [{"profile_fingerprint": "x"}, {"budget_bytes": 9}, {"threshold": 3}, {"hot_ids": {"a": np.array([0, 1])}}]
    assert len({hot_set.fingerprint, *(replace(hot_set, **change).fingerprint for change in changes)}) == 5
