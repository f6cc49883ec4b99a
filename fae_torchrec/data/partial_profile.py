"""What was counted in some shards of the data: merged over workers and ranks, it becomes a popularity profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.core.histogram import AccessHistogram
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_counts import RowCounts
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.kept_inputs import InputPool, KeptInputs, take_bags
from fae_torchrec.data.skipped_lines import SkippedLines


@dataclass(frozen=True)
class Sampling:
    """Which inputs are counted, and how many are kept whole.

    Attributes:
        sample_rate: the chance of an input to be counted, in (0, 1].
        seed: of the draws, at least 0.
        keep_inputs: counted inputs kept at most.
        fresh_inputs: inputs that were not counted, kept at most.

    Raises:
        ConfigError: a number is out of its range.
    """

    sample_rate: float
    seed: int
    keep_inputs: int
    fresh_inputs: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"sample_rate must be above 0 and at most 1, received {self.sample_rate}")
        for name, least in (("seed", 0), ("keep_inputs", 1), ("fresh_inputs", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, received {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class PartialProfile:
    """What a worker or rank found out about its shards; small enough to send (16 bytes per row seen, and the inputs kept).

    Attributes:
        tables: the tables.
        sampling: which inputs were counted.
        shards: the shards that were read.
        counts: table name -> accesses of each row in the counted inputs.
        counted: counted inputs, whole: those with the smallest draws.
        fresh: the same of inputs that were not counted.
        num_samples: inputs counted.
        total_samples: inputs seen.
        skipped: malformed lines.
    """

    tables: TableSet
    sampling: Sampling
    shards: frozenset[int]
    counts: Mapping[str, RowCounts]
    counted: KeptInputs
    fresh: KeptInputs
    num_samples: int
    total_samples: int
    skipped: SkippedLines

    @classmethod
    def merged(cls, parts: Iterable[PartialProfile]) -> PartialProfile:
        """The same as if one had read the shards of all parts. The order of the parts does not matter; they are taken in one by one.

        Raises:
            DataError: no parts, parts of other tables or another sampling, or a shard that is in two of them.
        """
        tally: ProfileTally | None = None
        for part in parts:
            tally = tally or ProfileTally(part.tables, part.sampling)
            tally.add_partial(part)
        if tally is None:
            raise DataError("received no partial profile to merge; give at least one")
        return tally.partial()

    def profile(self, source: str = "") -> PopularityProfile:
        """The profile of what was counted; these must be all shards.

        Args:
            source: where the inputs came from, kept in the profile.

        Raises:
            DataError: nothing was counted, or at a rate below 1 everything was; or more lines are malformed than allowed.
        """
        rate = self.sampling.sample_rate
        if not self.num_samples:
            raise DataError(f"none of {self.total_samples} inputs was sampled at sample_rate {rate}; give more inputs or a higher rate")
        if rate < 1 and not len(self.fresh):
            raise DataError(
                f"all of {self.total_samples} inputs were sampled at sample_rate {rate}, so none is left to estimate hot inputs "
                "on; give more inputs, a lower rate, or 1 to count all and accept an estimate that is too high"
            )
        features = looked_up_features(self.tables)
        return PopularityProfile(
            tables=self.tables,
            counts=self.counts,
            counted_inputs=self.counted.sample(features),
            fresh_inputs=self.fresh.sample(features) if len(self.fresh) else None,
            num_samples=self.num_samples,
            total_samples=self.total_samples,
            sample_rate=rate,
            seed=self.sampling.seed,
            source=source,
            skipped=self.skipped.by_file(),
        )


class ProfileTally:
    """Adds up batches, and the tallies of others, to a partial profile.

    Args:
        tables: the tables.
        sampling: which inputs are counted.
    """

    def __init__(self, tables: TableSet, sampling: Sampling) -> None:
        self._tables = tables
        self._sampling = sampling
        self._features = looked_up_features(tables)
        self._shards: frozenset[int] = frozenset()
        self._histograms = {table.name: AccessHistogram(table.rows) for table in tables}
        self._counted = InputPool(sampling.keep_inputs, len(self._features))
        self._fresh = InputPool(sampling.fresh_inputs, len(self._features))
        self._num_samples = self._total_samples = 0
        self._skipped = SkippedLines()

    def add_batch(self, kjt: KeyedJaggedTensor, draws: np.ndarray, places: np.ndarray) -> None:
        """Counts the inputs with draws below the sample rate, and keeps those of both kinds that have the smallest.

        Args:
            kjt: ids of stride B on the CPU, checked to be rows of the tables (`segregate.check_ids`).
            draws: float64 [B], uniform in [0, 1).
            places: int64 [B], where the inputs stand in the data.
        """
        counted = draws < self._sampling.sample_rate
        values, lengths = _feature_bags(kjt, self._features)
        number = len(self._features)

        def taken(index: np.ndarray) -> KeptInputs:
            return KeptInputs(draws[index], places[index], *take_bags(values, lengths, number, index), number)

        index = np.flatnonzero(counted)
        if index.size:
            inputs = taken(index)
            ids = dict(zip(self._features, inputs.by_feature(), strict=True))
            for table, feature in self._tables.lookups:
                self._histograms[table].add(ids[feature])
            self._counted.add(inputs)
        index = np.flatnonzero(~counted & (draws <= self._fresh.limit))
        if index.size:
            self._fresh.add(taken(index))
        self._num_samples += int(counted.sum())
        self._total_samples += len(draws)

    def add_shard(self, shard: int) -> None:
        """Notes that all batches of a shard were added."""
        self._shards |= {shard}

    def add_skipped(self, skipped: SkippedLines) -> None:
        """Adds malformed lines that were skipped."""
        self._skipped = self._skipped.plus(skipped)

    def add_partial(self, part: PartialProfile) -> None:
        """Adds what another one counted.

        Raises:
            DataError: it is of other tables or another sampling, or has a shard that was counted already.
        """
        if part.tables != self._tables or part.sampling != self._sampling:
            raise DataError(
                f"partial profiles of {self._sampling} on tables {self._tables.fingerprint} and of {part.sampling} on tables "
                f"{part.tables.fingerprint} cannot be merged; count all shards with one Calibrator"
            )
        if self._shards & part.shards:
            raise DataError(f"shards {sorted(self._shards & part.shards)} were counted twice; deal every shard to one worker")
        self._shards |= part.shards
        for name, counts in part.counts.items():
            self._histograms[name].add_counts(counts)
        self._counted.add(part.counted)
        self._fresh.add(part.fresh)
        self._num_samples += part.num_samples
        self._total_samples += part.total_samples
        self.add_skipped(part.skipped)

    def partial(self) -> PartialProfile:
        """What was added so far."""
        return PartialProfile(
            tables=self._tables,
            sampling=self._sampling,
            shards=self._shards,
            counts={name: histogram.row_counts() for name, histogram in self._histograms.items()},
            counted=self._counted.kept(),
            fresh=self._fresh.kept(),
            num_samples=self._num_samples,
            total_samples=self._total_samples,
            skipped=self._skipped,
        )


def looked_up_features(tables: TableSet) -> tuple[str, ...]:
    """The features that some table looks up, once each, in order."""
    return tuple(dict.fromkeys(feature for _, feature in tables.lookups))


def _feature_bags(kjt: KeyedJaggedTensor, features: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """The ids of some features in their order, and the lengths [features, stride]; None for them if every bag has one id."""
    keys = kjt.keys()
    values, lengths = kjt.values().numpy(), kjt.lengths().numpy().reshape(len(keys), kjt.stride())
    if tuple(keys) != tuple(features):
        rows, ends = [keys.index(feature) for feature in features], kjt.offset_per_key()
        values, lengths = np.concatenate([values[ends[row] : ends[row + 1]] for row in rows]), lengths[rows]
    one_hot = values.size == lengths.size and bool((lengths == 1).all())  # Criteo's shape
    return values, None if one_hot else lengths
