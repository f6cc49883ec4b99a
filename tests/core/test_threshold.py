"""FAE's selection: by hand, and against its definition, row by row."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core import histogram
from fae_torchrec.core.candidates import Candidates
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.threshold import ThresholdSelector
from tests.core.small_profiles import profile_of_counts

Hot = dict[str, list[int]]


def _select(profile: PopularityProfile, room: int) -> tuple[Hot, float | None]:
    candidates = Candidates(profile, pinned_max_rows=0)
    choice = ThresholdSelector(candidates).select(room)
    return {name: ids.tolist() for name, ids in candidates.hot_ids(choice.hot).items()}, choice.threshold


def test_the_largest_shares_of_all_tables_by_hand() -> None:
    # Shares of 20 and of 20 accesses; rows of 4 and of 8 bytes.
    profile = profile_of_counts([9, 1, 7, 0, 3], [0, 8, 4, 4, 4])
    assert _select(profile, 4 + 8 + 4) == ({"a": [0, 2], "b": [1]}, 35.0)


def test_a_share_counts_not_an_access() -> None:
    """Table b has ten times the traffic: 20 accesses there are as much as 2 in a (FAE: H = t * T * x / 100 with the table's own T)."""
    profile = profile_of_counts([2, 3, 5], [20, 30, 50])
    assert _select(profile, 4 + 8) == ({"a": [2], "b": [2]}, 50.0)
    assert _select(profile, 2 * (4 + 8)) == ({"a": [1, 2], "b": [1, 2]}, 30.0)


def test_ties_fill_the_rest_in_table_order_then_by_id() -> None:
    profile = profile_of_counts([9, 1, 7, 0, 3], [0, 11, 3, 3, 3])
    # 13 bytes are left of 29: row 4 of a (4 bytes), row 2 of b (8 bytes), one byte stays unused.
    assert _select(profile, 29) == ({"a": [0, 2, 4], "b": [1, 2]}, 35.0)


def test_a_table_whose_row_does_not_fit_is_passed_over() -> None:
    assert _select(profile_of_counts([1, 1], [1, 1], [1, 1]), 4 + 4 + 9) == ({"a": [0, 1], "b": [0], "c": []}, None)


def test_rows_never_seen_are_never_hot() -> None:
    assert _select(profile_of_counts([0, 2, 0], [0, 0, 0]), 10**9) == ({"a": [1], "b": []}, 100.0)


def test_no_room_is_no_hot_row() -> None:
    assert _select(profile_of_counts([5, 6], [9, 1]), 0) == ({"a": [], "b": []}, None)


def test_the_rows_at_a_threshold_by_hand() -> None:
    candidates = Candidates(profile_of_counts([2, 3, 5], [20, 30, 50]), pinned_max_rows=0)
    selector = ThresholdSelector(candidates)
    assert selector.levels.tolist() == [50.0, 30.0, 20.0] and selector.bytes_to.tolist() == [12, 24, 36]
    assert selector.at(30.0).tolist() == [False, True, True] * 2
    assert selector.at(30.0001).tolist() == [False, False, True] * 2
    assert not selector.at(51).any() and selector.at(0).all()


def _by_definition(profile: PopularityProfile, room: int) -> Hot:
    """One row and one threshold at a time, in exact fractions."""
    rows = [
        (table, row, Fraction(count, profile.counts[table.name].total))
        for table in profile.tables
        for row, count in enumerate(profile.counts[table.name].dense().tolist())
        if count
    ]
    hot: Hot = {table.name: [] for table in profile.tables}
    for share in sorted({share for _, _, share in rows}, reverse=True):
        level = [(table, row) for table, row, at in rows if at == share]
        whole = sum(table.row_bytes for table, _ in level) <= room
        for table, row in level:
            if table.row_bytes <= room:
                hot[table.name].append(row)
                room -= table.row_bytes
        if not whole:
            break
    return {name: sorted(ids) for name, ids in hot.items()}


ROWS = st.lists(st.one_of(st.integers(0, 6), st.just(40)), min_size=1, max_size=8)


@given(st.lists(ROWS, min_size=1, max_size=3), st.integers(0, 200), st.sampled_from([1, 3, 1 << 16]))
def test_the_selection_is_its_definition(counts: list[list[int]], room: int, clip: int) -> None:
    profile = profile_of_counts(*counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histogram, "_LEVEL_CLIP", clip)  # 1 and 3: most rows are above the clip of the tally
        hot, threshold = _select(profile, room)
    assert hot == _by_definition(profile, room)
    assert sum(table.row_bytes * len(hot[table.name]) for table in profile.tables) <= room
    if threshold is not None:
        above = ThresholdSelector(Candidates(profile, 0)).at(threshold)
        assert np.count_nonzero(above) <= sum(map(len, hot.values()))
