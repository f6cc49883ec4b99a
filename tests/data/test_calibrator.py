"""The calibrator against a loop over samples: the same inputs, however they are cut into batches."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.core.input_sample import InputSample
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data import kept_inputs as module
from fae_torchrec.data.calibrator import Calibrator
from tests.data.small_shards import TABLES, Sample, cut_samples, make_batch, make_samples


def _draws(n: int, seed: int, shard: int = 0) -> np.ndarray:
    """The draws of a shard's inputs, as documented."""
    key = np.random.SeedSequence([seed, shard]).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(n)


def _same(a: PopularityProfile, b: PopularityProfile) -> bool:
    return a.fingerprint == b.fingerprint


def _check_kept(inputs: InputSample | None, samples: list[Sample], kept: list[int]) -> None:
    """The sample is of these inputs."""
    assert inputs is not None and inputs.num_samples == len(kept) and set(inputs.values) == {"x", "y"}
    for feature in "xy":
        assert inputs.lengths[feature].tolist() == [len(samples[n][feature]) for n in kept]
        assert inputs.values[feature].tolist() == [i for n in kept for i in samples[n][feature]]


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_profile_is_that_of_a_loop_over_samples(one_hot: bool) -> None:
    samples = make_samples(400, one_hot=one_hot)
    calibrator = Calibrator(TABLES, sample_rate=0.3, seed=5, keep_inputs=30, fresh_inputs=25)
    profile = calibrator.run(cut_samples(samples, 64), source="loop")

    draws = _draws(400, seed=5)
    counted = [n for n in range(400) if draws[n] < 0.3]
    counts = {"a": [0] * 12, "b": [0] * 20}
    for n in counted:
        for table, feature in TABLES.lookups:
            for i in samples[n][feature]:
                counts[table][i] += 1
    assert {name: c.dense().tolist() for name, c in profile.counts.items()} == counts
    assert (profile.num_samples, profile.total_samples) == (len(counted), 400)
    assert (profile.sample_rate, profile.seed, profile.source, profile.tables) == (0.3, 5, "loop", TABLES)
    assert profile.skipped == {}
    fresh = sorted(set(range(400)) - set(counted), key=lambda n: draws[n])
    _check_kept(profile.fresh_inputs, samples, sorted(fresh[:25]))
    _check_kept(profile.counted_inputs, samples, sorted(sorted(counted, key=lambda n: draws[n])[:30]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.sampled_from([3, 20, 1000]), st.sampled_from([2, 5, 1024]), st.booleans())
def test_batch_sizes_do_not_matter(sizes: list[int], keep: int, max_pieces: int, one_hot: bool) -> None:
    samples = make_samples(150, one_hot=one_hot)
    calibrator = Calibrator(TABLES, sample_rate=0.5, seed=1, keep_inputs=keep, fresh_inputs=keep)
    whole = calibrator.run([make_batch(samples)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MAX_PIECES", max_pieces)
        assert _same(calibrator.run(cut_samples(samples, *sizes)), whole)
        assert _same(calibrator.run(batch.sparse_features for batch in cut_samples(samples, *sizes)), whole), "a stream of KJTs"


def test_the_order_of_features_and_of_batches_with_one_id_per_bag_do_not_matter() -> None:
    samples = [*make_samples(20, one_hot=True), *make_samples(20), *make_samples(20, 1, one_hot=True)]
    calibrator = Calibrator(TABLES, sample_rate=0.5, seed=1)
    whole = calibrator.run([make_batch(samples)])
    assert _same(calibrator.run(cut_samples(samples, 20)), whole)
    assert _same(calibrator.run([make_batch(samples, ("x", "y"))]), whole)


def test_the_seed_decides() -> None:
    samples = make_samples(200)
    runs = [Calibrator(TABLES, sample_rate=0.5, seed=seed).run(cut_samples(samples, 32)) for seed in (1, 1, 2)]
    assert _same(runs[0], runs[1])
    assert runs[0].counts["a"].dense().tolist() != runs[2].counts["a"].dense().tolist()


def test_numbers_may_be_of_numpy() -> None:
    batches = [make_batch(make_samples(40))]
    plain = Calibrator(TABLES, sample_rate=0.5, seed=3, keep_inputs=9, fresh_inputs=8).run(batches)
    seed, keep, fresh = np.int64(3), np.int64(9), np.int32(8)
    assert _same(Calibrator(TABLES, sample_rate=np.float32(0.5), seed=seed, keep_inputs=keep, fresh_inputs=fresh).run(batches), plain)  # type: ignore[arg-type]


def test_a_rate_of_one_counts_everything() -> None:
    samples = make_samples(50)
    profile = Calibrator(TABLES, sample_rate=1).run(cut_samples(samples, 7))
    assert profile.num_samples == profile.total_samples == profile.counted_inputs.num_samples == 50
    assert profile.fresh_inputs is None
    assert profile.total_accesses == sum(len(s["x"]) * 2 + len(s["y"]) for s in samples)


def test_the_counted_share_and_the_inputs_kept_are_fair() -> None:
    n, rate, size = 40_000, 0.1, 1000
    # The id of feature x is the sample's place in the stream, in tenths: a fair sample has about a tenth of each.
    tables = TableSet((TableSpec("t", 10, 4, ("x",)),))
    samples = [{"x": [place * 10 // n]} for place in range(n)]
    batches = (make_batch(samples[at : at + 500], ("x",)) for at in range(0, n, 500))
    profile = Calibrator(tables, sample_rate=rate, keep_inputs=size, fresh_inputs=size).run(batches)
    assert abs(profile.num_samples - n * rate) < 4 * np.sqrt(n * rate * (1 - rate))
    for inputs in (profile.counted_inputs, profile.fresh_inputs):
        assert inputs is not None
        in_tenths = np.bincount(inputs.values["x"], minlength=10)
        assert in_tenths.sum() == size
        assert np.all(np.abs(in_tenths - size / 10) < 4 * np.sqrt(size * 0.1 * 0.9))


@pytest.mark.parametrize(("rate", "hot_inputs"), [(0.5, 0.0), (1, 1.0)])
def test_hot_inputs_are_estimated_on_inputs_that_were_not_counted(rate: float, hot_inputs: float) -> None:
    """Every input has an id of its own: its row is hot once it was counted, which says nothing of the next input."""
    tables = TableSet((TableSpec("t", 1000, 4, ("x",)),))
    profile = Calibrator(tables, sample_rate=rate).run([make_batch([{"x": [n]} for n in range(1000)], ("x",))])
    assert profile.hot_inputs({"t": profile.counts["t"].ids}).value == hot_inputs


def test_the_interval_of_hot_inputs_covers_the_exact_share() -> None:
    """Of all inputs that were not counted, for the rows that were counted twice or more, over 300 seeds."""
    tables = TableSet((TableSpec("t", 2_000, 4, ("x",)), TableSpec("u", 3_000, 4, ("y",))))
    n, rate = 6_000, 0.1
    ids = np.minimum(np.random.default_rng(3).zipf(1.3, size=(2, n)), 2_000) - 1
    kjt = KeyedJaggedTensor(
        keys=["x", "y"], values=torch.from_numpy(ids.reshape(-1)), lengths=torch.ones(2 * n, dtype=torch.int32), stride=n
    )
    covered, biased, widths = 0, 0, []
    for seed in range(300):
        profile = Calibrator(tables, sample_rate=rate, seed=seed, fresh_inputs=300).run([kjt])
        hot_ids = {name: counts.ids[counts.counts >= 2] for name, counts in profile.counts.items()}
        hot = np.isin(ids[0], hot_ids["t"]) & np.isin(ids[1], hot_ids["u"])
        fresh = _draws(n, seed) >= rate
        exact = hot[fresh].mean()
        interval = profile.hot_inputs(hot_ids)
        covered += interval.low <= exact <= interval.high
        widths.append(interval.high - interval.low)
        biased += hot[~fresh].mean() > exact
    assert covered >= 297 and max(widths) < 0.2
    assert biased == 300, "inputs that were counted look better than they are, hence the fresh ones"


def test_nothing_left_out_is_an_error() -> None:
    with pytest.raises(DataError, match=r"all of 3 inputs were sampled at sample_rate 0\.999999.*none is left to estimate hot inputs"):
        Calibrator(TABLES, sample_rate=0.999999).run([make_batch(make_samples(3))])


def test_nothing_sampled_is_an_error() -> None:
    with pytest.raises(DataError, match=r"none of 3 inputs was sampled at sample_rate 1e-09"):
        Calibrator(TABLES, sample_rate=1e-9).run([make_batch(make_samples(3))])
    with pytest.raises(DataError, match="none of 0 inputs"):
        Calibrator(TABLES).run([])


def test_a_missing_feature_is_named() -> None:
    with pytest.raises(DataError, match=r"'y' of table 'a'"):
        Calibrator(TABLES, sample_rate=1).run([make_batch(make_samples(3), ("x", "z"))])


@pytest.mark.parametrize("rate", [1.0, 1e-9])
@pytest.mark.parametrize(("feature", "bad", "said"), [("y", 12, "'a'.*id 12.*0..11"), ("x", -1, "'a'.*id -1.*0..11")])
def test_an_id_out_of_range_is_found_sampled_or_not(rate: float, feature: str, bad: int, said: str) -> None:
    samples = make_samples(10)
    samples[7][feature] = [3, bad]
    with pytest.raises(DataError, match=f"day 0, in the 4 samples after the first 4: .*{said}"):
        Calibrator(TABLES, sample_rate=rate).run(cut_samples(samples, 4), source="day 0")


def test_ids_of_features_without_a_table_are_ignored() -> None:
    samples = make_samples(10)
    samples[4]["z"] = [-5, 10**12]
    Calibrator(TABLES, sample_rate=1).run(cut_samples(samples, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_rate": 0}, "received 0"),
        ({"sample_rate": 1.5}, r"received 1\.5"),
        ({"seed": -1}, "seed must be at least 0, received -1"),
        ({"keep_inputs": 0}, "keep_inputs must be at least 1, received 0"),
        ({"fresh_inputs": 0}, "fresh_inputs must be at least 1, received 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Calibrator(TABLES, **arguments)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_goes_to_a_terminal_on_stderr(terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    calibrator = Calibrator(TABLES, sample_rate=1)
    samples = make_samples(10)
    assert _same(calibrator.run(cut_samples(samples, 4), progress=True, total=10), calibrator.run(cut_samples(samples, 4)))
    shown = capsys.readouterr()
    assert shown.out == "" and ("calibrate: 100%" in shown.err) == terminal
