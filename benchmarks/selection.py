"""What share of the samples both selections make all hot, at equal budgets, on counted and on other samples, and how long they take.

    python benchmarks/selection.py

Two kinds of data: completejourney (real; 90,000 samples counted, the 10,000 that come later in time are the others; left out where it is
not beside the checkout) and samples shaped like Criteo Kaggle and Criteo Terabyte at 1/10 of their rows (others: fresh draws). The control
is a selection by counts alone, which is what `threshold` is when every table has the same traffic.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from record import record_header, write_record
from torchrec.datasets.utils import Batch
from tqdm import tqdm

from fae_torchrec.core.candidates import pinned_tables
from fae_torchrec.core.hot_set import POLICIES, select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.parquet import ParquetSource
from fae_torchrec.data.segregate import hot_samples
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.synthetic import SyntheticCriteo

_ROOT = Path(__file__).resolve().parent.parent
_COMPLETEJOURNEY = _ROOT.parent / "shared" / "data" / "completejourney"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the measurement and returns what was written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400_000, help="generated samples to profile (default: %(default)s)")
    parser.add_argument("--other-samples", type=int, default=100_000, help="generated samples to classify (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=0.1, help="of the published rows (default: %(default)s)")
    parser.add_argument("--sample-rates", type=float, nargs="+", default=[0.05, 0.5], help="shares that are counted (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the sampling (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=_ROOT / "benchmarks/results/selection.json")
    args = parser.parse_args(argv)
    results = [result for case in _cases(args) for result in case]
    record = {
        **record_header("selection", argv),
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "results": results,
    }
    write_record(args.json, record)
    print(args.json)
    return record


def _cases(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    if _COMPLETEJOURNEY.is_dir():
        rows = json.loads((_COMPLETEJOURNEY / "cardinalities.json").read_text())
        columns: dict[str, Any] = {"dense": ["quantity"], "sparse": list(rows), "label": "label", "tables_rows": rows}
        train, test = (ParquetSource(_COMPLETEJOURNEY / f"{split}.parquet", **columns) for split in ("train", "test"))
        yield _compared("completejourney, no table pinned", train, test, rows, 1.0, args.seed, (0.02, 0.05, 0.1, 0.2), pinned_max_rows=0)
    for dataset, shares in (("kaggle", (0.002, 0.005, 0.01, 0.02, 0.04)), ("terabyte", (0.001, 0.002, 0.005, 0.01))):
        source = SyntheticCriteo(dataset, scale=args.scale, num_samples=args.samples)
        others = SyntheticCriteo(dataset, scale=args.scale, num_samples=args.other_samples, split="test")
        for rate in args.sample_rates:
            name = f"synthetic {dataset} x {args.scale:g}, {rate:.0%} of {args.samples:,} samples counted"
            yield _compared(name, source, others, source.cardinalities, rate, args.seed, shares, pinned_max_rows=1024)


def _compared(
    name: str,
    source: ShardedSource,
    others: ShardedSource,
    rows: Mapping[str, int],
    rate: float,
    seed: int,
    budget_shares: Iterable[float],
    pinned_max_rows: int,
) -> list[dict[str, Any]]:
    """Both selections at every budget, as a share of all bytes."""
    tables = TableSet(tuple(TableSpec(f"t_{f}", n, 16, (f,), optimizer=Optimizer.SGD) for f, n in rows.items()))
    profile = Calibrator(tables, sample_rate=rate, seed=seed).run_source(source)
    fresh = list(others.batches(65_536))
    least = sum(table.total_bytes for table in pinned_tables(tables, pinned_max_rows))
    results = []
    print(name)
    for share in tqdm([s for s in budget_shares if s * tables.total_bytes >= least], desc=name, disable=None, leave=False):
        row_bytes = tables.tables[0].row_bytes
        budget = int(tables.total_bytes // row_bytes * share) * row_bytes
        for policy in POLICIES:
            start = time.perf_counter()
            hot_set = select_hot_set(profile, budget, policy=policy, pinned_max_rows=pinned_max_rows)
            seconds = time.perf_counter() - start
            counted = profile.coverage(hot_set.hot_ids)
            result = {
                "data": name, "policy": policy, "budget_share": share, "budget_bytes": budget, "used_bytes": hot_set.used_bytes,
                "counted_inputs": profile.num_samples, "kept_inputs": profile.counted_inputs.num_samples,
                "hot_inputs_estimate": [hot_set.hot_inputs, *hot_set.hot_inputs_interval],
                "hot_inputs_all": _hot_share(source.batches(65_536), hot_set), "hot_inputs_others": _hot_share(fresh, hot_set),
                "coverage": counted, "seconds": seconds,
            }  # fmt: skip
            results.append(result)
            shares = f"{result['hot_inputs_all']:7.2%} of all, {result['hot_inputs_others']:7.2%} of others"
            print(f"  {share:5.1%} of bytes, {policy:<11} hot inputs {shares}, coverage {counted:.1%}, {seconds:.2f} s")
    return results


def _hot_share(batches: Iterable[Batch], hot_set: Any) -> float:
    placement = RowPlacement.from_hot_set(hot_set)
    hot = [hot_samples(batch.sparse_features, placement) for batch in batches]
    return sum(int(part.sum()) for part in hot) / sum(part.numel() for part in hot)


if __name__ == "__main__":
    main()
