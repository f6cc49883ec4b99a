"""Counts what FAE moves over an epoch, as this package does it, as its authors published it, and with all tables on the host.

    python benchmarks/paper_bytes.py
    python benchmarks/paper_bytes.py --quick     # some seconds, to see that it runs; its figures mean nothing

Nothing is trained and no GPU is needed: a HotColdDataLoader with the schedule `fae` at R(50) gives an epoch of hot and cold batches, and
the bytes of each step follow from its ids (paper_bytes_count.py; a test holds them against what real ranks send). The data are shaped like
the four of FAE's paper, synthetic, by the configs of examples/configs: their profile, hot set, budget and batch size per GPU. Counted are
samples of the test split, none of which the profile saw. The hot set is the same for both FAEs: the config's policy at the config's budget,
and again FAE's threshold policy at the byte share of the paper (`threshold`). The rate stays at 50: no test loss is fed back.

stock_host    The paper's baseline: host memory has all tables; each step moves the rows (pooled where a table is) to the GPUs and the
              gradients back.
as_published  FAE as published: hot batches on the GPUs alone, cold batches as stock_host; hot rows' weights are copied at every swap.
              `between_gpus`: of hot batches the gradients of touched rows, the least that replicas can do. `between_gpus_otherwise`: a
              dense all-reduce of all hot rows, and what the authors' code does (github.com/STAR-Laboratory/Accelerating-RecSys-Training,
              DLRM/dlrm_fae.py: `replicate` of the hot table at each step, everything else through the first GPU).
ours          Nothing is copied at swaps; of cold batches only cold rows come from the host: `host` (looked up there, pooled rows of
              packed bags) or `uvm` (distinct cold rows with their optimizer state, in and out).

pcie          Bytes of rows and gradients between host and GPUs, both directions, and of hot rows at swaps. Ids (8 bytes each, where they
              cross) are kept apart. Dense features, labels and the dense part's gradients are the same for all, and left out.
links         `pcie` and bytes between GPUs.
tier          Bytes read and written in host memory.
paper_epoch   `counted`, for as many samples as the paper's epoch has (Table 7), and hot rows of as large a share of the paper's tables.

Target: ours at most half of FAE as published, of `pcie` and of `tier`, at the paper's epoch. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from paper_bytes_count import ByteCounter, ColdTier, Moved, swap_counts
from paper_bytes_table import PUBLISHED, Published, baseline_check, beside_table7
from record import record_header, write_record
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from fae_torchrec.config import RunConfig, load_config
from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.schedule import Kind, ShuffleSchedule
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.experiment_data import open_data
from fae_torchrec.experiment_model import placed_tables
from fae_torchrec.experiment_profile import make_profile

_ROOT = Path(__file__).resolve().parent.parent
_QUICK = {"samples": 20_000, "train_samples": 100_000, "scale": 0.01, "batch_size": 128, "json": _ROOT / "runs/paper_bytes_quick.json"}
_TIERS: tuple[ColdTier, ...] = ("host", "uvm")
_BUFFER = 16 << 30  # a whole epoch in one window
_TARGET = 0.5


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Counts, prints, and returns what was written as JSON."""
    args = _arguments(argv)
    began = time.perf_counter()
    shapes = {name: _shape(name, args) for name in args.shapes}
    record = {
        **record_header("paper_bytes", argv),
        "seed": {name: found["seed"] for name, found in shapes.items()},
        "wall_s": round(time.perf_counter() - began, 1),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "target": {"pcie": _TARGET, "tier": _TARGET, "met": all(found["met"] for found in shapes.values())},
        "above_target": _above_target(shapes),
        "table7_baseline": baseline_check(),
        "shapes": shapes,
    }
    write_record(args.json, record)
    print(record_text(record) + f"\nwritten: {args.json}")
    return record


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), help="(default: all)")
    add("--samples", type=int, help="counted, of the test split (default: 1,048,576; Taobao: 262,144)")
    add("--gpus", type=int, nargs="+", default=[1, 4], help="each with the config's batch size (default: %(default)s)")
    add("--scale", type=float, help="rows as a share of the published ones (default: the config's)")
    add("--train-samples", type=int, help="of which the profile counts its share (default: the config's)")
    add("--batch-size", type=int, help="samples per GPU (default: the config's)")
    add("--json", type=Path, default=_ROOT / "benchmarks/results/paper_bytes.json", help="(default: %(default)s)")
    add("--quick", action="store_true", help="small sizes; writes runs/paper_bytes_quick.json")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**_QUICK)
    return parser.parse_args(argv)


