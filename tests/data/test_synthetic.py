"""Tests of fae_torchrec/data/synthetic.py, criteo_shape.py and planted_model.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.input_sample import InputSample
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.criteo_shape import SHAPES
from fae_torchrec.data.generated_source import BLOCK_SAMPLES
from fae_torchrec.data.planted_model import PlantedModel
from fae_torchrec.data.popularity_law import affine_permutations
from fae_torchrec.data.published_shape import KEEP_ROWS
from fae_torchrec.data.synthetic import SyntheticCriteo

COUNTED, FRESH = 500_000, 100_000
SMALL = SyntheticCriteo("kaggle", scale=0.01, num_samples=5_003, seed=3)


def auc(score: npt.NDArray[np.float64], labels: npt.NDArray[np.float32]) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney); scores without ties."""
    rank = np.empty(len(score))
    rank[np.argsort(score)] = np.arange(1, len(score) + 1)
    clicks = labels.sum()
    return float((rank[labels > 0].sum() - clicks * (clicks + 1) / 2) / (clicks * (len(labels) - clicks)))


def measured_points(dataset: str, *, coupled: bool) -> list[float]:
    """Hot inputs of fresh samples at the published byte shares, scale 1/10, by the package's own calibrator and selection."""
    train = SyntheticCriteo(dataset, num_samples=COUNTED, coupled=coupled)  # type: ignore[arg-type]
    test = SyntheticCriteo(dataset, num_samples=FRESH, split="test", coupled=coupled)  # type: ignore[arg-type]
    dim = SHAPES[dataset].embedding_dim
    tables = TableSet(tuple(TableSpec(f"t_{name}", rows, dim, (name,)) for name, rows in train.cardinalities.items()))
    profile = Calibrator(tables, sample_rate=1.0, keep_inputs=1).run(train.batches(65_536))
    ids = test.samples(0, FRESH).ids
    one_hot = np.ones(FRESH, dtype=np.int64)
    inputs = InputSample(dict(zip(train.feature_names, ids, strict=True)), dict.fromkeys(train.feature_names, one_hot), FRESH)
    fresh: PopularityProfile = replace(profile, fresh_inputs=inputs)
    budgets = [round(share * tables.total_bytes) for share, _ in SHAPES[dataset].published_points]
    return [select_hot_set(fresh, budget, policy="threshold").hot_inputs for budget in budgets]


@pytest.mark.parametrize("dataset", ["kaggle", "terabyte"])
def test_hot_inputs_come_within_six_points_of_the_published(dataset: str) -> None:
    published = [hot for _, hot in SHAPES[dataset].published_points]
    np.testing.assert_allclose(measured_points(dataset, coupled=True), published, atol=0.06)


def test_hot_inputs_need_correlated_features() -> None:
    published = np.array([hot for _, hot in SHAPES["kaggle"].published_points])
    apart = np.array(measured_points("kaggle", coupled=False))
    assert (published - apart > 0.2).all(), f"without coupling: {apart}"


def test_published_points_are_the_papers() -> None:
    assert SHAPES["kaggle"].published_points == ((0.0020, 0.504), (0.0095, 0.651), (0.068, 0.758))
    assert SHAPES["terabyte"].published_points == ((0.0003, 0.526), (0.0013, 0.731), (0.0066, 0.817))


def test_published_rows_add_up() -> None:
    assert sum(SHAPES["kaggle"].published_rows) == 33_762_577
    assert sum(SHAPES["terabyte"].published_rows) == 266_000_000


def test_rows_scale_but_small_tables_keep_theirs() -> None:
    rows = SHAPES["kaggle"].rows(0.1)
    assert rows[:9].tolist() == [1_460, 583, 1_013_123, 220_261, 305, 24, KEEP_ROWS, 633, 3]
    assert SHAPES["kaggle"].rows(1.0).tolist() == list(SHAPES["kaggle"].published_rows)
    assert SHAPES["kaggle"].rows(1e-6).max() == KEEP_ROWS


@pytest.mark.parametrize("batch_size", [1, 700, BLOCK_SAMPLES, 5_003, 9_999])
def test_batches_do_not_change_the_samples(batch_size: int) -> None:
    source = SyntheticCriteo("kaggle", scale=0.01, num_samples=3 if batch_size == 1 else 5_003, seed=3)
    whole = SMALL.samples(0, source.num_samples)
    batches = list(source.batches(batch_size))
    assert [len(b.labels) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat([b.dense_features for b in batches]), torch.from_numpy(whole.dense))
    assert torch.equal(torch.cat([b.labels for b in batches]), torch.from_numpy(whole.labels))
    ids = torch.cat([b.sparse_features.values().view(26, -1) for b in batches], dim=1)
    assert torch.equal(ids, torch.from_numpy(whole.ids))


