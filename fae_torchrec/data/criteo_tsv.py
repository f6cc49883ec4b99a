"""Criteo's click logs in their original format: the tab-separated text of Kaggle's train.txt and test.txt and of Terabyte's day_N."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from fae_torchrec.data.category_keys import hex_keys
from fae_torchrec.data.coding import CategoryCoding
from fae_torchrec.data.criteo_shape import NUM_DENSE, NUM_SPARSE, SPARSE_NAMES
from fae_torchrec.data.delimited import DelimitedParser
from fae_torchrec.data.one_hot_source import Lines, OneHotSource, not_hex
from fae_torchrec.data.text_lines import SHARD_BYTES, TextLines
from fae_torchrec.data.text_source import WrongRows

_DENSE = tuple(f"int_{i}" for i in range(NUM_DENSE))


class CriteoTsvSource(OneHotSource):
    """A ShardedSource over Criteo Kaggle's train.txt (or test.txt) or Criteo Terabyte's day_0 .. day_23, plain or .gz, in file order.

    A line is a label (0 or 1), 13 integers and 26 categories of 8 hex digits, separated by tabs, without quotes. Integers and categories
    may be missing (empty). Dense features are as in facebookresearch/dlrm: missing is 0, negative is 0, then log(1 + x). A category is the
    number its digits write, coded into a row by `coding`; what a missing one becomes is for the coding to say.

    A line with another number of fields, a field of another kind, or a label that is missing or neither 0 nor 1 is malformed. So a last
    line that was cut is found, unless the cut fell right behind a tab or behind a whole last field.

    Args:
        paths: the files in the order in which they are read; local, or URIs that iopath knows. Names that end in .gz are unpacked.
        coding: from categories to rows, for the features cat_0 .. cat_25.
        max_bad_lines: malformed lines that are skipped and counted (`skipped`) before one is an error.
        has_label: False for Kaggle's test.txt, whose lines have no label (39 fields); all labels are then 0.
        shard_bytes: text per shard of a plain file.

    Attributes:
        feature_names: "cat_0" .. "cat_25", as in TorchRec's own Criteo datasets (torchrec/datasets/criteo.py).
        num_dense: 13.
        name: the files with their sizes and times of writing.
        max_bad_lines: as given.

    Raises:
        ConfigError: a file is missing or named twice, or a number is out of range.
        DataError: all files are empty, or a .gz cannot be unpacked.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        coding: CategoryCoding,
        max_bad_lines: int = 0,
        has_label: bool = True,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        columns = {**dict.fromkeys(("label", *_DENSE), pa.int64()), **dict.fromkeys(SPARSE_NAMES, pa.binary(8))}
        if not has_label:
            del columns["label"]
        text = TextLines(paths, shard_bytes=shard_bytes, max_bad_lines=max_bad_lines)
        parser = DelimitedParser(columns, delimiter="\t", quoting=False, bad_lines=text.bad_lines)
        super().__init__(text, parser, "Criteo TSV", SPARSE_NAMES, NUM_DENSE, coding)
        self._has_label = has_label

    def _meaning(self, table: Any, wrong: WrongRows) -> Lines:
        rows = table.num_rows
        keys, missing = np.empty((NUM_SPARSE, rows), dtype=np.int64), np.empty((NUM_SPARSE, rows), dtype=np.bool_)
        for column, name in enumerate(SPARSE_NAMES):
            _, _, bad = hex_keys(table.column(name), keys=keys[column], missing=missing[column])
            wrong.add(bad, partial(not_hex, table.column(name), name))
        labels = np.zeros(rows, dtype=np.float32)
        if self._has_label:
            labels = table.column("label").fill_null(-1).to_numpy().astype(np.float32)
            wrong.add(
                np.flatnonzero((labels != 0) & (labels != 1)),
                lambda row: f"the label is {table.column('label')[row]}, where 0 or 1 is expected",
            )
        return Lines(labels, _dense(table), keys, missing)


def _dense(table: Any) -> np.ndarray:
    """The 13 integers as log(1 + x), float32 [n, 13], contiguous."""
    dense = np.empty((table.num_rows, NUM_DENSE), dtype=np.float32)
    for column, name in enumerate(_DENSE):
        dense[:, column] = table.column(name).fill_null(0).to_numpy()
    np.maximum(dense, 0, out=dense)
    dense += 1  # then log, which numpy does several at a time, unlike log1p; for integers it is as exact
    return np.log(dense, out=dense)
