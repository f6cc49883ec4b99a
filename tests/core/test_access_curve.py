"""Access curves against laws computed row by row, against counts by hand, and distinct rows against sums and draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from fae_torchrec.core.access_curve import AccessCurve, discount
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.row_counts import RowCounts


def _counted(*counts: int, lookups: float = 1.0) -> AccessCurve:
    return AccessCurve.counted(RowCounts.from_dense(np.array(counts, dtype=np.int64)), lookups)


def _by_row(curve: AccessCurve) -> np.ndarray:
    return np.repeat(curve.chance, curve.rows.astype(np.int64))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.2, 2.3])
@pytest.mark.parametrize("shift", [0.3, 1.0, 7.6])
def test_zipf_of_a_small_table_is_the_law_integrated_row_by_row(exponent: float, shift: float) -> None:
    curve = AccessCurve.zipf(60, exponent, shift, lookups=3.0)
    law = np.array([quad(lambda x: (x + shift) ** -exponent, rank, rank + 1)[0] for rank in range(60)])
    np.testing.assert_allclose(curve.chance, law / law.sum(), rtol=1e-9)
    assert (curve.rows == 1).all() and curve.seen == 60 and curve.lookups == 3.0


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.05, 1.7])
def test_zipf_of_a_large_table_keeps_the_mass_of_every_bin(exponent: float) -> None:
    rows, shift = 1_000_000, 2.5
    curve = AccessCurve.zipf(rows, exponent, shift)
    # Gauss and Legendre's three points in [r, r + 1), row by row.
    ranks, points, weights = np.arange(rows, dtype=np.float64), *np.polynomial.legendre.leggauss(3)
    law = sum(weight / 2 * (ranks + (1 + point) / 2 + shift) ** -exponent for point, weight in zip(points, weights, strict=True))
    starts = np.concatenate([[0], curve.rows.cumsum()[:-1]]).astype(np.int64)
    np.testing.assert_allclose(curve.mass, np.add.reduceat(law / law.sum(), starts), rtol=1e-5)
    assert curve.rows.sum() == rows and (curve.rows[:1000] == 1).all() and len(curve.rows) < 1500
    np.testing.assert_allclose(curve.tail[[0, 500, -1]], [1.0, law[500:].sum() / law.sum(), curve.mass[-1]], rtol=1e-6)


def test_an_exponent_of_nothing_is_uniform() -> None:
    curve = AccessCurve.zipf(1000, 0.0, lookups=2.0)
    assert (curve.rows.tolist(), curve.chance.tolist(), curve.lookups, curve.seen) == ([1000.0], [0.001], 2.0, 1)


def test_counted_shares_what_good_and_turing_leave_among_unseen_rows() -> None:
    curve = _counted(1, 6, 0, 0, 1, 3, 0, 0, 0, 0, lookups=0.5)
    # 11 accesses, two rows seen once: 2 of 11 go to the six rows that were not seen, and each of the four seen ones counts half less.
    np.testing.assert_allclose(curve.chance, [5.5 / 11, 2.5 / 11, 0.5 / 11, 2 / 11 / 6])
    assert (curve.rows.tolist(), curve.seen, curve.lookups) == ([1, 1, 2, 6], 3, 0.5)


def test_an_unseen_row_is_at_most_as_likely_as_one_seen_once() -> None:
    curve = _counted(2, 1, 1, 1, 0)
    # Good and Turing would give the unseen row 3/5. Its even share is 1/5: the seen ones count 1/4 less, and the unseen one has no more
    # than the 0.75 / 5 of a row seen once; what is over goes to all seen ones, 0.85 / 0.8.
    np.testing.assert_allclose(curve.chance, [1.75 / 5 * 1.0625, 0.75 / 5 * 1.0625, 0.15])
    np.testing.assert_allclose(_counted(1, 1, 0, 0).chance, 0.25)  # all accesses are first ones: nothing is known


def test_counted_without_accesses_and_with_all_rows_seen() -> None:
    nothing = _counted(0, 0, 0, 0, lookups=0.0)
    assert (nothing.rows.tolist(), nothing.chance.tolist(), nothing.seen) == ([4], [0.25], 0)
    every = _counted(3, 1, 1, 5)
    assert (every.rows.tolist(), every.chance.tolist(), every.seen) == ([1, 1, 2], [0.5, 0.3, 0.1], 3)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_counted_is_a_distribution_that_keeps_the_order_of_rows(counts: list[int]) -> None:
    curve = _counted(*counts)
    chances = _by_row(curve)
    assert len(chances) == len(counts) and chances.sum() == pytest.approx(1.0)
    assert (np.diff(chances) <= 1e-12).all() and (chances >= 0).all()
    seen = int(curve.rows[: curve.seen].sum())
    assert seen == sum(count > 0 for count in counts)
    ordered = np.sort([count for count in counts if count])[::-1]
    less = discount(RowCounts.from_dense(np.array(counts, dtype=np.int64)))
    assert 0 <= less < 1
    np.testing.assert_allclose(chances[:seen] * (ordered - less).sum(), (ordered - less) * chances[:seen].sum())


def test_thinned_levels_keep_rows_accesses_and_what_is_left_for_unseen_rows() -> None:
    counts = np.concatenate([np.arange(1, 20_001), np.ones(4_999), np.zeros(10_000)]).astype(np.int64)
    curve = AccessCurve.counted(RowCounts.from_dense(counts), 1.0)
    assert len(curve.rows) <= 4_097 and curve.rows.sum() == 34_999 and curve.rows[: curve.seen].sum() == 24_999
    total = counts.sum()
    assert curve.mass[-1] == pytest.approx(5_000 / total), "rows seen once are known after thinning too"
    exact = (np.sort(counts)[::-1][:24_999] - 5_000 / 24_999) / total
    np.testing.assert_allclose(_by_row(curve)[:24_999], exact, rtol=0.003)
    np.testing.assert_allclose(curve.mass[: curve.seen].sum(), exact.sum(), rtol=1e-12)
    assert curve.rows[curve.seen - 1] == 5_000, "levels that many rows have are not joined"


@pytest.mark.parametrize("samples", [1, 10, 1000, 1e6])
def test_distinct_is_the_sum_over_rows(samples: float) -> None:
    curve = AccessCurve.zipf(5_000, 1.1, 2.0, lookups=1.5)
    law = np.array([quad(lambda x: (x + 2.0) ** -1.1, rank, rank + 1)[0] for rank in range(5_000)])
    slow = 1 - (1 - law / law.sum()) ** (1.5 * samples)
    assert curve.distinct(samples).sum() == pytest.approx(slow.sum(), rel=1e-4)


def test_distinct_against_draws() -> None:
    curve = AccessCurve.zipf(800, 1.3, lookups=2.0)
    draws = np.random.default_rng(1).choice(800, size=(300, 2 * 500), p=curve.chance)
    found = np.mean([len(np.unique(step)) for step in draws])
    assert curve.distinct(500).sum() == pytest.approx(found, rel=0.01)


def test_distinct_of_other_mass_and_of_part_of_the_rows_by_hand() -> None:
    curve = AccessCurve(np.array([2.0, 4.0]), np.array([0.3, 0.1]), 1.0, 2)
    np.testing.assert_allclose(curve.distinct(3, np.array([0.0, 0.8])), [0, 4 * (1 - 0.8**3)])
    # The same mass on half of the rows of each bin.
    found = curve.distinct(3, np.array([0.2, 0.8]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(found, [1 * (1 - 0.8**3), 2 * (1 - 0.6**3)])
    assert curve.distinct(3, np.array([0.2, 0.0]), np.array([0.5, 0.0])).tolist()[1] == 0
    np.testing.assert_allclose(curve.distinct(9, np.array([1.0, 0.0]), np.array([0.5, 1.0])), [1, 0], atol=1e-9)


@given(st.integers(1, 3_000), st.floats(0, 3), st.floats(0.1, 20), st.floats(0.1, 30), st.floats(0, 1e6))
def test_distinct_rows_are_at_most_all_rows_and_all_lookups(
    rows: int, exponent: float, shift: float, lookups: float, samples: float
) -> None:
    curve = AccessCurve.zipf(rows, exponent, shift, lookups)
    assert curve.mass.sum() == pytest.approx(1.0) and curve.rows.sum() == rows
    found = curve.distinct(samples)
    assert (found >= 0).all() and (found <= curve.rows * (1 + 1e-9)).all()
    if samples * lookups >= 1:
        assert found.sum() <= samples * lookups * (1 + 1e-6)
    assert curve.distinct(2 * samples).sum() >= found.sum() * (1 - 1e-9)


@pytest.mark.parametrize(
    ("rows", "chance"),
    [([1.0, 1.0], [0.5, 0.4]), ([1.0, 1.0], [0.4, 0.6]), ([1.0, 1.0], [1.0])],
    ids=["not one", "ascending", "shapes"],
)
def test_what_is_no_distribution_is_refused(rows: list[float], chance: list[float]) -> None:
    with pytest.raises(ConfigError, match="descending, that add up to 1"):
        AccessCurve(np.array(rows), np.array(chance), 1.0, 1)
