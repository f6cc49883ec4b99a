"""SequenceWriter: writes samples that come in batches of any size as the files of one sequence of a segregated store."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.bundler import Bundler
from fae_torchrec.data.store_columns import record_batch
from fae_torchrec.data.store_layout import ROWS_PER_BATCH, StoreFile

_WRITE_BYTES = 1 << 23  # whole large blocks: the page cache then keeps the file in large pieces, which are several times cheaper to map
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SequenceWriter:
    """Writes the samples of one kind in one part of a store.

    A feature is written as plain ids until a bag of another size is met; then a new file begins, in which it is a list.

    Args:
        folder: where to.
        kind: "hot" or "cold".
        part: number of the part.
        types: numpy type of the ids of each feature.
        needed_bytes: of the whole store, for the message about a full disk.
    """

    def __init__(self, folder: str, kind: str, part: int, types: Sequence[Any], needed_bytes: int) -> None:
        self._stem = os.path.join(folder, f"{kind}-{part:05d}")
        self._kind = kind
        self._types = types
        self._needed_bytes = needed_bytes
        self._queue = Bundler()
        self._files: list[StoreFile] = []
        self._bags = np.zeros(len(types), dtype=np.bool_)
        self._open: tuple[CheckedFile, Any] | None = None
        self._samples = 0  # in the open file

    def add(self, batch: Batch, numbers: np.ndarray) -> None:
        """Appends samples.

        Args:
            batch: n samples.
            numbers: int64 [n], their numbers in the part.

        Raises:
            ConfigError: the files cannot be written.
            DataError: the disk is full, or the batch has weights where others have none.
        """
        self._queue.add(batch, numbers)
        while len(self._queue) >= ROWS_PER_BATCH:
            self._write(ROWS_PER_BATCH)

    def finish(self) -> list[StoreFile]:
        """Writes what waits.

        Returns:
            The files; none if there was no sample. `first_sample` of the part is not known here and 0.

        Raises:
            ConfigError: as `add`.
            DataError: as `add`.
        """
        if len(self._queue):
            self._write(len(self._queue))
        self._end_file()
        return self._files

    def abandon(self) -> None:
        """Closes a file that is not finished, if there is one."""
        if self._open is not None:
            self._open[0].abandon()

    def _write(self, samples: int) -> None:
        batch, numbers = self._queue.pop(samples)
        bags = (batch.sparse_features.lengths().view(-1, samples) != 1).any(dim=1).numpy()
        if (bags & ~self._bags).any():
            self._end_file()
            self._bags = self._bags | bags
        records = record_batch(batch, numbers, self._types, self._bags)
        with disk_errors(self._path(), self._needed_bytes):
            if self._open is None:
                file = CheckedFile(self._path())
                self._open = file, pa.ipc.new_file(file, records.schema)
            self._open[1].write_batch(records)
        self._samples += samples

    def _end_file(self) -> None:
        if self._open is None:
            return
        file, stream = self._open
        with disk_errors(self._path(), self._needed_bytes):
            stream.close()
            file.close()
        self._files.append(StoreFile(os.path.basename(self._path()), self._kind, 0, self._samples, file.num_bytes, file.crc32))
        self._open, self._samples = None, 0

    def _path(self) -> str:
        return f"{self._stem}-{len(self._files)}.arrow"


class CheckedFile:
    """A new file with its checksum, on the disk when it is closed.

    Attributes:
        num_bytes: given so far.
        crc32: of them.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by `close` or `abandon`
        self._waiting = bytearray()
        self.num_bytes = 0
        self.crc32 = 0

    @property
    def closed(self) -> bool:
        """Whether it is closed (pyarrow asks)."""
        return self._file.closed

    def write(self, data: Any) -> int:
        """Appends bytes, or whatever shows its bytes."""
        self._waiting += data
        while len(self._waiting) >= _WRITE_BYTES:
            self._put(_WRITE_BYTES)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Does nothing, for bytes are written in large blocks (pyarrow calls it)."""

    def close(self) -> None:
        """Closes the file when all of it is on the disk."""
        while self._waiting:
            self._put(len(self._waiting))
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Closes the file without a care for its content."""
        self._file.close()

    def _put(self, size: int) -> None:
        done = self._file.write(self._waiting[:size])  # not all where the disk becomes full: the next call says so
        del self._waiting[:done]


@contextmanager
def disk_errors(path: str, needed_bytes: int) -> Iterator[None]:
    """Says what it means that a file cannot be written.

    Args:
        path: the file.
        needed_bytes: of the whole store, if all bags have one id.

    Raises:
        ConfigError: it cannot be written.
        DataError: the disk is full, or the user's share of it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise ConfigError(f"cannot write {path} ({error}); see that its folder is there and writable") from error
        free = shutil.disk_usage(os.path.dirname(path) or ".").free
        raise DataError(
            f"no space to write {path} ({error}): the whole store takes about {needed_bytes:,} bytes if all bags have one id, {free:,} are "
            "free there; free some space, raise the quota, or name a path on another disk"
        ) from error