def _shape(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One data set: its placements, and what was counted under each."""
    paper = PUBLISHED[name]
    given = {
        "data.synthetic.scale": args.scale,
        "data.synthetic.train_samples": args.train_samples,
        "data.synthetic.test_samples": args.samples,
        "train.batch_size": args.batch_size,
    }
    changed = [*paper.overrides, *(f"{key}={value}" for key, value in given.items() if value is not None)]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(_ROOT / "examples/configs" / paper.config, [*changed, f"output={folder}"])
        data = open_data(config)
        profile = make_profile(config, data, placed_tables(config, data), show_progress=True)
    budget = config.placement.budget_bytes(profile.tables.total_bytes)
    assert budget is not None and config.data.synthetic is not None
    placements = {
        "config": _placement(config, profile, config.placement.policy, budget),
        "threshold": _placement(config, profile, "threshold", int(paper.hot_bytes * profile.tables.total_bytes)),
    }
    found = {
        policy: _counted(name, paper, data.test, placement, config, args.gpus) for policy, placement in placements.items() if placement
    }
    chosen = found.pop("config")
    return {
        "config": paper.config,
        "overrides": changed,
        "data": f"{data.test.name}; profile: {data.train.name}, {profile.num_samples} counted",
        "seed": config.data.synthetic.seed,
        "batch_size_per_gpu": config.train.batch_size,
        "optimizer": config.train.optimizer.value,
        **chosen,
        **found,
        "met": all(
            over["paper_epoch"][tier][what] <= _TARGET for over in chosen["ratios"].values() for tier in _TIERS for what in ("pcie", "tier")
        ),
    }


def _placement(config: RunConfig, profile: PopularityProfile, policy: Any, budget: int) -> RowPlacement:
    options = config.placement
    hot_set = select_hot_set(profile, budget, policy=policy, pinned_max_rows=options.pinned_max_rows, sizes=options.sizes)
    return RowPlacement.from_hot_set(hot_set)


def _counted(
    name: str, paper: Published, source: ShardedSource, placement: RowPlacement, config: RunConfig, gpus: list[int]
) -> dict[str, Any]:
    """An epoch on each number of GPUs under one placement."""
    tables, counter = placement.tables, ByteCounter(placement)
    weights = sum(table.rows * table.weight_bytes for table in tables)
    grown = paper.weight_bytes / weights
    result: dict[str, Any] = {
        "placement": {
            "bytes": tables.total_bytes,
            "hot_bytes": placement.hot_bytes,
            "hot_weight_bytes": counter.hot_weights,
            "byte_share": placement.hot_bytes / tables.total_bytes,
            "hot_inputs_expected": placement.hot_inputs,
            "fingerprint": placement.fingerprint,
        },
        **{"epochs": {}, "ours": {}, "as_published": {}, "stock_host": {}, "ratios": {}},
    }
    for number in gpus:
        steps = _steps(source, placement, config.train.batch_size, number)
        epoch = _Epoch(counter, steps, f"{name}, {number} GPU(s)", number)
        longer, key = paper.samples / epoch.samples, str(number)
        moved = {
            scheme: {"counted": steps + swaps, "paper_epoch": steps.times(longer) + swaps.times(grown)}
            for scheme, (steps, swaps) in epoch.moved.items()
        }
        between = {
            "counted": {how: more + copies for how, (more, copies) in epoch.between.items()},
            "paper_epoch": {how: longer * (more + grown * copies) for how, (more, copies) in epoch.between.items()},
        }
        result["epochs"][key] = {**epoch.to_json(), "times_samples": longer, "times_hot_rows": grown}
        result["ours"][key] = {tier: {span: one.to_json() for span, one in moved[tier].items()} for tier in _TIERS}
        result["as_published"][key] = {
            span: {**one.to_json(), "between_gpus_otherwise": between[span]} for span, one in moved["published"].items()
        }
        result["stock_host"][key] = {span: one.to_json() for span, one in moved["stock"].items()}
        result["ratios"][key] = {
            span: {
                **{tier: _ratios(moved[tier][span], moved["published"][span], between[span]) for tier in _TIERS},
                "published_over_stock": _ratios(moved["published"][span], moved["stock"][span], {}),
            }
            for span in ("counted", "paper_epoch")
        }
        if number == min(gpus):
            hot_share = counter.hot_weights / weights
            result["table7"] = beside_table7(paper, epoch.hot_samples / epoch.samples, hot_share, moved["published"]["paper_epoch"])
    return result


class _Epoch:
    """What the steps of an epoch add up to.

    Attributes:
        moved: by scheme, its steps and its swaps.
        between: other ways of FAE as published to keep its replicas alike: bytes between GPUs that grow with the samples, and bytes of
            copies of all hot rows, which grow with these too.
    """

    def __init__(self, counter: ByteCounter, steps: Iterator[tuple[Kind, list[KeyedJaggedTensor]]], title: str, ranks: int) -> None:
        kinds: list[Kind] = []
        ours, published, stock = dict.fromkeys(_TIERS, Moved()), Moved(), Moved()
        through_first = copies = 0.0
        self.samples = self.hot_samples = self.cold_lookups = self.lookups = 0
        for kind, batches in tqdm(steps, desc=title, unit=" steps"):
            step = counter.count(batches, kind)
            kinds.append(kind)
            self.samples += int(step.samples.sum())
            self.hot_samples += int(step.samples.sum()) if kind == "hot" else 0
            self.lookups += int(step.ids.sum())
            self.cold_lookups += int(step.cold_ids.sum())
            published += counter.published(step)
            stock += counter.stock(step)
            ours = {tier: ours[tier] + counter.ours(step, tier) for tier in _TIERS}
            through_first += counter.through_first_gpu(step)
            copies += counter.hot_copies(step)
        self.steps = {kind: kinds.count(kind) for kind in ("hot", "cold")}
        self.swaps = swap_counts(kinds)
        self.moved = {
            **{tier: (ours[tier], Moved()) for tier in _TIERS},
            "published": (published, counter.swaps(kinds, ranks)),
            "stock": (stock, Moved()),
        }
        self.between = {"dense_all_reduce": (0.0, 2 * copies), "authors_code": (through_first, copies)}

    def to_json(self) -> dict[str, Any]:
        """How many of what."""
        return {
            "samples": self.samples,
            "hot_inputs": self.hot_samples / self.samples,
            "cold_lookups": self.cold_lookups / self.lookups,
            "steps": self.steps,
            "copies_to_gpus": self.swaps[0],
            "copies_to_host": self.swaps[1],
        }


def _ratios(one: Moved, other: Moved, otherwise: dict[str, float]) -> dict[str, float | None]:
    """One's bytes over the other's; `pcie_without_swaps` leaves the copies at swaps out of the other's."""
    swaps = other.sync_to_gpu + other.sync_to_host
    found: dict[str, float | None] = {
        "pcie": one.pcie / other.pcie,
        "pcie_and_ids": (one.pcie + one.ids) / (other.pcie + other.ids),
        "pcie_without_swaps": one.pcie / (other.pcie - swaps),
        "tier": one.tier / other.tier,
        "pcie_and_tier": (one.pcie + one.tier) / (other.pcie + other.tier),
        "between_gpus": one.between_gpus / other.between_gpus if other.between_gpus else None,
        "links": one.links / other.links,
        "links_and_tier": (one.links + one.tier) / (other.links + other.tier),
    }
    for how, between in otherwise.items() if one.between_gpus else ():
        found[f"links_{how}"] = one.links / (other.pcie + between)
        found[f"links_and_tier_{how}"] = (one.links + one.tier) / (other.pcie + between + other.tier)
    return found


def _above_target(shapes: dict[str, Any]) -> dict[str, float]:
    """Every ratio above the target at the paper's epoch, those that are not judged too."""
    return {
        f"{name}, {policy}, {gpus} GPU(s), {tier}: {what}": round(ratio, 3)
        for name, shape in shapes.items()
        for policy, found in (("config", shape), ("threshold", shape["threshold"]))
        for gpus, over in found["ratios"].items()
        for tier in _TIERS
        for what, ratio in over["paper_epoch"][tier].items()
        if ratio is not None and ratio > _TARGET
    }


def _steps(source: ShardedSource, placement: RowPlacement, batch_size: int, ranks: int) -> Iterator[tuple[Kind, list[KeyedJaggedTensor]]]:
    """The steps of an epoch: the kind, and each rank's batch, of as many loaders that agree as ranks would.

    Raises:
        Exception: what a loader raised.
    """
    gather, queues = _Gather(ranks), [queue.Queue[Any](maxsize=8) for _ in range(ranks)]

    def load(rank: int) -> None:
        loader = HotColdDataLoader(
            source,
            placement,
            batch_size=batch_size,
            schedule=ShuffleSchedule("fae", rate=50),
            rank=rank,
            world_size=ranks,
            agree=lambda counts: gather(rank, counts),
            buffer_bytes=_BUFFER,
            prefetch=0,
        )
        try:
            for batch in loader:
                queues[rank].put((batch.kind, batch.sparse_features))
            queues[rank].put(None)
        except BaseException as error:
            gather.barrier.abort()
            queues[rank].put(error)

    threads = [threading.Thread(target=load, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    while True:
        of_ranks = [one.get() for one in queues]
        for of_rank in of_ranks:
            if isinstance(of_rank, BaseException):
                raise of_rank
        if any(of_rank is None for of_rank in of_ranks):
            break
        yield of_ranks[0][0], [batch for _, batch in of_ranks]


class _Gather:
    """An all-gather of threads."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks)
        self._said: list[Any] = [None] * ranks

    def __call__(self, rank: int, counts: np.ndarray) -> np.ndarray:
        self._said[rank] = counts
        self.barrier.wait()
        said = np.stack(self._said)
        self.barrier.wait()  # nobody says anything new before all have read
        return said


def record_text(record: dict[str, Any]) -> str:
    """What is printed: GB of an epoch of the paper's length, and ours over as published."""
    lines = ["GB of an epoch as long as the paper's, PCIe + host memory (as published: of PCIe, the swaps), and ours over as published"]
    for name, shape in record["shapes"].items():
        for title, found in ((name, shape), (f"{name}, threshold", shape["threshold"])):
            lines += [_row(title, key, found) for key in found["ratios"]]
    lines.append("Table 7, GiB: published; by Fig. 5's hot inputs and bytes; counted with two copies; counted at R(50)")
    for name, shape in record["shapes"].items():
        for title, found in ((name, shape), (f"{name}, threshold", shape["threshold"])):
            table = found["table7"]
            shown = [table[key] for key in ("table7_fae_gib", "by_fig5_gib", "counted_two_copies_gib", "counted_r50_gib")]
            lines.append(f"  {title:20} {shown} hot {table['hot_inputs']:.1%}, published {table['published_hot_inputs']:.1%}")
    lines += [f"target met: {record['target']['met']}; above it:", *(f"  {what} {x}" for what, x in record["above_target"].items())]
    return "\n".join(lines)


def _row(title: str, key: str, found: dict[str, Any]) -> str:
    published = found["as_published"][key]["paper_epoch"]
    ours = {tier: found["ours"][key][tier]["paper_epoch"] for tier in _TIERS}
    cells = {"stock host": found["stock_host"][key]["paper_epoch"], "as published": published, **ours}
    swaps = (published["sync_to_gpu"] + published["sync_to_host"]) / 1e9
    gigabytes = "  ".join(f"{scheme} {one['pcie'] / 1e9:.2f} + {one['tier'] / 1e9:.2f}" for scheme, one in cells.items())
    over = found["ratios"][key]["paper_epoch"]
    ratios = "  ".join(f"{tier}: " + ", ".join(f"{what} {x:.3f}" for what, x in over[tier].items() if x) for tier in _TIERS)
    between = f"between GPUs {published['between_gpus'] / 1e9:.1f}, ours {[round(one['between_gpus'] / 1e9, 1) for one in ours.values()]}"
    hot = found["epochs"][key]["hot_inputs"]
    return f"  {title}, {key} GPU(s), hot {hot:.1%}: {gigabytes}  swaps {swaps:.2f}  {between}\n      {ratios}"


if __name__ == "__main__":
    main()
