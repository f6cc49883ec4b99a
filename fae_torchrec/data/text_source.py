"""What the readers of text files share: shards of lines, parsed block by block into batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import DataError
from fae_torchrec.data.category_keys import CategoryError
from fae_torchrec.data.delimited import DelimitedParser
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.text_lines import BadLines, TextBlock, TextLines


class TextSource(ShardedSource):
    """A ShardedSource over the lines of text files; a subclass says what a block of lines means.

    Args:
        text: the lines; malformed ones are counted in its `bad_lines`.
        parser: from lines to a table; it reports to the same `bad_lines`.
        name: what the files are, e.g. "Criteo TSV"; the files themselves are added.

    Attributes:
        max_bad_lines: malformed lines that this object may skip. Every worker's copy counts by itself: who reads with several of them
            compares the sum of `skipped` with this.
    """

    def __init__(self, text: TextLines, parser: DelimitedParser, name: str) -> None:
        self._text = text
        self._parser = parser
        self.name = f"{name}, {text.name}"
        self.max_bad_lines = text.bad_lines.max_bad_lines

    @property
    def num_shards(self) -> int:
        """Ranges of lines: of a plain file about `shard_bytes` each, a .gz is one."""
        return self._text.num_shards

    def read_shard(self, shard: int) -> Iterator[Batch]:
        """The samples of one shard in order, a batch for each block of lines.

        Raises:
            DataError: more lines are malformed than allowed, or a file is damaged; with file, line and what is wrong.
        """
        for block, table in self._tables(shard):
            yield from self._batches_of(block, table)

    def skipped(self) -> dict[str, int]:
        """File -> malformed lines skipped so far; a line that was read twice counts once."""
        return self._text.bad_lines.skipped

    def size_hint(self) -> int:
        """Samples, roughly, from the sizes of the files and the first lines."""
        return self._text.lines_hint()

    @abstractmethod
    def _batches_of(self, block: TextBlock, table: Any) -> Iterator[Batch]:
        """The samples of a block, in batches of at most 65,536; lines that are malformed by what they mean are reported to `bad_lines`."""

    def _tables(self, shard: int) -> Iterator[tuple[TextBlock, Any]]:
        """The blocks of one shard with the pyarrow Tables of their well-formed lines, the next one parsed while this one is used."""
        blocks = self._text.blocks(shard)
        if self.max_bad_lines:  # lines must be rejected in their order, so that it is always the same one that exceeds the allowance
            yield from ((block, self._parser.parse(block)) for block in blocks)
            return

        def step() -> tuple[TextBlock, Any] | None:
            block = next(blocks, None)
            return None if block is None else (block, self._parser.parse(block))

        with ThreadPoolExecutor(1, "parse") as pool:
            ahead = pool.submit(step)
            while (parsed := ahead.result()) is not None:
                ahead = pool.submit(step)
                yield parsed

    def _count(self, shard: int) -> int:
        # Where no line may be skipped every line is a sample (or an error when it is read); otherwise only reading tells which are.
        return super()._count(shard) if self.max_bad_lines else self._text.count_lines(shard)


class WrongRows:
    """The rows of a block that are malformed by what they mean, with what is wrong with each.

    Args:
        bad_lines: what they are reported to.
    """

    def __init__(self, bad_lines: BadLines) -> None:
        self._bad_lines = bad_lines
        self._reasons: dict[int, str] = {}

    def add(self, rows: np.ndarray, reason: Callable[[int], str]) -> None:
        """Adds rows, ascending; the first reason of a row counts. Beyond what may be skipped none is looked at: that is an error anyway."""
        for row in rows[: self._bad_lines.max_bad_lines + 1].tolist():
            self._reasons.setdefault(row, reason(row))

    def reported(self, block: TextBlock) -> np.ndarray | None:
        """Reports what was added; which rows are left: bool [rows], or None if all are.

        Raises:
            DataError: more lines are malformed than allowed.
        """
        if not self._reasons:
            return None
        rows = sorted(self._reasons)
        return self._bad_lines.report(block, np.array(rows), [self._reasons[row] for row in rows])


def located(block: TextBlock, feature: str, error: CategoryError) -> DataError:
    """The error of a category that cannot be coded, with its file and line.

    Args:
        block: where the rows come from.
        feature: whose category it is.
        error: its position is the number of the row among those left of the block.
    """
    line = error.position if block.lines is None else int(block.lines[error.position])
    return DataError(f"{block.path}, line {block.first_line() + line}, feature {feature!r}: {error}")
