"""Embedding tables as sizes: rows, dim and dtype -> bytes of weights and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from itertools import zip_longest
from typing import Any

from fae_torchrec.core.errors import ConfigError, FingerprintError
from fae_torchrec.core.fingerprint import fingerprint

ELEMENT_BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of one weight by dtype name."""


class Optimizer(str, Enum):
    """Fused optimizers by the field's names; the value is what a config file says."""

    SGD = "sgd"
    ADAGRAD = "adagrad"
    ROWWISE_ADAGRAD = "rowwise_adagrad"
    ADAM = "adam"

    def state_bytes_per_row(self, dim: int) -> int:
        """Bytes of optimizer state that FBGEMM keeps for one row of `dim` weights (its states are always fp32)."""
        states = {"sgd": 0, "adagrad": dim, "rowwise_adagrad": 1, "adam": 2 * dim}
        return 4 * states[self.value]


class TableKind(str, Enum):
    """Where the rows of one table live: all in the hot tier, in both, or all in the cold tier."""

    HOT = "hot"
    SPLIT = "split"
    COLD = "cold"


@dataclass(frozen=True)
class TableSpec:
    """One embedding table as far as its size matters.

    Attributes:
        name: the table's name in its collection.
        rows: number of rows (`num_embeddings`).
        dim: weights per row (`embedding_dim`).
        feature_names: features that look up this table.
        dtype: "fp32", "fp16" or "bf16".
        optimizer: the fused optimizer, whose state is kept beside the weights.
        pooled: whether a sample is given one row for each bag (EmbeddingBagCollection) or one for each id (EmbeddingCollection).
    """

    name: str
    rows: int
    dim: int
    feature_names: tuple[str, ...]
    dtype: str = "fp32"
    optimizer: Optimizer = Optimizer.ROWWISE_ADAGRAD
    pooled: bool = True

    def __post_init__(self) -> None:
        if self.rows < 1 or self.dim < 1:
            raise ConfigError(f"table {self.name!r}: rows and dim must be at least 1, received rows={self.rows}, dim={self.dim}")
        if self.dtype not in ELEMENT_BYTES:
            raise ConfigError(f"table {self.name!r}: dtype {self.dtype!r} is not one of {sorted(ELEMENT_BYTES)}")
        if not self.feature_names:
            raise ConfigError(f"table {self.name!r} has no features; give it at least one feature name")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in fast memory: weights and optimizer state."""
        return self.weight_bytes + self.optimizer.state_bytes_per_row(self.dim)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of one row."""
        return self.dim * ELEMENT_BYTES[self.dtype]

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows: weights and optimizer state."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class TableSet:
    """The embedding tables of one model, in the model's order; names are unique."""

    tables: tuple[TableSpec, ...]

    def __post_init__(self) -> None:
        names = [table.name for table in self.tables]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"table names must be unique, received more than one of {repeated}; rename them")

    def __iter__(self) -> Iterator[TableSpec]:
        return iter(self.tables)

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, name: str) -> TableSpec:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, TableSpec]:
        return {table.name: table for table in self.tables}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Table names in order."""
        return tuple(table.name for table in self.tables)

    @cached_property
    def lookups(self) -> tuple[tuple[str, str], ...]:
        """Every (table, feature) pair that a sample looks up, in order; a feature may feed several tables and a table several features."""
        return tuple((table.name, feature) for table in self.tables for feature in table.feature_names)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tables: weights and optimizer state."""
        return sum(table.total_bytes for table in self.tables)

    @cached_property
    def fingerprint(self) -> str:
        """Names the tables by what decides where a row is: table and feature names and row counts (not dim, dtype or optimizer)."""
        return fingerprint([_row_key(table) for table in self.tables])

    def check_same(self, given: TableSet, owner: str) -> None:
        """Checks that a saved value of these tables belongs to the given ones: same table and feature names, same rows.

        Args:
            given: the tables that the value is to be used with.
            owner: the saved value, for the message ("row placement 3f2a...").

        Raises:
            FingerprintError: the tables differ; names both fingerprints and the first difference.
        """
        if given.fingerprint == self.fingerprint:
            return
        pairs = zip_longest(self.tables, given.tables)
        saved_table, given_table = next((a, b) for a, b in pairs if _row_key(a) != _row_key(b))
        raise FingerprintError(
            f"{owner} was made for the tables {self.fingerprint}, given are the tables {given.fingerprint}; first difference: saved "
            f"{_described(saved_table)}, given {_described(given_table)}; make it again for these tables, or use those it was made for"
        )

    def to_json(self) -> list[dict[str, Any]]:
        """The tables as plain values, read back by `from_json`; "pooled" is left out where it is true, as in older files."""
        return [
            {
                **{key: value for key, value in asdict(table).items() if (key, value) != ("pooled", True)},
                "optimizer": table.optimizer.value,
                "feature_names": list(table.feature_names),
            }
            for table in self.tables
        ]

    @classmethod
    def from_json(cls, values: list[dict[str, Any]]) -> TableSet:
        """Reads what `to_json` wrote."""
        return cls(
            tuple(
                TableSpec(**{**value, "optimizer": Optimizer(value["optimizer"]), "feature_names": tuple(value["feature_names"])})
                for value in values
            )
        )


def _row_key(table: TableSpec | None) -> list[Any] | None:
    """What decides where a table's rows are."""
    return None if table is None else [table.name, table.rows, list(table.feature_names)]


def _described(table: TableSpec | None) -> str:
    return "no table" if table is None else f"table {table.name!r} with {table.rows} rows and features {list(table.feature_names)}"
