"""How popular the rows of all tables are: sampled counts, whole inputs that were counted and that were not, and where they come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from fae_torchrec.core.archive import Arrays, Fields, load_archive, save_archive
from fae_torchrec.core.errors import DataError
from fae_torchrec.core.estimate import Estimate, share_estimate
from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.core.input_sample import InputSample
from fae_torchrec.core.row_counts import RowCounts
from fae_torchrec.core.row_ids import check_ids, checked_hot_ids, find_slots
from fae_torchrec.core.tables import TableSet

_KIND = "popularity profile"


@dataclass(frozen=True, eq=False)
class PopularityProfile:
    """What the Calibrator found out (the result of FAE's Embedding Logger, FAE §4.1). The arrays are read-only by agreement.

    Attributes:
        tables: the tables.
        counts: table name -> accesses of each row over all features of the table, in the counted inputs.
        counted_inputs: a uniform sample of the inputs that were counted: what a selection may be fitted on.
        fresh_inputs: a uniform sample of the inputs that were not counted: what hot inputs are estimated on. None if all were counted.
        num_samples: inputs counted.
        total_samples: inputs seen, counted or not.
        sample_rate: the chance of an input to be counted, in (0, 1].
        seed: of the sampling.
        source: where the inputs came from, free text.
        skipped: file -> malformed lines that were skipped, for files that had some.

    Raises:
        DataError: a table or feature is missing, or has counts or ids that are not its own.
    """

    tables: TableSet
    counts: Mapping[str, RowCounts]
    counted_inputs: InputSample
    fresh_inputs: InputSample | None
    num_samples: int
    total_samples: int
    sample_rate: float
    seed: int
    source: str
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples <= self.total_samples:
            raise DataError(f"{self.num_samples} of {self.total_samples} inputs counted; at least 1, and at most all, can have been")
        if self.counts.keys() != set(self.tables.names):
            raise DataError(f"counts name the tables {sorted(self.counts)}, allowed are exactly {sorted(self.tables.names)}")
        for table in self.tables:
            if self.counts[table.name].rows != table.rows:
                raise DataError(f"counts of table {table.name!r} are of {self.counts[table.name].rows} rows, the table has {table.rows}")
        for which, inputs in self._samples.items():
            for name, feature in self.tables.lookups:
                if feature not in inputs.values:
                    raise DataError(f"{which} lack feature {feature!r} of table {name!r}; they have {sorted(inputs.values)}")
                check_ids(f"{which}, feature {feature!r}, table {name!r}", inputs.values[feature], self.tables[name].rows)

    @cached_property
    def fingerprint(self) -> str:
        """Names the profile by the tables' names and rows, its provenance, counts and samples."""
        scalars = [self.num_samples, self.total_samples, self.sample_rate, self.seed, self.source, dict(self.skipped)]
        features = {which: sorted(inputs.values) for which, inputs in self._samples.items()}
        return fingerprint(
            _KIND,
            self.tables.fingerprint,
            [scalars, features],
            *(part for name in self.tables.names for part in (self.counts[name].ids, self.counts[name].counts)),
            *(
                part[feature]
                for which, inputs in self._samples.items()
                for part in (inputs.values, inputs.lengths)
                for feature in features[which]
            ),
        )

    @cached_property
    def total_accesses(self) -> int:
        """Accesses counted, over all tables."""
        return sum(counts.total for counts in self.counts.values())

    def coverage(self, hot_ids: Mapping[str, np.ndarray]) -> float:
        """Share of the counted accesses that are hot.

        Args:
            hot_ids: table name -> int64 [hot rows], strictly ascending, for every table.

        Returns:
            0..1; 1 if nothing was accessed, since nothing is cold then.

        Raises:
            DataError: the hot ids are not those of these tables.
        """
        checked = checked_hot_ids(self.tables, hot_ids)
        hot = sum(_hot_accesses(self.counts[name], ids) for name, ids in checked.items())
        return hot / self.total_accesses if self.total_accesses else 1.0

    def hot_inputs(self, hot_ids: Mapping[str, np.ndarray]) -> Estimate:
        """Share of all inputs that are hot: every id of every lookup is hot; an empty bag is hot.

        Args:
            hot_ids: table name -> int64 [hot rows], strictly ascending, for every table.

        Returns:
            The share among `fresh_inputs` and its interval. Without fresh inputs it is the share among `counted_inputs`, which is too high:
            every row that they access was seen by the count; the interval knows nothing of that.

        Raises:
            DataError: the hot ids are not those of these tables.
        """
        checked = checked_hot_ids(self.tables, hot_ids)
        inputs = self.counted_inputs if self.fresh_inputs is None else self.fresh_inputs
        hot = np.ones(inputs.num_samples, dtype=np.bool_)
        for name, feature in self.tables.lookups:
            if len(checked[name]) < self.tables[name].rows:
                cold_id = find_slots(checked[name], inputs.values[feature]) < 0
                hot[inputs.input_of_id(feature)[cold_id]] = False
        return share_estimate(int(hot.sum()), inputs.num_samples)

    def for_tables(self, tables: TableSet) -> PopularityProfile:
        """The same counts for tables of the same names and rows, whose dims, dtypes and optimizers may differ (and so their bytes).

        Raises:
            FingerprintError: the tables differ in names or rows; names both fingerprints and the first difference.
        """
        self.tables.check_same(tables, f"popularity profile {self.fingerprint}")
        return replace(self, tables=tables)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile to one .npz file, under a temporary name first; `path` may be a URI that iopath knows."""
        samples = self._samples
        save_archive(
            path,
            _KIND,
            fingerprint=self.fingerprint,
            parent=self.tables.fingerprint,
            fields={
                "tables": self.tables.to_json(),
                "samples": {which: inputs.num_samples for which, inputs in samples.items()},
                "num_samples": self.num_samples,
                "total_samples": self.total_samples,
                "sample_rate": self.sample_rate,
                "seed": self.seed,
                "source": self.source,
                "skipped": dict(self.skipped),
            },
            arrays={
                "ids": {name: counts.ids for name, counts in self.counts.items()},
                "counts": {name: counts.counts for name, counts in self.counts.items()},
                **{f"{which} values": inputs.values for which, inputs in samples.items()},
                **{f"{which} lengths": inputs.lengths for which, inputs in samples.items()},
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PopularityProfile:
        """Reads what `save` wrote.

        Raises:
            ConfigError: there is no such file.
            DataError: the file is damaged or holds something else.
            FingerprintError: the content is not what was saved.
        """
        return load_archive(path, _KIND, cls._restored)

    @classmethod
    def _restored(cls, fields: Fields, arrays: Arrays) -> PopularityProfile:
        tables = TableSet.from_json(fields.pop("tables"))
        samples = {
            which: InputSample(arrays[f"{which} values"], arrays[f"{which} lengths"], size) for which, size in fields.pop("samples").items()
        }
        return cls(
            tables=tables,
            counts={table.name: RowCounts(table.rows, arrays["ids"][table.name], arrays["counts"][table.name]) for table in tables},
            counted_inputs=samples["counted inputs"],
            fresh_inputs=samples.get("fresh inputs"),
            **fields,
        )

    @property
    def _samples(self) -> dict[str, InputSample]:
        fresh = {} if self.fresh_inputs is None else {"fresh inputs": self.fresh_inputs}
        return {"counted inputs": self.counted_inputs, **fresh}


def _hot_accesses(counts: RowCounts, hot_ids: np.ndarray) -> int:
    """Accesses of the hot rows; the shorter of the two lists is looked up in the longer one."""
    if hot_ids.size == counts.rows:
        return counts.total
    if hot_ids.size < counts.ids.size:
        return int(counts.of(hot_ids).sum())
    return int(counts.counts[find_slots(hot_ids, counts.ids) >= 0].sum())
