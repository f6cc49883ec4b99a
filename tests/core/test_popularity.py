"""Popularity profiles: coverage and hot inputs against plain loops, and a file that proves itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core.archive import save_archive
from fae_torchrec.core.errors import ConfigError, DataError, FingerprintError
from fae_torchrec.core.estimate import share_estimate
from fae_torchrec.core.input_sample import InputSample
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_counts import RowCounts
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec

# Feature "x" feeds both tables, table "a" has two features.
TABLES = TableSet((TableSpec("a", 6, 8, ("x", "y")), TableSpec("b", 8, 4, ("x",))))
Bag = list[int]


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _inputs(*inputs: tuple[Bag, Bag]) -> InputSample:
    """Inputs (bag of x, bag of y)."""
    return InputSample(
        values={f: _ids(*(i for bags in inputs for i in bags[n])) for n, f in enumerate("xy")},
        lengths={f: _ids(*(len(bags[n]) for bags in inputs)) for n, f in enumerate("xy")},
        num_samples=len(inputs),
    )


def _counts(*counts: int) -> RowCounts:
    return RowCounts.from_dense(_ids(*counts))


def _profile(fresh: list[tuple[Bag, Bag]] | None = None, **changes: object) -> PopularityProfile:
    return replace(
        PopularityProfile(
            tables=TABLES,
            counts={"a": _counts(5, 0, 3, 1, 0, 1), "b": _counts(0, 0, 4, 0, 0, 0, 0, 6)},
            counted_inputs=_inputs(([0], [3]), ([2], [])),
            fresh_inputs=_inputs(*(fresh or [([0, 2], [3]), ([], [5])])),
            num_samples=40,
            total_samples=800,
            sample_rate=0.05,
            seed=7,
            source="by hand",
            skipped={"day_1": 3, "day_0": 2},
        ),
        **changes,
    )


def test_coverage_by_hand() -> None:
    profile = _profile()
    assert profile.total_accesses == 20
    assert profile.coverage({"a": _ids(0, 1), "b": _ids(7)}) == 11 / 20
    assert profile.coverage({"a": _ids(), "b": _ids()}) == 0
    assert profile.coverage({"a": np.arange(6), "b": np.arange(8)}) == 1


def test_without_accesses_nothing_is_cold() -> None:
    profile = _profile(counts={"a": _counts(*[0] * 6), "b": _counts(*[0] * 8)})
    assert profile.coverage({"a": _ids(), "b": _ids()}) == 1


@given(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 7)))
def test_coverage_is_the_plain_loop(hot_a: set[int], hot_b: set[int]) -> None:
    profile = _profile()
    hot = {"a": _ids(*sorted(hot_a)), "b": _ids(*sorted(hot_b))}
    expected = sum(profile.counts[name].dense()[row] for name in TABLES.names for row in hot[name]) / 20
    assert profile.coverage(hot) == expected


def test_hot_inputs_by_hand() -> None:
    profile = _profile([([0], [1]), ([2, 0], []), ([], []), ([3], [0])])
    every = profile.hot_inputs({"a": np.arange(6), "b": np.arange(8)})
    assert every == share_estimate(4, 4) and every.value == every.high == 1
    assert profile.hot_inputs({"a": _ids(0, 1, 3), "b": np.arange(8)}) == share_estimate(3, 4)  # id 2 of x is cold in a
    assert profile.hot_inputs({"a": np.arange(6), "b": _ids(0, 2)}) == share_estimate(3, 4)  # id 3 of x is hot in a, not in b
    assert profile.hot_inputs({"a": _ids(), "b": _ids()}) == share_estimate(1, 4)  # the input of empty bags


def test_without_fresh_inputs_the_counted_ones_have_to_do() -> None:
    hot = {"a": _ids(2), "b": _ids(2)}
    assert _profile([([0], []), ([0], []), ([0], [])]).hot_inputs(hot) == share_estimate(0, 3)
    assert _profile(fresh_inputs=None).hot_inputs(hot) == share_estimate(1, 2)


BAG = st.lists(st.integers(0, 5), max_size=3)


@given(st.lists(st.tuples(BAG, BAG), min_size=1, max_size=12), st.sets(st.integers(0, 5)), st.sets(st.integers(0, 7)))
def test_hot_inputs_is_the_plain_loop(inputs: list[tuple[Bag, Bag]], hot_a: set[int], hot_b: set[int]) -> None:
    expected = sum(all(i in hot_a for i in x + y) and all(i in hot_b for i in x) for x, y in inputs)
    hot_ids = {"a": _ids(*sorted(hot_a)), "b": _ids(*sorted(hot_b))}
    assert _profile(inputs).hot_inputs(hot_ids) == share_estimate(expected, len(inputs))


@pytest.mark.parametrize("ask", [PopularityProfile.coverage, PopularityProfile.hot_inputs])
def test_hot_ids_of_other_tables_are_refused(ask: object) -> None:
    assert callable(ask)
    with pytest.raises(DataError, match=r"missing \['b'\]"):
        ask(_profile(), {"a": _ids(0)})
    with pytest.raises(DataError, match="ascending"):
        ask(_profile(), {"a": _ids(1, 0), "b": _ids()})


def test_the_fingerprint_names_content_and_provenance() -> None:
    base = _profile()
    changes = {"num_samples": 41, "total_samples": 801, "seed": 8, "source": "x", "sample_rate": 0.1, "skipped": {"day_1": 3}}
    others = [
        _profile(counts={**base.counts, "a": _counts(5, 0, 3, 1, 1, 0)}),
        _profile(counts={**base.counts, "a": _counts(5, 0, 3, 1, 0, 2)}),
        _profile(counted_inputs=_inputs(([0], [3]), ([], [2]))),
        _profile(fresh_inputs=None),
        _profile([([0, 2], [3]), ([], [4])]),
        _profile([([0], [3]), ([2], [5])]),
        *(_profile(**{name: value}) for name, value in changes.items()),
    ]
    assert len({profile.fingerprint for profile in [base, *others]}) == 13
    assert _profile().fingerprint == base.fingerprint
    assert _profile(counts=dict(reversed(base.counts.items()))).fingerprint == base.fingerprint
    assert _profile(skipped={"day_0": 2, "day_1": 3}).fingerprint == base.fingerprint


def test_the_same_counts_serve_other_dims_only() -> None:
    profile = _profile()
    wider = TableSet(tuple(replace(t, dim=64, optimizer=Optimizer.ADAM) for t in TABLES))
    assert profile.for_tables(wider).tables.total_bytes == wider.total_bytes
    assert profile.for_tables(wider).fingerprint == profile.fingerprint
    other = TableSet((TABLES["a"], replace(TABLES["b"], rows=9)))
    with pytest.raises(FingerprintError, match=f"profile {profile.fingerprint} .*{TABLES.fingerprint}.*{other.fingerprint}.*'b'"):
        profile.for_tables(other)


def test_counts_that_are_not_the_tables_own_are_refused() -> None:
    counts = _profile().counts
    with pytest.raises(DataError, match=r"allowed are exactly \['a', 'b'\]"):
        _profile(counts={"a": counts["a"]})
    with pytest.raises(DataError, match="'a' are of 8 rows, the table has 6"):
        _profile(counts={"a": counts["b"], "b": counts["b"]})


@pytest.mark.parametrize("which", ["counted_inputs", "fresh_inputs"])
def test_inputs_of_other_tables_are_refused(which: str) -> None:
    said = which.replace("_", " ")
    with pytest.raises(DataError, match=f"{said} lack feature 'y' of table 'a'"):
        _profile(**{which: InputSample({"x": _ids(1)}, {"x": _ids(1)}, 1)})
    with pytest.raises(DataError, match=rf"{said}, feature 'x', table 'a': id 7 .*0\.\.5"):
        _profile(**{which: _inputs(([7], []))})


@pytest.mark.parametrize("fresh", [True, False])
def test_a_saved_profile_comes_back(tmp_path: Path, fresh: bool) -> None:
    profile = _profile() if fresh else _profile(fresh_inputs=None)
    profile.save(tmp_path / "profile.npz")
    back = PopularityProfile.load(tmp_path / "profile.npz")
    assert back.fingerprint == profile.fingerprint and back.tables == TABLES
    scalars = ("num_samples", "total_samples", "sample_rate", "seed", "source", "skipped")
    assert [getattr(back, name) for name in scalars] == [getattr(profile, name) for name in scalars]
    for name in TABLES.names:
        np.testing.assert_array_equal(back.counts[name].dense(), profile.counts[name].dense())
    assert (back.fresh_inputs is None) == (not fresh)
    for saved, kept in ((back.counted_inputs, profile.counted_inputs), (back.fresh_inputs, profile.fresh_inputs)):
        for feature in "xy" if saved is not None and kept is not None else "":
            np.testing.assert_array_equal(saved.values[feature], kept.values[feature])
            np.testing.assert_array_equal(saved.lengths[feature], kept.lengths[feature])


def test_altered_or_missing_profiles_are_told(tmp_path: Path) -> None:
    path = tmp_path / "profile.npz"
    with pytest.raises(ConfigError, match="popularity profile"):
        PopularityProfile.load(path)
    _profile().save(path)
    with np.load(path) as archive:
        members = dict(archive)
    members["counts.0"][0] += 1
    np.savez(path, **members)
    with pytest.raises(FingerprintError, match=_profile().fingerprint):
        PopularityProfile.load(path)
    members["counts.0"] = members["counts.0"][:3]
    np.savez(path, **members)
    with pytest.raises(DataError, match=r"profile\.npz: row counts"):
        PopularityProfile.load(path)


def test_a_profile_of_an_older_version_is_told(tmp_path: Path) -> None:
    fields = {"tables": TABLES.to_json(), "probe_samples": 2, "num_samples": 40, "source": "by hand"}  # as of version 0.1
    save_archive(
        tmp_path / "old.npz", "popularity profile", "0" * 12, TABLES.fingerprint, fields, {"counts": {"a": _ids(5, 0, 3, 1, 0, 1)}}
    )
    with pytest.raises(DataError, match=r"old\.npz is damaged or not ours .*should hold a popularity profile: make it again"):
        PopularityProfile.load(tmp_path / "old.npz")
