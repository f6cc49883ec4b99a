"""How well a cache in front of each table would do: measured LRU miss ratios of a stream of batches, for TorchRec's planner."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from tqdm import tqdm

from fae_torchrec.core.archive import load_archive, save_archive
from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.core.stack_distance import stack_distances
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.category_keys import mixed
from fae_torchrec.data.segregate import check_ids

_KIND = "cache statistics"
_LEAST_ACCESSES = 1 << 12
_WINDOW = 256  # accesses per sampled row at least, before a table's rows are thinned out no further


@dataclass(frozen=True, eq=False)
class TableCacheStatistics:
    """What TorchRec's `EmbeddingOffloadStats` asks about one table, and how it was measured.

    Attributes:
        rows: of the table.
        expected_lookups: mean number of distinct rows in a global batch, which is how often a cache is asked for a row in a step.
        cacheability: area under the miss-ratio curve over load factors 0..1 of an LRU cache. Near 0: few rows are worth all; 0.5:
            uniform access; near 1: no row comes again before nearly all others have. 0 for a table that is never accessed.
        histogram: int64 [bins], measured accesses by the share of the table that an LRU cache needs to serve them: bin i counts stack
            distances of i/bins to (i+1)/bins of the rows. First accesses are in the last bin.
        first_accesses: those of the histogram's accesses that no cache could have served, as the row had not been seen before.
        row_rate: the share of rows whose accesses were kept, in (0, 1].

    Raises:
        DataError: the figures are not such statistics.
    """

    rows: int
    expected_lookups: float
    cacheability: float
    histogram: np.ndarray
    first_accesses: int
    row_rate: float

    def __post_init__(self) -> None:
        bins = self.histogram.size
        if self.histogram.dtype != np.int64 or self.histogram.ndim != 1 or not 1 <= bins <= self.rows or int(self.histogram.min()) < 0:
            raise DataError(
                f"the histogram must be int64 [1..{self.rows} bins], none negative; received {self.histogram.dtype} "
                f"{list(self.histogram.shape)}; measure the statistics again"
            )
        if not (0 <= self.cacheability <= 1 and 0 <= self.expected_lookups <= self.rows and 0 < self.row_rate <= 1):
            raise DataError(
                f"cacheability must be 0..1, expected_lookups 0..{self.rows} and row_rate above 0 and at most 1; received "
                f"{self.cacheability}, {self.expected_lookups} and {self.row_rate}; measure the statistics again"
            )

    @property
    def accesses(self) -> int:
        """Accesses that the curve was measured on."""
        return int(self.histogram.sum())


@dataclass(frozen=True, eq=False)
class MeasuredCacheStatistics:
    """The cache statistics of all tables under one global batch size. The arrays are read-only by agreement.

    Attributes:
        tables: the tables.
        by_table: table name -> its statistics.
        global_batch_size: samples that all ranks together look up in one step.
        global_batches: steps that were read.
        seed: of the choice of rows in tables whose `row_rate` is below 1.
        source: where the batches came from, free text.

    Raises:
        DataError: a table is missing, or its statistics are of another number of rows.
    """

    tables: TableSet
    by_table: Mapping[str, TableCacheStatistics]
    global_batch_size: int
    global_batches: int
    seed: int
    source: str

    def __post_init__(self) -> None:
        measured = {name: statistics.rows for name, statistics in self.by_table.items()}
        allowed = {table.name: table.rows for table in self.tables}
        if measured != allowed:
            raise DataError(f"cache statistics are of tables with rows {measured}, allowed are exactly {allowed}; measure them again")

    @cached_property
    def fingerprint(self) -> str:
        """Names the statistics by the tables' names and rows, their provenance and every figure."""
        return fingerprint(
            _KIND,
            self.tables.fingerprint,
            [self.global_batch_size, self.global_batches, self.seed, self.source],
            *(part for name in self.tables.names for part in (_figures(self.by_table[name]), self.by_table[name].histogram)),
        )

    def to_json(self) -> dict[str, Any]:
        """Every figure as a plain value that JSON can write."""
        return {
            "fingerprint": self.fingerprint, "parent": self.tables.fingerprint, "source": self.source, "seed": self.seed,
            "global_batch_size": self.global_batch_size, "global_batches": self.global_batches,
            "tables": {
                name: {**_figures(one), "accesses": one.accesses, "histogram": one.histogram.tolist()}
                for name, one in self.by_table.items()
            },
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics to one .npz file, under a temporary name first; `path` may be a URI that iopath knows."""
        save_archive(
            path,
            _KIND,
            fingerprint=self.fingerprint,
            parent=self.tables.fingerprint,
            fields={
                "tables": self.tables.to_json(),
                "figures": {name: _figures(one) for name, one in self.by_table.items()},
                "global_batch_size": self.global_batch_size,
                "global_batches": self.global_batches,
                "seed": self.seed,
                "source": self.source,
            },
            arrays={"histogram": {name: one.histogram for name, one in self.by_table.items()}},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MeasuredCacheStatistics:
        """Reads what `save` wrote.

        Raises:
            ConfigError: there is no such file.
            DataError: the file is damaged or holds something else.
            FingerprintError: the content is not what was saved.
        """
        return load_archive(
            path,
            _KIND,
            lambda fields, arrays: cls(
                tables=TableSet.from_json(fields["tables"]),
                by_table={
                    name: TableCacheStatistics(**figures, histogram=arrays["histogram"][name])
                    for name, figures in fields["figures"].items()
                },
                global_batch_size=fields["global_batch_size"],
                global_batches=fields["global_batches"],
                seed=fields["seed"],
                source=fields["source"],
            ),
        )


def measure_cache_statistics(
    batches: Iterable[Batch],
    tables: TableSet,
    *,
    global_batch_size: int,
    bins: int = 100,
    max_accesses: int = 1 << 20,
    seed: int = 7,
    source: str = "",
    progress: bool = False,
    total: int | None = None,
) -> MeasuredCacheStatistics:
    """Measures what an LRU cache of any size would do for each table (FBGEMM's cached UVM tables; TorchRec's FUSED_UVM_CACHING kernel).

    FBGEMM looks a row up in the cache once per step, however many ids of the batch ask for it. So the accesses of a table are the
    distinct rows of one global batch after the other, in ascending order within each; the stack distance of an access says which caches
    serve it. The first half of the batches only fills the cache. In the second half, a row not seen before is an access that no cache
    serves: it counts as one that needs the whole table. Too few batches therefore make a table look harder to cache, never easier.

    Memory is one global batch, 8 bytes for each of at most `max_accesses` accesses per table and 120 bytes for each step that they come
    from, and 50 bytes for each access of the one table whose curve is being computed. When a table has more accesses, half of its rows,
    chosen by a hash of the id, are left out again, and distances are scaled up for it (SHARDS: Waldspurger et al., "Efficient MRC
    construction with SHARDS", FAST 2015); a table with few rows, where that would be crude, drops its oldest batches instead, and is
    measured on the latest.

    What differs from FBGEMM: it looks all rows of a step up before it evicts any, so a distance here is off by the distinct rows of two
    steps at most; and its cache is set-associative (32 or 64 ways), where a crowded set misses what the fully associative one here holds.

    Args:
        batches: samples in the order of training, in batches of any sizes, on the CPU: `source.batches(global_batch_size)`. Samples at
            the end that do not fill a global batch are left out.
        tables: the tables. Features that none looks up are ignored.
        global_batch_size: samples of one step, all ranks together.
        bins: of the histograms; a table with fewer rows gets one bin per row.
        max_accesses: kept per table, at least 4,096.
        seed: of the hash.
        source: where the batches come from, kept in the result.
        progress: whether to show a bar on stderr.
        total: samples in the stream, if known, for the bar.

    Raises:
        ConfigError: a setting is out of its range.
        DataError: there are fewer than two global batches, a feature is missing, or an id is not a row of its table.
    """
    settings = (("global_batch_size", global_batch_size, 1), ("bins", bins, 1), ("max_accesses", max_accesses, _LEAST_ACCESSES))
    for name, value, least in settings:
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, received {value}")
    traces = {table.name: _Trace(table.rows, max_accesses, seed) for table in tables}
    steps = 0
    with tqdm(total=total, desc="cache statistics", unit="sample", unit_scale=True, disable=None if progress else True) as bar:
        for ids in _global_batches(batches, tables, global_batch_size, source):
            for name, trace in traces.items():
                trace.add(np.unique(ids[name]))
            steps += 1
            bar.update(global_batch_size)
    if steps < 2:
        raise DataError(
            f"{source or 'input'}: {steps} whole global batches of {global_batch_size} samples were received, at least 2 are needed (one "
            "to fill the cache, one to measure) and some hundreds are better; give more samples or a smaller global_batch_size"
        )
    by_table = {name: trace.statistics(min(bins, tables[name].rows)) for name, trace in traces.items()}
    return MeasuredCacheStatistics(tables, by_table, global_batch_size, steps, seed, source)


def _global_batches(batches: Iterable[Batch], tables: TableSet, size: int, source: str) -> Iterator[dict[str, np.ndarray]]:
    """The ids of one global batch after the other, by table; the last samples are dropped if they do not fill one."""
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in tables.names}
    held = seen = 0
    for batch in batches:
        kjt = batch.sparse_features
        try:
            check_ids(kjt, tables)
        except DataError as error:
            raise DataError(f"{source or 'input'}, in the {kjt.stride()} samples after the first {seen}: {error}") from error
        bags = {feature: kjt[feature] for _, feature in tables.lookups}
        values = {feature: bag.values().numpy() for feature, bag in bags.items()}
        offsets = {feature: bag.offsets().numpy() for feature, bag in bags.items()}
        start = 0
        while start < kjt.stride():
            stop = min(kjt.stride(), start + size - held)
            for name, feature in tables.lookups:
                pieces[name].append(values[feature][offsets[feature][start] : offsets[feature][stop]])
            held, start = held + stop - start, stop
            if held == size:
                yield {name: np.concatenate(parts) for name, parts in pieces.items()}
                pieces, held = {name: [] for name in tables.names}, 0
        seen += kjt.stride()


class _Trace:
    """The accesses of one table, step by step: those of the rows that are sampled, at most `budget` of them."""

    def __init__(self, rows: int, budget: int, seed: int) -> None:
        self._rows, self._budget = rows, budget
        self._salt = np.uint64(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
        self._halvings = 0
        self._steps: list[np.ndarray] = []  # sampled rows by step
        self._held = self._lookups = self._num_steps = 0

    def add(self, distinct: np.ndarray) -> None:
        """Adds the distinct rows of the next step."""
        self._lookups += distinct.size
        self._num_steps += 1
        self._steps.append(self._sampled(distinct))
        self._held += self._steps[-1].size
        while self._held > self._budget:
            if (self._rows >> (self._halvings + 1)) * _WINDOW >= self._budget:
                self._halvings += 1
                self._steps = [self._sampled(step) for step in self._steps]
            else:  # so few rows that a shorter window tells as much
                self._steps = self._steps[len(self._steps) // 2 :]
            self._held = sum(step.size for step in self._steps)

    def statistics(self, bins: int) -> TableCacheStatistics:
        """The miss-ratio curve of the second half of the steps, after the first half has filled the cache."""
        warm = sum(step.size for step in self._steps[: len(self._steps) // 2])
        sampled_distances = stack_distances(np.concatenate(self._steps))[warm:]
        first = sampled_distances < 0
        distances = np.minimum(sampled_distances << self._halvings, self._rows - 1)
        distances[first] = self._rows - 1
        # The very edges that EmbeddingOffloadStats compares cache sizes with, rounding included.
        edges = torch.linspace(0, self._rows, bins + 1).numpy()
        place = np.minimum(np.searchsorted(edges, distances, side="right") - 1, bins - 1)
        return TableCacheStatistics(
            rows=self._rows,
            expected_lookups=self._lookups / self._num_steps,
            # A cache of c rows misses an access of distance d if c <= d, for d + 1 of the sizes 0..rows-1.
            cacheability=float((distances + 1).mean() / self._rows) if distances.size else 0.0,
            histogram=np.bincount(place, minlength=bins).astype(np.int64),
            first_accesses=int(first.sum()),
            row_rate=0.5**self._halvings,
        )

    def _sampled(self, rows: np.ndarray) -> np.ndarray:
        if not self._halvings:
            return rows
        kept: np.ndarray = rows[mixed(rows.view(np.uint64) ^ self._salt) >> np.uint64(64 - self._halvings) == 0]
        return kept


def _figures(statistics: TableCacheStatistics) -> dict[str, Any]:
    """All but the histogram."""
    return {name: value for name, value in asdict(statistics).items() if name != "histogram"}
