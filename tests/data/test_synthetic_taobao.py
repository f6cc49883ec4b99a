"""Tests of the Taobao-shaped generator: the fit, what is drawn against the law, sessions, purity, and what can be learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.access_model import AccessModel
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.input_sample import InputSample
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.planted_sequence import PlantedSequenceModel, fits
from fae_torchrec.data.synthetic_access import synthetic_access
from fae_torchrec.data.synthetic_taobao import SyntheticTaobao
from fae_torchrec.data.taobao import FEATURES
from fae_torchrec.data.taobao_access import taobao_access
from fae_torchrec.data.taobao_shape import BAG, TAOBAO
from tests.data.test_synthetic import auc

SAMPLES = 50_000
PUBLISHED = [hot for _, hot in TAOBAO.published_points]
SMALL = SyntheticTaobao(scale=0.01, num_samples=5_003, seed=3)


def _tables(scale: float) -> TableSet:
    rows = TAOBAO.rows(scale).tolist()
    return TableSet(tuple(TableSpec(f"t_{name}", size, 16, (name,)) for name, size in zip(FEATURES, rows, strict=True)))


def _hot_inputs(model: AccessModel) -> list[float]:
    """At the published byte shares, by the law."""
    return [model.share(round(share * model.tables.total_bytes)).hot_inputs for share, _ in TAOBAO.published_points]


def _places(source: SyntheticTaobao, table: int, ids: np.ndarray) -> np.ndarray:
    """Ids back to the numbers that they had before they were scattered."""
    rows = int(source._rows[table])
    return (ids - source._offset[table]) * pow(int(source._step[table]), -1, rows) % rows


def test_sizes_and_points_are_the_published() -> None:
    assert TAOBAO.published_points == ((0.15, 0.01), (0.39, 0.271), (0.80, 0.925))
    assert TAOBAO.rows(1.0).tolist() == [987_994, 4_162_024, 9_439] and TAOBAO.feature_names == FEATURES
    assert TAOBAO.rows(0.1).tolist() == [98_799, 416_202, 2_048]


@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
def test_hot_inputs_of_the_law_come_within_three_points_of_the_published(scale: float) -> None:
    np.testing.assert_allclose(_hot_inputs(taobao_access(scale, _tables(scale))), PUBLISHED, atol=0.03)
    assert _hot_inputs(taobao_access(scale, _tables(scale)))[0] > 0.004, "three points would allow none at the first"


def test_hot_inputs_need_sessions() -> None:
    apart = np.array(_hot_inputs(taobao_access(0.1, _tables(0.1), coupled=False)))
    assert apart[0] < 0.001 and (np.array(PUBLISHED) - apart > [0.005, 0.2, 0.1]).all(), f"drawn independently: {apart}"


def test_counted_and_fresh_samples_come_near_the_published() -> None:
    """By the package's own calibrator and selection; 10 samples a user are counted, and hot inputs taken on samples of the test split."""
    scale = 0.03
    train = SyntheticTaobao(scale=scale, num_samples=296_000)
    tables = _tables(scale)
    profile = Calibrator(tables, sample_rate=1.0, keep_inputs=1).run(train.batches(16_384))
    ids = SyntheticTaobao(scale=scale, num_samples=1, split="test").samples(0, SAMPLES).ids
    bags = np.full(SAMPLES, BAG, dtype=np.int64)
    inputs = InputSample({name: ids[i].ravel() for i, name in enumerate(FEATURES)}, dict.fromkeys(FEATURES, bags), SAMPLES)
    fresh: PopularityProfile = replace(profile, fresh_inputs=inputs)
    budgets = [round(share * tables.total_bytes) for share, _ in TAOBAO.published_points]
    np.testing.assert_allclose([select_hot_set(fresh, budget, policy="threshold").hot_inputs for budget in budgets], PUBLISHED, atol=0.05)


