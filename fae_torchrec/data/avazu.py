"""Avazu's click logs (Kaggle's avazu-ctr-prediction) in their original CSV format."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import DataError
from fae_torchrec.data.category_keys import CategoryError, category_keys, hex_keys
from fae_torchrec.data.coding import CategoryCoding
from fae_torchrec.data.delimited import DelimitedParser
from fae_torchrec.data.feature_batch import one_hot_batch
from fae_torchrec.data.text_lines import SHARD_BYTES, TextBlock, TextLines
from fae_torchrec.data.text_source import TextSource, located
from fae_torchrec.data.vocabulary import KeyChunk

_BATCH_SAMPLES = 65_536

_HEX = (
    *("site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model"),
)
FEATURES = ("C1", "banner_pos", *_HEX, "device_type", "device_conn_type", *(f"C{i}" for i in range(14, 22)))
"""The 21 categorical columns in the order of the file."""


class AvazuSource(TextSource):
    """A ShardedSource over Avazu's train.csv, plain or .gz, in file order: 1 dense feature and 21 categories, as in FAE's RMC4.

    The first line of each file names the columns; they are found by name. The nine columns of ids and domains are 8 hex digits: a
    category is the number that they write. The other twelve are integers, which are their own keys (C20 has a real -1). A missing category
    is left to the coding. The dense feature is the hour of the day as a share of the day, 0 to 23/24, from `hour` (YYMMDDHH). The
    competition's test.csv has no `click` and is refused.

    A line with another number of fields, a field of another kind, no valid hour, or a click that is missing or neither 0 nor 1 is
    malformed.

    Args:
        paths: the files in the order in which they are read; local, or URIs that iopath knows. Names that end in .gz are unpacked.
        coding: from categories to rows, for the features C1, banner_pos, site_id, ..., C21.
        max_bad_lines: malformed lines that are skipped and counted (`skipped`) before one is an error.
        shard_bytes: text per shard of a plain file.

    Attributes:
        feature_names: `FEATURES`.
        num_dense: 1.
        name: the files with their sizes and times of writing.
        max_bad_lines: as given.

    Raises:
        ConfigError: a file is missing or named twice, or a number is out of range.
        DataError: all files are empty, a .gz cannot be unpacked, or the header lacks a column.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        coding: CategoryCoding,
        max_bad_lines: int = 0,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        text = TextLines(paths, shard_bytes=shard_bytes, header=True, max_bad_lines=max_bad_lines)
        needed = ("click", "hour", *FEATURES)
        lacking = [name for name in needed if name not in text.header]
        if lacking == ["click"]:
            raise DataError(f"{text.name}: no column 'click': this is the competition's test file, which has no labels; give train.csv")
        if lacking or len(set(text.header)) < len(text.header):
            raise DataError(f"{text.name}: the header is {text.header}; it lacks {lacking} or names a column twice; give Avazu's train.csv")
        types = {name: pa.binary(8) if name in _HEX else pa.int64() for name in needed}
        parser = DelimitedParser(
            {name: types.get(name, pa.binary()) for name in text.header},
            delimiter=",",
            quoting=False,
            bad_lines=text.bad_lines,
            include=needed,
        )
        super().__init__(text, parser, "Avazu CSV")
        self.feature_names = FEATURES
        self.num_dense = 1
        self._coding = coding

    def read_keys(self, shard: int) -> Iterator[KeyChunk]:
        """The categories of one shard before they are coded, to fit a vocabulary on.

        Raises:
            DataError: as `read_shard`.
        """
        for block, table in self._tables(shard):
            lines = self._lines(block, table)
            yield {name: (lines.keys[column], lines.missing[column]) for column, name in enumerate(FEATURES)}

    def _batches_of(self, block: TextBlock, table: Any) -> Iterator[Batch]:
        labels, dense, keys, missing = self._lines(block, table)
        for column, name in enumerate(FEATURES):
            try:
                self._coding.encode(name, keys[column], missing[column], out=keys[column])
            except CategoryError as error:
                raise located(block, name, error) from error
        for start in range(0, len(labels), _BATCH_SAMPLES):
            cut = slice(start, start + _BATCH_SAMPLES)
            yield one_hot_batch(FEATURES, dense[cut], np.ascontiguousarray(keys[:, cut]), labels[cut])

    def _lines(self, block: TextBlock, table: Any) -> _Lines:
        """The lines of a block that are well-formed, and well-formed by what they mean."""
        rows = table.num_rows
        keys, missing = np.empty((len(FEATURES), rows), dtype=np.int64), np.empty((len(FEATURES), rows), dtype=np.bool_)
        wrong: dict[int, str] = {}  # row -> what is wrong with it
        for column, name in enumerate(FEATURES):
            if name in _HEX:
                _, _, bad = hex_keys(table.column(name), keys=keys[column], missing=missing[column])
                for row in bad.tolist():
                    wrong.setdefault(row, f"column {name!r}: {table.column(name)[row].as_py()!r}, where 8 hex digits are expected")
            else:
                keys[column], missing[column] = category_keys(table.column(name), name)
        clicks, hours = (table.column(name).fill_null(-1).to_numpy() for name in ("click", "hour"))
        for row in np.flatnonzero((clicks != 0) & (clicks != 1)).tolist():
            wrong.setdefault(row, f"column 'click': {table.column('click')[row]}, where 0 or 1 is expected")
        for row in np.flatnonzero((hours < 0) | (hours % 100 > 23)).tolist():
            wrong.setdefault(row, f"column 'hour': {table.column('hour')[row]}, where YYMMDDHH is expected")
        lines = _Lines(clicks.astype(np.float32), (hours % 100 / 24).astype(np.float32)[:, None], keys, missing)
        if wrong:
            bad_rows = sorted(wrong)
            keep = self._text.bad_lines.report(block, np.array(bad_rows), [wrong[row] for row in bad_rows])
            lines = _Lines(lines.labels[keep], lines.dense[keep], keys[:, keep], missing[:, keep])
        return lines


class _Lines(NamedTuple):
    labels: np.ndarray  # float32 [n]
    dense: np.ndarray  # float32 [n, 1]
    keys: np.ndarray  # int64 [21, n]
    missing: np.ndarray  # bool [21, n]
