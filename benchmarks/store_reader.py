"""Measures reading a segregated store against TorchRec's own in-memory Criteo loader with memory-mapped files.

    python benchmarks/store_reader.py

The same synthetic samples in the shape of Criteo Kaggle (26 one-hot features over 33.8 M rows, 13 dense features) are written twice to a
temporary folder: as the three npy files that TorchRec reads (float32, int32, int32) and, segregated by a placement, as a store; both in
blocks of 8 MiB, so that the page cache holds them alike. Then the readers take turns, each reading all samples batch after batch in its
order, from the page cache:

  torchrec        InMemoryBinaryCriteoIterDataPipe(mmap_mode=True, hashes=rows of the tables), as TorchRec's DLRM calls it: categories are
                  taken modulo the rows batch by batch; int32 ids; dense values and labels are views of the files
  torchrec_coded  the same with hashes=None: only for files whose ids are rows already, as they happen to be here
  store           SegregatedStore.read, all cold samples and then all hot ones: int64 ids, dense values, labels, the samples' numbers
  loader          HotColdDataLoader on the store, hot and cold batches spread evenly, with its threads
  loader_alone    the same without threads (prefetch=0)

All end with a TorchRec Batch; that the samples are the same is checked once before. A reader is opened anew in each repeat and makes two
passes: in the first one the files are mapped, the later one is what every further epoch costs. Dense values and labels are summed, in all
readers, as some consumer must read what TorchRec only maps; a second comparison leaves the batches untouched. One thread, but for `loader`;
medians, and the ratio of the rates to both of TorchRec's. About two minutes.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from record import record_header, write_record
from torchrec.datasets.criteo import InMemoryBinaryCriteoIterDataPipe
from torchrec.datasets.utils import Batch

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.store import SegregatedStore
from fae_torchrec.data.store_writer import write_store
from fae_torchrec.data.synthetic import SyntheticCriteo

TARGET = 1.0
OURS = ("store", "loader", "loader_alone")
_ROOT = Path(__file__).resolve().parent.parent
_BLOCK_BYTES = 1 << 23
_PARTS = ("dense", "sparse", "labels")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the measurement and returns what was written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2_048, 8_192], help="settings (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed readings of each; medians are reported (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=_ROOT / "benchmarks/results/store_reader.json")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    source = SyntheticCriteo("kaggle", scale=1.0, num_samples=args.samples, seed=args.seed)
    with tempfile.TemporaryDirectory(prefix="store_reader_") as folder:
        ids = write_npy(folder, source)
        began = time.perf_counter()
        placement = half_hot(source, ids)
        store = write_store(os.path.join(folder, "store"), source, placement, show_progress=True)
        written_s = time.perf_counter() - began
        check_same(folder, store, ids)
        rows = list(source.cardinalities.values())
        results = [
            {"batch_size": size, "summed": summed, "pass": name, **result}
            for size in args.batch_sizes
            for summed in (True, False)
            for name, result in measure(folder, size, args.repeats, summed, rows=rows, placement=placement).items()
        ]
        record = {
            **record_header("store_reader", argv),
            "pyarrow": pa.__version__,
            "load_before": load,
            "samples": args.samples,
            "hot_samples": store.hot_samples,
            "rows": sum(rows),
            "npy_bytes": sum(os.path.getsize(_npy(folder, part)) for part in _PARTS),
            "store_bytes": sum(file.num_bytes for file in store.layout.files),
            "store_files": len(store.layout.files),
            "write_s": round(written_s, 2),
            "id_types": {"torchrec": "int32", "store": "int64"},
            "repeats": args.repeats,
            "seed": args.seed,
            "target_ratio": TARGET,
            "results": results,
            "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
    write_record(args.json, record)
    _print(record, args.json)
    return record


def write_npy(folder: str, source: SyntheticCriteo) -> np.ndarray:
    """Writes the samples as TorchRec's preprocessing has them; their ids, int32 [26, samples]."""
    batches = [batch for shard in range(source.num_shards) for batch in source.read_shard(shard)]
    ids = np.concatenate([batch.sparse_features.values().view(26, -1).int().numpy() for batch in batches], axis=1)
    labels = np.concatenate([batch.labels.int().numpy() for batch in batches])[:, None]
    dense = np.concatenate([batch.dense_features.numpy() for batch in batches])
    for part, array in (("dense", dense), ("sparse", np.ascontiguousarray(ids.T)), ("labels", labels)):
        content = io.BytesIO()
        np.save(content, array)
        with open(_npy(folder, part), "xb", buffering=0) as file:
            for start in range(0, content.tell(), _BLOCK_BYTES):
                file.write(content.getbuffer()[start : start + _BLOCK_BYTES])
    return ids


