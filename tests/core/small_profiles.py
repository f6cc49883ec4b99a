"""Profiles small enough to check by hand: from counts, or from whole inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fae_torchrec.core.input_sample import InputSample
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_counts import RowCounts
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec

Inputs = Sequence[Sequence[Sequence[int]]]
"""Input -> feature -> ids."""


def small_tables(rows: Sequence[int], dims: Sequence[int] = (1, 2, 3)) -> TableSet:
    """Tables a, b, c, ... with one feature each (f_a, ...) and rows of 4 bytes per dim (4, 8 and 12 by default)."""
    names = "abcdefgh"[: len(rows)]
    specs = zip(names, rows, dims, strict=False)
    return TableSet(tuple(TableSpec(name, size, dim, (f"f_{name}",), optimizer=Optimizer.SGD) for name, size, dim in specs))


def sample_of(tables: TableSet, inputs: Inputs) -> InputSample:
    features = [feature for _, feature in tables.lookups]
    return InputSample(
        {f: np.array([i for bags in inputs for i in bags[k]], dtype=np.int64) for k, f in enumerate(features)},
        {f: np.array([len(bags[k]) for bags in inputs], dtype=np.int64) for k, f in enumerate(features)},
        len(inputs),
    )


def profile_of_counts(*counts: list[int]) -> PopularityProfile:
    """One table per list of counts; the only whole input looks up row 0 of every table."""
    tables = small_tables([len(rows) for rows in counts])
    return PopularityProfile(
        tables=tables,
        counts={table.name: RowCounts.from_dense(np.array(rows, dtype=np.int64)) for table, rows in zip(tables, counts, strict=True)},
        counted_inputs=sample_of(tables, [[[0]] * len(counts)]),
        fresh_inputs=None,
        num_samples=10,
        total_samples=200,
        sample_rate=0.05,
        seed=7,
        source="by hand",
        skipped={},
    )


def profile_of_inputs(tables: TableSet, inputs: Inputs, fresh: Inputs | None = None) -> PopularityProfile:
    """All inputs counted and kept."""
    sample = sample_of(tables, inputs)
    features = dict(tables.lookups)
    return PopularityProfile(
        tables=tables,
        counts={t.name: RowCounts.from_dense(np.bincount(sample.values[features[t.name]], minlength=t.rows)) for t in tables},
        counted_inputs=sample,
        fresh_inputs=None if fresh is None else sample_of(tables, fresh),
        num_samples=len(inputs),
        total_samples=len(inputs) + len(fresh or ()),
        sample_rate=1.0 if fresh is None else 0.5,
        seed=7,
        source="by hand",
        skipped={},
    )
