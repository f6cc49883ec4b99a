"""StoreWriter: classifies the samples of a source once and writes them as a hot and a cold sequence (what `fae segregate` does)."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from tqdm import tqdm

from fae_torchrec.core.errors import ConfigError, DataError, FAEError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.data.segregate import hot_samples, select_samples
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.skipped_lines import SkippedLines
from fae_torchrec.data.store import SegregatedStore
from fae_torchrec.data.store_columns import id_types
from fae_torchrec.data.store_layout import MANIFEST, StoreFile, StoreLayout
from fae_torchrec.data.store_sequence import CheckedFile, SequenceWriter, disk_errors

PART_SAMPLES = 1 << 19
"""Samples of a part, about: 80 MB of Criteo's shape, so that billions take thousands of files and a few millions occupy several workers."""


def write_store(
    path: str | os.PathLike[str], source: ShardedSource, placement: RowPlacement, *, workers: int = 1, show_progress: bool = False
) -> SegregatedStore:
    """Segregates a source: reads it once and writes its hot and its cold samples, whole or not at all.

    The files are written to a folder `.NAME.partial` beside the target, which is renamed at the end; what a crash leaves there is replaced
    by the next call. The bytes are the same for any number of workers. Starting workers takes some seconds; a script needs
    `if __name__ == "__main__":`, as always with worker processes. Each holds a few batches of 65,536 samples and the placement.

    Args:
        path: the folder to make, on a local disk; it must not exist.
        source: the data; pickled for the workers.
        placement: which rows are hot.
        workers: processes that read and write, at least 1. One works in this process.
        show_progress: whether to show a bar on stderr.

    Returns:
        The store, opened.

    Raises:
        ConfigError: workers is below 1, the path exists, is a URI, cannot be written to, or is being written by somebody else.
        DataError: the data are malformed (an id is no row of its table, more lines are malformed than allowed), or the disk is full.
        FAEError: a worker was killed.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, received {workers}")
    with store_folder(path) as folder:
        writer = StoreWriter(folder, source, placement)
        workers = min(workers, writer.num_parts)
        bar: tqdm[NoReturn]
        with tqdm(
            total=source.size_hint(), desc="segregate", unit="sample", unit_scale=True, disable=None if show_progress else True
        ) as bar:
            written = (
                _write_parts(writer, workers, bar) if workers > 1 else [writer.write(part, bar.update) for part in range(writer.num_parts)]
            )
        writer.finish(written)
    return SegregatedStore.open(path)


@contextmanager
def store_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """Gives an empty folder beside `path` to write a store in. At the end it becomes `path`; after an exception it is removed.

    A lock that ends with its process tells a folder in use from one that a crash left.

    Raises:
        ConfigError: the path exists, is a URI, cannot be written to, or another process is writing it.
    """
    path = os.fspath(path).rstrip("/")
    if "://" in path:
        raise ConfigError(f"a store cannot be written to {path}: a URI has no folder to rename; write to a local folder and copy that")
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already, and a store is never overwritten; remove it, or name another path")
    parent, name = os.path.split(path)
    folder = os.path.join(parent, f".{name}.partial")
    try:
        os.makedirs(folder, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder} ({error}); give a path in a folder that is writable") from error
    try:
        if not _locked(lock, folder):
            raise ConfigError(f"another process is writing the store {path}; wait for it, or name another path")
        for left in os.listdir(folder):
            os.unlink(os.path.join(folder, left))
        try:
            yield folder
            os.fsync(lock)
            os.rename(folder, path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _locked(lock: int, folder: str) -> bool:
    """Takes the lock of an open folder; False if another process has it, or has renamed or removed the folder meanwhile."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), os.stat(folder))
    except (BlockingIOError, FileNotFoundError):
        return False


@dataclass(frozen=True)
class WrittenPart:
    """What one part of a store came to.

    Attributes:
        part: its number.
        samples: how many, of both kinds.
        weighted: whether their ids have weights: what was met, which should be one answer.
        files: hot and cold, in the order of the data for each kind; `first_sample` is not known yet.
        skipped: malformed lines met.
    """

    part: int
    samples: int
    weighted: frozenset[bool]
    files: tuple[StoreFile, ...]
    skipped: SkippedLines


