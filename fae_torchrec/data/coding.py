"""Coding: from the key of a raw category to a row of its table, by modulo, by hash, by a vocabulary, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.data.category_keys import CategoryError, mixed
from fae_torchrec.data.vocabulary import Vocabulary


class CategoryCoding(Protocol):
    """From keys to rows; picklable, and the same on every machine."""

    @property
    def method(self) -> str:
        """One of "modulo", "hash", "vocabulary" and "none"."""
        ...

    @property
    def rows(self) -> Mapping[str, int]:
        """Feature -> rows of its table."""
        ...

    def encode(self, feature: str, keys: np.ndarray, missing: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The rows of some categories.

        Args:
            feature: whose categories they are.
            keys: int64 [n] from `hex_keys` or `category_keys`; not changed.
            missing: bool [n].
            out: int64 [n], written to and returned; may be `keys` itself.

        Returns:
            ids int64 [n] in 0..rows[feature]-1.

        Raises:
            ConfigError: the coding does not know the feature.
            CategoryError: (method "none") a key is missing or is no row of the table; its `position` says which.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """The method with all that decides its ids, as plain values that JSON can write: for provenance."""
        ...


def category_coding(method: str, rows: Mapping[str, int] | None = None, vocabulary: Vocabulary | None = None) -> CategoryCoding:
    """Makes a coding.

    Args:
        method: "modulo": key % rows, as `--max-ind-range` of facebookresearch/dlrm; "hash": splitmix64(key) % rows; "vocabulary": the
            category's id in `vocabulary`; "none": the key itself, which must be a row. What is missing is row 0 (an error for "none");
            so is what the vocabulary does not know.
        rows: feature -> rows of its table, at least 1; may be left out for "vocabulary", and is then what the vocabulary needs.
        vocabulary: for "vocabulary" alone.

    Raises:
        ConfigError: an unknown method, no rows or rows below 1, a vocabulary too many or too few, or one that lacks a feature or has
            more ids than the feature's table has rows.
    """
    if method == VocabularyCoding.method:
        if vocabulary is None:
            raise ConfigError("coding by vocabulary needs a vocabulary, received none; fit one on the training data and give its path")
        return VocabularyCoding(vocabulary.rows if rows is None else rows, vocabulary)
    if method not in _PLAIN:
        raise ConfigError(f"coding method {method!r} is unknown; allowed are {[*_PLAIN, VocabularyCoding.method]}")
    if vocabulary is not None:
        raise ConfigError(f"coding by {method!r} uses no vocabulary, received one; leave it out, or choose the method 'vocabulary'")
    if rows is None:
        raise ConfigError(f"coding by {method!r} needs the rows of each feature's table, received none; give them")
    return _PLAIN[method](rows)


@dataclass(frozen=True, eq=False)
class _TableCoding:
    """What all codings share: rows that are checked, and a description."""

    method: ClassVar[str]
    rows: Mapping[str, int]

    def __post_init__(self) -> None:
        for feature, rows in self.rows.items():
            if not isinstance(rows, (int, np.integer)) or isinstance(rows, bool) or rows < 1:
                raise ConfigError(f"coding: the table of feature {feature!r} has {rows!r} rows; a whole number of at least 1 is needed")

    def describe(self) -> dict[str, Any]:
        """As CategoryCoding says."""
        return {"method": self.method, "rows": {feature: int(rows) for feature, rows in self.rows.items()}}

    def _rows_of(self, feature: str) -> int:
        if feature not in self.rows:
            raise ConfigError(f"coding: no rows are given for feature {feature!r}, only for {list(self.rows)}; add its table's rows")
        return int(self.rows[feature])


class ModuloCoding(_TableCoding):
    """Row = key % rows, missing = row 0, as facebookresearch/dlrm does with `--max-ind-range`; negative keys count from the end."""

    method = "modulo"

    def encode(self, feature: str, keys: np.ndarray, missing: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """As CategoryCoding says; about 2 ns per key."""
        ids: np.ndarray = np.remainder(keys, self._rows_of(feature), out=out)
        np.multiply(ids, ~missing, out=ids)  # has no branch to mispredict: ten times as fast as a masked store
        return ids


class HashCoding(_TableCoding):
    """Row = splitmix64(key) % rows, missing = row 0: spreads keys that modulo would crowd, such as multiples of a power of two."""

    method = "hash"

    def encode(self, feature: str, keys: np.ndarray, missing: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """As CategoryCoding says."""
        ids = np.empty(len(keys), dtype=np.int64) if out is None else out
        np.remainder(mixed(keys.view(np.uint64)), np.uint64(self._rows_of(feature)), out=ids.view(np.uint64))
        np.multiply(ids, ~missing, out=ids)
        return ids


class NoCoding(_TableCoding):
    """The key is the row: for data that are coded already."""

    method = "none"

    def encode(self, feature: str, keys: np.ndarray, missing: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """As CategoryCoding says."""
        rows = self._rows_of(feature)
        # As unsigned numbers the negative keys are the largest of all: one maximum finds both ends.
        unsigned = keys.view(np.uint64)
        if missing.any() or (keys.size and int(unsigned.max()) >= rows):
            position = int(np.flatnonzero(missing | (unsigned >= rows))[0])
            shown = "missing" if missing[position] else str(keys[position])
            raise CategoryError(
                f"feature {feature!r}: category {position} of {len(keys)} (counted from 0) is {shown}; without coding, ids 0..{rows - 1} "
                "are allowed; correct the data, give the table more rows, or code by modulo, hash or vocabulary",
                position,
            )
        ids = np.empty(len(keys), dtype=np.int64) if out is None else out
        np.copyto(ids, keys)
        return ids


@dataclass(frozen=True, eq=False)
class VocabularyCoding(_TableCoding):
    """Row = the category's id in a vocabulary; missing and unknown = row 0. A table may have more rows than the vocabulary needs.

    Raises:
        ConfigError: the vocabulary lacks a feature, or has more ids than the feature's table has rows.
    """

    method: ClassVar[str] = "vocabulary"
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        super().__post_init__()
        for feature, rows in self.rows.items():
            needed = self.vocabulary.rows.get(feature)
            if needed is None:
                raise ConfigError(
                    f"the vocabulary has no feature {feature!r}; it has {list(self.vocabulary.rows)}; fit one with this feature"
                )
            if needed > rows:
                raise ConfigError(
                    f"the vocabulary of feature {feature!r} needs {needed} rows, its table has {rows}; give the table {needed} rows, or "
                    f"fit the vocabulary with max_rows={rows}"
                )

    def encode(self, feature: str, keys: np.ndarray, missing: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """As CategoryCoding says."""
        self._rows_of(feature)
        return self.vocabulary.encode(feature, keys, missing, out)

    def describe(self) -> dict[str, Any]:
        """As CategoryCoding says."""
        return {**super().describe(), "vocabulary": self.vocabulary.fingerprint}


_PLAIN = {coding.method: coding for coding in (ModuloCoding, HashCoding, NoCoding)}
