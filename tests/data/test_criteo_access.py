"""The access model of synthetic Criteo against samples that SyntheticCriteo draws, and a profile's model against the same samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from fae_torchrec.core.access_model import AccessModel, HotShare
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.criteo_access import criteo_access
from fae_torchrec.data.criteo_shape import SPARSE_NAMES, criteo_shape
from fae_torchrec.data.synthetic import SyntheticCriteo

SAMPLES, BATCH = 131_072, 1_024
SCALES = {"kaggle": 0.02, "terabyte": 0.002}


class Drawn(NamedTuple):
    """Samples as popularity ranks, int64 [26, SAMPLES], and the tables that they look up."""

    tables: TableSet
    ranks: np.ndarray


def _tables(dataset: str, scale: float) -> TableSet:
    rows = criteo_shape(dataset).rows(scale).tolist()
    return TableSet(
        tuple(
            TableSpec(f"t_{name}", size, 16 + 16 * (number % 2), (name,))
            for number, (name, size) in enumerate(zip(SPARSE_NAMES, rows, strict=True))
        )
    )


def _draw(dataset: str, *, coupled: bool = True) -> Drawn:
    source = SyntheticCriteo(dataset, scale=SCALES[dataset], num_samples=SAMPLES, seed=5, coupled=coupled)  # type: ignore[arg-type]
    tables = _tables(dataset, SCALES[dataset])
    assert [table.rows for table in tables] == list(source.cardinalities.values())
    back = np.array([pow(int(step), -1, table.rows) if table.rows > 1 else 0 for step, table in zip(source._step, tables, strict=True)])
    rows = np.array([table.rows for table in tables])
    return Drawn(tables, (source.samples(0, SAMPLES).ids - source._offset[:, None]) * back[:, None] % rows[:, None])


@pytest.fixture(scope="module", params=["kaggle", "terabyte"])
def drawn(request: pytest.FixtureRequest) -> tuple[str, Drawn]:
    return request.param, _draw(request.param)


def _hot_rows(dataset: str, tables: TableSet, budget: int, pinned_max_rows: int) -> np.ndarray:
    """How many of each table's most popular rows are hot, chosen row by row from the law: int64 [26]."""
    law = criteo_shape(dataset).popularity(SCALES[dataset])
    densities, sizes, owners = [], [], []
    hot = np.zeros(len(tables), dtype=np.int64)
    for number, table in enumerate(tables):
        if table.rows <= pinned_max_rows:
            hot[number], budget = table.rows, budget - table.total_bytes
            continue
        power = 1 - law.exponent[number]
        ends = (np.arange(table.rows + 1) + law.shift[number]) ** power
        densities.append(np.diff(ends) / (ends[-1] - ends[0]) / table.row_bytes)
        sizes.append(np.full(table.rows, table.row_bytes))
        owners.append(np.full(table.rows, number))
    order = np.argsort(-np.concatenate(densities), kind="stable")
    taken = order[np.concatenate(sizes)[order].cumsum() <= budget]
    return hot + np.bincount(np.concatenate(owners)[taken], minlength=len(tables))


def _batches(samples: np.ndarray) -> Iterator[np.ndarray]:
    """Of ranks [26, n], whole batches."""
    assert samples.shape[1] >= BATCH
    return (samples[:, start : start + BATCH] for start in range(0, samples.shape[1] - BATCH + 1, BATCH))