class StoreWriter:
    """Writes the parts of one store, in any order and by any number of processes; can be pickled before it has written.

    Args:
        folder: an empty folder (see `store_folder`).
        source: the data.
        placement: which rows are hot.
    """

    def __init__(self, folder: str, source: ShardedSource, placement: RowPlacement) -> None:
        self._folder = folder
        self._source = source
        self._placement = placement
        self._known_skipped = source.skipped()
        self._types = id_types(source.feature_names, placement.tables)
        self._needed_bytes = source.size_hint() * (12 + 4 * source.num_dense + sum(np.dtype(t).itemsize for t in self._types))
        # What a part is must not depend on who writes it: so many shards, whatever they hold.
        self._shards_per_part = max(1, round(PART_SAMPLES * source.num_shards / max(source.size_hint(), 1)))

    @property
    def num_parts(self) -> int:
        """Parts of the store."""
        return -(-self._source.num_shards // self._shards_per_part)

    def write(self, part: int, advance: Callable[[int], Any] = lambda samples: None) -> WrittenPart:
        """Writes the files of one part.

        Args:
            part: 0..num_parts-1.
            advance: called with the samples of each batch that was dealt with.

        Raises:
            DataError: as `write_store`.
        """
        source, first = self._source, part * self._shards_per_part
        skipped_before = source.skipped()
        sequences = {kind: SequenceWriter(self._folder, kind, part, self._types, self._needed_bytes) for kind in ("hot", "cold")}
        samples, weighted = 0, set()
        try:
            for shard in range(first, min(first + self._shards_per_part, source.num_shards)):
                for batch in source.read_shard(shard):
                    hot = self._hot(batch, shard)
                    for kind, mask in (("hot", hot), ("cold", ~hot)):
                        index = torch.from_numpy(np.flatnonzero(mask))
                        sequences[kind].add(select_samples(batch, index), samples + index.numpy())
                    weighted.add(batch.sparse_features.weights_or_none() is not None)
                    samples += len(hot)
                    advance(len(hot))
            files = tuple(file for sequence in sequences.values() for file in sequence.finish())
        finally:
            for sequence in sequences.values():
                sequence.abandon()
        new = Counter(source.skipped()) - Counter(skipped_before)
        return WrittenPart(part, samples, frozenset(weighted), files, SkippedLines(self._known_skipped, dict(new), source.max_bad_lines))

    def finish(self, written: Iterable[WrittenPart]) -> StoreLayout:
        """Writes `store.json`.

        Args:
            written: every part, in any order.

        Raises:
            DataError: more lines were malformed than allowed, some parts have weights and others not, or the disk is full.
        """
        parts = sorted(written, key=lambda part: part.part)
        skipped = SkippedLines(self._known_skipped, allowed=self._source.max_bad_lines)
        files, first = [], 0
        for part in parts:
            skipped = skipped.plus(part.skipped)
            files += [StoreFile(**{**vars(file), "first_sample": first}) for file in part.files]
            first += part.samples
        weighted = frozenset[bool]().union(*(part.weighted for part in parts))
        if len(weighted) > 1:
            raise DataError(f"{self._source.name}: ids have weights in some batches and none in others; give them to all or to none")
        layout = StoreLayout(
            feature_names=tuple(self._source.feature_names),
            num_dense=self._source.num_dense,
            weighted=True in weighted,
            placement_fingerprint=self._placement.fingerprint,
            data_name=self._source.name,
            skipped_lines=skipped.by_file(),
            files=tuple(files),
        )
        path = os.path.join(self._folder, MANIFEST)
        with disk_errors(path, self._needed_bytes):
            file = CheckedFile(path)
            file.write(layout.to_json().encode())
            file.close()
        return layout

    def _hot(self, batch: Batch, shard: int) -> np.ndarray:
        """Which samples are hot, bool [B], after a look at the batch's shape."""
        source, keys, size = self._source, tuple(batch.sparse_features.keys()), batch.sparse_features.stride()
        shapes = tuple(batch.dense_features.shape), tuple(batch.labels.shape)
        if keys != tuple(source.feature_names) or shapes != ((size, source.num_dense), (size,)):
            raise DataError(
                f"{source.name}, shard {shard}: a batch of {size} samples has the features {list(keys)}, dense {shapes[0]} and labels "
                f"{shapes[1]}, where the source says {list(source.feature_names)} and {source.num_dense} dense columns; correct the source"
            )
        try:
            hot: np.ndarray = hot_samples(batch.sparse_features, self._placement).numpy()
        except DataError as error:
            raise DataError(f"{source.name}, shard {shard}: {error}") from error
        return hot


_worker_writer: StoreWriter | None = None


def _start_worker(writer: StoreWriter, log_level: int) -> None:
    """Keeps the writer (its placement may be large: it comes once), takes one thread, and lets torch.fx say no more than it may there."""
    global _worker_writer
    _worker_writer = writer
    torch.set_num_threads(1)
    logging.getLogger("torch.fx").setLevel(log_level)


def _write_in_worker(part: int) -> WrittenPart:
    assert _worker_writer is not None
    return _worker_writer.write(part)


def _write_parts(writer: StoreWriter, workers: int, bar: tqdm[NoReturn]) -> list[WrittenPart]:
    """All parts, written by workers."""
    context = multiprocessing.get_context("forkserver")  # imports torch once for all workers; a fork of this process may deadlock
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (writer, logging.getLogger("torch.fx").getEffectiveLevel()))
    written = []
    try:
        for future in as_completed([pool.submit(_write_in_worker, part) for part in range(writer.num_parts)]):
            written.append(future.result())
            bar.update(written[-1].samples)
    except BrokenProcessPool as error:
        raise FAEError(
            "a worker that wrote a store ended without a result: killed, perhaps for lack of memory, or it could not start; take fewer "
            'workers (1 needs no other process), and see that your script has `if __name__ == "__main__":`'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # nobody may write any more when the folder is removed
    return written
