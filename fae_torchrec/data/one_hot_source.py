"""What the readers of click logs share: text lines with one category for each sparse feature."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torchrec.datasets.utils import Batch

from fae_torchrec.data.category_keys import CategoryError
from fae_torchrec.data.coding import CategoryCoding
from fae_torchrec.data.delimited import DelimitedParser
from fae_torchrec.data.feature_batch import one_hot_batch
from fae_torchrec.data.text_lines import TextBlock, TextLines
from fae_torchrec.data.text_source import TextSource, WrongRows, located
from fae_torchrec.data.vocabulary import KeyChunk

_BATCH_SAMPLES = 65_536


class Lines(NamedTuple):
    """What n lines mean.

    Attributes:
        labels: float32 [n].
        dense: float32 [n, D], contiguous.
        keys: int64 [F, n], contiguous.
        missing: bool [F, n].
    """

    labels: np.ndarray
    dense: np.ndarray
    keys: np.ndarray
    missing: np.ndarray


class OneHotSource(TextSource):
    """A TextSource whose every line has one category, or a missing one, for each sparse feature; a subclass says what a table means.

    Args:
        text: as TextSource.
        parser: as TextSource.
        name: as TextSource.
        features: keys of the KeyedJaggedTensor, in order.
        num_dense: columns of `dense_features`.
        coding: from categories to rows.
    """

    def __init__(
        self, text: TextLines, parser: DelimitedParser, name: str, features: tuple[str, ...], num_dense: int, coding: CategoryCoding
    ) -> None:
        super().__init__(text, parser, name)
        self.feature_names = features
        self.num_dense = num_dense
        self._coding = coding

    def read_keys(self, shard: int) -> Iterator[KeyChunk]:
        """The categories of one shard before they are coded, to fit a vocabulary on.

        Raises:
            DataError: as `read_shard`.
        """
        for block, table in self._tables(shard):
            lines = self._lines(block, table)
            yield {name: (lines.keys[column], lines.missing[column]) for column, name in enumerate(self.feature_names)}

    @abstractmethod
    def _meaning(self, table: Any, wrong: WrongRows) -> Lines:
        """What the rows of a pyarrow Table mean, those included that are malformed by what they mean and added to `wrong`."""

    def _batches_of(self, block: TextBlock, table: Any) -> Iterator[Batch]:
        labels, dense, keys, missing = self._lines(block, table)
        for column, name in enumerate(self.feature_names):
            try:
                self._coding.encode(name, keys[column], missing[column], out=keys[column])
            except CategoryError as error:
                raise located(block, name, error) from error
        for start in range(0, len(labels), _BATCH_SAMPLES):
            cut = slice(start, start + _BATCH_SAMPLES)
            yield one_hot_batch(self.feature_names, dense[cut], np.ascontiguousarray(keys[:, cut]), labels[cut])

    def _lines(self, block: TextBlock, table: Any) -> Lines:
        wrong = WrongRows(self._text.bad_lines)
        lines = self._meaning(table, wrong)
        keep = wrong.reported(block)
        return lines if keep is None else Lines(lines.labels[keep], lines.dense[keep], lines.keys[:, keep], lines.missing[:, keep])


def not_hex(column: Any, name: str, row: int) -> str:
    """What is wrong with a category that `hex_keys` refused."""
    return f"column {name!r}: {column[row].as_py()!r}, where 8 hex digits are expected"
