"""Measures how well the synthetic data meet FAE's published hot inputs (Fig. 5): prints, writes JSON and a picture.

    python benchmarks/synthetic_fit.py

Each data set is profiled by the Calibrator at 5 %, hot sets are selected by the access threshold under the published byte shares, and hot
inputs are measured on samples of the test split, none of which was counted. Of Taobao, whose samples look up 63 ids, as many samples are
counted, and 2,000,000 besides, but all that are drawn. A few minutes on one core of its own.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
from fae_torchrec.data.generated_source import GeneratedSource
from fae_torchrec.data.synthetic import SyntheticCriteo
from fae_torchrec.data.synthetic_taobao import SyntheticTaobao
from fae_torchrec.data.taobao_shape import BAG, TAOBAO

_ROOT = Path(__file__).resolve().parent.parent
_BATCH = 65_536
_CURVE_SHARES = np.geomspace(2e-4, 0.3, 24)
_TITLES = {name: shape.title.title() for name, shape in SHAPES.items()} | {"taobao": TAOBAO.title}
_NAMES = list(_TITLES)
_TAOBAO_CURVE = np.linspace(0.05, 0.9, 24)


@dataclass(frozen=True)
class _Data:
    """One data set: what FAE publishes of it, and its samples.

    Attributes:
        points: FAE Fig. 5: (hot bytes as a share of all, share of inputs that are all hot).
        embedding_dim: weights per row.
        source: the generator, but for its options.
        bag: ids of each feature.
        streams: (samples drawn, share of them that is counted) of the profiles; the first one makes the headline and the picture.
        curve: byte shares of the picture's line.
    """

    points: tuple[tuple[float, float], ...]
    embedding_dim: int
    source: Callable[..., GeneratedSource]
    bag: int
    streams: tuple[tuple[int, float], ...]
    curve: np.ndarray


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
    parser.add_argument("--datasets", nargs="+", choices=_NAMES, default=_NAMES, help="default: all")
    parser.add_argument("--fresh", type=int, default=262_144, help="samples on which hot inputs are measured (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the data (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=_ROOT / "benchmarks/results/synthetic_fit.json")
    parser.add_argument("--picture", type=Path, default=_ROOT / "docs/images/synthetic_fit.png")
    args = parser.parse_args(argv)

    started = time.perf_counter()
    results = {name: _measure(data, args) for name, data in _data(args).items()}
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


def _data(args: argparse.Namespace) -> dict[str, _Data]:
    streams = tuple((samples, args.sample_rate) for samples in args.samples)
    found = {
        name: _Data(shape.published_points, shape.embedding_dim, partial(SyntheticCriteo, name), 1, streams, _CURVE_SHARES)
        for name, shape in SHAPES.items()
    }
    # As many counted samples as of the others; the last point needs most, so the largest number comes first.
    counted = tuple((number, 1.0) for number in sorted((round(samples * rate) for samples, rate in streams), reverse=True))
    counted = (*counted, (2 * counted[0][0], 1.0))
    found["taobao"] = _Data(TAOBAO.published_points, TAOBAO.embedding_dim, SyntheticTaobao, BAG, counted, _TAOBAO_CURVE)
    return {name: found[name] for name in args.datasets}


def _measure(data: _Data, args: argparse.Namespace) -> dict[str, Any]:
    shares = [share for share, _ in data.points]
    profiles = []
    for stream in data.streams:
        began = time.perf_counter()
        profile, tables = _profile(data, stream, args, coupled=True)
        points = hot_inputs_curve(profile, [round(share * tables.total_bytes) for share in shares], policy="threshold")
        profiles.append(
            {
                "stream_samples": stream[0],
                "sample_rate": stream[1],
                "counted_samples": profile.num_samples,
                "profile_s": round(time.perf_counter() - began, 1),
                "seen_rows": sum(counts.ids.size for counts in profile.counts.values()) / sum(table.rows for table in tables),
                "points": [
                    {"byte_share": share, "published": published, "measured": point.hot_inputs, "coverage": point.coverage}
                    for (share, published), point in zip(data.points, points, strict=True)
                ],
            }
        )
        if stream == data.streams[0]:
            pinned = sum(table.total_bytes for table in tables if table.rows <= 1024)
            budgets = [round(share * tables.total_bytes) for share in data.curve]
            budgets = [budget for budget in budgets if budget >= pinned]
            curve = hot_inputs_curve(profile, budgets, policy="threshold")
    control, _ = _profile(data, data.streams[0], args, coupled=False)
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


def _profile(data: _Data, stream: tuple[int, float], args: argparse.Namespace, *, coupled: bool) -> tuple[PopularityProfile, TableSet]:
    """A profile of the train split; its fresh inputs are samples of the test split."""
    options: dict[str, Any] = {"scale": args.scale, "seed": args.seed, "coupled": coupled}
    samples, rate = stream
    train = data.source(num_samples=samples, **options)
    specs = [TableSpec(f"t_{name}", rows, data.embedding_dim, (name,)) for name, rows in train.cardinalities.items()]
    tables = TableSet(tuple(specs))
    profile = Calibrator(tables, sample_rate=rate, keep_inputs=1, fresh_inputs=1).run(
        train.batches(_BATCH // data.bag), progress=True, total=samples
    )
    fresh = data.source(num_samples=args.fresh, split="test", **options).samples(0, args.fresh)
    bags = np.full(args.fresh, data.bag, dtype=np.int64)
    inputs = InputSample(
        values={name: fresh.ids[i].reshape(-1) for i, name in enumerate(train.feature_names)},
        lengths={name: bags for name in train.feature_names},
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
    for (dataset, result), colour in zip(results.items(), ("#1f5fa8", "#c2571a", "#3a7d44", "#7b4aa0"), strict=False):
        points = result["profiles"][0]["points"]
        label = _TITLES[dataset]
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
    axes.set_xticks([0.03, 0.1, 0.3, 1, 3, 10, 30, 80], labels=["0.03", "0.1", "0.3", "1", "3", "10", "30", "80"])
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
