"""Text files as shards of whole lines: plain files are cut into byte ranges at line ends, .gz files are streamed."""

from __future__ import annotations

import csv
import gzip
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import cached_property
from typing import IO, NamedTuple, cast

import numpy as np
from iopath.common.file_io import g_pathmgr

from fae_torchrec.core.errors import ConfigError, DataError

BLOCK_BYTES = 8 * 2**20
"""Text that is parsed at a time: about 35,000 of Criteo's lines. Smaller blocks cost more time, larger ones more memory."""
SHARD_BYTES = 64 * 2**20
"""Plain text per shard."""

_BOM = b"\xef\xbb\xbf"
_MAX_LINE_BYTES = 16 * 2**20  # a longer "line" is no text: without a limit, a binary file would be read into memory whole
_COUNT_BYTES = 2**18  # counted at a time: stays in the cache
_GZIP_RATIO = 3  # of text like Criteo's; only for progress bars


class TextBlock:
    """Whole lines of one file, and which of them are rows that were not rejected.

    Attributes:
        path: the file.
        data: the lines, with their ends (a line feed, perhaps after a carriage return; the file's last may have none).
        offset: position of the first byte in the file (of a .gz: in what it unpacks to).
        lines: int64 [rows], the line within this block (from 0) that each row was read from; None: row i is line i.
    """

    def __init__(self, path: str, data: bytes, offset: int) -> None:
        self.path = path
        self.data = data
        self.offset = offset
        self.lines: np.ndarray | None = None

    @cached_property
    def num_lines(self) -> int:
        """Lines of the block, rejected or not."""
        return count_newlines(self.data) + (not self.data.endswith(b"\n"))

    @cached_property
    def line_starts(self) -> np.ndarray:
        """int64 [num_lines + 1], where each line begins in `data`, and where the last one ends."""
        starts = np.flatnonzero(np.frombuffer(self.data, dtype=np.uint8) == ord("\n")) + 1
        return np.concatenate([[0], starts, [] if self.data.endswith(b"\n") else [len(self.data)]]).astype(np.int64)

    def first_line(self) -> int:
        """Number of the first line in its file, from 1. Reads the file up to here: for messages only."""
        lines, left = 1, self.offset
        with _opened(self.path) as stream:
            while left and (data := stream.read(min(left, _COUNT_BYTES))):
                lines += count_newlines(data)
                left -= len(data)
        return lines


class BadLines:
    """The malformed lines that were skipped, held against an allowance.

    A line is known by its place in its file, so reading it again (a second epoch, the pass that counts samples) counts once.
    Every worker's copy counts by itself; who joins them compares the sum with `max_bad_lines`.

    Args:
        max_bad_lines: lines that may be skipped, over all files; 0 means that the first malformed line is an error.

    Raises:
        ConfigError: max_bad_lines is negative.
    """

    def __init__(self, max_bad_lines: int = 0) -> None:
        if max_bad_lines < 0:
            raise ConfigError(f"max_bad_lines must be at least 0, received {max_bad_lines}; 0 accepts no malformed line")
        self.max_bad_lines = max_bad_lines
        self._places: dict[str, set[int]] = {}

    @property
    def skipped(self) -> dict[str, int]:
        """File -> lines skipped so far; only files with such lines."""
        return {path: len(places) for path, places in self._places.items()}

    def report(self, block: TextBlock, rows: np.ndarray, reason: str | Sequence[str]) -> np.ndarray:
        """Rejects rows that were parsed from a block but cannot be used: they are counted and struck from `block.lines`.

        Args:
            block: where the rows come from.
            rows: int64, ascending numbers among the rows that are left of the block (those of the table that was parsed from it).
            reason: what is wrong, for all or for each.

        Returns:
            bool [rows left before], False for the rejected: what to keep of the table.

        Raises:
            DataError: more lines are malformed than allowed; names the file, the line and what is wrong.
        """
        lines = np.arange(block.num_lines) if block.lines is None else block.lines
        reasons = [reason] * len(rows) if isinstance(reason, str) else reason
        for line, why in zip(lines[rows].tolist(), reasons, strict=True):
            self.reject_line(block, line, why)
        keep = np.ones(len(lines), dtype=np.bool_)
        keep[rows] = False
        block.lines = lines[keep]
        return keep

    def reject_line(self, block: TextBlock, line: int, reason: str) -> None:
        """Counts one line of a block (from 0, rejected ones included); raises DataError as `report` does."""
        start, end = block.line_starts[line : line + 2].tolist()
        places = self._places.get(block.path, set())
        if block.offset + start not in places and sum(map(len, self._places.values())) >= self.max_bad_lines:
            cut = "" if block.data[start:end].endswith(b"\n") else " (it is the last line and has no line end: the file may be truncated)"
            allowed = (
                f"{self.max_bad_lines} malformed lines are allowed, and that many were skipped"
                if self.max_bad_lines
                else "no malformed line is allowed"
            )
            where = f"{block.path}, line {block.first_line() + line}"
            raise DataError(f"{where}: {reason}{cut}; {allowed}; correct or remove the line, or raise max_bad_lines")
        self._places.setdefault(block.path, places).add(block.offset + start)


