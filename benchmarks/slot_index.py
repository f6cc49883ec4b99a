"""Measures the id -> slot maps of hot/cold tables: bytes a row, and lookup time an id, of the dense index, the bitmap and bisection.

    python benchmarks/slot_index.py

Every lookup of a hot/cold table first asks which slot of fast memory holds a row, if any. Three answers are compared on one table:

  dense         a slot number for every row: 4 bytes a row, one read a lookup
  bitmap        a bit for every row, a count for every 64 rows: 1.5 bits a row, two reads and a popcount a lookup
  searchsorted  torch.searchsorted over the sorted hot ids: 8 bytes a hot row, and log2(hot rows) dependent reads a lookup

In every repeat all three look up the same fresh ids, one after the other, the first of them moving on with every repeat; their slots must
agree. Ids are drawn twice: `uniform` over all rows (the worst case of the caches; nearly all ids are cold) and `skewed` (a share of them
falls on hot rows, as in training). About half a minute and 1 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record_header, write_record

from fae_torchrec.modules.slot_index import BitmapSlotIndex, DenseSlotIndex

_ROOT = Path(__file__).resolve().parent.parent
_Lookup = Callable[[torch.Tensor], torch.Tensor]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the measurement and returns what was written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000], help="table sizes (default: %(default)s)"
    )
    parser.add_argument("--hot-share", type=float, default=0.01, help="hot rows as a share of the rows (default: %(default)s)")
    parser.add_argument("--ids", type=int, default=50_000, help="ids a lookup (default: %(default)s)")
    parser.add_argument(
        "--hot-accesses", type=float, default=0.8, help="share of the skewed ids drawn from hot rows (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=101, help="timed lookups of each map; medians are reported (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="intra-op threads of torch (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where maps and ids lie, e.g. cpu or cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of hot sets and ids (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=_ROOT / "benchmarks/results/slot_index.json")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]  # other programs slow the bitmap most: it has the most operations to share between threads
    started = time.perf_counter()
    results = [_measure(rows, args) for rows in args.rows]
    record = {
        **record_header("slot_index", argv),
        "load_before": load,
        "device": args.device,
        "threads": args.threads,
        "seed": args.seed,
        "hot_share": args.hot_share,
        "ids_per_lookup": args.ids,
        "hot_accesses": args.hot_accesses,
        "repeats": args.repeats,
        "wall_s": round(time.perf_counter() - started, 1),
        "results": results,
    }
    write_record(args.json, record)
    _print(results, args)
    return record


def _measure(rows: int, args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng([args.seed, rows])
    device = torch.device(args.device)
    hot = torch.from_numpy(np.sort(rng.choice(rows, max(1, round(rows * args.hot_share)), replace=False, shuffle=False)))
    maps: dict[str, dict[str, Any]] = {}
    lookups: dict[str, _Lookup] = {}
    for name, kind in {"dense": DenseSlotIndex, "bitmap": BitmapSlotIndex}.items():
        began = time.perf_counter()
        index = kind([rows], [hot], device)
        maps[name] = {"bytes": index.index_bytes, "build_s": round(time.perf_counter() - began, 3)}
        lookups[name] = index
    keys = hot.to(device)
    maps["searchsorted"] = {"bytes": keys.numel() * keys.element_size(), "build_s": 0.0}
    lookups["searchsorted"] = lambda row: _bisect(keys, row)
    for entry in maps.values():
        entry["bits_per_row"] = round(8 * entry["bytes"] / rows, 3)
        entry["ns_per_id"] = {}
    for pattern, hot_accesses in (("uniform", 0.0), ("skewed", args.hot_accesses)):
        for name, times in _time(lookups, rows, hot, hot_accesses, rng, device, args).items():
            low, median, high = (1e9 * x / args.ids for x in (np.quantile(times, 0.1), statistics.median(times), np.quantile(times, 0.9)))
            maps[name]["ns_per_id"][pattern] = {"median": round(median, 2), "p10": round(low, 2), "p90": round(high, 2)}
    return {"rows": rows, "hot_rows": hot.numel(), "maps": maps}


def _time(
    lookups: dict[str, _Lookup],
    rows: int,
    hot: torch.Tensor,
    hot_accesses: float,
    rng: np.random.Generator,
    device: torch.device,
    args: argparse.Namespace,
) -> dict[str, list[float]]:
    """Seconds of every lookup; repeats are interleaved, so that a slow moment of the machine meets all maps alike."""
    names = list(lookups)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-3, args.repeats):  # the first three warm up
        drawn = rng.integers(rows, size=args.ids)
        to_hot = rng.random(args.ids) < hot_accesses
        drawn[to_hot] = hot.numpy()[rng.integers(hot.numel(), size=int(to_hot.sum()))]
        row = torch.from_numpy(drawn).to(device)
        found = {}
        for i in range(len(names)):
            name = names[(repeat + i) % len(names)]
            _wait(device)
            began = time.perf_counter()
            found[name] = lookups[name](row)
            _wait(device)
            if repeat >= 0:
                times[name].append(time.perf_counter() - began)
        if not all(torch.equal(found["searchsorted"], slots) for slots in found.values()):
            raise AssertionError(f"the maps disagree at {rows} rows, repeat {repeat}")
    return times


def _bisect(keys: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    found = torch.searchsorted(keys, row, out_int32=True)
    at = torch.index_select(keys, 0, found.clamp(max=keys.numel() - 1))
    return torch.where(at == row, found, -1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _print(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"{args.ids} ids a lookup, {args.hot_share:.1%} of the rows hot, medians of {args.repeats} interleaved repeats, {args.device}")
    print(f"{'rows':>12} {'map':14}{'bits/row':>9}{'MB':>9}{'uniform ns/id':>15}{'skewed ns/id':>14}{'build s':>9}")
    for result in results:
        for name, entry in result["maps"].items():
            uniform, skewed = (entry["ns_per_id"][pattern]["median"] for pattern in ("uniform", "skewed"))
            print(
                f"{result['rows']:12} {name:14}{entry['bits_per_row']:9.2f}{entry['bytes'] / 1e6:9.2f}{uniform:15.1f}{skewed:14.1f}"
                f"{entry['build_s']:9.2f}"
            )
    print(f"written: {args.json}")


if __name__ == "__main__":
    main()