@pytest.mark.parametrize("coupled", [True, False])
def test_what_is_drawn_follows_the_law(coupled: bool) -> None:
    """A sample is hot if all its rows are before the last hot one of their table, in the law's order; shares of lookups likewise."""
    scale = 0.1
    source = SyntheticTaobao(scale=scale, num_samples=SAMPLES, seed=5, coupled=coupled)
    model = taobao_access(scale, _tables(scale), coupled=coupled)
    ids, sizes = source.samples(0, SAMPLES).ids, TAOBAO.category_sizes(scale)
    category = _places(source, 2, ids[2])
    place = _places(source, 1, ids[1]) - (sizes.cumsum() - sizes)[category]
    assert (place >= 0).all() and (place < sizes[category]).all()
    ranks = np.stack([_places(source, 0, ids[0]), (place + 0.5) / sizes[category] * sizes.sum(), category])
    for share, _ in TAOBAO.published_points:
        hot = model.share(round(share * model.tables.total_bytes))
        is_hot = ranks < hot.hot_rows[:, None, None]
        assert is_hot.all(axis=(0, 2)).mean() == pytest.approx(hot.hot_inputs, abs=0.01)
        np.testing.assert_allclose(is_hot.mean(axis=(1, 2)), hot.coverage, atol=0.01)
        if share == 0.39:  # hot samples look up some rows more than the others, by the law as drawn
            number, half = 1, hot.hot_rows[1] / 2
            drawn = (ranks[number] < half)[is_hot.all(axis=(0, 2))].mean()
            of_hot = hot.of_hot[number][model.curves[number].rows.cumsum() <= half].sum()
            assert drawn == pytest.approx(of_hot, abs=0.02)


def test_bags_are_as_taobaos_source_has_them() -> None:
    batch = next(SMALL.batches(1_000))
    kjt = batch.sparse_features
    assert kjt.keys() == list(FEATURES) and kjt.stride() == 1_000 and kjt.values().dtype == torch.int64
    assert batch.dense_features.shape == (1_000, 1) and batch.dense_features.dtype == torch.float32
    assert set(batch.labels.unique().tolist()) == {0.0, 1.0} and batch.labels.dtype == torch.float32
    for name, rows in SMALL.cardinalities.items():
        assert torch.equal(kjt[name].lengths(), torch.full((1_000,), 21, dtype=torch.int32))
        assert int(kjt[name].values().min()) >= 0 and int(kjt[name].values().max()) < rows
    users = kjt["user"].values().view(1_000, 21)
    assert (users == users[:, :1]).all() and len(users[:, 0].unique()) > 500
    assert kjt["item"].offsets()[-1] == 21_000 and torch.equal(kjt["category"].values(), kjt.values()[42_000:])


def test_a_session_repeats_items_and_stays_in_few_categories() -> None:
    _, items, categories = SyntheticTaobao(scale=1.0, num_samples=1).samples(0, 4_000).ids
    distinct = [np.array([len(set(row)) for row in rows.tolist()]) for rows in (items, categories)]
    assert 8 < distinct[0].mean() < 16 and 2 < distinct[1].mean() < 5
    new = 1 - TAOBAO.repeats
    expected = 1 + 19 * new + (TAOBAO.follows * new + 1 - TAOBAO.follows)
    assert distinct[0].mean() == pytest.approx(expected, abs=0.5)  # two new items of a category may be the same


def test_an_item_has_one_category() -> None:
    source = SyntheticTaobao(scale=0.03, num_samples=1, split="test")
    _, items, categories = source.samples(0, 20_000).ids
    pairs = np.unique(np.stack([items.ravel(), categories.ravel()]), axis=1)
    assert len(np.unique(pairs[0])) == pairs.shape[1]
    np.testing.assert_array_equal(source.category_of(items), categories)
    everything = source.category_of(np.arange(source.cardinalities["item"]))
    sizes = np.bincount(everything, minlength=source.cardinalities["category"])
    np.testing.assert_array_equal(np.sort(sizes)[::-1], TAOBAO.category_sizes(0.03))


@pytest.mark.parametrize("scale", [0.0001, 0.001, 0.1, 1.0])
def test_category_sizes_add_up(scale: float) -> None:
    sizes, rows = TAOBAO.category_sizes(scale), TAOBAO.rows(scale)
    assert len(sizes) == rows[2] and sizes.sum() == rows[1] and sizes.min() >= 1 and (np.diff(sizes) <= 0).all()


