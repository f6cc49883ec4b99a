"""Bundler: samples waiting in a queue, which come in batches of any size and go out in batches of another."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import DataError
from fae_torchrec.data.segregate import join_runs


class _Piece(NamedTuple):
    """The samples begin..end-1 of a batch, and what the whole batch is."""

    batch: Batch
    begin: int
    end: int
    numbers: np.ndarray
    batch_bytes: int

    @property
    def num_bytes(self) -> int:
        """Its share of the batch's bytes; the shares of a batch's pieces add up to them."""
        return self.batch_bytes * self.end // len(self.numbers) - self.batch_bytes * self.begin // len(self.numbers)


class Bundler:
    """Samples in the order of their coming, each with a number.

    Attributes:
        num_bytes: of the waiting samples' tensors, numbers included; of a batch that is partly gone, in proportion.
    """

    def __init__(self) -> None:
        self._pieces: deque[_Piece] = deque()
        self._samples = 0
        self.num_bytes = 0

    def __len__(self) -> int:
        """Samples that wait."""
        return self._samples

    def add(self, batch: Batch, numbers: np.ndarray) -> None:
        """Appends the n samples of `batch`, whose numbers are `numbers` (int64 [n])."""
        if len(numbers):
            self._append(_Piece(batch, 0, len(numbers), numbers, _num_bytes(batch) + numbers.nbytes))

    def split(self, samples: int) -> Bundler:
        """Takes the first samples out, uncopied.

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
            piece = self._pieces.popleft()
            self._samples -= piece.end - piece.begin
            self.num_bytes -= piece.num_bytes
            cut = min(piece.begin + samples, piece.end)
            if cut < piece.end:
                self._append(piece._replace(begin=cut), left=True)
                piece = piece._replace(end=cut)
            first._append(piece)
            samples -= piece.end - piece.begin
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
        pieces = self.split(samples)._pieces
        batch = join_runs([(piece.batch, piece.begin, piece.end) for piece in pieces])
        return batch, np.concatenate([piece.numbers[piece.begin : piece.end] for piece in pieces])

    def _append(self, piece: _Piece, *, left: bool = False) -> None:
        (self._pieces.appendleft if left else self._pieces.append)(piece)
        self._samples += piece.end - piece.begin
        self.num_bytes += piece.num_bytes


def _num_bytes(batch: Batch) -> int:
    kjt = batch.sparse_features
    tensors: list[torch.Tensor | None] = [batch.dense_features, batch.labels, kjt.values(), kjt.lengths(), kjt.weights_or_none()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