def half_hot(source: SyntheticCriteo, ids: np.ndarray) -> RowPlacement:
    """A placement whose hot rows are all rows that every second block of 1,024 samples uses: at least half of the samples are hot."""
    chosen = ids[:, np.arange(ids.shape[1]) // 1_024 % 2 == 0]
    tables = TableSet(tuple(TableSpec(name, rows, 16, (name,)) for name, rows in source.cardinalities.items()))
    hot_ids = {name: np.unique(chosen[f]).astype(np.int64) for f, name in enumerate(source.feature_names)}
    return RowPlacement(tables, hot_ids, "benchmark", 0, 0.5, 1.0)


def check_same(folder: str, store: SegregatedStore, ids: np.ndarray) -> None:
    """Raises unless both readers give the samples that were written."""
    at, numbers = 0, []
    for batch in open_torchrec(folder, 4_096):
        if not np.array_equal(batch.sparse_features.values().view(26, -1).numpy(), ids[:, at : at + len(batch.labels)]):
            raise AssertionError(f"TorchRec's samples from {at} differ")
        at += len(batch.labels)
    for kind, count in (("cold", store.cold_samples), ("hot", store.hot_samples)):
        for start in range(0, count, 4_096):
            batch, positions = store.read(kind, start, min(start + 4_096, count))  # type: ignore[arg-type]
            numbers.append(positions)
            if not np.array_equal(batch.sparse_features.values().view(26, -1).numpy(), ids[:, positions]):
                raise AssertionError(f"the store's {kind} samples from {start} differ")
    if at != ids.shape[1] or not np.array_equal(np.sort(np.concatenate(numbers)), np.arange(ids.shape[1])):
        raise AssertionError("a sample is missing or comes twice")


def measure(
    folder: str, batch_size: int, repeats: int, summed: bool, *, rows: list[int], placement: RowPlacement
) -> dict[str, dict[str, Any]]:
    """Times the readers in turns, the first pass after opening and a later one; the first turn warms up."""
    openers: dict[str, Callable[[str, int], Iterable[Batch]]] = {
        "torchrec": partial(open_torchrec, hashes=rows),
        "torchrec_coded": open_torchrec,
        "store": StorePass,
        "loader": partial(open_loader, placement=placement, prefetch=2),
        "loader_alone": partial(open_loader, placement=placement, prefetch=0),
    }
    times: dict[str, dict[str, list[tuple[float, float]]]] = {number: {name: [] for name in openers} for number in ("first", "later")}
    samples = 0
    for repeat in range(repeats + 1):
        for name in list(openers) if repeat % 2 else list(reversed(openers)):
            began, used = time.perf_counter(), time.process_time()
            reader = openers[name](folder, batch_size)
            for number in times:
                samples = read(reader, summed)
                if repeat:
                    times[number][name].append((time.perf_counter() - began, time.process_time() - used))
                began, used = time.perf_counter(), time.process_time()
    return {number: summary(of_pass, samples) for number, of_pass in times.items()}


def read(reader: Iterable[Batch], summed: bool) -> int:
    """One pass; the samples."""
    samples = 0
    for batch in reader:
        samples += len(batch.labels)
        if summed:
            batch.dense_features.sum()
            batch.labels.sum()
    return samples


def summary(times: dict[str, list[tuple[float, float]]], samples: int) -> dict[str, Any]:
    """What the repeats come to, for each reader, and the ratio of their rates."""
    result: dict[str, Any] = {}
    for name, taken in times.items():
        wall = statistics.median(seconds for seconds, _ in taken)
        result[name] = {
            "wall_s": round(wall, 4),
            "wall_min_s": round(min(seconds for seconds, _ in taken), 4),
            "wall_max_s": round(max(seconds for seconds, _ in taken), 4),
            "cpu_s": round(statistics.median(seconds for _, seconds in taken), 4),
            "samples_per_s": round(samples / wall),
        }
    for name in OURS:
        for theirs in ("torchrec", "torchrec_coded"):
            of_turn = [a / b for (a, _), (b, _) in zip(times[theirs], times[name], strict=True)]
            result[name][f"ratio_to_{theirs}"] = round(statistics.median(of_turn), 3)
    return result


def open_torchrec(folder: str, batch_size: int, *, hashes: list[int] | None = None) -> Iterable[Batch]:
    paths = [[_npy(folder, part)] for part in _PARTS]
    return InMemoryBinaryCriteoIterDataPipe("train", *paths, batch_size=batch_size, rank=0, world_size=1, mmap_mode=True, hashes=hashes)


def open_loader(folder: str, batch_size: int, *, placement: RowPlacement, prefetch: int) -> Iterable[Batch]:
    store = SegregatedStore.open(os.path.join(folder, "store"))
    return HotColdDataLoader(store, placement, batch_size=batch_size, schedule=ShuffleSchedule("proportional"), prefetch=prefetch)


class StorePass:
    """All cold samples of the store, then all hot ones, in batches."""

    def __init__(self, folder: str, batch_size: int) -> None:
        self._store = SegregatedStore.open(os.path.join(folder, "store"))
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        kinds: tuple[tuple[Literal["cold", "hot"], int], ...] = (("cold", self._store.cold_samples), ("hot", self._store.hot_samples))
        for kind, count in kinds:
            for start in range(0, count, self._batch_size):
                yield self._store.read(kind, start, min(start + self._batch_size, count))[0]


def _npy(folder: str, part: str) -> str:
    return os.path.join(folder, f"day_0_{part}.npy")


def _print(record: dict[str, Any], written: Path) -> None:
    sizes = f"npy {record['npy_bytes'] / 1e6:.0f} MB, store {record['store_bytes'] / 1e6:.0f} MB, written in {record['write_s']} s"
    print(f"{record['samples']} samples, {record['hot_samples']} hot; {sizes}; medians of {record['repeats']}; target {TARGET}")
    print(f"{'batch':>6} {'summed':7}{'pass':6}{'reader':15}{'s':>8}{'CPU s':>8}{'M samples/s':>13}{'to torchrec':>13}{'to coded':>10}")
    for result in record["results"]:
        for name in ("torchrec", "torchrec_coded", *OURS):
            entry = result[name]
            rates = f"{entry['wall_s']:8.4f}{entry['cpu_s']:8.4f}{entry['samples_per_s'] / 1e6:13.2f}"
            if name in OURS:
                rates += f"{entry['ratio_to_torchrec']:13.2f}{entry['ratio_to_torchrec_coded']:10.2f}"
            print(f"{result['batch_size']:6} {result['summed']!s:7}{result['pass']:6}{name:15}{rates}")
    print(f"written: {written}")


if __name__ == "__main__":
    main()
