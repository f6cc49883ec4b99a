"""An experiment's profile: when the kept one serves, when it is measured anew, and the cache statistics beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fae_torchrec.config import load_config
from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.data.cache_statistics import MeasuredCacheStatistics
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.experiment import placed_tables
from fae_torchrec.experiment_data import open_data
from fae_torchrec.experiment_profile import make_cache_statistics
from tests.raw_data import RAW
from tests.small_config import TRAIN_SAMPLES, new_config, profile_of, write_parquet, write_run


@pytest.fixture()
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every profile that is measured."""
    calls: list[int] = []
    run = Calibrator.run_source
    monkeypatch.setattr(Calibrator, "run_source", lambda self, *a, **k: (calls.append(1), run(self, *a, **k))[1])
    return calls


def test_profile_is_reused(tmp_path: Path, measured: list[int]) -> None:
    first = profile_of(new_config(tmp_path))
    assert (tmp_path / "out" / "profile.npz").is_file()
    again = profile_of(new_config(tmp_path))
    assert again.fingerprint == first.fingerprint
    # What does not change the counts does not matter; the bytes are those of the tables at hand.
    wider = profile_of(new_config(tmp_path, "model.embedding_dim=8", "model.dense_arch=[8]", "train.optimizer=sgd", "placement.budget=30%"))
    assert wider.fingerprint == first.fingerprint
    profile_of(new_config(tmp_path, *KEPT))
    assert (first.tables["t_v"].row_bytes, wider.tables["t_v"].row_bytes) == (4 * 4 + 4, 8 * 4)
    assert len(measured) == 1


KEPT = ["profile.workers=1", "profile.keep_inputs=701", "profile.fresh_inputs=700"]
"""Says the same: no more inputs are kept than were counted."""
OTHER_ROWS = "data.parquet.cardinalities={u: 40, v: 2001, w: 500}"


SAMPLING = ["profile.seed=8", "profile.sample_rate=0.6", "profile.sample_rate=1", "profile.keep_inputs=99", "profile.fresh_inputs=99"]
CHANGES = [*SAMPLING, OTHER_ROWS, "data.parquet.sparse=[u]", "file", "damage"]


@pytest.mark.parametrize("change", CHANGES)
def test_profile_is_measured_anew(change: str, tmp_path: Path, measured: list[int]) -> None:
    first = profile_of(new_config(tmp_path))
    overrides = []
    if change == "file":  # the same name and number of rows, other samples
        train = tmp_path / "train.parquet"
        write_parquet(train, TRAIN_SAMPLES, seed=9)
        os.utime(train, ns=(train.stat().st_atime_ns, train.stat().st_mtime_ns + 1_000_000))  # where the clock of files is coarse
    elif change == "damage":
        (tmp_path / "out" / "profile.npz").write_bytes(b"PK")
    else:
        overrides = [change]
    second = profile_of(new_config(tmp_path, *overrides))
    assert len(measured) == 2
    assert (second.fingerprint == first.fingerprint) == (change == "damage")
    assert PopularityProfile.load(tmp_path / "out" / "profile.npz").fingerprint == second.fingerprint, "the new one is kept"


def test_named_profile(tmp_path: Path, measured: list[int]) -> None:
    first = profile_of(new_config(tmp_path))
    first.save(tmp_path / "named.npz")
    # A named profile is taken as it is, whatever the sampling says, and the kept one is left alone.
    kept = (tmp_path / "out" / "profile.npz").read_bytes()
    named = profile_of(new_config(tmp_path, f"profile.path={tmp_path / 'named.npz'}", "profile.seed=8"))
    assert named.fingerprint == first.fingerprint and len(measured) == 1
    assert (tmp_path / "out" / "profile.npz").read_bytes() == kept


def test_profile_of_raw_data(tmp_path: Path, measured: list[int]) -> None:
    """Its kept profile serves too, unless the coding changes or more malformed lines were skipped than are allowed now."""
    path = write_run(tmp_path, RAW["csv"](tmp_path))
    first = profile_of(load_config(path))
    assert first.source == open_data(load_config(path)).name and "method hash" in first.source
    assert profile_of(load_config(path)).fingerprint == first.fingerprint and len(measured) == 1
    assert profile_of(load_config(path, ["data.coding.method=modulo"])).fingerprint != first.fingerprint and len(measured) == 2
    with (tmp_path / "c.csv").open("a") as test:
        test.write("of no interest here\n")
    with (tmp_path / "a.csv").open("a") as train:
        train.write("1,0.5\n")
    allowed = ["data.max_bad_lines=1"]
    skipping = profile_of(load_config(path, allowed))
    assert skipping.skipped == {str(tmp_path / "a.csv"): 1} and skipping.total_samples == first.total_samples and len(measured) == 3
    assert profile_of(load_config(path, ["data.max_bad_lines=2"])).fingerprint == skipping.fingerprint and len(measured) == 3
    with pytest.raises(DataError, match=r"a\.csv, line 92: expected 5 fields, received 2"):
        profile_of(load_config(path))


def test_cache_statistics(tmp_path: Path) -> None:
    config = new_config(tmp_path)
    data = open_data(config)
    tables = placed_tables(config, data)
    statistics, path = make_cache_statistics(config, data, tables)
    assert path == tmp_path / "out" / "cache_statistics.npz"
    assert (statistics.global_batch_size, statistics.global_batches, statistics.source) == (32, TRAIN_SAMPLES // 32, data.name)
    loaded = MeasuredCacheStatistics.load(path)
    assert loaded.fingerprint == statistics.fingerprint
    assert json.loads(path.with_suffix(".json").read_text()) == json.loads(json.dumps(loaded.to_json()))
    ids = pq.read_table(tmp_path / "train.parquet").column("w").to_numpy()
    distinct = [len(set(ids[start : start + 32])) for start in range(0, TRAIN_SAMPLES - 31, 32)]
    assert loaded.by_table["t_w"].expected_lookups == pytest.approx(sum(distinct) / len(distinct))
    other, _ = make_cache_statistics(config, data, tables, 64)
    assert (other.global_batch_size, other.global_batches) == (64, TRAIN_SAMPLES // 64)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, received 0"):
        make_cache_statistics(config, data, tables, 0)
    with pytest.raises(DataError, match="1 whole global batches of 400 samples"):
        make_cache_statistics(config, data, tables, 400)
    assert MeasuredCacheStatistics.load(path).fingerprint == other.fingerprint, "a failure leaves what was there"
