"""Samples from delimited text in general: the columns are named, the categories may be strings, integers or several in one field."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.category_keys import CategoryError, category_keys
from fae_torchrec.data.coding import CategoryCoding
from fae_torchrec.data.delimited import DelimitedParser
from fae_torchrec.data.feature_batch import bag_batch, one_hot_batch
from fae_torchrec.data.text_lines import SHARD_BYTES, TextBlock, TextLines
from fae_torchrec.data.text_source import TextSource, WrongRows, located
from fae_torchrec.data.vocabulary import KeyChunk

_BATCH_SAMPLES = 65_536


class CsvSource(TextSource):
    """A ShardedSource over text files with a delimiter between fields, plain or .gz, in file order.

    A category is the bytes of its field (no blanks are stripped, no encoding is assumed), or an integer in the columns named in `integers`.
    What is read as which never depends on the data: a column of digits that has one word in it would otherwise change its keys. An
    empty field is a missing category, for the coding to deal with. In columns with a separator a field is a bag: an empty field is an
    empty bag.

    A line is malformed if it has another number of fields, an integer or number that is none, a number that is not finite, or no label;
    also if it lacks a dense value and there is no `fill`. A quoted field cannot hold a line end.

    Args:
        paths: the files in the order in which they are read; local, or URIs that iopath knows. Names that end in .gz are unpacked.
        dense: names of numeric columns, in the order of `dense_features`.
        sparse: names of categorical columns, in the order of the keys.
        label: name of a numeric column.
        coding: from categories to rows, for the features `sparse`.
        delimiter: the byte between fields.
        columns: names of all columns, for files without a header; None: the first line of each file names them.
        integers: the sparse columns of integers; None: all of them if the coding is "none", else none of them.
        separators: sparse column -> what separates the categories of a bag in it, e.g. {"genres": "|"}.
        fill: what a missing dense value is; None: the line is malformed.
        quoting: whether fields may be enclosed in double quotes.
        max_bad_lines: malformed lines that are skipped and counted (`skipped`) before one is an error.
        shard_bytes: text per shard of a plain file.

    Attributes:
        feature_names: keys of the KeyedJaggedTensor, in order (the sparse columns).
        num_dense: columns of `dense_features`.
        name: the columns, and the files with their sizes and times of writing.
        max_bad_lines: as given.

    Raises:
        ConfigError: a file is missing or named twice, a column is named twice, no column is sparse, or a setting is out of range.
        DataError: all files are empty, a .gz cannot be unpacked, or a column is not there or there twice.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        dense: Sequence[str],
        sparse: Sequence[str],
        label: str,
        coding: CategoryCoding,
        delimiter: str = ",",
        columns: Sequence[str] | None = None,
        integers: Sequence[str] | None = None,
        separators: Mapping[str, str] | None = None,
        fill: float | None = None,
        quoting: bool = True,
        max_bad_lines: int = 0,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if integers is None:
            integers = sparse if coding.method == "none" else ()
        separators = dict(separators or {})
        needed = [*dense, *sparse, label]
        repeated = sorted({name for name in needed if needed.count(name) > 1})
        if repeated or not sparse:
            raise ConfigError(
                f"columns {repeated} are named more than once among dense, sparse and label, or sparse is empty: {list(sparse)}"
            )
        strangers = sorted(({*integers} | {*separators}) - {*sparse})
        if strangers or "" in separators.values():
            raise ConfigError(f"integers and separators are for sparse columns, which {strangers} are not; a separator must not be empty")
        if len(delimiter) != 1 or not delimiter.isascii():
            raise ConfigError(f"the delimiter must be one ASCII character, received {delimiter!r}")
        if fill is not None and not np.isfinite(np.float32(fill)):
            raise ConfigError(f"fill must be a finite float32 number, received {fill}")
        text = TextLines(paths, shard_bytes=shard_bytes, header=columns is None, delimiter=delimiter, max_bad_lines=max_bad_lines)
        present = text.header if columns is None else list(columns)
        lacking = [name for name in needed if name not in present]
        if lacking or len(set(present)) < len(present):
            raise DataError(f"{text.name}: the columns are {present}; {lacking} are not among them, or a name is there twice")
        types = {name: pa.float32() for name in (*dense, label)}
        types.update({name: pa.int64() for name in integers if name not in separators})
        parser = DelimitedParser(
            {name: types.get(name, pa.binary()) for name in present},
            delimiter=delimiter,
            quoting=quoting,
            bad_lines=text.bad_lines,
            include=needed,
        )
        super().__init__(text, parser, f"CSV, dense {list(dense)}, sparse {list(sparse)}, label {label!r}, fill {fill}")
        self.feature_names = tuple(sparse)
        self.num_dense = len(dense)
        self._dense, self._label, self._fill = tuple(dense), label, fill
        self._separators = separators
        self._integer_bags = {name for name in integers if name in separators}
        self._coding = coding

    def read_keys(self, shard: int) -> Iterator[KeyChunk]:
        """The categories of one shard before they are coded, to fit a vocabulary on.

        Raises:
            DataError: as `read_shard`.
        """
        for block, table in self._tables(shard):
            good = self._good(block, table)
            yield {name: self._keys(good, name)[:2] for name in self.feature_names}

    def _batches_of(self, block: TextBlock, table: Any) -> Iterator[Batch]:
        table = self._good(block, table)
        for start in range(0, table.num_rows, _BATCH_SAMPLES):
            yield self._batch(block, table.slice(start, _BATCH_SAMPLES), start)

    def _batch(self, block: TextBlock, table: Any, start: int) -> Batch:
        """The batch of some rows, the first of which is row `start` of the block."""
        bags = []
        for name in self.feature_names:
            keys, missing, lengths = self._keys(table, name)
            try:
                bags.append((self._coding.encode(name, keys, missing), lengths))
            except CategoryError as error:
                row = int(np.searchsorted(np.cumsum(lengths), error.position, side="right"))
                raise located(block, name, CategoryError(str(error), start + row)) from error
        dense = np.empty((table.num_rows, self.num_dense), dtype=np.float32)
        for column, name in enumerate(self._dense):
            dense[:, column] = table.column(name).to_numpy()
        labels = np.array(table.column(self._label).to_numpy(), dtype=np.float32)  # a copy: arrow's memory is read-only
        if self._separators:
            return bag_batch(self.feature_names, dense, bags, labels)
        return one_hot_batch(self.feature_names, dense, np.stack([ids for ids, _ in bags]), labels)

    def _keys(self, table: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys int64 [n], missing bool [n] and lengths int32 [rows] of a feature."""
        column = table.column(name)
        if name not in self._separators:
            return *category_keys(column, name), np.ones(table.num_rows, dtype=np.int32)
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int32)
        return *category_keys(pc.list_flatten(column), name), lengths

    def _good(self, block: TextBlock, table: Any) -> Any:
        """The rows that are well-formed by what they mean, with bags as lists and missing dense values filled; reports the others."""
        wrong = WrongRows(self._text.bad_lines)
        for name in self._separators:
            bags = pc.split_pattern(table.column(name), self._separators[name])
            if name in self._integer_bags:
                bags = _integer_lists(bags, name, wrong)
            table = table.set_column(table.column_names.index(name), name, bags)
        for name in (*self._dense, self._label):
            numbers = table.column(name)
            if numbers.null_count and name != self._label and self._fill is not None:
                numbers = numbers.fill_null(pa.scalar(self._fill, pa.float32()))
                table = table.set_column(table.column_names.index(name), name, numbers)
            if numbers.null_count:
                wrong.add(np.flatnonzero(numbers.is_null().to_numpy()), partial(_missing, name, name == self._label))
            wrong.add(
                np.flatnonzero(~np.isfinite(numbers.fill_null(0.0).to_numpy())), partial(_expected, numbers, name, "a finite number is")
            )
        keep = wrong.reported(block)
        return table if keep is None else table.filter(pa.array(keep))


def _integer_lists(bags: Any, name: str, wrong: WrongRows) -> Any:
    """Lists of text as lists of integers; what is no integer goes to `wrong`, and its whole bag becomes null."""
    strings = pc.list_flatten(bags)
    try:
        return _as_integers(bags, strings)
    except pa.ArrowInvalid:
        bad = np.array([not _is_integer(value) for value in strings.to_pylist()])  # only a block with such values comes here
        ends = np.cumsum(pc.fill_null(pc.list_value_length(bags), 0).to_numpy())
        rows = np.searchsorted(ends, np.flatnonzero(bad), side="right")
        wrong.add(rows, partial(_expected, bags, name, "integers are"))
        broken = np.zeros(len(bags), dtype=np.bool_)
        broken[rows] = True
        bags = pc.if_else(pa.array(broken), None, bags)
        return _as_integers(bags, pc.list_flatten(bags))


def _as_integers(bags: Any, strings: Any) -> Any:
    numbers = pc.if_else(pc.equal(strings, b""), None, strings).cast(pa.string()).cast(pa.int64())
    offsets = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(bags), 0).to_numpy())]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), numbers.combine_chunks() if isinstance(numbers, pa.ChunkedArray) else numbers)


def _is_integer(value: bytes) -> bool:
    try:
        pa.array([value or b"0"]).cast(pa.string()).cast(pa.int64())
    except pa.ArrowInvalid:
        return False
    return True


def _missing(name: str, is_label: bool, row: int) -> str:
    return f"column {name!r} is missing" + ("" if is_label else " (and there is no fill)")


def _expected(column: Any, name: str, what: str, row: int) -> str:
    return f"column {name!r}: {column[row].as_py()}, where {what} expected"