class TextLines:
    """Text files, their lines cut into shards.

    Of a plain file, shard k owns the lines that begin in its range of `shard_bytes`; a .gz file is one shard, because it can only be
    read from its beginning. Lines end with LF or CR LF; what follows the last line end is a line only if it is not empty. A UTF-8 byte
    order mark at the beginning of a file is skipped. An empty file has no lines.

    Args:
        paths: files, local or URIs that iopath's `g_pathmgr` knows (plain remote files are fetched whole, .gz are streamed).
        shard_bytes: plain text per shard.
        header: whether the first line of each file is a header.
        delimiter: of the header's names.
        max_bad_lines: allowance of `bad_lines`.

    Attributes:
        header: the header's names; empty if there is none.
        bad_lines: where malformed lines are to be reported.
        name: absolute paths, sizes and times of writing.

    Raises:
        ConfigError: no paths, a file is missing or named twice, or a number is out of range.
        DataError: all files are empty, a .gz cannot be unpacked, or the headers differ.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        shard_bytes: int = SHARD_BYTES,
        header: bool = False,
        delimiter: str = ",",
        max_bad_lines: int = 0,
    ) -> None:
        names = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"text files: received {names}; name at least one file, and each once")
        if shard_bytes < 1:
            raise ConfigError(f"shard_bytes must be at least 1, received {shard_bytes}")
        self.bad_lines = BadLines(max_bad_lines)
        self.header: list[str] = []
        self._files = [self._look_at(name, header, delimiter) for name in names]
        if all(file.empty for file in self._files):
            raise DataError(f"{', '.join(names)}: empty, without a single line; give a file with data")
        self.name = ", ".join(
            f"{absolute(file.path)} ({'unknown size' if file.size is None else f'{file.size} bytes'}, written {file.written or 'unknown'})"
            for file in self._files
        )
        self._shards = [
            (file, begin, sys.maxsize if file.packed else min(begin + shard_bytes, size))
            for file in self._files
            for size in (1 if file.size is None else file.size,)
            for begin in range(0, 1 if file.packed else size, shard_bytes)
        ]

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def blocks(self, shard: int, block_bytes: int = BLOCK_BYTES) -> Iterator[TextBlock]:
        """The lines of one shard in order, about `block_bytes` at a time; the header is left out.

        Raises:
            DataError: a .gz is damaged or truncated, or a line is longer than 16 MiB.
        """
        file, begin, end = self._shards[shard]
        with _opened(file.path) as stream:
            if file.packed:
                at = len(stream.read(file.start))
                while data := stream.read(block_bytes):
                    data += b"" if data.endswith(b"\n") else self._line(stream, file.path, at)
                    yield TextBlock(file.path, data, at)
                    at += len(data)
                return
            at = self._next_start(stream, file, begin)
            while at < end:
                size = self._next_start(stream, file, min(at + block_bytes, end)) - at  # known first: nothing is read and then copied
                stream.seek(at)
                data = stream.read(size)
                if not data:
                    return
                yield TextBlock(file.path, data, at)
                at += len(data)

    def count_lines(self, shard: int) -> int:
        """Lines of one shard, malformed or not, without the header. Reads them."""
        return sum(block.num_lines for block in self.blocks(shard))

    def lines_hint(self) -> int:
        """Lines in all, roughly, from the files' sizes and the first lines."""
        shard = next(shard for shard, (file, _, _) in enumerate(self._shards) if not file.empty)
        first = next(self.blocks(shard, _COUNT_BYTES), None)
        mean = len(first.data) / first.num_lines if first else 1.0
        return sum(int((file.size or 0) * (_GZIP_RATIO if file.packed else 1) / mean) for file in self._files)

    def _look_at(self, path: str, header: bool, delimiter: str) -> _File:
        """Describes one file; its header, if there is one, becomes ours or must be the same."""
        size, written = None, None
        with _opened(path) as stream:
            if "://" not in path or not path.endswith(".gz"):
                status = os.stat(g_pathmgr.get_local_path(path))
                size, written = status.st_size, datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat(timespec="seconds")
            first = self._line(stream, path, 0)
        start = len(_BOM) if first.startswith(_BOM) else 0
        if header and first:
            names = next(csv.reader([first[start:].decode("utf-8", "replace").rstrip("\r\n")], delimiter=delimiter), [])
            if self.header and names != self.header:
                raise DataError(f"{path}, line 1: the header is {names}, where the first file's is {self.header}; give files of one kind")
            self.header, start = names, len(first)
        return _File(path, size, written, start, not first)

    def _next_start(self, stream: IO[bytes], file: _File, place: int) -> int:
        """Where the first line begins that begins at `place` of a plain file or later; the file's end if there is none."""
        if place <= file.start:
            return file.start
        stream.seek(place - 1)
        return place - 1 + len(self._line(stream, file.path, place - 1))

    @staticmethod
    def _line(stream: IO[bytes], path: str, at: int) -> bytes:
        """What is left of the line at which the stream stands; `at` is a place in or before this line, for the message."""
        line = stream.readline(_MAX_LINE_BYTES)
        if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
            number = TextBlock(path, b"", at).first_line()
            raise DataError(f"{path}, line {number} or later is longer than {_MAX_LINE_BYTES} bytes; this is no text with lines")
        return line


