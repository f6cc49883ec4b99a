"""Writing a store: every sample once, in order, under its kind, by any number of workers, whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError, FAEError
from fae_torchrec.data import store_sequence, store_writer
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.store import SegregatedStore
from fae_torchrec.data.store_layout import MANIFEST
from fae_torchrec.data.store_writer import StoreWriter, store_folder, write_store
from tests.data.test_segregate import HOT, PLACEMENT, ROWS, Bag, make_batch, samples, slowly_hot, unpack

Sample = dict[str, Bag]
HOT_SAMPLE: Sample = {"a": [0], "b": [2], "c": [1], "d": [], "ignored": [999]}
COLD_SAMPLE: Sample = {"a": [1, 0], "b": [2], "c": [1], "d": [2], "ignored": [0, 0]}


class BagShards(ShardedSource):
    """Shards of samples, in batches of 4; the label and the dense values of a sample are its number in the data."""

    def __init__(self, shards: list[list[Sample]], *, weighted: bool = False) -> None:
        self.feature_names, self.num_dense, self.name = tuple(ROWS), 2, f"{sum(map(len, shards))} samples in memory"
        self.shards = shards
        self.weighted = weighted
        self.lines_lost: dict[int, int] = {}
        self._read: set[int] = set()

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def size_hint(self) -> int:
        return sum(map(len, self.shards))

    def read_shard(self, shard: int) -> Iterator[Batch]:
        self._read.add(shard)
        first = sum(map(len, self.shards[:shard]))
        for start in range(0, len(self.shards[shard]), 4):
            yield make_batch(self.shards[shard][start : start + 4], weighted=self.weighted, start=first + start)

    def skipped(self) -> dict[str, int]:
        lost = sum(self.lines_lost.get(shard, 0) for shard in self._read)
        return {"file": lost} if lost else {}


def small_parts(monkeypatch: pytest.MonkeyPatch, part_samples: int = 7, batch_rows: int = 3) -> None:
    """Parts and record batches that a test can fill."""
    monkeypatch.setattr(store_writer, "PART_SAMPLES", part_samples)
    monkeypatch.setattr(store_sequence, "ROWS_PER_BATCH", batch_rows)
    monkeypatch.setattr("fae_torchrec.data.store.ROWS_PER_BATCH", batch_rows)
    monkeypatch.setattr("fae_torchrec.data.store_layout.ROWS_PER_BATCH", batch_rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


shards_of_samples = st.booleans().flatmap(lambda one_hot: st.lists(samples(one_hot), max_size=5))


@settings(deadline=None, max_examples=60)
@given(shards=shards_of_samples, weighted=st.booleans(), part=st.integers(1, 40), rows=st.integers(1, 5), data=st.data())
def test_every_range_is_what_the_source_has_of_that_kind(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[Sample]], weighted: bool, part: int, rows: int, data: st.DataObject
) -> None:
    source = BagShards(shards, weighted=weighted)
    everything = [sample for shard in shards for sample in shard]
    wanted = unpack(make_batch(everything, weighted=weighted))
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_parts(monkeypatch, part, rows)
        path = tmp_path_factory.mktemp("store") / "store"
        store = write_store(path, source, PLACEMENT)
        numbers = {
            "hot": [i for i, s in enumerate(everything) if slowly_hot(s)],
            "cold": [i for i, s in enumerate(everything) if not slowly_hot(s)],
        }
        assert (store.hot_samples, store.cold_samples, store.num_samples) == (len(numbers["hot"]), len(numbers["cold"]), len(everything))
        for kind, of_kind in numbers.items():
            start, stop = sorted(data.draw(st.lists(st.integers(0, len(of_kind)), min_size=2, max_size=2)))
            for begin, end in ((0, len(of_kind)), (start, stop)):
                batch, got = store.read(kind, begin, end)  # type: ignore[arg-type]
                assert got.dtype == np.int64 and got.tolist() == of_kind[begin:end]
                assert unpack(batch) == [wanted[i] for i in of_kind[begin:end]]
                kjt = batch.sparse_features
                assert (kjt.values().dtype, kjt.lengths().dtype, kjt.offsets().dtype) == (torch.int64, torch.int32, torch.int32)
                assert (batch.dense_features.dtype, batch.labels.dtype, batch.labels.shape) == (
                    torch.float32,
                    torch.float32,
                    (end - begin,),
                )
                assert batch.dense_features.shape == (end - begin, 2)
                assert len(kjt.values()) == int(kjt.lengths().sum()) and kjt.keys() == list(ROWS)
                assert (kjt.weights_or_none() is not None) == (store.layout.weighted) == (weighted and bool(everything))
        store.verify()


def test_ids_take_the_narrowest_type_and_lists_only_where_a_bag_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)
    write_store(tmp_path / "s", BagShards([[HOT_SAMPLE] * 3, [COLD_SAMPLE] * 2]), PLACEMENT)
    with pa.memory_map(str(tmp_path / "s" / "hot-00000-0.arrow")) as mapped:
        types = {field.name: str(field.type) for field in pa.ipc.open_file(mapped).schema}
    assert types == {
        "sample": "int64",
        "label": "float",
        "dense": "fixed_size_list<item: float>[2]",
        "id.a": "uint8",
        "id.b": "uint8",
        "id.c": "uint8",
        "id.d": "list<item: uint8>",  # empty bags
        "id.ignored": "int64",  # no table says how many rows it has
    }
    with pa.memory_map(str(tmp_path / "s" / "cold-00000-0.arrow")) as mapped:
        assert str(pa.ipc.open_file(mapped).schema.field("id.a").type) == "list<item: uint8>"


def test_a_bag_of_another_size_begins_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch, part_samples=100)
    one, two = {**HOT_SAMPLE, "d": [0]}, {**HOT_SAMPLE, "a": [1, 1], "d": [0]}
    store = write_store(tmp_path / "s", BagShards([[one] * 7 + [two] + [one] * 6]), PLACEMENT)  # d has no hot row: all are cold
    assert [(file.name, file.samples) for file in store.layout.files] == [("cold-00000-0.arrow", 6), ("cold-00000-1.arrow", 8)]
    assert [sample[2]["a"] for sample in unpack(store.read("cold", 5, 9)[0])] == [[0], [0], [1, 1], [0]]


def test_no_sample_and_no_shard_make_a_store(tmp_path: Path) -> None:
    for name, shards in {"no shard": [], "empty shards": [[], []]}.items():
        store = write_store(tmp_path / name, BagShards(shards), PLACEMENT)
        assert store.num_samples == 0 and contents(tmp_path / name).keys() == {MANIFEST}
        batch, numbers = store.read("hot", 0, 0)
        assert batch.dense_features.shape == (0, 2) and batch.sparse_features.stride() == 0 and len(numbers) == 0


def test_the_bytes_are_the_same_by_one_process_by_two_and_by_ranks_that_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "PART_SAMPLES", 7)  # this process alone decides on the parts
    rng = np.random.default_rng(3)
    shards = [[HOT_SAMPLE if rng.random() < 0.4 else COLD_SAMPLE for _ in range(rng.integers(0, 9))] for _ in range(9)]
    source = BagShards(shards)
    source.max_bad_lines, source.lines_lost = 5, {2: 2, 7: 3}
    store = write_store(tmp_path / "one", source, PLACEMENT)
    assert len(store.layout.files) > 8 and store.layout.skipped_lines == {"file": 5}
    again = BagShards(shards)
    again.max_bad_lines, again.lines_lost = 5, {2: 2, 7: 3}
    assert write_store(tmp_path / "two", again, PLACEMENT, workers=2).fingerprint == store.fingerprint
    with store_folder(tmp_path / "ranks") as folder:
        fresh = [BagShards(shards) for _ in range(3)]
        for copy in fresh:
            copy.max_bad_lines, copy.lines_lost = 5, {2: 2, 7: 3}
        ranks = [StoreWriter(folder, copy, PLACEMENT) for copy in fresh]
        ranks[0].finish([ranks[part % 3].write(part) for part in reversed(range(ranks[0].num_parts))])
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "ranks")
    # No part exceeds an allowance of 3; their sum does.
    bad = BagShards(shards)
    bad.max_bad_lines, bad.lines_lost = 3, {2: 2, 7: 3}
    with pytest.raises(DataError, match="5 malformed lines were skipped by all workers"):
        write_store(tmp_path / "bad", bad, PLACEMENT)
    assert sorted(os.listdir(tmp_path)) == ["one", "ranks", "two"]


def test_what_cannot_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    source = BagShards([])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        write_store(tmp_path / "file", source, PLACEMENT)
    with pytest.raises(ConfigError, match="cannot make the folder"):
        write_store(tmp_path / "file" / "store", source, PLACEMENT)
    with pytest.raises(ConfigError, match="local folder"):
        write_store("s3://bucket/store", source, PLACEMENT)
    with pytest.raises(ConfigError, match="workers"):
        write_store(tmp_path / "store", source, PLACEMENT, workers=0)
    with store_folder(tmp_path / "store"), pytest.raises(ConfigError, match="another process is writing"):
        write_store(tmp_path / "store", source, PLACEMENT)


def test_bad_data_say_where_and_leave_nothing(tmp_path: Path) -> None:
    bad = {**HOT_SAMPLE, "a": [6]}
    with pytest.raises(DataError, match=r"2 samples in memory, shard 1: table 'shared'.*6"):
        write_store(tmp_path / "s", BagShards([[HOT_SAMPLE], [bad]]), PLACEMENT)

    class Renamed(BagShards):
        def __init__(self) -> None:
            super().__init__([[HOT_SAMPLE]])
            self.feature_names = (*list(ROWS)[1:], "a")

    class HalfWeighted(BagShards):
        def read_shard(self, shard: int) -> Iterator[Batch]:
            yield make_batch([HOT_SAMPLE], weighted=True)
            yield make_batch([COLD_SAMPLE])

    with pytest.raises(DataError, match="where the source says"):
        write_store(tmp_path / "s", Renamed(), PLACEMENT)
    with pytest.raises(DataError, match="weights in some batches"):
        write_store(tmp_path / "s", HalfWeighted([[HOT_SAMPLE, COLD_SAMPLE]]), PLACEMENT)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = BagShards([[HOT_SAMPLE] * 4, [COLD_SAMPLE] * 4_000])
    # 12 bytes and two floats, three ids of 1 byte, one more, and one of 8: 32 bytes for each of 4,004 samples.
    wanted = r"no space to write .*cold-00000-0.arrow.*about 128,128 bytes.*are free"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limits[1]))  # for real: the kernel lets no file grow beyond it
    try:
        with pytest.raises(DataError, match=wanted):
            write_store(tmp_path / "s", source, PLACEMENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_sequence.os, "fsync", full)
    with pytest.raises(DataError, match=r"no space to write .*hot-00000-0.arrow.*No space left"):
        write_store(tmp_path / "s", source, PLACEMENT)
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    assert write_store(tmp_path / "s", source, PLACEMENT).num_samples == 4_004  # control: only the space was wrong


class Killed(BagShards):
    """Its reader dies at the last shard."""

    def read_shard(self, shard: int) -> Iterator[Batch]:
        if shard == self.num_shards - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().read_shard(shard)


def write_killed(path: str) -> None:
    """Run in another process."""
    store_writer.PART_SAMPLES = 2
    write_store(path, Killed([[HOT_SAMPLE] * 3, [COLD_SAMPLE] * 3, []]), PLACEMENT)


def test_a_killed_writer_leaves_nothing_that_opens_and_is_followed_by_another(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=write_killed, args=(str(tmp_path / "s"),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".s.partial"]
    left = os.listdir(tmp_path / ".s.partial")
    assert left and MANIFEST not in left
    with pytest.raises(ConfigError, match="no segregated store"):
        SegregatedStore.open(tmp_path / "s")
    with pytest.raises(DataError, match=f"no readable {MANIFEST}"):
        SegregatedStore.open(tmp_path / ".s.partial")
    store = write_store(tmp_path / "s", BagShards([[HOT_SAMPLE] * 2]), PLACEMENT)
    assert store.num_samples == 2
    assert os.listdir(tmp_path) == ["s"] and contents(tmp_path / "s").keys() == {MANIFEST, "hot-00000-0.arrow"}


def test_a_killed_worker_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "PART_SAMPLES", 2)
    with pytest.raises(FAEError, match="ended without a result"):
        write_store(tmp_path / "s", Killed([[HOT_SAMPLE] * 3, [COLD_SAMPLE] * 3, []]), PLACEMENT, workers=2)
    assert os.listdir(tmp_path) == []


def test_samples_of_both_kinds_are_there() -> None:
    # Negative control of the property above: it would pass vacuously if one kind never came.
    assert slowly_hot(HOT_SAMPLE) and not slowly_hot(COLD_SAMPLE) and HOT["none"] == []
