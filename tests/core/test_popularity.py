"""Popularity profiles: coverage and hot inputs against plain loops, and a file that proves itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError, DataError, FingerprintError
from fae_torchrec.core.popularity import PopularityProfile, ProbeSample
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec

# Feature "x" feeds both tables, table "a" has two features.
TABLES = TableSet((TableSpec("a", 6, 8, ("x", "y")), TableSpec("b", 8, 4, ("x",))))
Bag = list[int]


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _probe(samples: list[tuple[Bag, Bag]]) -> ProbeSample:
    """A probe of samples (bag of x, bag of y)."""
    return ProbeSample(
        values={f: _ids(*(i for sample in samples for i in sample[n])) for n, f in enumerate("xy")},
        lengths={f: _ids(*(len(sample[n]) for sample in samples)) for n, f in enumerate("xy")},
        num_samples=len(samples),
    )


def _profile(samples: list[tuple[Bag, Bag]] | None = None, **changes: object) -> PopularityProfile:
    return replace(
        PopularityProfile(
            tables=TABLES,
            counts={"a": _ids(5, 0, 3, 1, 0, 1), "b": _ids(0, 0, 4, 0, 0, 0, 0, 6)},
            probe=_probe(samples or [([0, 2], [3]), ([], [5])]),
            num_samples=40,
            total_samples=800,
            sample_rate=0.05,
            seed=7,
            source="by hand",
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
    profile = _profile(counts={"a": np.zeros(6, dtype=np.int64), "b": np.zeros(8, dtype=np.int64)})
    assert profile.coverage({"a": _ids(), "b": _ids()}) == 1


def test_hot_inputs_by_hand() -> None:
    profile = _profile([([0], [1]), ([2, 0], []), ([], []), ([3], [0])])
    assert profile.hot_inputs({"a": np.arange(6), "b": np.arange(8)}) == 1
    assert profile.hot_inputs({"a": _ids(0, 1, 3), "b": np.arange(8)}) == 0.75  # id 2 of x is cold in a
    assert profile.hot_inputs({"a": np.arange(6), "b": _ids(0, 2)}) == 0.75  # id 3 of x is hot in a, not in b
    assert profile.hot_inputs({"a": _ids(), "b": _ids()}) == 0.25  # the sample of empty bags


BAG = st.lists(st.integers(0, 5), max_size=3)


@given(st.lists(st.tuples(BAG, BAG), min_size=1, max_size=12), st.sets(st.integers(0, 5)), st.sets(st.integers(0, 7)))
def test_hot_inputs_is_the_plain_loop(samples: list[tuple[Bag, Bag]], hot_a: set[int], hot_b: set[int]) -> None:
    expected = sum(all(i in hot_a for i in x + y) and all(i in hot_b for i in x) for x, y in samples) / len(samples)
    hot_ids = {"a": _ids(*sorted(hot_a)), "b": _ids(*sorted(hot_b))}
    assert _profile(samples).hot_inputs(hot_ids) == pytest.approx(expected)


@pytest.mark.parametrize("ask", [PopularityProfile.coverage, PopularityProfile.hot_inputs])
def test_hot_ids_of_other_tables_are_refused(ask: object) -> None:
    assert callable(ask)
    with pytest.raises(DataError, match=r"missing \['b'\]"):
        ask(_profile(), {"a": _ids(0)})
    with pytest.raises(DataError, match="ascending"):
        ask(_profile(), {"a": _ids(1, 0), "b": _ids()})


def test_the_fingerprint_names_content_and_provenance() -> None:
    base = _profile()
    changes = {"num_samples": 41, "total_samples": 801, "seed": 8, "source": "x", "sample_rate": 0.1}
    changed_counts = {**base.counts, "a": _ids(5, 0, 3, 1, 1, 0)}
    others = [
        _profile(counts=changed_counts),
        _profile([([0, 2], [3]), ([], [4])]),
        _profile([([0], [3]), ([2], [5])]),
        *(_profile(**{name: value}) for name, value in changes.items()),
    ]
    assert len({profile.fingerprint for profile in [base, *others]}) == 9
    assert _profile().fingerprint == base.fingerprint
    assert _profile(counts=dict(reversed(base.counts.items()))).fingerprint == base.fingerprint


def test_the_same_counts_serve_other_dims_only() -> None:
    profile = _profile()
    wider = TableSet(tuple(replace(t, dim=64, optimizer=Optimizer.ADAM) for t in TABLES))
    assert profile.for_tables(wider).tables.total_bytes == wider.total_bytes
    assert profile.for_tables(wider).fingerprint == profile.fingerprint
    other = TableSet((TABLES["a"], replace(TABLES["b"], rows=9)))
    with pytest.raises(FingerprintError, match=f"profile {profile.fingerprint} .*{TABLES.fingerprint}.*{other.fingerprint}.*'b'"):
        profile.for_tables(other)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": np.zeros(6, np.int64)}, r"allowed are exactly \['a', 'b'\]"),
        ({"a": np.zeros(5, np.int64), "b": np.zeros(8, np.int64)}, r"'a' must be int64 \[6\]"),
        ({"a": np.zeros(6), "b": np.zeros(8, np.int64)}, "received float64"),
        ({"a": np.full(6, -1), "b": np.zeros(8, np.int64)}, "minimum -1"),
    ],
)
def test_counts_that_are_not_the_tables_own_are_refused(counts: Mapping[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _profile(counts=counts)


def test_probes_that_contradict_themselves_are_refused() -> None:
    for values, lengths, samples in [
        (_ids(1, 2), _ids(1, 2), 2),  # sum
        (_ids(1, 2), _ids(1, 1), 3),  # number
        (_ids(1, 2), _ids(3, -1), 2),  # negative
    ]:
        with pytest.raises(DataError, match="'x'"):
            ProbeSample({"x": values}, {"x": lengths}, samples)
    with pytest.raises(DataError, match="at least 1 sample"):
        ProbeSample({}, {}, 0)
    with pytest.raises(DataError, match="different features"):
        ProbeSample({"x": _ids()}, {"y": _ids(0)}, 1)
    with pytest.raises(DataError, match="lacks feature 'y' of table 'a'"):
        _profile(probe=ProbeSample({"x": _ids(1)}, {"x": _ids(1)}, 1))
    with pytest.raises(DataError, match=r"'x', table 'a': id 7 .*0\.\.5"):
        _profile([([7], [])])


def test_a_saved_profile_comes_back(tmp_path: Path) -> None:
    profile = _profile()
    profile.save(tmp_path / "profile.npz")
    back = PopularityProfile.load(tmp_path / "profile.npz")
    assert back.fingerprint == profile.fingerprint and back.tables == TABLES
    scalars = ("num_samples", "total_samples", "sample_rate", "seed", "source")
    assert [getattr(back, name) for name in scalars] == [getattr(profile, name) for name in scalars]
    for name in TABLES.names:
        np.testing.assert_array_equal(back.counts[name], profile.counts[name])
    for feature in "xy":
        np.testing.assert_array_equal(back.probe.values[feature], profile.probe.values[feature])
        np.testing.assert_array_equal(back.probe.lengths[feature], profile.probe.lengths[feature])


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
    with pytest.raises(DataError, match=r"profile\.npz: counts of table 'a'"):
        PopularityProfile.load(path)
