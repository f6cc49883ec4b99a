"""Measures what segregating on the fly costs a feed: HotColdDataLoader over a stream, against the same loader without segregation.

    python benchmarks/segregation_feed.py

The source is `SyntheticCriteo` in Criteo Kaggle's shape (26 one-hot features, 13 dense columns), profiled and placed first; a thread of the
loader generates the samples in both cases. Three loaders take turns on it, each read to its end by a consumer that does nothing:

  stock         policy "stock": batches only cut to size, in the order of the data
  proportional  hot and cold batches, spread as finely as can be
  fae           hot and cold batches, FAE's phases at R(50)

Medians of samples/s, and each against `stock` (target 0.8). A consumer that trains leaves the loader more room than this one: here nothing
hides the work. With `--source parquet` the same samples are read from a Parquet file instead.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from record import record_header, write_record

from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import Policy, ShuffleSchedule
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.parquet import ParquetSource
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.synthetic import SyntheticCriteo

TARGET = 0.8
POLICIES: tuple[Policy, ...] = ("stock", "proportional", "fae")
_ROOT = Path(__file__).resolve().parent.parent
_MIB = 1 << 20


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the measurement and returns what was written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the source (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--window-batches", type=int, nargs="+", default=[0, 128], help="0: what the buffer holds (default: %(default)s)")
    parser.add_argument("--budget-mib", type=int, default=64, help="of hot rows (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each; medians are reported (default: %(default)s)")
    parser.add_argument("--source", choices=("synthetic", "parquet"), default="synthetic", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=_ROOT / "benchmarks/results/segregation_feed.json")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    synthetic = SyntheticCriteo("kaggle", scale=1.0, num_samples=args.samples, seed=args.seed)
    rows = synthetic.cardinalities
    tables = TableSet(tuple(TableSpec(f"t_{name}", rows=count, dim=16, feature_names=(name,)) for name, count in rows.items()))
    profile = Calibrator(tables, sample_rate=0.1, seed=args.seed).run_source(synthetic)
    placement = RowPlacement.from_hot_set(select_hot_set(profile, args.budget_mib * _MIB))
    with tempfile.TemporaryDirectory(prefix="segregation_feed_") as folder:
        source = synthetic if args.source == "synthetic" else _as_parquet(synthetic, Path(folder, "samples.parquet"))
        results = [
            {"window_batches": window or None, **measure(source, placement, args.batch_size, window or None, args.repeats)}
            for window in args.window_batches
        ]
    record = {
        **record_header("segregation_feed", argv),
        "load_before": load,
        "source": args.source,
        "samples": args.samples,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "seed": args.seed,
        "hot_inputs": round(placement.hot_inputs, 4),
        "target_ratio": TARGET,
        "results": results,
        "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    write_record(args.json, record)
    _print(record, args.json)
    return record


def measure(source: ShardedSource, placement: RowPlacement, batch_size: int, window: int | None, repeats: int) -> dict[str, Any]:
    """Reads the source through each loader in turns; the first turn warms up."""
    seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for repeat in range(repeats + 1):
        for policy in POLICIES if repeat % 2 else POLICIES[::-1]:
            schedule = ShuffleSchedule(policy)
            loader = HotColdDataLoader(source, placement, batch_size=batch_size, schedule=schedule, window_batches=window)
            began = time.perf_counter()
            read = sum(batch.num_samples for batch in loader)
            taken = time.perf_counter() - began
            if read != source.num_samples:
                raise AssertionError(f"{policy} gave {read} samples of {source.num_samples}")
            if repeat:
                seconds[policy].append(taken)
    rates = {policy: [source.num_samples / second for second in taken] for policy, taken in seconds.items()}
    result: dict[str, Any] = {
        policy: {
            "samples_per_s": round(statistics.median(of_policy)),
            "samples_per_s_min": round(min(of_policy)),
            "samples_per_s_max": round(max(of_policy)),
        }
        for policy, of_policy in rates.items()
    }
    for policy in POLICIES[1:]:
        # Each pass against the stock pass of its own turn: what slows the machine slows both.
        result[policy]["ratio"] = round(statistics.median(a / b for a, b in zip(rates[policy], rates["stock"], strict=True)), 3)
    return result


def _as_parquet(synthetic: SyntheticCriteo, path: Path) -> ParquetSource:
    """Writes the samples to a Parquet file and opens it."""
    dense = [f"dense_{i}" for i in range(synthetic.num_dense)]
    writer: pq.ParquetWriter | None = None
    for batch in synthetic.batches(65_536):
        columns = dict(zip(dense, batch.dense_features.numpy().T, strict=True))
        columns |= {key: jagged.values().numpy() for key, jagged in batch.sparse_features.to_dict().items()}
        table = pa.table({**columns, "label": batch.labels.numpy()})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    sparse = list(synthetic.feature_names)
    return ParquetSource(str(path), dense=dense, sparse=sparse, label="label", tables_rows=dict(synthetic.cardinalities))


def _print(record: dict[str, Any], path: Path) -> None:
    for result in record["results"]:
        window = result["window_batches"] or "the buffer"
        print(f"window {window}: " + ", ".join(f"{policy} {result[policy]['samples_per_s']:,} samples/s" for policy in POLICIES))
        print("  against stock: " + ", ".join(f"{policy} {result[policy]['ratio']:.2f}" for policy in POLICIES[1:]) + f" (target {TARGET})")
    print(f"hot inputs {record['hot_inputs']:.1%}; {path}")


if __name__ == "__main__":
    main()