@settings(max_examples=25, deadline=None)
@given(batch_size=st.integers(300, 6_000), world_size=st.integers(1, 5))
def test_ranks_get_every_sample_once_in_consecutive_steps(batch_size: int, world_size: int) -> None:
    ranks = [list(SMALL.batches(batch_size, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    dealt = torch.cat([batch.dense_features for step in zip(*ranks, strict=True) for batch in step])
    share = SMALL.num_samples // world_size
    assert all(sum(len(b.labels) for b in batches) == share for batches in ranks)
    assert torch.equal(dealt, torch.from_numpy(SMALL.samples(0, share * world_size).dense))


def test_samples_are_random_access() -> None:
    whole = SMALL.samples(0, 10_000)
    far = SMALL.samples(7_777, 8_888)
    np.testing.assert_array_equal(far.ids, whole.ids[:, 7_777:8_888])
    np.testing.assert_array_equal(far.labels, whole.labels[7_777:8_888])
    assert SMALL.samples(5, 5).ids.shape == (26, 0)


def test_seed_split_and_dataset_change_the_draws() -> None:
    one = SMALL.samples(0, 1_000)
    for other in (
        SyntheticCriteo("kaggle", scale=0.01, num_samples=1, seed=4),
        SyntheticCriteo("kaggle", scale=0.01, num_samples=1, seed=3, split="test"),
        SyntheticCriteo("terabyte", scale=0.01, num_samples=1, seed=3),
    ):
        two = other.samples(0, 1_000)
        assert abs(np.corrcoef(one.dense.ravel(), two.dense.ravel())[0, 1]) < 0.05  # 13,000 pairs: 5 standard errors are 0.044


def test_train_and_test_share_popularity_and_model() -> None:
    test = SyntheticCriteo("kaggle", scale=0.01, num_samples=1, seed=3, split="test")
    one, two = SMALL.samples(0, 20_000), test.samples(0, 20_000)
    for feature, rows in enumerate(SMALL.cardinalities.values()):
        tops = [int(np.bincount(s.ids[feature], minlength=rows).argmax()) for s in (one, two)]
        if SMALL._law.tail_mass(feature, 0) - SMALL._law.tail_mass(feature, 1) > 0.1:
            assert tops[0] == tops[1]
    np.testing.assert_array_equal(SMALL.planted_model.logits(two.ids, two.dense), test.planted_model.logits(two.ids, two.dense))


@pytest.mark.parametrize("dataset", ["kaggle", "terabyte", "avazu"])
@pytest.mark.parametrize("scale", [0.003, 1.0])
def test_batch_is_well_formed_and_ids_are_in_range(dataset: str, scale: float) -> None:
    source = SyntheticCriteo(dataset, scale=scale, num_samples=20_000)  # type: ignore[arg-type]
    for batch in source.batches(8_192):
        kjt, size = batch.sparse_features, len(batch.labels)
        assert kjt.keys() == list(source.feature_names) and kjt.stride() == size and kjt.values().dtype == torch.int64
        assert batch.dense_features.shape == (size, source.num_dense) and batch.dense_features.dtype == torch.float32
        assert batch.labels.dtype == torch.float32 and set(batch.labels.unique().tolist()) <= {0.0, 1.0}
        for name, rows in source.cardinalities.items():
            ids = kjt[name].values()
            assert len(ids) == size and int(ids.min()) >= 0 and int(ids.max()) < rows
            assert torch.equal(kjt[name].lengths(), torch.ones(size, dtype=torch.int32))


@pytest.mark.parametrize("dataset", ["kaggle", "terabyte", "avazu"])
def test_ranks_invert_the_distribution_function(dataset: str) -> None:
    law = SHAPES[dataset].popularity(0.1)
    survival = np.tile(np.array([1.0, 0.9, 0.5, 0.1, 1e-3, 1e-6, 0.0]), (len(law.rows), 1))
    ranks = law.ranks(survival.copy())
    assert (ranks[:, 0] == 0).all() and (ranks[:, -1] == law.rows - 1).all()
    for table in range(len(law.rows)):  # slower second method: bisection on the survival function
        for column in range(1, 6):
            low, high = 0, int(law.rows[table])
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if law.tail_mass(table, middle) >= survival[table, column] else (low, middle)
            assert abs(int(ranks[table, column]) - low) <= 1


@pytest.mark.parametrize("coupled", [True, False])
def test_coupling_leaves_every_table_its_law(coupled: bool) -> None:
    source, n = SyntheticCriteo("kaggle", scale=0.01, num_samples=1, seed=3, coupled=coupled), 100_000
    ids, law = source.samples(0, n).ids, source._law
    for table, rows in enumerate(law.rows):
        share = np.sort(np.bincount(ids[table], minlength=rows))[::-1] / n
        for head in (1, 10, 100):
            if head < rows:
                mass = 1 - law.tail_mass(table, head)
                # Sorting by counts favours lucky rows a little, more where 100 rows are nearly equally popular.
                assert share[:head].sum() == pytest.approx(mass, abs=0.01), (table, head)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5_000), seed=st.integers(0, 1_000))
def test_ranks_map_to_ids_one_to_one(rows: int, seed: int) -> None:
    step, offset = affine_permutations(np.array([rows]), np.random.SeedSequence(seed))
    ids = (np.arange(rows) * step[0] + offset[0]) % rows
    np.testing.assert_array_equal(np.sort(ids), np.arange(rows))


@pytest.mark.parametrize("dataset", ["kaggle", "terabyte"])
@pytest.mark.parametrize(("scale", "seed"), [(0.1, 0), (0.01, 5)])
def test_labels_follow_the_planted_model(dataset: str, scale: float, seed: int) -> None:
    samples = SyntheticCriteo(dataset, scale=scale, num_samples=1, seed=seed).samples(0, 100_000)  # type: ignore[arg-type]
    assert samples.labels.mean() == pytest.approx(0.25, abs=0.02)
    assert 0.76 < auc(samples.probability, samples.labels) < 0.82  # what a perfect model scores
    for tenth in np.array_split(np.argsort(samples.probability), 10):
        assert samples.labels[tenth].mean() == pytest.approx(samples.probability[tenth].mean(), abs=0.025)


def test_rows_of_middling_popularity_carry_signal() -> None:
    source = SyntheticCriteo("kaggle", num_samples=1)
    samples = source.samples(0, 200_000)
    rows = list(source.cardinalities.values())
    best = auc(samples.probability, samples.labels)
    for least, most in ((20, 1_000), (1_000, 200_000)):  # middling rows, popular rows of the tables that are not tiny
        ids = samples.ids.copy()
        for table in np.flatnonzero(np.array(rows) > 1_024):
            times = np.bincount(ids[table], minlength=rows[table])[ids[table]]
            chosen = (times >= least) & (times < most)
            ids[table, chosen] = (ids[table, chosen] + 1) % rows[table]  # other rows, whose effects say nothing about these samples
        assert auc(source.planted_model.logits(ids, samples.dense), samples.labels) < best - 0.02


def test_planted_model_meets_the_click_rate_on_its_calibration_sample() -> None:
    random = np.random.default_rng(0)
    rows = np.array([5, 3_000, 7_000])
    ids, dense = random.integers(0, rows[:, None], size=(3, 4_000)), random.standard_normal((4_000, 13)).astype(np.float32)
    model = PlantedModel.calibrated(rows, 1, ids, dense, 0.1)
    logits = model.logits(ids, dense)
    assert (1 / (1 + np.exp(-logits))).mean() == pytest.approx(0.1, abs=1e-6)
    assert np.corrcoef(logits, PlantedModel.calibrated(rows, 2, ids, dense, 0.1).logits(ids, dense))[0, 1] < 0.7


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dataset": "criteo"}, "kaggle"),
        ({"scale": 0.0}, r"\(0, 1\]"),
        ({"scale": 1.5}, "1.5"),
        ({"num_samples": 0}, "at least 1"),
        ({"seed": -1}, "-1"),
        ({"split": "dev"}, "'train' or 'test'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SyntheticCriteo(**{"dataset": "kaggle", "num_samples": 10, **options})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="world_size"):
        next(SMALL.batches(10, rank=2, world_size=2))


def test_shards_are_the_samples_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fae_torchrec.data.generated_source.SHARD_SAMPLES", 2 * BLOCK_SAMPLES)
    source = SyntheticCriteo("kaggle", scale=0.01, num_samples=10_000, seed=3)
    assert (source.num_shards, source.shard_sizes().tolist(), source.size_hint()) == (3, [4_096, 4_096, 1_808], 10_000)
    shards = [batch for shard in range(3) for batch in source.read_shard(shard)]
    assert torch.equal(torch.cat([b.dense_features for b in shards]), torch.from_numpy(SMALL.samples(0, 10_000).dense))
    assert source.name == "synthetic criteo kaggle, scale 0.01, 10000 samples, seed 3, train"
