"""The numbering of the rows that may become hot, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fae_torchrec.core.candidates import Candidates, pinned_tables
from fae_torchrec.core.errors import BudgetError, ConfigError, DataError
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec
from tests.core.small_profiles import Inputs, profile_of_counts, profile_of_inputs, sample_of, small_tables


def test_seen_rows_are_numbered_table_after_table() -> None:
    candidates = Candidates(profile_of_counts([5, 0, 2], [0, 0, 7, 1]), pinned_max_rows=0)
    assert candidates.starts.tolist() == [0, 2, 4] and len(candidates) == 4
    assert candidates.counts.tolist() == [5, 2, 7, 1]
    assert candidates.row_bytes.tolist() == [4, 4, 8, 8] and candidates.total_bytes == 24
    hot = candidates.hot_ids(np.array([False, True, True, False]))
    assert {name: ids.tolist() for name, ids in hot.items()} == {"a": [2], "b": [2]}


def test_a_pinned_table_has_no_candidates_and_all_its_ids_are_hot() -> None:
    candidates = Candidates(profile_of_counts([5, 0], [0, 0, 7, 1]), pinned_max_rows=2)
    assert [table.name for table in candidates.pinned] == ["a"] and len(candidates) == 2
    hot = candidates.hot_ids(np.array([False, True]))
    assert {name: ids.tolist() for name, ids in hot.items()} == {"a": [0, 1], "b": [3]}
    assert (candidates.room(8), candidates.room(20)) == (0, 12)
    with pytest.raises(BudgetError, match=r"7 bytes.*1 pinned tables.*need 8 bytes"):
        candidates.room(7)


def test_no_candidates_at_all() -> None:
    for counts, pinned in (([0, 0], 0), ([3, 3], 2)):
        candidates = Candidates(profile_of_counts(counts), pinned)
        assert len(candidates) == 0 and candidates.total_bytes == 0 and candidates.counts.dtype == np.int64
        assert [part.size for part in candidates.incidence(candidates.profile.counted_inputs)] == [0, 0]


def test_a_negative_pinning_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 0, received -1"):
        pinned_tables(small_tables([2]), -1)


def test_more_candidates_than_int32_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fae_torchrec.core.candidates._MOST", 3)
    assert len(Candidates(profile_of_counts([5, 0, 2], [0, 7]), pinned_max_rows=0)) == 3
    with pytest.raises(DataError, match="4 rows were seen, at most 3 can be selected from"):
        Candidates(profile_of_counts([5, 0, 2], [1, 7]), pinned_max_rows=0)


def test_incidence_by_hand() -> None:
    tables = small_tables([4, 3])
    inputs: Inputs = [[[0, 3, 0], []], [[3], [2, 1]], [[], []]]
    candidates = Candidates(profile_of_inputs(tables, inputs), pinned_max_rows=0)  # a0 a3 b1 b2
    at, row = candidates.incidence(sample_of(tables, inputs))
    assert sorted(zip(at.tolist(), row.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3)], (
        "a0 comes twice, and counts once"
    )
    # Inputs of which some rows were never counted: those are left out.
    at, row = candidates.incidence(sample_of(tables, [[[1], [1]], [[3, 2], [0]]]))
    assert sorted(zip(at.tolist(), row.tolist(), strict=True)) == [(0, 2), (1, 1)]


def test_a_row_that_two_features_need_counts_once() -> None:
    tables = TableSet((TableSpec("a", 3, 1, ("x", "y"), optimizer=Optimizer.SGD),))
    profile = profile_of_inputs(small_tables([3]), [[[1]], [[2]]])
    sample = sample_of(small_tables([3, 3]), [[[1], [1]], [[1], [2]]])
    renamed = {"x": sample.values["f_a"], "y": sample.values["f_b"]}
    lengths = {"x": sample.lengths["f_a"], "y": sample.lengths["f_b"]}
    both = type(sample)(renamed, lengths, 2)
    shared = type(profile)(
        tables, profile.counts, both, None, num_samples=2, total_samples=2, sample_rate=1.0, seed=0, source="", skipped={}
    )
    at, row = Candidates(shared, 0).incidence(both)
    assert sorted(zip(at.tolist(), row.tolist(), strict=True)) == [(0, 0), (1, 0), (1, 1)]
