"""Access models against a selection row by row, against enumerated samples, and against whole inputs that were kept."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.access_curve import AccessCurve
from fae_torchrec.core.access_model import AccessModel, Coupled, HotShare, Independent, Joint
from fae_torchrec.core.errors import BudgetError, ConfigError, FingerprintError
from fae_torchrec.core.row_counts import RowCounts
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec
from tests.core.small_profiles import profile_of_counts, profile_of_inputs, small_tables

Counts = list[list[int]]
TWO = small_tables([6, 4])  # rows of 4 and 8 bytes


def _model(counts: Counts, lookups: tuple[float, ...] = (), joint: Joint | None = None) -> AccessModel:
    tables = small_tables([len(rows) for rows in counts])
    numbers = lookups or (1.0,) * len(counts)
    curves = {
        table.name: AccessCurve.counted(RowCounts.from_dense(np.array(rows, dtype=np.int64)), number)
        for table, rows, number in zip(tables, counts, numbers, strict=True)
    }
    return AccessModel(tables, curves, joint or Independent(), "test")


def _chances(curve: AccessCurve) -> np.ndarray:
    """Of rows that are known, the most popular first."""
    return np.repeat(curve.chance[: curve.seen], curve.rows[: curve.seen].astype(np.int64))


def _knapsack(model: AccessModel, room: float, pinned_max_rows: int) -> float:
    """Lookups per sample that the densest rows take, row by row, the last one in part; pinned tables left out."""
    rows = [
        (chance * curve.lookups / table.row_bytes, table.row_bytes)
        for curve, table in zip(model.curves, model.tables, strict=True)
        if table.rows > pinned_max_rows
        for chance in _chances(curve).tolist()
    ]
    taken = 0.0
    for density, size in sorted(rows, reverse=True):
        part = min(size, max(room, 0.0))
        taken, room = taken + density * part, room - part
    return taken


def _consistent(model: AccessModel, share: HotShare, tolerance: float = 1e-9) -> None:
    """Hot and cold samples together look up what all do, but where a bin has been given to the hot ones altogether."""
    for curve, of_hot, of_cold in zip(model.curves, share.of_hot, share.of_cold, strict=True):
        both, left = share.hot_inputs * of_hot + (1 - share.hot_inputs) * of_cold, of_cold > 0
        np.testing.assert_allclose(both[left], curve.mass[left], atol=tolerance)
        assert (both >= curve.mass - tolerance).all() or share.hot_inputs >= 1


_COUNTS = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(_COUNTS, st.floats(0, 1), st.integers(0, 4), st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3))
def test_share_is_the_selection_of_single_rows(counts: Counts, part: float, pinned: int, lookups: list[float]) -> None:
    model = _model(counts, tuple(lookups[: len(counts)]))
    least = sum(table.total_bytes for table in model.tables if table.rows <= pinned)
    budget = least + int(part * (model.tables.total_bytes - least))
    share = model.share(budget, pinned)
    assert share.budget_bytes == budget and share.used_bytes <= budget * (1 + 1e-12)
    row_bytes = np.array([table.row_bytes for table in model.tables])
    assert share.used_bytes == pytest.approx(share.hot_rows @ row_bytes)
    free = np.array([table.rows > pinned for table in model.tables])
    taken = sum(c * curve.lookups for c, curve, f in zip(share.coverage, model.curves, free, strict=True) if f)
    assert taken == pytest.approx(_knapsack(model, budget - least, pinned))
    assert (share.coverage[~free] == pytest.approx(1.0)) and (
        share.hot_rows[~free] == [t.rows for t in model.tables if t.rows <= pinned]
    ).all()
    for curve, hot in zip(model.curves, share.hot, strict=True):
        assert (hot >= 0).all() and (hot <= 1).all()
        if curve.rows.sum() > pinned:
            assert (hot[curve.seen :] == 0).all(), "rows that were not seen cannot be chosen"
    _consistent(model, share)


def test_a_share_by_hand() -> None:
    # Accesses per byte: a 6/10/4 .15, 3/10/4 .075, 1/10/4 .025; b, of twice the bytes: 8/10/8 .1, 1/10/8 .0125 twice.
    model = _model([[6, 3, 1, 0, 0, 0], [8, 1, 1, 0]], joint=None)
    share = model.share(4 + 8 + 4, pinned_max_rows=1)
    assert share.hot_rows.tolist() == [2, 1] and share.used_bytes == 16
    kept_a, kept_b = model.curves[0].mass, model.curves[1].mass
    assert share.coverage == pytest.approx([kept_a[:2].sum(), kept_b[0]])
    assert share.hot_inputs == pytest.approx(kept_a[:2].sum() * kept_b[0])
    assert model.share(16, 1) is share, "what was asked for is kept"
    assert model.share(18, 1).hot_rows.tolist() == pytest.approx([2.5, 1]), "half of a's next row fits"
    pinned = model.share(8 * 4, pinned_max_rows=4)
    assert pinned.hot_rows.tolist() == [0, 4] and pinned.coverage == pytest.approx([0, 1])
    assert model.share(10_000, 1).hot_rows.tolist() == [3, 3], "rows that nobody was seen to access are never hot"
    assert share.of("hot") is share.of_hot and share.of("cold") is share.of_cold


def test_pinned_tables_alone_may_exceed_the_budget() -> None:
    model = _model([[1] * 6, [1] * 4])
    with pytest.raises(BudgetError, match="budget is 31 bytes, tables of at most 4 rows, which are always hot, take 32"):
        model.share(31, pinned_max_rows=4)


def test_every_table_needs_a_curve() -> None:
    with pytest.raises(ConfigError, match=r"access curves of the tables \['b'\] are missing"):
        AccessModel(TWO, {"a": AccessCurve.uniform(6)}, Independent(), "test")


@pytest.mark.parametrize("budget", [24, 32, 36, 44])
def test_hot_inputs_of_independent_lookups_are_those_of_all_samples_enumerated(budget: int) -> None:
    model = _model([[6, 4, 3, 2, 1, 0], [5, 3, 2, 1]], (2.0, 1.0))
    share = model.share(budget, pinned_max_rows=1)
    kept = [np.repeat(hot, curve.rows.astype(int)) for hot, curve in zip(share.hot, model.curves, strict=True)]
    assert all(np.isin(part, [0, 1]).all() for part in kept), "this budget ends between rows"
    chances = [np.repeat(curve.chance, curve.rows.astype(int)) for curve in model.curves]
    hot_samples, looked_up = 0.0, [np.zeros(6), np.zeros(4)]
    for first, second, third in product(range(6), range(6), range(4)):
        chance = chances[0][first] * chances[0][second] * chances[1][third]
        if kept[0][first] and kept[0][second] and kept[1][third]:
            hot_samples += chance
            looked_up[0][[first]] += chance / 2
            looked_up[0][[second]] += chance / 2
            looked_up[1][[third]] += chance
    assert 0 < hot_samples < 1 and share.hot_inputs == pytest.approx(hot_samples)
    for curve, of_hot, slow in zip(model.curves, share.of_hot, looked_up, strict=True):
        np.testing.assert_allclose(np.repeat(of_hot / curve.rows, curve.rows.astype(int)), slow / hot_samples)
    _consistent(model, share)


def test_many_empty_bags_leave_hot_samples_fewer_lookups() -> None:
    """A table that one sample in ten looks up, a half of the time a hot row: all other samples are hot, whatever it says."""
    model = _model([[5, 1, 1, 1, 1, 1]], (0.1,))
    share = model.share(4, pinned_max_rows=1)
    assert share.coverage == pytest.approx([0.5]) and share.hot_inputs == pytest.approx(0.5**0.1)
    assert share.of_hot[0].sum() == pytest.approx(0.5 / 0.5**0.1)
    assert share.of_cold[0].sum() > 1
    _consistent(model, share)


def test_uniform_has_no_popular_rows() -> None:
    tables = TableSet((TableSpec("a", 1000, 4, ("x", "y"), optimizer=Optimizer.SGD),))
    model = AccessModel.uniform(tables)
    share = model.share(16 * 250, pinned_max_rows=1)
    assert share.coverage == pytest.approx([0.25]) and share.hot_inputs == pytest.approx(0.25**2), "two lookups, both hot"
    assert (share.of_hot[0].tolist(), model.source) == ([1.0], "uniform accesses")
    _consistent(model, share)
    everything = model.share(16 * 1000, pinned_max_rows=1)
    assert everything.hot_inputs == 1.0 and everything.of_cold[0].tolist() == [0.0]


@pytest.mark.parametrize("coupling", [0.5, 5.8, 10.0])
@pytest.mark.parametrize("part", [0.03, 0.3])
def test_coupled_tails_against_draws(coupling: float, part: float) -> None:
    rows = [40, 200, 90]
    tables = TableSet(tuple(TableSpec(f"t{n}", size, 4, (f"f{n}",), optimizer=Optimizer.SGD) for n, size in enumerate(rows)))
    curves = {f"t{n}": AccessCurve.zipf(size, 1.1, 2.0) for n, size in enumerate(rows)}
    model = AccessModel(tables, curves, Coupled(coupling), "test")
    share = model.share(round(part * tables.total_bytes), pinned_max_rows=1)
    # The copula as the generator draws it: a common level, private exponentials, and the law's inverse row by row.
    random, number = np.random.default_rng(3), 200_000
    level = np.maximum(random.standard_gamma(1 / coupling, number), np.finfo(np.float64).tiny)
    with np.errstate(over="ignore"):
        survival = (1 + random.standard_exponential((3, number)) / level) ** (-1 / coupling)
    ranks = [np.minimum(np.searchsorted(curves[f"t{n}"].mass.cumsum(), 1 - survival[n]), rows[n] - 1) for n in range(3)]
    hot = np.all([share.hot[n][ranks[n]] >= random.random(number) for n in range(3)], axis=0)
    assert share.hot_inputs == pytest.approx(hot.mean(), abs=0.006)
    assert hot.mean() > np.prod(share.coverage) + 0.02, "independent lookups would be something else"
    for n in range(3):
        found = np.bincount(ranks[n][hot], minlength=rows[n]) / hot.sum()
        np.testing.assert_allclose(share.of_hot[n].cumsum(), found.cumsum(), atol=0.01)
        found = np.bincount(ranks[n][~hot], minlength=rows[n]) / (~hot).sum()
        np.testing.assert_allclose(share.of_cold[n].cumsum(), found.cumsum(), atol=0.012)
    _consistent(model, share, tolerance=3e-4)


INPUTS = [[[0], [0]], [[0], [1]], [[1], [0]], [[0], [0]], [[2], [0]], [[], [0]], [[0, 1], []], [[3], [2]]]
FRESH = [[[0], [0]], [[1], [0]], [[], []], [[5], [0]], [[0, 0], [1]], [[2], []]]


def test_sampled_inputs_are_hot_once_their_least_accessed_row_is() -> None:
    """Rows of a: 0 four times, 1 twice, 2 and 3 once. The rows of b: 0 five times, 1 and 2 once. a's are half the bytes."""
    for fresh in (None, FRESH):
        profile = profile_of_inputs(TWO, INPUTS, fresh)
        model = AccessModel.from_profile(profile, TWO, pinned_max_rows=1)
        assert model.source == f"profile {profile.fingerprint}"
        assert [curve.lookups for curve in model.curves] == [1.0, 7 / 8]
        sizes = [4, 8, 4, 4 + 4, 8 + 8]  # a0, b0, a1, a2 and a3, b1 and b2: of falling density
        hot_ids = [(1, 0), (1, 1), (2, 1), (4, 1), (4, 3)]
        for budget, (of_a, of_b) in zip(np.cumsum(sizes).tolist(), hot_ids, strict=True):
            share = model.share(budget, pinned_max_rows=1)
            assert share.hot_rows.tolist() == [of_a, of_b]
            expected = profile.hot_inputs({"a": np.arange(of_a), "b": np.arange(of_b)})
            assert share.hot_inputs == pytest.approx(expected.value)
            _consistent(model, share)


