"""Parsing blocks of delimited text into Arrow tables with pyarrow's reader, and finding the malformed lines where it fails."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.data.text_lines import BadLines, TextBlock

_BOM = b"\xef\xbb\xbf"
_PIECE_BYTES = 2**20  # that pyarrow parses at a time (per thread); also the longest line it takes at the first attempt


class DelimitedParser:
    """Parses delimited text whose columns have known types. Every line is one record: a quoted value cannot hold a line end.

    A missing value (an empty field) is null in every type. A line is malformed if it has another number of fields, is blank, holds a
    carriage return in its middle or a quote that is not closed, or a value that is not of its column's type: these go to `bad_lines`,
    the others into the table. After `parse`, `block.lines` says which lines the rows are; reject more rows (for what they mean)
    through `bad_lines.report`. What is malformed does not depend on how the file was cut into blocks.

    Args:
        columns: name -> type, all columns of the file in order, at least two.
        delimiter: one byte between fields.
        quoting: whether fields may be enclosed in double quotes.
        bad_lines: where malformed lines are reported.
        include: the columns to read, in the order wanted; None: all. Values of other columns are not looked at.

    Raises:
        ConfigError: fewer than two columns (a blank line could not be told from a missing value), or an unknown one in `include`.
    """

    def __init__(
        self, columns: Mapping[str, Any], *, delimiter: str, quoting: bool, bad_lines: BadLines, include: Sequence[str] | None = None
    ) -> None:
        self._columns = dict(columns)
        self._include = list(self._columns if include is None else include)
        unknown = [name for name in self._include if name not in self._columns]
        if len(self._columns) < 2 or unknown:
            raise ConfigError(f"delimited text needs at least two columns, and has {list(columns)}; {unknown} are not among them")
        self._delimiter = delimiter
        self._quoting = quoting
        self._bad_lines = bad_lines

    def parse(self, block: TextBlock) -> Any:
        """The well-formed lines of a block as a pyarrow.Table with the columns of `include` in order, each in one chunk.

        Raises:
            DataError: more lines are malformed than allowed; names the file, the line and what is wrong.
        """
        block.lines = None
        table = self._read(block.data, block.num_lines)
        # One chunk per column: numpy's calls on many small ones would cost several times the copy.
        return (self._good_lines(block) if isinstance(table, str) else table).combine_chunks()

    def _good_lines(self, block: TextBlock) -> Any:
        """As `parse`, for a block with malformed lines: halves it until the pieces are well-formed or single lines."""
        bad: list[int] = []
        tables: list[Any] = []

        def search(first: int, last: int) -> None:
            begin, end = block.line_starts[[first, last]].tolist()
            table = self._read(block.data[begin:end], last - first)
            if not isinstance(table, str):
                tables.append(table)
            elif last - first == 1:
                self._bad_lines.reject_line(block, first, table)
                bad.append(first)
            else:
                middle = (first + last) // 2
                search(first, middle)
                search(middle, last)

        search(0, block.num_lines)
        block.lines = np.delete(np.arange(block.num_lines), bad)
        empty = pa.schema([(name, self._columns[name]) for name in self._include]).empty_table()
        return pa.concat_tables([empty, *tables])

    def _read(self, data: bytes, lines: int) -> Any:
        """A table with one row for each of the lines, or what is wrong with them (meant for a single line)."""
        if b"\r" in data and data.count(b"\r") != data.count(b"\r\n"):
            return "it holds a carriage return that does not end it"
        if self._quoting and not data.endswith(b"\n"):
            data += b"\n"  # so that a quote that is not closed always swallows a line end, which is found below
        if data.startswith(_BOM):
            data = _BOM + data  # pyarrow drops one at the beginning of what it reads; here it is the middle of a file
        try:
            table = pa_csv.read_csv(
                pa.BufferReader(data),
                read_options=pa_csv.ReadOptions(
                    column_names=list(self._columns),
                    block_size=_PIECE_BYTES if lines > 1 else max(_PIECE_BYTES, len(data) + 1),
                    use_threads=len(data) > _PIECE_BYTES,
                ),
                parse_options=pa_csv.ParseOptions(delimiter=self._delimiter, quote_char='"' if self._quoting else False),
                convert_options=pa_csv.ConvertOptions(
                    column_types=self._columns,
                    include_columns=self._include,
                    null_values=[""],
                    strings_can_be_null=True,
                    check_utf8=False,
                ),
            )
        except pa.ArrowInvalid as error:
            return "it is blank" if not data.strip(b"\r\n") else self._explained(str(error))
        if table.num_rows != lines:  # pyarrow skips blank lines, and a quote that is not closed swallows the next line
            return "it is blank" if not table.num_rows else "a quoted value is not closed"
        if self._quoting and b'"' in data and any(_holds_newline(column) for column in table.columns):
            return "a quoted value is not closed"
        return table

    def _explained(self, message: str) -> str:
        """What pyarrow says about a single line, in our words where its own are known."""
        fields = re.search(r"Expected (\d+) columns, got (\d+)", message)
        if fields:
            return f"expected {fields[1]} fields, received {fields[2]}"
        value = re.search(r"column #(\d+): (?:Row #\d+: )?CSV conversion error to ([^:]*): (.*)", message, re.DOTALL)
        if value:
            return f"column {list(self._columns)[int(value[1])]!r}: {value[3]}, where {value[2]} is expected"
        return message


def _holds_newline(column: Any) -> bool:
    """Whether a string or binary column has a line end in a value."""
    if not (pa.types.is_binary(column.type) or pa.types.is_string(column.type)):
        return False
    buffers = [chunk.buffers()[2] for chunk in column.chunks]
    return any(buffer is not None and bool((np.frombuffer(buffer, dtype=np.uint8) == ord("\n")).any()) for buffer in buffers)