def _distinct(samples: np.ndarray, hot_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean distinct hot and cold rows of batches, by table."""
    found = [[np.unique(of_table) for of_table in batch] for batch in _batches(samples)]
    hot = np.mean([[int((rows < limit).sum()) for rows, limit in zip(batch, hot_rows, strict=True)] for batch in found], axis=0)
    return hot, np.mean([[rows.size for rows in batch] for batch in found], axis=0) - hot


def _predicted(model: AccessModel, share: HotShare, kind: str, tier: str) -> np.ndarray:
    """Of the bins that are hot or cold altogether; at most one bin of a table is neither."""
    parts = [part if tier == "hot" else 1 - part for part in share.hot]
    return np.array([float(curve.distinct(BATCH, of) @ part) for curve, of, part in zip(model.curves, share.of(kind), parts, strict=True)])


@pytest.mark.parametrize("budget", [0.02, 0.06])
def test_the_law_predicts_what_is_drawn(drawn: tuple[str, Drawn], budget: float) -> None:
    dataset, (tables, ranks) = drawn
    model = criteo_access(dataset, SCALES[dataset], tables)
    share = model.share(round(budget * tables.total_bytes), pinned_max_rows=100)
    hot_rows = _hot_rows(dataset, tables, share.budget_bytes, 100)
    np.testing.assert_allclose(share.hot_rows, hot_rows, rtol=0.02, atol=2)
    is_hot = ranks < hot_rows[:, None]
    np.testing.assert_allclose(share.coverage, is_hot.mean(axis=1), atol=0.006)
    hot = is_hot.all(axis=0)
    assert share.hot_inputs == pytest.approx(hot.mean(), abs=0.01)
    assert hot.mean() - np.prod(share.coverage) > 0.07, "independent lookups would be far from it"
    for kind, samples in (("hot", ranks[:, hot]), ("cold", ranks[:, ~hot])):
        for tier, measured in zip(("hot", "cold"), _distinct(samples, hot_rows), strict=True):
            predicted = _predicted(model, share, kind, tier)
            assert predicted.sum() == pytest.approx(measured.sum(), rel=0.03, abs=1), (kind, tier)
            np.testing.assert_allclose(predicted, measured, rtol=0.1, atol=0.01 * BATCH, err_msg=f"{kind} samples, {tier} rows")


def test_samples_drawn_independently() -> None:
    tables, ranks = _draw("terabyte", coupled=False)
    model = criteo_access("terabyte", SCALES["terabyte"], tables, coupled=False)
    share = model.share(round(0.02 * tables.total_bytes), pinned_max_rows=100)
    hot = (ranks < _hot_rows("terabyte", tables, share.budget_bytes, 100)[:, None]).all(axis=0)
    assert share.hot_inputs == pytest.approx(hot.mean(), abs=0.01)
    coupled = criteo_access("terabyte", SCALES["terabyte"], tables).share(share.budget_bytes, pinned_max_rows=100)
    assert coupled.hot_inputs > hot.mean() + 0.2


def test_a_profile_predicts_the_samples_that_it_did_not_count(drawn: tuple[str, Drawn]) -> None:
    dataset, (tables, _) = drawn
    source = SyntheticCriteo(dataset, scale=SCALES[dataset], num_samples=2 * SAMPLES, seed=5)  # type: ignore[arg-type]
    profile = Calibrator(tables, sample_rate=0.5, fresh_inputs=SAMPLES).run(source.batches(32_768))
    model = AccessModel.from_profile(profile, tables, pinned_max_rows=100)
    for budget in (0.01, 0.05):
        share = model.share(round(budget * tables.total_bytes), pinned_max_rows=100)
        hot_ids = {}
        for table, number in zip(tables, np.rint(share.hot_rows).astype(int), strict=True):
            counts = profile.counts[table.name]
            most = counts.ids[np.argsort(-counts.counts, kind="stable")[:number]]
            hot_ids[table.name] = np.sort(most) if number < table.rows else np.arange(table.rows)
        measured = profile.hot_inputs(hot_ids).value
        assert share.hot_inputs == pytest.approx(measured, abs=0.015)
        assert float(share.coverage.sum()) / 26 == pytest.approx(profile.coverage(hot_ids), abs=0.02)
        law = criteo_access(dataset, SCALES[dataset], tables).share(share.budget_bytes, pinned_max_rows=100)
        assert share.hot_inputs == pytest.approx(law.hot_inputs, abs=0.05), "counts find less of the tail than there is"


def test_the_tables_may_be_some_of_the_generators() -> None:
    tables = _tables("kaggle", 0.02)
    some = TableSet((tables.tables[20], tables.tables[3]))
    model = criteo_access("kaggle", 0.02, some)
    assert [curve.rows.sum() for curve in model.curves] == [tables.tables[20].rows, tables.tables[3].rows]
    assert model.source == "the law of synthetic Criteo kaggle, scale 0.02"
    law = criteo_shape("kaggle").popularity(0.02)
    for curve, number in zip(model.curves, (20, 3), strict=True):
        np.testing.assert_allclose(curve.tail[[10, 999]], [law.tail_mass(number, 10), law.tail_mass(number, 999)], rtol=1e-9)


@pytest.mark.parametrize(
    "table",
    [
        TableSpec("t", 1_459, 4, ("cat_0",)),
        TableSpec("t", 1_460, 4, ("user",)),
        TableSpec("t", 1_460, 4, ("cat_0", "cat_1")),
    ],
    ids=["rows", "feature", "features"],
)
def test_other_tables_have_no_law(table: TableSpec) -> None:
    with pytest.raises(ConfigError, match=r"table 't' of \d+ rows .* none of synthetic Criteo kaggle's at scale 0.02; measure a profile"):
        criteo_access("kaggle", 0.02, TableSet((table,)))
    with pytest.raises(ConfigError, match="'criteo' is not one of"):
        criteo_access("criteo", 0.02, TableSet((table,)))
