"""Stock TorchRec plans its caches from statistics that fae_torchrec measured, with no part of FAE turned on.

TorchRec can keep embedding tables in host memory behind caches in device memory (the FUSED_UVM_CACHING kernel), and its
EmbeddingOffloadScaleupProposer deals the device memory that is left to these caches, in proportion to

    cacheability * expected lookups        (area under the LRU miss-ratio curve) * (distinct rows of a global batch)

It asks for both through CacheParams(stats=...) and skips every table that has none. TorchRec has no means to measure them; this
example measures two tables of equal size, one whose accesses are skewed (Zipf) and one whose accesses are uniform, and shows the
stock plan without and with these statistics. Nothing is trained and no GPU is needed: a plan only looks at sizes.

In a training script of your own, three lines do it:

    measured = measure_cache_statistics(source.batches(global_batch_size), tables, global_batch_size=global_batch_size)
    constraints = cache_constraints(measured, load_factor=0.1)
    planner = EmbeddingShardingPlanner(constraints=constraints, proposer=[EmbeddingOffloadScaleupProposer()], ...)
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.proposers import EmbeddingOffloadScaleupProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.data.cache_statistics import measure_cache_statistics
from fae_torchrec.distributed.cache_statistics import cache_constraints, torchrec_cache_statistics
from fae_torchrec.modules.model_tables import model_tables

TABLES = ("skewed", "uniform")
DIM = 128


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    model = _model(options.rows)
    measured = measure_cache_statistics(
        _batches(options), model_tables(model), global_batch_size=options.batch_size, source=f"two synthetic tables, seed {options.seed}"
    )
    table_wise = {name: ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value]) for name in TABLES}
    constraints = cache_constraints(measured, load_factor=options.load_factor, base_constraints=table_wise)
    without = {name: replace(given, cache_params=replace(given.cache_params, stats=None)) for name, given in constraints.items()}
    before, after = _planned(model, without, options), _planned(model, constraints, options)

    statistics = torchrec_cache_statistics(measured)
    result = {
        name: {
            "rows": options.rows,
            "cacheability": statistics[name].cacheability,
            "expected_lookups": statistics[name].expected_lookups,
            "load_factor": {"before": before[name], "after": after[name]},
            "misses_per_step": {
                when: statistics[name].expected_lookups * statistics[name].expected_miss_rate(chosen[name])
                for when, chosen in (("before", before), ("after", after))
            },
        }
        for name in TABLES
    }
    print(json.dumps(result, indent=1) if options.json else _text(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="of each table (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8192, help="samples of a global batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="global batches to measure (default: %(default)s)")
    parser.add_argument("--load-factor", type=float, default=0.1, help="smallest cache, as a share of the table (default: %(default)s)")
    parser.add_argument("--hbm", type=float, default=0.5, help="device memory, as a share of both tables (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the synthetic accesses (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _model(rows: int) -> EmbeddingBagCollection:
    configs = [EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[f"{name}_id"]) for name in TABLES]
    return EmbeddingBagCollection(tables=configs, device=torch.device("meta"))


def _batches(options: argparse.Namespace) -> Iterator[Batch]:
    """One id per sample and table: rows by Zipf's law with exponent 1.2 (in scrambled order), and any row alike."""
    rng = np.random.default_rng(options.seed)
    scrambled = rng.permutation(options.rows)
    shares = np.cumsum(np.arange(1, options.rows + 1) ** -1.2)
    size = options.batch_size
    for _ in range(options.steps):
        skewed = scrambled[np.searchsorted(shares, rng.random(size) * shares[-1])]
        values = torch.from_numpy(np.concatenate([skewed, rng.integers(0, options.rows, size)]))
        lengths = torch.ones(2 * size, dtype=torch.int32)
        features = KeyedJaggedTensor([f"{name}_id" for name in TABLES], values, lengths=lengths, stride=size)
        yield Batch(dense_features=torch.empty(size, 0), sparse_features=features, labels=torch.empty(size))


def _planned(
    model: EmbeddingBagCollection, constraints: Mapping[str, ParameterConstraints], options: argparse.Namespace
) -> dict[str, float]:
    """Load factors that the stock planner chose for one GPU; 1 for a table that it moved into device memory whole."""
    bytes_of_both = len(TABLES) * options.rows * DIM * 4
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, local_world_size=1, compute_device="cuda", hbm_cap=int(options.hbm * bytes_of_both)),
        batch_size=options.batch_size,
        constraints=dict(constraints),
        proposer=[EmbeddingOffloadScaleupProposer()],
        storage_reservation=FixedPercentageStorageReservation(0.0),  # nothing else runs on this imagined device
    )
    plan = planner.plan(model, [EmbeddingBagCollectionSharder()]).plan[""]
    return {name: 1.0 if plan[name].cache_params.load_factor is None else plan[name].cache_params.load_factor for name in TABLES}


def _text(result: Mapping[str, Any]) -> str:
    lines = [
        f"{'':8} {'':>9} {'cache-':>8} {'distinct rows':>14}   {'load factor':^16}   {'misses a step':^17}",
        f"{'table':8} {'rows':>9} {'ability':>8} {'a global batch':>14}   {'before':>7}  {'after':>7}   {'before':>7}  {'after':>8}",
    ]
    for name, one in result.items():
        factor, misses = one["load_factor"], one["misses_per_step"]
        lines.append(
            f"{name:8} {one['rows']:9,} {one['cacheability']:8.3f} {one['expected_lookups']:14,.0f}   "
            f"{factor['before']:7.3f}  {factor['after']:7.3f}   {misses['before']:7,.0f}  {misses['after']:8,.0f}"
        )
    priority = {name: one["cacheability"] * one["expected_lookups"] for name, one in result.items()}
    lines += [
        "",
        "before: no statistics, so the proposer leaves both caches as they were given and the rest of the device memory idle.",
        f"after:  it deals that memory out {priority['uniform'] / priority['skewed']:.0f} : 1 in favour of the uniform table, which asks "
        "for more distinct rows a step",
        "        and finds fewer of them in a small cache; the skewed table is served well by the little that it has.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
