"""Several sources one after the other as one, such as the part files of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.vocabulary import KeyChunk, KeySource


class JoinedSource(ShardedSource):
    """A ShardedSource of the samples of several ones in order; its shards are theirs.

    Args:
        sources: at least one, all with the same features and dense columns.

    Attributes:
        feature_names: as the sources'.
        num_dense: as the sources'.
        name: all their names.

    Raises:
        ConfigError: there are no sources, or they differ in features or dense columns.
    """

    def __init__(self, sources: Sequence[ShardedSource]) -> None:
        kinds = {(source.feature_names, source.num_dense) for source in sources}
        if len(kinds) != 1:
            raise ConfigError(f"sources must have the same features and dense columns, received {sorted(kinds)}; join like with like")
        ((self.feature_names, self.num_dense),) = kinds
        self.name = "; ".join(source.name for source in sources)
        self._sources = tuple(sources)
        self._ends = np.cumsum([source.num_shards for source in sources])

    @property
    def num_shards(self) -> int:
        """Shards of all sources."""
        return int(self._ends[-1])

    def shard_sizes(self) -> np.ndarray:
        """Samples in each shard, int64 [num_shards]."""
        return np.concatenate([source.shard_sizes() for source in self._sources])

    def read_shard(self, shard: int) -> Iterator[Batch]:
        """The samples of one shard in order, as its source reads them."""
        source, number = self._at(shard)
        return source.read_shard(number)

    def read_keys(self, shard: int) -> Iterator[KeyChunk]:
        """The categories of one shard before they are coded, as its source reads them."""
        source, number = self._at(shard)
        keys: KeySource = source  # type: ignore[assignment]
        return keys.read_keys(number)

    def skipped(self) -> dict[str, int]:
        """Malformed lines that the sources skipped so far, by file."""
        return dict(sum((Counter(source.skipped()) for source in self._sources), Counter()))

    def size_hint(self) -> int:
        """Samples of all sources, roughly."""
        return sum(source.size_hint() for source in self._sources)

    def _at(self, shard: int) -> tuple[ShardedSource, int]:
        source = int(np.searchsorted(self._ends, shard, side="right"))
        return self._sources[source], shard - int(self._ends[source - 1] if source else 0)
