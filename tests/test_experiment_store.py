"""An experiment's store: written once, found again, and told apart from those of other placements and other data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fae_torchrec.config import RunConfig
from fae_torchrec.core.errors import ConfigError, DataError, FAEError, FingerprintError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.experiment import prepare
from fae_torchrec.experiment_data import ExperimentData, open_data
from fae_torchrec.experiment_placement import place_rows
from fae_torchrec.experiment_store import make_store, open_store
from tests.raw_data import RAW
from tests.small_config import TRAIN_SAMPLES, new_config, write_parquet, write_run


def opened(folder: Path, *overrides: str) -> tuple[RunConfig, ExperimentData, RowPlacement]:
    config = new_config(folder, *overrides)
    data = open_data(config)
    return config, data, place_rows(config, data)


def test_written_once_and_found_again(tmp_path: Path) -> None:
    config, data, placement = opened(tmp_path)
    store, is_new = make_store(config, data, placement)
    assert (store.path, is_new) == (str(tmp_path / "out" / "store"), True), "in the output folder, where the config names none"
    assert (store.num_samples, store.data_name, store.placement_fingerprint) == (TRAIN_SAMPLES, data.name, placement.fingerprint)
    assert 0 < store.hot_samples < TRAIN_SAMPLES
    times = {file.name: file.stat().st_mtime_ns for file in os.scandir(store.path)}
    again, is_new = make_store(config, data, placement)
    assert (again.fingerprint, is_new) == (store.fingerprint, False)
    assert {file.name: file.stat().st_mtime_ns for file in os.scandir(store.path)} == times
    assert open_store(config, data, placement) is None, "it is not used unless the config names it"
    named = new_config(tmp_path, f"loader.store={store.path}")
    found = open_store(named, data, placement)
    assert found is not None and found.fingerprint == store.fingerprint
    elsewhere, is_new = make_store(new_config(tmp_path, f"loader.store={tmp_path / 'else'}", "loader.workers=1"), data, placement)
    assert (elsewhere.path, elsewhere.fingerprint, is_new) == (str(tmp_path / "else"), store.fingerprint, True)


def test_of_another_placement_or_other_data(tmp_path: Path) -> None:
    config, data, placement = opened(tmp_path)
    store, _ = make_store(config, data, placement)
    named = f"loader.store={store.path}"
    smaller = opened(tmp_path, "placement.budget=10%", f"output={tmp_path / 'smaller'}", named)
    for refuse in (make_store, open_store):
        with pytest.raises(FingerprintError) as error:
            refuse(*smaller)
        assert placement.fingerprint in str(error.value) and smaller[2].fingerprint in str(error.value)
        assert ("remove" in str(error.value)) == (refuse is make_store)
    prepare(smaller[0], "stock", 1)  # which does not read it
    with pytest.raises(FingerprintError):
        prepare(smaller[0], "fae", 1)
    write_parquet(tmp_path / "train.parquet", TRAIN_SAMPLES, seed=5)
    other = open_data(config)
    for refuse in (make_store, open_store):
        with pytest.raises(FingerprintError, match=r"holds the data [0-9a-f]{12} .*, given are the data [0-9a-f]{12} "):
            refuse(new_config(tmp_path, named), other, placement)


def test_what_is_no_store(tmp_path: Path) -> None:
    config, data, placement = opened(tmp_path, f"loader.store={tmp_path / 'absent'}")
    with pytest.raises(ConfigError, match=r"no segregated store .*absent; .*fae segregate"):
        open_store(config, data, placement)
    (tmp_path / "folder").mkdir()
    config = new_config(tmp_path, f"loader.store={tmp_path / 'folder'}")
    with pytest.raises(ConfigError, match=r"no store.*never overwritten: remove .*folder, or name another"):
        make_store(config, data, placement)
    with pytest.raises(DataError, match="no store"):
        open_store(config, data, placement)
    with pytest.raises(FAEError, match="file"):
        (tmp_path / "file").write_text("")
        make_store(new_config(tmp_path, f"loader.store={tmp_path / 'file' / 'store'}"), data, placement)


def test_another_coding_is_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named placement does not know how categories become rows, but the name of the data does."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, RAW["csv"](tmp_path))
    make_store(*opened(tmp_path, "placement.pinned_max_rows=0"))
    modulo = new_config(tmp_path, "data.coding.method=modulo", "placement.path=out/placement.npz", "loader.store=out/store")
    with pytest.raises(FingerprintError, match=r"coding method hash\), given are the data .*coding method modulo\)"):
        prepare(modulo, "fae", 1)
    assert open_data(modulo).train.name == open_data(modulo).name
