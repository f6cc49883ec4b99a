"""Bundler: samples waiting in a queue, which come in batches of any size and go out in batches of another."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import DataError
from fae_torchrec.data.segregate import concat_batches, select_samples


class Bundler:
    """Samples in the order of their coming, each with a number.

    Attributes:
        num_bytes: of the waiting samples' tensors, numbers included. A piece that a cut went through is kept whole until it is used up.
    """

    def __init__(self) -> None:
        self._pieces: deque[tuple[Batch, np.ndarray]] = deque()
        self._begun = 0  # samples of the first piece that were taken
        self._samples = 0
        self.num_bytes = 0

    def __len__(self) -> int:
        """Samples that wait."""
        return self._samples

    def add(self, batch: Batch, numbers: np.ndarray) -> None:
        """Appends the n samples of `batch`, whose numbers are `numbers` (int64 [n])."""
        if len(numbers):
            self._pieces.append((batch, numbers))
            self._samples += len(numbers)
            self.num_bytes += _num_bytes(batch, 0, len(numbers))

    def split(self, samples: int) -> Bundler:
        """Takes the first samples out, uncopied but for those of a piece that a cut goes through.

        Args:
            samples: how many, at least 0.

        Returns:
            A queue of them.

        Raises:
            DataError: fewer samples are waiting.
        """
        if not 0 <= samples <= self._samples:
            raise DataError(f"cannot take {samples} samples out of {self._samples} waiting; allowed 0..{self._samples}")
        first = Bundler()
        while samples:
            batch, numbers = self._pieces[0]
            begin, end = self._begun, min(self._begun + samples, len(numbers))
            self._samples -= end - begin
            self.num_bytes -= _num_bytes(batch, begin, end)
            samples -= end - begin
            self._begun = end
            if end == len(numbers):
                self._pieces.popleft()
                self._begun = 0
            if end - begin < len(numbers):
                batch, numbers = select_samples(batch, torch.arange(begin, end)), numbers[begin:end]
            first.add(batch, numbers)
        return first

    def pop(self, samples: int) -> tuple[Batch, np.ndarray]:
        """Takes the first samples out.

        Args:
            samples: how many, at least 1.

        Returns:
            A plain batch of them and their numbers, int64 [samples].

        Raises:
            DataError: fewer samples are waiting.
        """
        if not samples:
            raise DataError("cannot take 0 samples as a batch; take at least 1")
        first = self.split(samples)
        return concat_batches([batch for batch, _ in first._pieces]), np.concatenate([numbers for _, numbers in first._pieces])


def _num_bytes(batch: Batch, begin: int, end: int) -> int:
    """Of the samples begin..end-1, each with a number."""
    kjt = batch.sparse_features
    samples, ids = kjt.stride(), int(kjt.values().numel())
    of_samples = 8 * samples + sum(t.numel() * t.element_size() for t in (batch.dense_features, batch.labels, kjt.lengths()))
    of_ids = sum(t.numel() * t.element_size() for t in (kjt.values(), kjt.weights_or_none()) if t is not None)
    if end - begin < samples and ids:
        bags = np.arange(len(kjt.keys())) * samples
        offsets = kjt.offsets().numpy()
        of_ids = of_ids // ids * int((offsets[bags + end] - offsets[bags + begin]).sum())
    return of_samples // samples * (end - begin) + of_ids
