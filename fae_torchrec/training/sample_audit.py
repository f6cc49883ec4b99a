"""Which samples every step trained on, written down beside the checkpoints: the proof that an epoch has each sample exactly once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from iopath.common.file_io import g_pathmgr

from fae_torchrec.core.archive import Arrays, Fields, load_archive, save_archive
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.fingerprint import fingerprint

_KIND = "sample audit"
_KINDS = ("cold", "hot", "mixed")
_SEGMENT = re.compile(r"samples_(\d+)_(\d+)_rank(\d+)\.npz")
_UNFINISHED = re.compile(r"\.samples_.*\.tmp")  # of a rank that was killed while writing


@dataclass(frozen=True)
class AuditedSamples:
    """Samples in the order in which a rank was given them; int64 [n] each.

    Attributes:
        epochs: passes finished before the sample was trained on.
        steps: step of the run.
        ranks: that trained on it.
        kinds: of its batch: 0 cold, 1 hot, 2 mixed.
        samples: its number.
    """

    epochs: np.ndarray
    steps: np.ndarray
    ranks: np.ndarray
    kinds: np.ndarray
    samples: np.ndarray

    @cached_property
    def fingerprint(self) -> str:
        """Names the content."""
        return fingerprint(*(getattr(self, column.name) for column in fields(self)))


@dataclass(frozen=True)
class EpochAudit:
    """What is wrong with an epoch; sorted int64 arrays of sample numbers.

    Attributes:
        missing: expected, and trained on by no rank.
        repeated: trained on more than once.
        unknown: trained on, and not expected.
    """

    missing: np.ndarray
    repeated: np.ndarray
    unknown: np.ndarray

    @property
    def exact(self) -> bool:
        """Whether every sample was trained on exactly once."""
        return not (self.missing.size or self.repeated.size or self.unknown.size)


class SampleAudit:
    """Writes this rank's part of the audit.

    A segment is a file of consecutive steps, named by the first and the last. `flush` before a checkpoint of the same step is finished:
    then whatever checkpoint survives a crash has its segments, and `discard` takes away those of the steps that are done again.

    Args:
        folder: of the segments of all ranks; made if it is not there. A URI that iopath's `g_pathmgr` knows will do.
        rank: this one.
        first_step: steps done before, when a run is resumed.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: str, rank: int, *, first_step: int = 0) -> None:
        self._folder = folder
        self._rank = rank
        self._flushed = first_step
        self._steps: list[tuple[int, int, int, int]] = []  # epoch, step, kind, samples
        self._samples: list[np.ndarray] = []
        try:
            g_pathmgr.mkdirs(folder)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {folder} for the sample audit: {error}; give one that can be written") from error

    def record(self, epoch: int, step: int, kind: str, sample_numbers: np.ndarray) -> None:
        """Notes a step.

        Args:
            epoch: passes finished before this one.
            step: steps of the run so far, this one included.
            kind: of the batch.
            sample_numbers: int64 [samples of this rank]; kept, not copied.
        """
        self._steps.append((epoch, step, _KINDS.index(kind), len(sample_numbers)))
        self._samples.append(sample_numbers)

    def flush(self, step: int) -> None:
        """Writes what was noted since the last flush.

        Args:
            step: steps of the run so far.

        Raises:
            ConfigError: the file cannot be written.
        """
        if self._steps:
            epochs, steps, kinds, counts = np.array(self._steps, dtype=np.int64).T
            ranks = np.full(len(counts), self._rank, dtype=np.int64)
            by_step = {"epochs": epochs, "steps": steps, "ranks": ranks, "kinds": kinds}
            columns = {name: np.repeat(column, counts) for name, column in by_step.items()}
            columns["samples"] = np.concatenate([numbers.astype(np.int64, copy=False) for numbers in self._samples])
            path = os.path.join(self._folder, f"samples_{self._flushed + 1:012d}_{step:012d}_rank{self._rank:05d}.npz")
            save_archive(path, _KIND, AuditedSamples(**columns).fingerprint, "", {}, {"columns": columns})
        self._steps.clear()
        self._samples.clear()
        self._flushed = step


def discard(folder: str, after_step: int) -> None:
    """Takes away the segments of all ranks that go beyond a step. One rank calls it, before any of them records.

    Args:
        folder: of the segments; need not be there.
        after_step: steps done at the checkpoint from which the run goes on; 0 takes everything away.
    """
    beyond = [name for name, last in _segments(folder).items() if last > after_step]
    for name in beyond + [name for name in _names(folder) if _UNFINISHED.fullmatch(name)]:
        g_pathmgr.rm(os.path.join(folder, name))


def read_audit(folder: str) -> AuditedSamples:
    """Reads all segments of all ranks, in the order of steps.

    Raises:
        ConfigError: there is no segment in the folder.
        DataError: a segment is damaged.
        FingerprintError: a segment was altered.
    """
    names = sorted(_segments(folder))
    if not names:
        raise ConfigError(f"there is no sample audit in {folder}; train with checkpoint.sample_audit: true, or correct the path")
    parts = [load_archive(os.path.join(folder, name), _KIND, _build) for name in names]
    return AuditedSamples(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(AuditedSamples)))


def check_audit(folder: str, expected: int | np.ndarray) -> dict[int, EpochAudit]:
    """Looks, for each epoch of which there is a sample, for samples that are missing or repeated.

    Args:
        folder: of the segments.
        expected: samples of an epoch: a count n, if they are numbered 0..n-1, or their numbers, int64 [n], in any order.

    Returns:
        By epoch. An epoch that the run did not finish has missing samples.

    Raises:
        ConfigError, DataError, FingerprintError: as `read_audit`.
    """
    audited = read_audit(folder)
    wanted = np.arange(expected) if isinstance(expected, int) else np.unique(expected)
    audits = {}
    for epoch in np.unique(audited.epochs).tolist():
        numbers, counts = np.unique(audited.samples[audited.epochs == epoch], return_counts=True)
        audits[epoch] = EpochAudit(
            missing=np.setdiff1d(wanted, numbers, assume_unique=True),
            repeated=numbers[counts > 1],
            unknown=np.setdiff1d(numbers, wanted, assume_unique=True),
        )
    return audits


def _names(folder: str) -> list[str]:
    return list(g_pathmgr.ls(folder)) if g_pathmgr.isdir(folder) else []


def _segments(folder: str) -> dict[str, int]:
    """Name of each segment -> its last step."""
    found = (_SEGMENT.fullmatch(name) for name in _names(folder))
    return {match[0]: int(match[2]) for match in found if match}


def _build(_: Fields, arrays: Arrays) -> AuditedSamples:
    return AuditedSamples(**arrays["columns"])
