"""The calibrator against a loop over samples: the same inputs, however they are cut into batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data import calibrator as module
from fae_torchrec.data.calibrator import Calibrator

# "x" feeds both tables, "a" has two features, "z" feeds none.
TABLES = TableSet((TableSpec("a", 12, 4, ("x", "y")), TableSpec("b", 20, 4, ("x",))))
FEATURES = ("z", "y", "x")
Sample = dict[str, list[int]]


def _samples(n: int, seed: int = 0) -> list[Sample]:
    """Samples with bags of 0 to 3 ids."""
    rng = np.random.default_rng(seed)
    return [{f: rng.integers(0, 12, size=rng.integers(0, 4)).tolist() for f in FEATURES} for _ in range(n)]


def _batch(samples: list[Sample], features: tuple[str, ...] = FEATURES) -> Batch:
    return Batch(
        dense_features=torch.zeros(len(samples), 1),
        sparse_features=KeyedJaggedTensor(
            keys=list(features),
            values=torch.tensor([i for f in features for s in samples for i in s[f]], dtype=torch.int64),
            lengths=torch.tensor([len(s[f]) for f in features for s in samples], dtype=torch.int32),
            stride=len(samples),
        ),
        labels=torch.zeros(len(samples)),
    )


def _cut(samples: list[Sample], *sizes: int) -> Iterator[Batch]:
    """Batches of these sizes over and over."""
    at, n = 0, 0
    while at < len(samples):
        yield _batch(samples[at : at + sizes[n % len(sizes)]])
        at, n = at + sizes[n % len(sizes)], n + 1


def _same(a: PopularityProfile, b: PopularityProfile) -> bool:
    return a.fingerprint == b.fingerprint


def test_the_profile_is_that_of_a_loop_over_samples() -> None:
    samples = _samples(400)
    profile = Calibrator(TABLES, sample_rate=0.3, seed=5, probe_size=25).run(_cut(samples, 64), source="loop")

    draws = np.random.default_rng(5).random(400)
    sampled = [n for n in range(400) if draws[n] < 0.3]
    counts = {"a": [0] * 12, "b": [0] * 20}
    for n in sampled:
        for table, feature in TABLES.lookups:
            for i in samples[n][feature]:
                counts[table][i] += 1
    assert {name: c.tolist() for name, c in profile.counts.items()} == counts
    assert (profile.num_samples, profile.total_samples) == (len(sampled), 400)
    assert (profile.sample_rate, profile.seed, profile.source, profile.tables) == (0.3, 5, "loop", TABLES)

    kept = sorted(sorted(set(range(400)) - set(sampled), key=lambda n: draws[n])[:25])
    assert profile.probe.held_out and profile.probe.num_samples == 25 and set(profile.probe.values) == {"x", "y"}
    for feature in "xy":
        assert profile.probe.lengths[feature].tolist() == [len(samples[n][feature]) for n in kept]
        assert profile.probe.values[feature].tolist() == [i for n in kept for i in samples[n][feature]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.sampled_from([3, 20, 1000]), st.sampled_from([2, 5, 1024]))
def test_batch_sizes_do_not_matter(sizes: list[int], probe_size: int, max_pieces: int) -> None:
    samples = _samples(150)
    calibrator = Calibrator(TABLES, sample_rate=0.5, seed=1, probe_size=probe_size)
    whole = calibrator.run([_batch(samples)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MAX_PIECES", max_pieces)
        assert _same(calibrator.run(_cut(samples, *sizes)), whole)


def test_the_seed_decides() -> None:
    samples = _samples(200)
    runs = [Calibrator(TABLES, sample_rate=0.5, seed=seed).run(_cut(samples, 32)) for seed in (1, 1, 2)]
    assert _same(runs[0], runs[1])
    assert runs[0].counts["a"].tolist() != runs[2].counts["a"].tolist()


def test_a_rate_of_one_counts_everything() -> None:
    samples = _samples(50)
    profile = Calibrator(TABLES, sample_rate=1).run(_cut(samples, 7))
    assert profile.num_samples == profile.total_samples == profile.probe.num_samples == 50
    assert not profile.probe.held_out, "nothing is left out"
    assert profile.total_accesses == sum(len(s["x"]) * 2 + len(s["y"]) for s in samples)


def test_the_sampled_share_and_the_probe_are_fair() -> None:
    n, rate, size = 40_000, 0.1, 1000
    # The id of feature x is the sample's place in the stream, in tenths: a fair probe has about a tenth of each.
    tables = TableSet((TableSpec("t", 10, 4, ("x",)),))
    samples = [{"x": [place * 10 // n]} for place in range(n)]
    batches = (_batch(samples[at : at + 500], ("x",)) for at in range(0, n, 500))
    profile = Calibrator(tables, sample_rate=rate, probe_size=size).run(batches)
    assert abs(profile.num_samples - n * rate) < 4 * np.sqrt(n * rate * (1 - rate))
    in_tenths = np.bincount(profile.probe.values["x"], minlength=10)
    assert in_tenths.sum() == size
    assert np.all(np.abs(in_tenths - size / 10) < 4 * np.sqrt(size * 0.1 * 0.9))


@pytest.mark.parametrize(("rate", "hot_inputs"), [(0.5, 0.0), (1, 1.0)])
def test_hot_inputs_are_estimated_on_inputs_that_were_not_counted(rate: float, hot_inputs: float) -> None:
    """Every input has an id of its own: its row is hot once it was counted, which says nothing of the next input."""
    tables = TableSet((TableSpec("t", 1000, 4, ("x",)),))
    profile = Calibrator(tables, sample_rate=rate).run([_batch([{"x": [n]} for n in range(1000)], ("x",))])
    assert profile.hot_inputs({"t": profile.counts["t"].nonzero()[0]}) == hot_inputs


def test_nothing_left_out_is_an_error() -> None:
    with pytest.raises(DataError, match=r"all of 3 inputs were sampled at sample_rate 0\.999999.*none is left to estimate hot inputs"):
        Calibrator(TABLES, sample_rate=0.999999).run([_batch(_samples(3))])


def test_nothing_sampled_is_an_error() -> None:
    with pytest.raises(DataError, match=r"none of 3 inputs was sampled at sample_rate 1e-09"):
        Calibrator(TABLES, sample_rate=1e-9).run([_batch(_samples(3))])
    with pytest.raises(DataError, match="none of 0 inputs"):
        Calibrator(TABLES).run([])


def test_a_missing_feature_is_named() -> None:
    with pytest.raises(DataError, match=r"'y' of table 'a'"):
        Calibrator(TABLES, sample_rate=1).run([_batch(_samples(3), ("x", "z"))])


@pytest.mark.parametrize("rate", [1.0, 1e-9])
@pytest.mark.parametrize(("feature", "bad", "said"), [("y", 12, "'a'.*id 12.*0..11"), ("x", -1, "'a'.*id -1.*0..11")])
def test_an_id_out_of_range_is_found_sampled_or_not(rate: float, feature: str, bad: int, said: str) -> None:
    samples = _samples(10)
    samples[7][feature] = [3, bad]
    with pytest.raises(DataError, match=f"day 0, in the 4 samples after the first 4: .*{said}"):
        Calibrator(TABLES, sample_rate=rate).run(_cut(samples, 4), source="day 0")


def test_ids_of_features_without_a_table_are_ignored() -> None:
    samples = _samples(10)
    samples[4]["z"] = [-5, 10**12]
    Calibrator(TABLES, sample_rate=1).run(_cut(samples, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"sample_rate": 0}, "received 0"), ({"sample_rate": 1.5}, r"received 1\.5"), ({"probe_size": 0}, "at least 1 sample, received 0")],
)
def test_bad_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Calibrator(TABLES, **arguments)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_goes_to_a_terminal_on_stderr(terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    calibrator = Calibrator(TABLES, sample_rate=1)
    assert _same(calibrator.run(_cut(_samples(10), 4), progress=True, total=10), calibrator.run(_cut(_samples(10), 4)))
    shown = capsys.readouterr()
    assert shown.out == "" and ("calibrate: 100%" in shown.err) == terminal
