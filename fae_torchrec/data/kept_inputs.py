"""Whole inputs kept while a stream goes by: those with the smallest draws, however the stream was cut and dealt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fae_torchrec.core.input_sample import InputSample

_MAX_PIECES = 1024  # of a pool between two joins: many small arrays would cost more than what is in them


@dataclass(frozen=True, eq=False)
class KeptInputs:
    """Some inputs of a stream with all their ids.

    Attributes:
        draws: float64 [n], the random number of each input.
        places: int64 [n], where each input stands in the data: no two have the same.
        values: int64 [ids], feature after feature, and input after input within a feature (as in a KeyedJaggedTensor).
        lengths: int64 [F, n], ids of each feature and input; None if every bag has one id, which halves the memory.
        num_features: F.
    """

    draws: np.ndarray
    places: np.ndarray
    values: np.ndarray
    lengths: np.ndarray | None
    num_features: int

    def __len__(self) -> int:
        return len(self.draws)

    @classmethod
    def joined(cls, parts: Sequence[KeptInputs]) -> KeptInputs:
        """The inputs of all parts (at least one), one part after the other."""
        if len(parts) == 1:
            return parts[0]
        by_feature = zip(*(part.by_feature() for part in parts), strict=True)
        one_hot = all(part.lengths is None for part in parts)
        return cls(
            np.concatenate([part.draws for part in parts]),
            np.concatenate([part.places for part in parts]),
            np.concatenate([values for feature in by_feature for values in feature]),
            None if one_hot else np.concatenate([part.full_lengths() for part in parts], axis=1),
            parts[0].num_features,
        )

    def take(self, index: np.ndarray) -> KeptInputs:
        """Some of the inputs, int64 [m] numbers of them, in that order."""
        bags = take_bags(self.values, self.lengths, self.num_features, index)
        return KeptInputs(self.draws[index], self.places[index], *bags, self.num_features)

    def smallest(self, size: int) -> KeptInputs:
        """The `size` inputs with the smallest draws (of equal draws: the first places); all inputs if they are no more."""
        if len(self) <= size:
            return self
        limit = np.partition(self.draws, size - 1)[size - 1]
        chosen = np.flatnonzero(self.draws <= limit)
        if len(chosen) > size:
            chosen = chosen[np.lexsort((self.places[chosen], self.draws[chosen]))[:size]]
        return self.take(chosen)

    def in_place_order(self) -> KeptInputs:
        """The same inputs in the order of the data."""
        return self.take(np.argsort(self.places, kind="stable"))

    def sample(self, features: Sequence[str]) -> InputSample:
        """The inputs (at least one) by the names of the F features."""
        lengths = [np.ones(len(self), dtype=np.int64)] * len(features) if self.lengths is None else self.lengths
        return InputSample(dict(zip(features, self.by_feature(), strict=True)), dict(zip(features, lengths, strict=True)), len(self))

    def by_feature(self) -> list[np.ndarray]:
        """The ids of each feature: F views of `values`."""
        if self.lengths is None:
            return list(self.values.reshape(self.num_features, len(self)))
        return np.split(self.values, np.cumsum(self.lengths.sum(axis=1))[:-1])

    def full_lengths(self) -> np.ndarray:
        """Ids of each feature and input, int64 [F, n]."""
        return np.ones((self.num_features, len(self)), dtype=np.int64) if self.lengths is None else self.lengths


class InputPool:
    """The `size` inputs with the smallest draws of all that were added. Memory is about three times that of what it keeps.

    Args:
        size: inputs kept at most.
        num_features: F.
    """

    def __init__(self, size: int, num_features: int) -> None:
        self._size = size
        nothing = np.zeros(0, dtype=np.int64)
        self._pieces = [KeptInputs(np.zeros(0), nothing, nothing, None, num_features)]
        self._held = 0
        self.limit = np.inf
        """Inputs with larger draws cannot be among the smallest any more: there is no need to add them."""

    def add(self, inputs: KeptInputs) -> None:
        """Adds inputs whose places no other input has."""
        if self.limit < np.inf:
            inputs = inputs.take(np.flatnonzero(inputs.draws <= self.limit))
        if not len(inputs):
            return
        self._pieces.append(inputs)
        self._held += len(inputs)
        if self._held >= 2 * self._size or len(self._pieces) >= _MAX_PIECES:
            self._shrink()

    def kept(self) -> KeptInputs:
        """The inputs with the smallest draws, in the order of the data."""
        self._shrink()
        return self._pieces[0].in_place_order()

    def _shrink(self) -> None:
        kept = KeptInputs.joined(self._pieces).smallest(self._size)
        self._pieces, self._held = [kept], len(kept)
        if len(kept) == self._size:
            self.limit = float(kept.draws.max())


def take_bags(values: np.ndarray, lengths: np.ndarray | None, num_features: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Takes some inputs out of the ids of F features.

    Args:
        values: int64 [ids], feature after feature, input after input.
        lengths: int32 or int64 [F, n], which add up to the ids; None: every bag has one id.
        num_features: F.
        index: int64 [m], numbers of inputs, 0..n-1.

    Returns:
        values int64 and lengths int64 [F, m], or None, of these inputs, in the order of `index`; copies.
    """
    if lengths is None:  # the ids are a table, which is several times cheaper to cut than jagged bags
        return values.reshape(num_features, -1).take(index, axis=1).reshape(-1), None
    begins = np.cumsum(lengths, dtype=np.int64).reshape(lengths.shape) - lengths
    taken = lengths.take(index, axis=1).astype(np.int64)
    ends = np.cumsum(taken)
    shift = begins.take(index, axis=1).reshape(-1) - (ends - taken.reshape(-1))
    place = np.arange(ends[-1] if ends.size else 0) + np.repeat(shift, taken.reshape(-1))
    return values[place], taken
