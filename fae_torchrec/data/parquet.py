"""Samples from a parquet file: streamed by row group, dealt to ranks, every id checked against its table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from iopath.common.file_io import g_pathmgr
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.category_keys import CategoryError, category_keys
from fae_torchrec.data.coding import CategoryCoding
from fae_torchrec.data.dealing import rank_runs, touched
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.text_lines import absolute
from fae_torchrec.data.vocabulary import KeyChunk

_CHUNK_ROWS = 65_536  # rows decoded at a time: large enough to amortise the call, small beside a row group


class ParquetSource(ShardedSource):
    """A ShardedSource that streams one parquet file in file order (nothing is shuffled); its shards are the row groups.

    Integer columns are one-hot features; lists of integers are multi-hot features, where an empty list is an empty bag. A null is
    never replaced by a guess. Only row groups that hold samples of the rank are read; at most one encoded row group, 65,536
    decoded rows and one batch are in memory.

    Args:
        path: a parquet file, local or a URI that iopath's `g_pathmgr` knows (fetched whole); opened here to check that the columns
            exist and have usable types.
        dense: names of numeric or boolean columns, in the order of `dense_features`.
        sparse: names of integer or list-of-integer columns, in the order of the keys.
        label: name of a numeric or boolean column.
        tables_rows: feature -> rows of its table; ids 0..rows-1 are allowed. Not with `coding`.
        coding: from raw categories to rows, instead of `tables_rows`: sparse columns may then hold integers, text, bytes or lists of these,
            and a null is a missing category, or an empty bag.

    Attributes:
        feature_names: keys of the KeyedJaggedTensor, in order (the sparse columns).
        num_dense: columns of `dense_features`.
        num_samples: rows of the file.
        name: the file with its rows, size and time of writing.
        path: the file.

    Raises:
        ConfigError: the file is missing, a name is given twice, or a sparse column has no row count.
        DataError: the file is not parquet, or a column is missing or has another type.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dense: Sequence[str],
        sparse: Sequence[str],
        label: str,
        tables_rows: Mapping[str, int] | None = None,
        coding: CategoryCoding | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.feature_names = tuple(sparse)
        self.num_dense = len(dense)
        self._dense = tuple(dense)
        self._label = label
        self._columns = [*dense, *sparse, label]
        repeated = sorted({name for name in self._columns if self._columns.count(name) > 1})
        if repeated:
            raise ConfigError(f"columns {repeated} are named more than once among dense, sparse and label; name each column once")
        if not sparse:
            raise ConfigError("no sparse columns are named; name at least one")
        if (tables_rows is None) == (coding is None):
            raise ConfigError("received tables_rows and coding, or neither; give the rows of coded columns, or a coding of raw ones")
        self._coding = coding
        tables_rows = cast(Mapping[str, int], coding.rows if tables_rows is None and coding is not None else tables_rows)
        unsized = [name for name in sparse if name not in tables_rows]
        if unsized:
            raise ConfigError(f"no row count for the sparse columns {unsized}; counts are given for {sorted(tables_rows)}; add them")
        self._rows = {name: int(tables_rows[name]) for name in sparse}
        self._local = g_pathmgr.get_local_path(self.path)
        if not os.path.isfile(self._local):
            raise ConfigError(f"no parquet file at {self.path}; {_neighbours(self._local)}")
        try:
            with pq.ParquetFile(self._local) as file:
                metadata, schema = file.metadata, file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path} cannot be read as a parquet file ({error}); write it again") from error
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._group_starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._check_schema(schema)
        status = os.stat(self._local)
        written = datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat(timespec="seconds")
        self.name = f"parquet {absolute(self.path)}, {metadata.num_rows} samples, {status.st_size} bytes, written {written}"

    @property
    def num_shards(self) -> int:
        """Row groups of the file."""
        return len(self._group_starts) - 1

    def shard_sizes(self) -> np.ndarray:
        """Rows of each row group, int64 [num_shards], as the file's metadata say."""
        sizes: np.ndarray = np.diff(self._group_starts)
        return sizes

    def size_hint(self) -> int:
        """Rows of the file, exactly."""
        return self.num_samples

    def read_shard(self, shard: int) -> Iterator[Batch]:
        """The rows of one row group in order, in batches of 65,536.

        Raises:
            DataError: as `batches`.
        """
        begin, end = self._group_starts[shard : shard + 2].tolist()
        starts = np.arange(begin, end, _CHUNK_ROWS)
        return self._stream(starts, np.minimum(starts + _CHUNK_ROWS, end))

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One pass over this rank's share, as BatchSource says.

        Args:
            batch_size: samples per batch and rank; the last batch may be smaller.
            rank: which share, 0..world_size-1.
            world_size: number of shares.

        Yields:
            Batches of dense [B, num_dense] float32, a KeyedJaggedTensor of int64 ids with F keys and stride B, labels [B] float32.

        Raises:
            ConfigError: batch_size, rank or world_size is out of range.
            DataError: a null or non-finite number, or an id out of range; names the column and the row (counted from 0 in the file).
        """
        starts, stops = rank_runs(self.num_samples, batch_size, rank, world_size)
        return self._stream(starts, stops)

    def _stream(self, starts: np.ndarray, stops: np.ndarray) -> Iterator[Batch]:
        """Yields one batch for each run of rows [starts[i], stops[i]); runs are in order and do not overlap."""
        run = 0
        pieces: list[Any] = []
        for first, records in self._chunks(starts, stops):
            last = first + records.num_rows
            while run < len(starts) and starts[run] < last:
                begin, end = max(int(starts[run]), first), min(int(stops[run]), last)
                pieces.append(records.slice(begin - first, end - begin))
                if stops[run] > last:
                    break  # the run goes on in the next chunk
                yield self._to_batch(pa.Table.from_batches(pieces), int(starts[run]))
                pieces = []
                run += 1

    def _chunks(self, starts: np.ndarray, stops: np.ndarray) -> Iterator[tuple[int, Any]]:
        """Yields (row number of its first row, record batch) for the row groups that some run touches, in file order."""
        begins, ends = self._group_starts[:-1], self._group_starts[1:]
        needed = touched(begins, ends, starts, stops)
        try:
            with pq.ParquetFile(self._local) as file:
                for group in np.flatnonzero(needed).tolist():
                    first = int(begins[group])
                    for records in file.iter_batches(batch_size=_CHUNK_ROWS, row_groups=[group], columns=self._columns):
                        yield first, records
                        first += records.num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path} cannot be read ({error}); it was damaged or replaced; write it again") from error

    def _to_batch(self, table: Any, first_row: int) -> Batch:
        """Turns the rows of a pyarrow Table, which begin at row `first_row` of the file, into a batch."""
        dense = np.empty((table.num_rows, self.num_dense), dtype=np.float32)
        for column, name in enumerate(self._dense):
            dense[:, column] = self._numbers(table, name, first_row)
        values, lengths = [], []
        for name in self.feature_names:
            ids, bags = self._ids(table, name, first_row)
            values.append(ids)
            lengths.append(bags)
        return Batch(
            dense_features=torch.from_numpy(dense),
            sparse_features=KeyedJaggedTensor(
                keys=list(self.feature_names),
                values=torch.from_numpy(np.concatenate(values)),
                lengths=torch.from_numpy(np.concatenate(lengths)),
                stride=table.num_rows,
            ),
            labels=torch.from_numpy(self._numbers(table, self._label, first_row)),
        )

    def _numbers(self, table: Any, name: str, first_row: int) -> np.ndarray:
        """A dense or label column as float32 [n], all finite."""
        self._check_nulls(table.column(name), name, first_row)
        with np.errstate(over="ignore"):  # what does not fit becomes infinite and is reported below
            numbers: np.ndarray = table.column(name).to_numpy().astype(np.float32)
        finite = np.isfinite(numbers)
        if not finite.all():
            row = first_row + int(np.flatnonzero(~finite)[0])
            raise DataError(
                f"{self.path}: column {name!r}, row {row}: {table.column(name)[row - first_row]} is not a finite float32 number; "
                f"replace it before training"
            )
        return numbers

    def read_keys(self, shard: int) -> Iterator[KeyChunk]:
        """The categories of one row group before they are coded, to fit a vocabulary on.

        Raises:
            DataError: the file is damaged, or a column is of a kind that has no categories.
        """
        bounds = self._group_starts[shard : shard + 2]
        for _, records in self._chunks(bounds[:1], bounds[1:]):
            table = pa.Table.from_batches([records])
            yield {name: category_keys(self._bags(table, name)[0], f"{self.path}: {name}") for name in self.feature_names}

    def _ids(self, table: Any, name: str, first_row: int) -> tuple[np.ndarray, np.ndarray]:
        """A sparse column as ids int64 [nnz] and bag lengths int32 [n]."""
        column, lengths = self._bags(table, name)
        if self._coding is not None:
            try:
                keys, missing = category_keys(column, f"{self.path}: {name}")
                return self._coding.encode(name, keys, missing), lengths
            except CategoryError as error:
                raise DataError(f"{self.path}: column {name!r}, row {_row(first_row, lengths, error.position)}: {error}") from None
        self._check_nulls(table.column(name), name, first_row)
        ids = column.to_numpy() if column.null_count == 0 else None
        if ids is None:
            at, shown = int(np.flatnonzero(column.is_null().to_numpy())[0]), "null"
        elif ids.size and (ids.min() < 0 or ids.max() >= self._rows[name]):
            at = int(np.flatnonzero((ids < 0) | (ids >= self._rows[name]))[0])
            shown = str(ids[at])
        else:
            return ids.astype(np.int64), lengths
        raise DataError(
            f"{self.path}: column {name!r}, row {_row(first_row, lengths, at)} (counted from 0): id {shown} is out of range; allowed "
            f"0..{self._rows[name] - 1}; correct the id or give the table more rows"
        )

    def _bags(self, table: Any, name: str) -> tuple[Any, np.ndarray]:
        """A sparse column's categories, one bag after the other, and bag lengths int32 [n]."""
        column = table.column(name)
        if not _is_list(column.type):
            return column, np.ones(table.num_rows, dtype=np.int32)
        return pc.list_flatten(column), pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int32)

    def _check_nulls(self, column: Any, name: str, first_row: int) -> None:
        if column.null_count:
            row = first_row + int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise DataError(
                f"{self.path}: column {name!r}, row {row} (counted from 0) is null; every row needs a value: fill the number, give "
                f"missing ids an id of their own, or write an empty list for an empty bag"
            )

    def _check_schema(self, schema: Any) -> None:
        """Raises DataError for a missing column or a type that cannot be used."""
        missing = [name for name in self._columns if name not in schema.names]
        if missing:
            raise DataError(f"{self.path} has no columns {missing}; it has {list(schema.names)}; name columns that exist")
        for name in self._columns:
            kind = schema.field(name).type
            if name in self._rows:
                item = kind.value_type if _is_list(kind) else kind
                right = pa.types.is_integer(item) or (self._coding is not None and not _is_list(item))  # `category_keys` is more exact
                allowed = "integers or lists of integers, or with a coding categories or lists of them"
            else:
                right = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
                allowed = "numbers or booleans"
            if not right:
                raise DataError(f"{self.path}: column {name!r} has type {kind}; allowed are {allowed}; code the column so")


def _row(first_row: int, lengths: np.ndarray, position: int) -> int:
    """The row of the file whose bag holds the category at a position; `first_row` is the row of the first bag."""
    return first_row + int(np.searchsorted(np.cumsum(lengths), position, side="right"))


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _neighbours(path: str) -> str:
    """What stands where the file was looked for, for the message."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        return f"its folder {folder} does not exist either"
    found = sorted(name for name in os.listdir(folder) if name.endswith(".parquet"))
    return f"the folder {folder} holds " + (f"{found}" if found else "no parquet files")