class _File(NamedTuple):
    path: str
    size: int | None  # bytes as stored; None if the store does not say
    written: str | None
    start: int  # where the lines begin: after a byte order mark and the header
    empty: bool

    @property
    def packed(self) -> bool:
        return self.path.endswith(".gz")


def absolute(path: str) -> str:
    """A local path however it was spelled; a URI as it is."""
    return path if "://" in path else os.path.abspath(path)


def count_newlines(data: bytes) -> int:
    """Bytes that end a line."""
    view = np.frombuffer(data, dtype=np.uint8)
    return sum(int(np.count_nonzero(view[at : at + _COUNT_BYTES] == ord("\n"))) for at in range(0, len(view), _COUNT_BYTES))


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """Opens a file for reading, unpacked; what goes wrong with it becomes an error of ours."""
    try:
        if path.endswith(".gz"):
            with g_pathmgr.open(path, "rb") as packed, gzip.GzipFile(fileobj=packed) as stream:
                yield cast(IO[bytes], stream)
        else:
            with open(g_pathmgr.get_local_path(path), "rb") as file:
                yield file
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"there is no file {path} ({error}); correct the path") from error
    except EOFError as error:
        raise DataError(f"{path}, line {_line_of_break(path)}: the packed data end here; the file is truncated: fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}, line {_line_of_break(path)}: not gzip data, or damaged ({error}); fetch it again, or rename it if it is plain text"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); check the file and its permissions") from error


def _line_of_break(path: str) -> int:
    """The line in which unpacking fails, from 1."""
    lines = 1
    with suppress(EOFError, OSError, zlib.error), g_pathmgr.open(path, "rb") as packed, gzip.GzipFile(fileobj=packed) as stream:
        while data := stream.read1(_COUNT_BYTES):
            lines += count_newlines(data)
    return lines