@settings(max_examples=15, deadline=None)
@given(batch_size=st.integers(300, 6_000), world_size=st.integers(1, 4))
def test_samples_do_not_depend_on_who_reads_them(batch_size: int, world_size: int) -> None:
    ranks = [list(SMALL.batches(batch_size, rank=rank, world_size=world_size)) for rank in range(world_size)]
    dealt = [batch for step in zip(*ranks, strict=True) for batch in step]
    whole = SMALL.samples(0, SMALL.num_samples // world_size * world_size)
    assert torch.equal(torch.cat([b.labels for b in dealt]), torch.from_numpy(whole.labels))
    ids = torch.cat([b.sparse_features.values().view(3, -1, 21) for b in dealt], dim=1)
    assert torch.equal(ids, torch.from_numpy(whole.ids))


def test_shards_are_the_samples_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fae_torchrec.data.generated_source.SHARD_SAMPLES", 4_096)
    assert (SMALL.num_shards, SMALL.shard_sizes().tolist(), SMALL.size_hint()) == (2, [4_096, 907], 5_003)
    read = torch.cat([b.sparse_features.values().view(3, -1, 21) for shard in range(2) for b in SMALL.read_shard(shard)], dim=1)
    assert torch.equal(read, torch.from_numpy(SMALL.samples(0, 5_003).ids))
    np.testing.assert_array_equal(SMALL.samples(3_333, 4_444).ids, read.numpy()[:, 3_333:4_444])


def test_train_and_test_share_popularity_categories_and_model() -> None:
    test = SyntheticTaobao(scale=0.01, num_samples=1, seed=3, split="test")
    other = SyntheticTaobao(scale=0.01, num_samples=1, seed=4)
    one, two, three = (source.samples(0, 30_000) for source in (SMALL, test, other))
    assert not np.array_equal(one.ids[0], two.ids[0])
    for table, least in ((0, 0.2), (1, 0.8)):
        counts = [np.bincount(part.ids[table].ravel(), minlength=SMALL._rows[table]) for part in (one, two, three)]
        assert np.corrcoef(counts[0], counts[1])[0, 1] > least and abs(np.corrcoef(counts[0], counts[2])[0, 1]) < 0.05
    np.testing.assert_array_equal(SMALL.category_of(two.ids[1]), two.ids[2])
    np.testing.assert_array_equal(SMALL.planted_model.logits(two.ids, two.dense), test.planted_model.logits(two.ids, two.dense))


@pytest.mark.parametrize(("scale", "seed"), [(0.1, 0), (0.01, 5)])
def test_labels_follow_the_planted_model(scale: float, seed: int) -> None:
    samples = SyntheticTaobao(scale=scale, num_samples=1, seed=seed).samples(0, SAMPLES)
    assert samples.labels.mean() == pytest.approx(0.5, abs=0.015)
    assert 0.78 < auc(samples.probability, samples.labels) < 0.82  # what a perfect model scores
    for tenth in np.array_split(np.argsort(samples.probability), 10):
        assert samples.labels[tenth].mean() == pytest.approx(samples.probability[tenth].mean(), abs=0.03)


def test_what_can_be_learned_is_in_the_order_and_in_the_sum() -> None:
    """Without the fit of the candidate, or without the rows' effects, the best score is lower."""
    source = SyntheticTaobao(scale=0.1, num_samples=1)
    samples = source.samples(0, SAMPLES)
    best = auc(samples.probability, samples.labels)
    fitting = fits(samples.ids[2])
    assert fitting.mean() == pytest.approx(0.5, abs=0.02)
    assert samples.labels[fitting].mean() > 0.6 and samples.labels[~fitting].mean() < 0.4
    model = source.planted_model
    for part, least in ((0, 0.05), (1, 0.05), (2, 0.015)):
        shares = tuple(0.0 if number == part else share for number, share in enumerate(model.mix.shares))
        without = PlantedSequenceModel(model.seed, replace(model.mix, shares=shares))
        assert auc(without.logits(samples.ids, samples.dense), samples.labels) < best - least, part


def test_a_candidate_fits_if_its_category_occurred() -> None:
    assert fits(np.array([[1, 2, 3, 2], [1, 2, 3, 4], [5, 5, 5, 5]])).tolist() == [True, False, True]


def test_names_say_synthetic() -> None:
    assert SMALL.name == "synthetic taobao, scale 0.01, 5003 samples, seed 3, train"
    assert SyntheticTaobao(num_samples=1, coupled=False).name.endswith(", features drawn independently")
    assert synthetic_access("taobao", 0.1, _tables(0.1)).source == "the law of synthetic Taobao, scale 0.1"
    assert synthetic_access("avazu", 0.1, TableSet((TableSpec("t_C1", 7, 16, ("C1",)),))).source == "the law of synthetic Avazu, scale 0.1"


@pytest.mark.parametrize("rows", [98_798, 416_202])
def test_the_law_refuses_other_tables(rows: int) -> None:
    with pytest.raises(ConfigError, match=r"none of synthetic Taobao's at scale 0\.1; measure a profile"):
        taobao_access(0.1, TableSet((TableSpec("t_user", rows, 16, ("user",)),)))


@pytest.mark.parametrize(
    ("options", "says"), [({"scale": 0.0}, r"\(0, 1\]"), ({"seed": -1}, "-1"), ({"split": "dev"}, "'train' or 'test'")]
)
def test_bad_arguments_are_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SyntheticTaobao(**{"num_samples": 10, **options})  # type: ignore[arg-type]
