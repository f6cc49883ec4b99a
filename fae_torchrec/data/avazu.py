"""Avazu's click logs (Kaggle's avazu-ctr-prediction) in their original CSV format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from fae_torchrec.core.errors import DataError
from fae_torchrec.data.category_keys import category_keys, hex_keys
from fae_torchrec.data.coding import CategoryCoding
from fae_torchrec.data.delimited import DelimitedParser
from fae_torchrec.data.one_hot_source import Lines, OneHotSource, not_hex
from fae_torchrec.data.text_lines import SHARD_BYTES, TextLines
from fae_torchrec.data.text_source import WrongRows

_HEX = (
    *("site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model"),
)
FEATURES = ("C1", "banner_pos", *_HEX, "device_type", "device_conn_type", *(f"C{i}" for i in range(14, 22)))
"""The 21 categorical columns in the order of the file."""


class AvazuSource(OneHotSource):
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
        super().__init__(text, parser, "Avazu CSV", FEATURES, 1, coding)

    def _meaning(self, table: Any, wrong: WrongRows) -> Lines:
        rows = table.num_rows
        keys, missing = np.empty((len(FEATURES), rows), dtype=np.int64), np.empty((len(FEATURES), rows), dtype=np.bool_)
        for column, name in enumerate(FEATURES):
            if name in _HEX:
                _, _, bad = hex_keys(table.column(name), keys=keys[column], missing=missing[column])
                wrong.add(bad, partial(not_hex, table.column(name), name))
            else:
                keys[column], missing[column] = category_keys(table.column(name), name)
        clicks, hours = (table.column(name).fill_null(-1).to_numpy() for name in ("click", "hour"))
        wrong.add(
            np.flatnonzero((clicks != 0) & (clicks != 1)),
            lambda row: f"column 'click': {table.column('click')[row]}, where 0 or 1 is expected",
        )
        wrong.add(
            np.flatnonzero((hours < 0) | (hours % 100 > 23)),
            lambda row: f"column 'hour': {table.column('hour')[row]}, where YYMMDDHH is expected",
        )
        return Lines(clicks.astype(np.float32), (hours % 100 / 24).astype(np.float32)[:, None], keys, missing)
