"""Measures how well the synthetic Criteo and Avazu data meet FAE's published hot inputs (Fig. 5): prints, writes JSON and a picture.

    python benchmarks/synthetic_fit.py

Each data set is profiled by the Calibrator at 5 %, hot sets are selected by the access threshold under the published byte shares, and hot
inputs are measured on samples of the test split, none of which was counted. About two minutes on one core of its own.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import record_header, write_record

from fae_torchrec.core.hot_set import hot_inputs_curve
from fae_torchrec.core.input_sample import InputSample
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.criteo_shape import SHAPES
from fae_torchrec.data.synthetic import SyntheticCriteo

_ROOT = Path(__file__).resolve().parent.parent
_BATCH = 65_536
_CURVE_SHARES = np.geomspace(2e-4, 0.3, 24)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the measurement and returns what was written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.1, help="rows as a share of the published rows (default: %(default)s)")
    parser.add_argument("--sample-rate", type=float, default=0.05, help="of the Calibrator (default: %(default)s)")
    parser.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=[10_000_000, 4_000_000, 20_000_000],
        help="stream lengths to profile; the first one makes the headline and the picture (default: %(default)s)",
    )
    parser.add_argument("--fresh", type=int, default=262_144, help="samples on which hot inputs are measured (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the data (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=_ROOT / "benchmarks/results/synthetic_fit.json")
    parser.add_argument("--picture", type=Path, default=_ROOT / "docs/images/synthetic_fit.png")
    args = parser.parse_args(argv)

    started = time.perf_counter()
    results = {dataset: _measure(dataset, args) for dataset in SHAPES}
    record = {
        **record_header("synthetic_fit", argv),
        "seed": args.seed,
        "scale": args.scale,
        "sample_rate": args.sample_rate,
        "fresh_samples": args.fresh,
        "wall_s": round(time.perf_counter() - started, 1),
        "results": results,
    }
    write_record(args.json, record)
    _draw(results, args.scale, args.picture)
    _print(results, args)
    return record


def _measure(dataset: str, args: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[dataset]
    shares = [share for share, _ in shape.published_points]
    profiles = []
    for samples in args.samples:
        began = time.perf_counter()
        profile, tables = _profile(dataset, samples, args, coupled=True)
        points = hot_inputs_curve(profile, [round(share * tables.total_bytes) for share in shares], policy="threshold")
        profiles.append(
            {
                "stream_samples": samples,
                "counted_samples": profile.num_samples,
                "profile_s": round(time.perf_counter() - began, 1),
                "points": [
                    {"byte_share": share, "published": published, "measured": point.hot_inputs, "coverage": point.coverage}
                    for (share, published), point in zip(shape.published_points, points, strict=True)
                ],
            }
        )
        if samples == args.samples[0]:
            pinned = sum(table.total_bytes for table in tables if table.rows <= 1024)
            budgets = [round(share * tables.total_bytes) for share in _CURVE_SHARES]
            budgets = [budget for budget in budgets if budget >= pinned]
            curve = hot_inputs_curve(profile, budgets, policy="threshold")
    control, _ = _profile(dataset, args.samples[0], args, coupled=False)
    apart = hot_inputs_curve(control, [round(share * tables.total_bytes) for share in shares], policy="threshold")
    return {
        "rows": sum(table.rows for table in tables),
        "bytes": tables.total_bytes,
        "profiles": profiles,
        "uncoupled": [{"byte_share": share, "measured": point.hot_inputs} for share, point in zip(shares, apart, strict=True)],
        "curve": [
            {"byte_share": point.used_bytes / tables.total_bytes, "hot_inputs": point.hot_inputs, "coverage": point.coverage}
            for point in curve
        ],
    }


def _profile(dataset: Any, samples: int, args: argparse.Namespace, *, coupled: bool) -> tuple[PopularityProfile, TableSet]:
    """A profile of the train split; its fresh inputs are samples of the test split."""
    options: dict[str, Any] = {"scale": args.scale, "seed": args.seed, "coupled": coupled}
    train = SyntheticCriteo(dataset, num_samples=samples, **options)
    dim = SHAPES[dataset].embedding_dim
    tables = TableSet(tuple(TableSpec(f"t_{name}", rows, dim, (name,)) for name, rows in train.cardinalities.items()))
    profile = Calibrator(tables, sample_rate=args.sample_rate, keep_inputs=1, fresh_inputs=1).run(
        train.batches(_BATCH), progress=True, total=samples
    )
    fresh = SyntheticCriteo(dataset, num_samples=args.fresh, split="test", **options).samples(0, args.fresh)
    one_hot = np.ones(args.fresh, dtype=np.int64)
    inputs = InputSample(
        values={name: fresh.ids[i] for i, name in enumerate(train.feature_names)},
        lengths={name: one_hot for name in train.feature_names},
        num_samples=args.fresh,
    )
    return replace(profile, fresh_inputs=inputs), tables


def _print(results: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"hot inputs of {args.fresh} fresh samples, scale {args.scale}, threshold selection")
    print(f"{'dataset':10} {'counted':>9} {'hot bytes':>10} {'published':>10} {'measured':>9} {'difference':>11}")
    for dataset, result in results.items():
        for profile in result["profiles"]:
            for point in profile["points"]:
                published, measured = point["published"], point["measured"]
                print(
                    f"{dataset:10} {profile['counted_samples']:9} {point['byte_share']:10.2%} {published:10.1%} {measured:9.1%} "
                    f"{100 * (measured - published):+8.1f} pp"
                )
        apart = ", ".join(f"{point['byte_share']:.2%} -> {point['measured']:.1%}" for point in result["uncoupled"])
        print(f"{dataset:10} features drawn independently: {apart}")
    print(f"written: {args.json}\nwritten: {args.picture}")


def _draw(results: dict[str, Any], scale: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 4.4), dpi=120)
    for (dataset, result), colour in zip(results.items(), ("#1f5fa8", "#c2571a", "#3a7d44"), strict=True):
        points = result["profiles"][0]["points"]
        label = SHAPES[dataset].title.title()
        axes.plot(
            [100 * p["byte_share"] for p in result["curve"]],
            [100 * p["hot_inputs"] for p in result["curve"]],
            color=colour,
            label=f"{label}: synthetic, scale {scale:g}",
        )
        axes.plot(
            [100 * p["byte_share"] for p in points],
            [100 * p["published"] for p in points],
            marker="o",
            linestyle="none",
            color=colour,
            label=f"{label}: published (FAE, Fig. 5)",
        )
        axes.plot(
            [100 * p["byte_share"] for p in result["uncoupled"]],
            [100 * p["measured"] for p in result["uncoupled"]],
            linestyle=":",
            color=colour,
            label=f"{label}: features independent",
        )
    axes.set_xscale("log")
    axes.set_xticks([0.03, 0.1, 0.3, 1, 3, 10, 30], labels=["0.03", "0.1", "0.3", "1", "3", "10", "30"])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel("hot bytes, % of all table bytes (log scale)")
    axes.set_ylabel("hot inputs, % of samples")
    axes.set_title("Synthetic data against FAE's published hot inputs", loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, path)
    plt.close(figure)


if __name__ == "__main__":
    main()
