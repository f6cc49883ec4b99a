"""How popular the rows of all tables are: sampled counts, a probe of whole inputs, and where they come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fae_torchrec.core.archive import load_archive, save_archive
from fae_torchrec.core.errors import DataError
from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.core.row_ids import check_ids, checked_hot_ids, find_slots
from fae_torchrec.core.tables import TableSet

_KIND = "popularity profile"


@dataclass(frozen=True, eq=False)
class ProbeSample:
    """Whole inputs kept as ids, to ask which share of inputs a hot set makes all hot (counts of single rows cannot tell).

    Attributes:
        values: feature name -> int64 [ids of all samples], sample after sample.
        lengths: feature name -> int64 [num_samples], ids per sample; 0 is an empty bag.
        num_samples: samples kept, at least 1.
        held_out: whether these inputs were left out of the counts. If not, what they say of hot inputs is too high: every row that they
            access was seen by the count.

    Raises:
        DataError: no samples, or lengths that do not fit the samples or the values.
    """

    values: Mapping[str, np.ndarray]
    lengths: Mapping[str, np.ndarray]
    num_samples: int
    held_out: bool = False

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(f"a probe needs at least 1 sample, received {self.num_samples}")
        if self.values.keys() != self.lengths.keys():
            raise DataError(f"a probe's values and lengths name different features: {sorted(self.values)} and {sorted(self.lengths)}")
        for feature, lengths in self.lengths.items():
            if lengths.shape != (self.num_samples,) or self.values[feature].shape != (int(lengths.sum()),) or bool((lengths < 0).any()):
                raise DataError(
                    f"probe of feature {feature!r}: lengths of shape {lengths.shape} with sum {int(lengths.sum())} and values of shape "
                    f"{self.values[feature].shape} do not describe {self.num_samples} samples"
                )


@dataclass(frozen=True, eq=False)
class PopularityProfile:
    """What the Calibrator found out (the result of FAE's Embedding Logger, FAE §4.1). The arrays are read-only by agreement.

    Attributes:
        tables: the tables.
        counts: table name -> int64 [rows], accesses of each row over all features of the table, in the sampled inputs.
        probe: a uniform sample of the inputs, whole; of those not counted, where there are any.
        num_samples: inputs sampled and counted.
        total_samples: inputs seen, sampled or not.
        sample_rate: the chance of an input to be sampled, in (0, 1].
        seed: of the sampling.
        source: where the inputs came from, free text.

    Raises:
        DataError: a table or feature is missing, or has counts or ids that are not its own.
    """

    tables: TableSet
    counts: Mapping[str, np.ndarray]
    probe: ProbeSample
    num_samples: int
    total_samples: int
    sample_rate: float
    seed: int
    source: str

    def __post_init__(self) -> None:
        if self.counts.keys() != set(self.tables.names):
            raise DataError(f"counts name the tables {sorted(self.counts)}, allowed are exactly {sorted(self.tables.names)}")
        for table in self.tables:
            counts = self.counts[table.name]
            if counts.shape != (table.rows,) or counts.dtype != np.int64 or int(counts.min()) < 0:
                raise DataError(f"counts of table {table.name!r} must be int64 [{table.rows}], none negative; received {_brief(counts)}")
        for name, feature in self.tables.lookups:
            if feature not in self.probe.values:
                raise DataError(f"the probe lacks feature {feature!r} of table {name!r}; it has {sorted(self.probe.values)}")
            check_ids(f"probe of feature {feature!r}, table {name!r}", self.probe.values[feature], self.tables[name].rows)

    @cached_property
    def fingerprint(self) -> str:
        """Names the profile by the tables' names and rows, its provenance, counts and probe."""
        features = sorted(self.probe.values)
        return fingerprint(
            _KIND,
            self.tables.fingerprint,
            [self.num_samples, self.total_samples, self.sample_rate, self.seed, self.source, features, self.probe.held_out],
            *(self.counts[name] for name in self.tables.names),
            *(part[feature] for part in (self.probe.values, self.probe.lengths) for feature in features),
        )

    @cached_property
    def total_accesses(self) -> int:
        """Accesses counted, over all tables."""
        return sum(int(counts.sum()) for counts in self.counts.values())

    def coverage(self, hot_ids: Mapping[str, np.ndarray]) -> float:
        """Share of the counted accesses that are hot.

        Args:
            hot_ids: table name -> int64 [hot rows], strictly ascending, for every table.

        Returns:
            0..1; 1 if nothing was accessed, since nothing is cold then.

        Raises:
            DataError: the hot ids are not those of these tables.
        """
        hot = sum(int(self.counts[name][ids].sum()) for name, ids in checked_hot_ids(self.tables, hot_ids).items())
        return hot / self.total_accesses if self.total_accesses else 1.0

    def hot_inputs(self, hot_ids: Mapping[str, np.ndarray]) -> float:
        """Share of the probe's inputs that are hot: every id of every lookup is hot; an empty bag is hot.

        Args:
            hot_ids: table name -> int64 [hot rows], strictly ascending, for every table.

        Returns:
            0..1, of a uniform sample of inputs: its standard error is at most 0.5 / sqrt(probe.num_samples). Without bias if the probe
            was held out, else too high.

        Raises:
            DataError: the hot ids are not those of these tables.
        """
        checked = checked_hot_ids(self.tables, hot_ids)
        hot = np.ones(self.probe.num_samples, dtype=np.bool_)
        for name, feature in self.tables.lookups:
            if len(checked[name]) < self.tables[name].rows:
                cold_id = find_slots(checked[name], self.probe.values[feature]) < 0
                sample_of_id = np.repeat(np.arange(self.probe.num_samples), self.probe.lengths[feature])
                hot[sample_of_id[cold_id]] = False
        return float(hot.mean())

    def for_tables(self, tables: TableSet) -> PopularityProfile:
        """The same counts for tables of the same names and rows, whose dims, dtypes and optimizers may differ (and so their bytes).

        Raises:
            FingerprintError: the tables differ in names or rows; names both fingerprints and the first difference.
        """
        self.tables.check_same(tables, f"popularity profile {self.fingerprint}")
        return replace(self, tables=tables)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile to one .npz file, under a temporary name first; `path` may be a URI that iopath knows."""
        save_archive(
            path,
            _KIND,
            fingerprint=self.fingerprint,
            parent=self.tables.fingerprint,
            fields={
                "tables": self.tables.to_json(),
                "probe_samples": self.probe.num_samples,
                "probe_held_out": self.probe.held_out,
                "num_samples": self.num_samples,
                "total_samples": self.total_samples,
                "sample_rate": self.sample_rate,
                "seed": self.seed,
                "source": self.source,
            },
            arrays={"counts": self.counts, "probe_values": self.probe.values, "probe_lengths": self.probe.lengths},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PopularityProfile:
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
                counts=arrays["counts"],
                probe=ProbeSample(arrays["probe_values"], arrays["probe_lengths"], fields["probe_samples"], fields["probe_held_out"]),
                num_samples=fields["num_samples"],
                total_samples=fields["total_samples"],
                sample_rate=fields["sample_rate"],
                seed=fields["seed"],
                source=fields["source"],
            ),
        )


def _brief(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}" + (f" with minimum {array.min()}" if array.size else "")
