"""Bundler: samples waiting in a queue, which come in batches of any size and go out in batches of another."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import DataError
from fae_torchrec.data.segregate import Rows, join_rows


class _Piece(NamedTuple):
    """Some samples of a batch: the begin-th to the (end - 1)-th of `rows` (None: of all)."""

    batch: Batch
    rows: np.ndarray | None
    begin: int
    end: int
    numbers: np.ndarray
    all_bytes: int

    @property
    def num_bytes(self) -> int:
        """Its share of the bytes of all `rows`; what is cut in pieces adds up."""
        return self.all_bytes * self.end // len(self.numbers) - self.all_bytes * self.begin // len(self.numbers)

    def chosen(self) -> Rows:
        """The samples, as numbers of the batch's."""
        return slice(self.begin, self.end) if self.rows is None else self.rows[self.begin : self.end]


class Bundler:
    """Samples in the order of their coming, each with a number.

    Samples are copied once, when they go out: until then a batch stays whole in memory, also where only some of it waits (see `compact`).

    Attributes:
        num_bytes: of the waiting samples, numbers included; of a batch that waits in part, in proportion.
    """

    def __init__(self) -> None:
        self._pieces: deque[_Piece] = deque()
        self._samples = 0
        self.num_bytes = 0

    def __len__(self) -> int:
        """Samples that wait."""
        return self._samples

    def add(self, batch: Batch, numbers: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Appends samples of a batch.

        Args:
            batch: on the CPU; must not change until its samples are gone.
            numbers: int64 [n], of the samples.
            rows: which samples of the batch, int64 [n]; None: all.
        """
        if len(numbers):
            share = _num_bytes(batch) * len(numbers) // batch.sparse_features.stride()
            self._append(_Piece(batch, rows, 0, len(numbers), numbers, share + numbers.nbytes))

    def compact(self) -> None:
        """Copies the waiting samples, so that nothing else of their batches stays in memory."""
        if len(self):
            batch, numbers = self.pop(len(self))
            self.add(batch, numbers)

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
        batch = join_rows([(piece.batch, piece.chosen()) for piece in pieces])
        return batch, np.concatenate([piece.numbers[piece.begin : piece.end] for piece in pieces])

    def _append(self, piece: _Piece, *, left: bool = False) -> None:
        (self._pieces.appendleft if left else self._pieces.append)(piece)
        self._samples += piece.end - piece.begin
        self.num_bytes += piece.num_bytes


def _num_bytes(batch: Batch) -> int:
    kjt = batch.sparse_features
    tensors: list[torch.Tensor | None] = [batch.dense_features, batch.labels, kjt.values(), kjt.lengths(), kjt.weights_or_none()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
