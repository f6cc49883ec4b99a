"""Reading a store: any range at once by many readers, and nothing that is not what was written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fae_torchrec.core.errors import ConfigError, DataError, FingerprintError
from fae_torchrec.data.store import SegregatedStore
from fae_torchrec.data.store_columns import id_types
from fae_torchrec.data.store_layout import MANIFEST
from fae_torchrec.data.store_writer import write_store
from tests.data.test_segregate import PLACEMENT, TABLES, make_batch, unpack
from tests.data.test_store_writer import COLD_SAMPLE, HOT_SAMPLE, BagShards, small_parts

SHARDS = [[HOT_SAMPLE if (i * 7) % 5 < 3 else COLD_SAMPLE for i in range(n)] for n in (5, 0, 8, 3, 11)]
ONE_ID = {"a": [0], "b": [2], "c": [3], "d": [1], "ignored": [70_000]}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store of 27 samples in files of a few, with record batches of 3."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_parts(monkeypatch, part_samples=6)
        path = tmp_path_factory.mktemp("written") / "store"
        write_store(path, BagShards(SHARDS, weighted=True), PLACEMENT)
        yield path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "store"))


def test_what_it_says_of_itself(written: Path) -> None:
    store = SegregatedStore.open(written)
    assert (store.feature_names, store.num_dense, store.num_samples) == (("a", "b", "c", "d", "ignored"), 2, 27)
    assert (store.placement_fingerprint, store.data_name) == (PLACEMENT.fingerprint, "27 samples in memory")
    assert store.hot_samples + store.cold_samples == 27 and store.hot_samples > 10
    assert len(store.layout.files) > 5
    manifest = json.loads((written / MANIFEST).read_text())
    assert (manifest["fingerprint"], manifest["data_fingerprint"]) == (store.fingerprint, store.layout.data_fingerprint)
    assert manifest["samples"] == {"hot": store.hot_samples, "cold": store.cold_samples}


def test_threads_and_copies_read_what_one_reads(written: Path) -> None:
    store = SegregatedStore.open(written)
    ranges = [(start, stop) for start in range(store.hot_samples) for stop in range(start, store.hot_samples + 1)]
    one_by_one = [unpack(store.read("hot", i, i + 1)[0])[0] for i in range(store.hot_samples)]

    def right(reader: SegregatedStore, start: int, stop: int) -> bool:
        return unpack(reader.read("hot", start, stop)[0]) == one_by_one[start:stop]

    fresh = SegregatedStore.open(written)  # its files are mapped by the threads, all at once
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda span: right(fresh, *span), ranges))
    copy = pickle.loads(pickle.dumps(store))
    assert copy.fingerprint == store.fingerprint and right(copy, 0, store.hot_samples)


def test_bags_of_one_id_come_with_their_offsets_and_no_descriptor_stays_open(tmp_path: Path) -> None:
    cold = [{**ONE_ID, "ignored": [2**40 + i]} for i in range(6)]
    store = write_store(tmp_path / "s", BagShards([cold]), PLACEMENT)
    before = len(os.listdir("/proc/self/fd"))
    (first, _), (second, numbers) = store.read("cold", 0, 2), store.read("cold", 2, 6)
    assert len(os.listdir("/proc/self/fd")) == before
    assert unpack(first) + unpack(second) == unpack(make_batch(cold))
    assert numbers.tolist() == [2, 3, 4, 5]
    kjt = second.sparse_features
    assert (kjt.length_per_key(), kjt.offset_per_key()) == ([4] * 5, [0, 4, 8, 12, 16, 20])
    assert kjt.lengths().tolist() == [1] * 20 and kjt.offsets().tolist() == list(range(21))
    first.sparse_features.values().zero_()
    first.labels.zero_()
    assert unpack(store.read("cold", 0, 2)[0]) == unpack(make_batch(cold[:2]))  # a batch is a copy


def test_types_of_ids_by_hand() -> None:
    def spec(name: str, rows: int, *features: str) -> object:
        return replace(TABLES["all"], name=name, rows=rows, feature_names=features)

    rows = {"a": 256, "b": 257, "c": 65_536, "d": 65_537, "e": 2**31, "f": 2**31 + 1}
    tables = replace(TABLES, tables=(spec("small", 7, "f"), *(spec(name, n, name) for name, n in rows.items())))
    types = id_types([*rows, "none"], tables)
    # "f" feeds a table of 7 rows too, so its ids are below 7.
    assert types == [np.uint8, np.uint16, np.uint16, np.int32, np.int32, np.uint8, np.int64]
    assert id_types(["f"], replace(tables, tables=tables.tables[1:])) == [np.int64]


def test_a_range_that_is_none_is_refused(written: Path) -> None:
    store = SegregatedStore.open(written)
    for kind, start, stop in (("hot", -1, 2), ("hot", 0, store.hot_samples + 1), ("cold", 3, 2), ("mixed", 0, 1)):
        with pytest.raises(ConfigError, match=f"cannot read the {kind} samples"):
            store.read(kind, start, stop)  # type: ignore[arg-type]


def test_another_placement_or_other_data_name_both(written: Path) -> None:
    store = SegregatedStore.open(written)
    store.check(PLACEMENT)
    store.check(PLACEMENT, "27 samples in memory")
    other = replace(PLACEMENT, hot_ids={**PLACEMENT.hot_ids, "shared": np.array([0, 2])})
    with pytest.raises(FingerprintError, match=f"{PLACEMENT.fingerprint}, given is the placement {other.fingerprint}"):
        store.check(other)
    with pytest.raises(FingerprintError, match=r"\(27 samples in memory\), given are the data .* \(28 samples in memory\)"):
        store.check(PLACEMENT, "28 samples in memory")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def other_magic(path: Path) -> None:
    path.write_bytes(b"PARQUE" + path.read_bytes()[6:])


@pytest.mark.parametrize(("damage", "found"), [(cut, "bytes"), (lengthen, "bytes"), (other_magic, "PARQUE"), (os.unlink, "cannot be read")])
def test_a_file_that_is_not_whole_is_named_when_the_store_is_opened(path: Path, damage: Callable[[Path], None], found: str) -> None:
    last = sorted(path.glob("*.arrow"))[-1]
    damage(last)
    with pytest.raises(DataError, match=rf"{last.name}.*{found}.*again"):
        SegregatedStore.open(path)


def test_a_flipped_bit_is_found_by_verify_which_names_the_file(path: Path) -> None:
    store = SegregatedStore.open(path)
    store.verify()
    name = store.layout.files[3].name
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} has the checksum"):
        SegregatedStore.open(path).verify()


def test_files_that_do_not_fit_the_description_are_refused_when_they_are_read(path: Path) -> None:
    layout = SegregatedStore.open(path).layout
    hot, cold = (next(file for file in layout.files if file.kind == kind) for kind in ("hot", "cold"))
    shutil.copy(path / cold.name, path / hot.name)
    described = replace(hot, num_bytes=cold.num_bytes, samples=cold.samples + 1)
    store = SegregatedStore(str(path), replace(layout, files=(described,)))
    with pytest.raises(DataError, match=rf"{hot.name} is damaged.*{cold.samples} samples.*{cold.samples + 1} in"):
        store.read("hot", 0, 1)


def test_a_manifest_that_is_missing_cut_short_altered_or_of_another_version_is_refused(path: Path) -> None:
    manifest = path / MANIFEST
    text = manifest.read_text()
    changes = {
        "damaged, or not of a store": [text[: len(text) // 2], "{}", text.replace("fae_torchrec store", "something else"), "[1]"],
        "altered": [text.replace("27 samples", "28 samples")],
        "another version": [text.replace('"version": 1', '"version": 2'), text.replace('"rows_per_batch": 3', '"rows_per_batch": 4')],
    }
    for wanted, texts in changes.items():
        for changed in texts:
            assert changed != text
            manifest.write_text(changed)
            with pytest.raises(DataError, match=rf"{MANIFEST}: .*{wanted}"):
                SegregatedStore.open(path)
    manifest.unlink()
    with pytest.raises(DataError, match=f"no readable {MANIFEST}"):
        SegregatedStore.open(path)
    with pytest.raises(ConfigError, match="no segregated store"):
        SegregatedStore.open(path / "nowhere")
