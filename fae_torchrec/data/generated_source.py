"""What generated sources have in common: samples drawn in blocks, each a pure function of its number, cut into shards and batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.data.dealing import rank_runs
from fae_torchrec.data.planted_model import sigmoid
from fae_torchrec.data.popularity_law import affine_permutations
from fae_torchrec.data.published_shape import PublishedShape
from fae_torchrec.data.sharded_source import ShardedSource

BLOCK_SAMPLES = 2_048
"""Samples are drawn in blocks of this many, each from its own counter range of a Philox stream."""
SHARD_SAMPLES = 32 * BLOCK_SAMPLES
"""Samples of a shard; the last may be smaller."""

_SPLITS = ("train", "test", "probe")  # "probe" centres the planted model; nobody trains or tests on it.
_PROBE_BLOCKS = 16


class Draw(NamedTuple):
    """All that is random about one block of n samples.

    Attributes:
        ids: int64 [F, n], or [F, n, L] where each feature is a bag of L ids.
        dense: float32 [n, num_dense].
        uniform: float64 [n], for the labels.
    """

    ids: npt.NDArray[np.int64]
    dense: npt.NDArray[np.float32]
    uniform: npt.NDArray[np.float64]


class SyntheticSamples(NamedTuple):
    """Consecutive samples with the truth behind their labels.

    Attributes:
        dense: float32 [N, num_dense].
        ids: int64 [F, N], or [F, N, L] where each feature is a bag of L ids.
        labels: float32 [N], 0 or 1.
        probability: float64 [N], the true click probability.
    """

    dense: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32]
    probability: npt.NDArray[np.float64]


class GeneratedSource(ShardedSource):
    """A ShardedSource whose sample i is a pure function of (data set, scale, seed, split): batch size, rank and world size only deal them.

    A subclass draws a block and knows the true logits. Train and test share everything but the draws.

    Args:
        shape: the data set.
        dataset_word: names it in the seeds of all random streams.
        scale: rows of the large tables as a share of the published rows, in (0, 1].
        num_samples: samples in one pass over all ranks.
        seed: 0 to 65,535.
        split: "train" or "test".
        coupled: whether the ids of a sample go together; False is said in the name.

    Attributes:
        cardinalities: feature -> rows of its table.

    Raises:
        ConfigError: an argument is outside its range.
    """

    def __init__(
        self,
        shape: PublishedShape,
        dataset_word: int,
        *,
        scale: float,
        num_samples: int,
        seed: int,
        split: str,
        coupled: bool,
    ) -> None:
        if not 0.0 < scale <= 1.0:
            raise ConfigError(f"synthetic scale must be in (0, 1], received {scale}; 1 gives the published rows")
        if num_samples < 1:
            raise ConfigError(f"synthetic num_samples must be at least 1, received {num_samples}")
        if not 0 <= seed < 2**16:
            raise ConfigError(f"synthetic seed must be in 0..{2**16 - 1}, received {seed}")
        if split not in ("train", "test"):
            raise ConfigError(f"synthetic split {split!r} is not 'train' or 'test'")
        self.feature_names = shape.feature_names
        self.num_dense = shape.num_dense
        self.num_samples = num_samples
        self._split, self._coupled = split, coupled
        words = [dataset_word, seed]
        self._keys = {name: np.random.SeedSequence([*words, i]).generate_state(2, np.uint64) for i, name in enumerate(_SPLITS)}
        self._rows = shape.rows(scale)
        self.cardinalities = {name: int(rows) for name, rows in zip(self.feature_names, self._rows, strict=True)}
        self._step, self._offset = affine_permutations(self._rows, np.random.SeedSequence([*words, len(_SPLITS)]))
        independent = "" if coupled else ", features drawn independently"
        self.name = f"synthetic {shape.title.lower()}, scale {scale}, {num_samples} samples, seed {seed}, {split}{independent}"

    @abstractmethod
    def _draw(self, random: np.random.Generator) -> Draw:
        """One block of `BLOCK_SAMPLES` samples."""

    @abstractmethod
    def _logits(self, draw: Draw) -> npt.NDArray[np.float64]:
        """True logits of a block, float64 [n]."""

    def samples(self, start: int, stop: int) -> SyntheticSamples:
        """Samples start..stop-1 of the split's endless stream, with their true click probabilities."""
        return next(iter(self._runs([(start, stop)])))

    @property
    def num_shards(self) -> int:
        """Runs of 65,536 samples."""
        return -(-self.num_samples // SHARD_SAMPLES)

    def shard_sizes(self) -> np.ndarray:
        """Samples in each shard, int64 [num_shards]."""
        starts = np.arange(self.num_shards, dtype=np.int64) * SHARD_SAMPLES
        return np.minimum(self.num_samples - starts, SHARD_SAMPLES)

    def size_hint(self) -> int:
        """The samples, exactly."""
        return self.num_samples

    def read_shard(self, shard: int) -> Iterator[Batch]:
        """The samples of one shard as one batch."""
        start = shard * SHARD_SAMPLES
        yield self._to_batch(self.samples(start, min(start + SHARD_SAMPLES, self.num_samples)))

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One pass over this rank's share, dealt as `BatchSource` says.

        Yields:
            Batches of dense [B, num_dense] float32, a KeyedJaggedTensor of int64 ids (every bag of the same length), labels [B] float32.
        """
        starts, stops = rank_runs(self.num_samples, batch_size, rank, world_size)
        return map(self._to_batch, self._runs(zip(starts.tolist(), stops.tolist(), strict=True)))

    def _probes(self) -> Draw:
        """Samples outside both splits, to calibrate a planted model on."""
        drawn = [self._draw(self._random("probe", block)) for block in range(_PROBE_BLOCKS)]
        return Draw(
            np.concatenate([part.ids for part in drawn], axis=1),
            np.concatenate([part.dense for part in drawn]),
            np.concatenate([part.uniform for part in drawn]),
        )

    def _random(self, split: str, block: int) -> np.random.Generator:
        # The block number is the counter's highest word: blocks are 2**192 draws apart and never overlap.
        return np.random.Generator(np.random.Philox(key=self._keys[split], counter=[0, 0, 0, block]))

    def _runs(self, runs: Iterable[tuple[int, int]]) -> Iterator[SyntheticSamples]:
        """Cuts rising runs (start, stop) of samples out of whole blocks; a block that several runs share is drawn once."""
        drawn: tuple[int, SyntheticSamples] | None = None
        for start, stop in runs:
            pieces = []
            for block in range(start // BLOCK_SAMPLES, max(stop - 1, start) // BLOCK_SAMPLES + 1):
                if drawn is None or drawn[0] != block:
                    drawn = (block, self._block(block))
                cut = slice(max(start - block * BLOCK_SAMPLES, 0), min(stop - block * BLOCK_SAMPLES, BLOCK_SAMPLES))
                dense, ids, labels, probability = drawn[1]
                pieces.append(SyntheticSamples(dense[cut], ids[:, cut], labels[cut], probability[cut]))
            yield SyntheticSamples(
                np.concatenate([p.dense for p in pieces]),
                np.concatenate([p.ids for p in pieces], axis=1),
                np.concatenate([p.labels for p in pieces]),
                np.concatenate([p.probability for p in pieces]),
            )

    def _block(self, block: int) -> SyntheticSamples:
        draw = self._draw(self._random(self._split, block))
        probability = sigmoid(self._logits(draw))
        return SyntheticSamples(draw.dense, draw.ids, (draw.uniform < probability).astype(np.float32), probability)

    def _to_batch(self, run: SyntheticSamples) -> Batch:
        size, features = len(run.labels), len(self.feature_names)
        bag = run.ids.shape[2] if run.ids.ndim == 3 else 1
        sparse = KeyedJaggedTensor(
            keys=list(self.feature_names),
            values=torch.from_numpy(run.ids.reshape(-1)),
            lengths=torch.full((features * size,), bag, dtype=torch.int32),
            offsets=torch.arange(features * size + 1, dtype=torch.int32) * bag,
            stride=size,
            length_per_key=[size * bag] * features,
            offset_per_key=[size * bag * i for i in range(features + 1)],
        )
        return Batch(dense_features=torch.from_numpy(run.dense), sparse_features=sparse, labels=torch.from_numpy(run.labels))