def test_a_level_that_fits_in_part_makes_the_same_part_of_its_inputs_hot() -> None:
    profile = profile_of_inputs(TWO, INPUTS)
    model = AccessModel.from_profile(profile, TWO, pinned_max_rows=1)
    less, more = model.share(16, 1).hot_inputs, model.share(24, 1).hot_inputs
    assert more > less
    assert model.share(22, 1).hot_inputs == pytest.approx(less + 0.75 * (more - less))


def test_pinned_tables_do_not_make_an_input_cold() -> None:
    profile = profile_of_inputs(TWO, INPUTS, FRESH)
    model = AccessModel.from_profile(profile, TWO, pinned_max_rows=4)
    share = model.share(8 * 4 + 4, pinned_max_rows=4)
    assert share.hot_rows.tolist() == [1, 4]
    assert share.hot_inputs == pytest.approx(profile.hot_inputs({"a": np.arange(1), "b": np.arange(4)}).value)


def test_inputs_of_pinned_tables_alone_are_hot_where_nothing_else_is_accessed() -> None:
    profile = profile_of_inputs(TWO, [[[], [0]], [[], [3]]], fresh=[[[], [0]], [[], [1]], [[], [2]], [[4], [2]]])
    model = AccessModel.from_profile(profile, TWO, pinned_max_rows=4)
    share = model.share(8 * 4, pinned_max_rows=4)
    assert share.hot_rows.tolist() == [0, 4] and share.hot_inputs == 0.75


def test_many_levels_of_counts_do_not_move_the_inputs_that_are_hot() -> None:
    """Where levels are joined, an input's density and the curve's still compare."""
    counts = [8_000, 100_000, *range(9_000, 0, -1)]
    profile = profile_of_counts(counts)  # its one input looks up the first row, of which a thousand others have more accesses
    model = AccessModel.from_profile(profile, profile.tables, pinned_max_rows=1)
    assert len(model.curves[0].rows) < 9_000
    assert [model.share(4 * rows, pinned_max_rows=1).hot_inputs for rows in (900, 1_100, 2_500)] == [0, 1, 1]


def test_a_profile_of_other_tables_is_refused() -> None:
    with pytest.raises(FingerprintError):
        AccessModel.from_profile(profile_of_inputs(TWO, INPUTS), small_tables([6, 5]))
