"""Measures reading Criteo's TSV into coded batches against pyarrow's own reading of the same file.

    python benchmarks/read_criteo.py

A file of 1 M lines is written first: the ids of `SyntheticCriteo` (so that categories repeat as in real data) as 8 hex digits, counts of
one to five digits, one value in twenty missing. Then two readers take turns on it, from the page cache:

  pyarrow   pyarrow.csv.read_csv to a Table, defaults but for the delimiter and the columns' names (categories become strings)
  ours      CriteoTsvSource over all its shards: labels, log(1 + x), categories decoded and coded by modulo, as TorchRec batches

Each setting is a process of its own that may use the first n CPUs, and no other; both readers use as many threads as there are CPUs.
Medians, and the ratio of the rates. About a minute and 1.5 GB of memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import torch
from record import record_header, write_record
from tqdm import tqdm

from fae_torchrec.data.coding import category_coding
from fae_torchrec.data.criteo_shape import criteo_shape
from fae_torchrec.data.criteo_tsv import CriteoTsvSource
from fae_torchrec.data.synthetic import SyntheticCriteo

TARGET = 0.6
_ROOT = Path(__file__).resolve().parent.parent
_NAMES = ["label", *(f"int_{i}" for i in range(13)), *(f"cat_{i}" for i in range(26))]
_MISSING = 0.05
_PIECE = 65_536


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the measurement and returns what was written as JSON."""
    cpus = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="lines of the file (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed readings of each; medians are reported (default: %(default)s)")
    parser.add_argument("--cpus", type=int, nargs="+", default=sorted({cpus, 1}, reverse=True), help="settings (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the file (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=_ROOT / "benchmarks/results/read_criteo.json")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="read_criteo_") as folder:
        path = os.path.join(folder, "day_0")
        write_criteo_tsv(path, args.rows, args.seed)
        size = os.path.getsize(path)
        results = []
        for count in args.cpus:
            with multiprocessing.get_context("spawn").Pool(1, _use_cpus, (count,)) as pool:
                results.append({"cpus": count, **pool.apply(measure, (path, args.rows, size, args.repeats))})
    record = {
        **record_header("read_criteo", argv),
        "pyarrow": pa.__version__,
        "load_before": load,
        "rows": args.rows,
        "bytes": size,
        "missing": _MISSING,
        "repeats": args.repeats,
        "seed": args.seed,
        "target_ratio": TARGET,
        "results": results,
    }
    write_record(args.json, record)
    _print(record, args.json)
    return record


def write_criteo_tsv(path: str, rows: int, seed: int) -> None:
    """Writes lines in Criteo's format."""
    rng = np.random.default_rng(seed)
    source = SyntheticCriteo("kaggle", scale=1.0, num_samples=rows, seed=seed)
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    options = pa_csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with open(path, "wb") as file:
        for start in tqdm(range(0, rows, _PIECE), desc="write", unit="piece", disable=None):
            samples = source.samples(start, min(start + _PIECE, rows))
            n = len(samples.labels)
            counts = np.floor(np.exp(rng.normal(1.5, 2.0, size=(13, n)))).astype(np.int64) - 1
            columns = [pa.array(samples.labels.astype(np.int64)), *(pa.array(count, mask=rng.random(n) < _MISSING) for count in counts)]
            for ids in samples.ids:
                numbers = (ids.astype(np.uint32) * np.uint32(2_654_435_761))[:, None] >> np.arange(28, -1, -4, dtype=np.uint32)
                text = digits[numbers & np.uint32(15)].view("S8").ravel()
                columns.append(pa.array(text.astype("U8").astype(object), mask=rng.random(n) < _MISSING, type=pa.string()))
            pa_csv.write_csv(pa.table(columns, names=_NAMES), file, options)


def measure(path: str, rows: int, size: int, repeats: int) -> dict[str, Any]:
    """Times both readers in turns; the first turn warms up."""
    coding = category_coding("modulo", {f"cat_{i}": int(n) for i, n in enumerate(criteo_shape("kaggle").rows(1.0))})
    source = CriteoTsvSource([path], coding=coding)
    readers: dict[str, Callable[[], int]] = {"pyarrow": lambda: _read_pyarrow(path), "ours": lambda: _read_ours(source)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for repeat in range(repeats + 1):
        for name in list(readers) if repeat % 2 else list(reversed(readers)):
            began, used = time.perf_counter(), time.process_time()
            read = readers[name]()
            taken = time.perf_counter() - began, time.process_time() - used
            if read != rows:
                raise AssertionError(f"{name} read {read} rows of {rows}")
            if repeat:
                times[name].append(taken)
    result: dict[str, Any] = {}
    for name, taken in times.items():
        wall = statistics.median(seconds for seconds, _ in taken)
        result[name] = {
            "wall_s": round(wall, 4),
            "wall_min_s": round(min(seconds for seconds, _ in taken), 4),
            "wall_max_s": round(max(seconds for seconds, _ in taken), 4),
            "cpu_s": round(statistics.median(seconds for _, seconds in taken), 4),
            "rows_per_s": round(rows / wall),
            "bytes_per_s": round(size / wall),
        }
    result["ratio"] = round(result["pyarrow"]["wall_s"] / result["ours"]["wall_s"], 3)
    result["ratio_of_best"] = round(result["pyarrow"]["wall_min_s"] / result["ours"]["wall_min_s"], 3)
    result["max_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return result


def _read_pyarrow(path: str) -> int:
    table = pa_csv.read_csv(path, pa_csv.ReadOptions(column_names=_NAMES), pa_csv.ParseOptions(delimiter="\t"))
    return int(table.num_rows)


def _read_ours(source: CriteoTsvSource) -> int:
    return sum(batch.labels.numel() for shard in range(source.num_shards) for batch in source.read_shard(shard))


def _use_cpus(count: int) -> None:
    """Before any pool of threads starts: threads inherit the CPUs."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    pa.set_cpu_count(count)
    torch.set_num_threads(count)


def _print(record: dict[str, Any], written: Path) -> None:
    print(f"{record['rows']} rows, {record['bytes'] / 1e6:.0f} MB, medians of {record['repeats']} interleaved repeats; target {TARGET}")
    print(f"{'CPUs':>4} {'reader':10}{'s':>8}{'CPU s':>8}{'M rows/s':>10}{'MB/s':>8}{'ratio':>8}")
    for result in record["results"]:
        for name in ("pyarrow", "ours"):
            entry, ratio = result[name], f"{result['ratio']:8.2f}" if name == "ours" else ""
            rates = f"{entry['rows_per_s'] / 1e6:10.2f}{entry['bytes_per_s'] / 1e6:8.0f}"
            print(f"{result['cpus']:4} {name:10}{entry['wall_s']:8.3f}{entry['cpu_s']:8.3f}{rates}{ratio}")
    print(f"written: {written}")


if __name__ == "__main__":
    main()
