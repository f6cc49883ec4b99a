"""The `data` section of a run's description: where samples come from, and how raw categories become rows of tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from iopath.common.file_io import g_pathmgr

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.schema import within

DATA_PATHS = (
    *(f"data.parquet.{name}" for name in ("train", "test", "cardinalities")),
    *(f"data.{source}.{name}" for source in ("criteo", "avazu", "csv") for name in ("train", "test")),
    *(f"data.taobao.{name}" for name in ("files", "index_folder")),
    "data.criteo_npy.folder",
    *(f"data.coding.{name}" for name in ("rows", "vocabulary")),
)
"""Keys that hold paths, or lists of paths."""


def _files(default: Any = MISSING) -> Any:
    """A field of files: one path, or a list of them in the order in which they are read."""
    return field(default=default, metadata={"read": lambda value: [value] if isinstance(value, str) else value})


def _rows_of(key: str) -> Any:
    """A field of rows by feature: a mapping, or the path of a JSON file that holds one."""
    return field(default=None, metadata={"read": lambda value: _rows(value, key)})


@dataclass(frozen=True)
class SyntheticConfig:
    """Generated samples shaped like Criteo Kaggle, Criteo Terabyte, Avazu or Taobao; `scale` multiplies the published row counts."""

    dataset: Literal["kaggle", "terabyte", "avazu", "taobao"] = "kaggle"
    scale: float = within(0.01, 0, 1, above=True)
    train_samples: int = within(262_144, 1)
    test_samples: int = within(32_768, 1)
    seed: int = within(0, 0)


@dataclass(frozen=True)
class ParquetConfig:
    """Samples in Parquet files.

    Attributes:
        train, test: files in the order in which they are read; without test files, `data.holdout` says what is for testing.
        sparse: columns of ids, or of lists of ids.
        label: column of 0 and 1.
        dense: columns of numbers.
        cardinalities: rows of each sparse column's table, a mapping or the path of a JSON file: then the ids are rows already. Without,
            the columns are raw categories for `data.coding`.
    """

    sparse: tuple[str, ...]
    label: str
    train: tuple[str, ...] = _files()
    test: tuple[str, ...] = _files(())
    cardinalities: Mapping[str, int] | None = _rows_of("data.parquet.cardinalities")
    dense: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.sparse:
            raise ConfigError("data.parquet.sparse: received no columns; name at least one column of ids")
        if self.cardinalities is None:
            return
        missing = [name for name in self.sparse if name not in self.cardinalities]
        if missing:
            raise ConfigError(
                f"data.parquet.cardinalities: no row count for the sparse columns {missing}; it has {sorted(self.cardinalities)}; "
                "add the number of rows of each table"
            )
        _check_rows(self.cardinalities, "data.parquet.cardinalities")


@dataclass(frozen=True)
class FilesConfig:
    """Criteo's TSV (train.txt, day_N) or Avazu's CSV, plain or .gz, in the order in which they are read.

    Without test files, `data.holdout` says what is for testing.
    """

    train: tuple[str, ...] = _files()
    test: tuple[str, ...] = _files(())


@dataclass(frozen=True)
class CriteoNpyConfig:
    """TorchRec's preprocessed Criteo in one folder: day_N_dense.npy, day_N_sparse.npy, day_N_labels.npy.

    `sparse_part` is the middle of the sparse files' names ("sparse_contig_freq" after `sparse_to_contiguous`); `test_stage` takes the first
    or second half of the test day, as TorchRec's "val" and "test" do, or all of it.
    """

    folder: str
    train_days: tuple[int, ...] = within((0,), 0)
    test_day: int = within(23, 0)
    test_stage: Literal["train", "val", "test"] = "train"
    sparse_part: str = "sparse"


@dataclass(frozen=True)
class TaobaoConfig:
    """Taobao's UserBehavior.csv as sequences (TBSM, FAE RMC1): `history` events and a candidate, for three features.

    The last window of each user is for testing, the ones before it are for training. `index_folder` keeps the sorted events on disk.
    """

    files: tuple[str, ...] = _files()
    history: int = within(20, 1)
    min_history: int | None = within(None, 1)
    windows_per_user: int = within(10, 1)
    negatives: Literal["uniform", "popular"] = "uniform"
    seed: int = within(0, 0)
    index_folder: str | None = None


@dataclass(frozen=True)
class CsvConfig:
    """Delimited text of any kind, plain or .gz.

    Attributes:
        train, test: files in the order in which they are read; without test files, `data.holdout` says what is for testing.
        sparse: columns of categories.
        label: column of 0 and 1.
        dense: columns of numbers.
        delimiter: between fields.
        columns: names of the columns, for files without a header line.
        integers: sparse columns that hold whole numbers (007 is 7 there); the others are text.
        separators: sparse column -> what separates the categories of a bag within a field.
        fill: what an empty dense field is; null: an error.
        quoting: whether fields may be in double quotes.
    """

    sparse: tuple[str, ...]
    label: str
    train: tuple[str, ...] = _files()
    test: tuple[str, ...] = _files(())
    dense: tuple[str, ...] = ()
    delimiter: str = ","
    columns: tuple[str, ...] | None = None
    integers: tuple[str, ...] | None = None
    separators: Mapping[str, str] | None = None
    fill: float | None = None
    quoting: bool = True

    def __post_init__(self) -> None:
        if not self.sparse:
            raise ConfigError("data.csv.sparse: received no columns; name at least one column of categories")


@dataclass(frozen=True)
class CodingConfig:
    """From raw categories to rows of tables (of every source but synthetic, and parquet with cardinalities, whose ids are rows already).

    Attributes:
        method: modulo (key % rows, as facebookresearch/dlrm), hash (mixed first), vocabulary (fitted by `fae vocabulary`) or none (coded
            already).
        rows: feature -> rows of its table, a mapping or the path of a JSON file; a vocabulary brings its own.
        max_rows: no table has more rows; alone, every table has so many. What a vocabulary keeps at most.
        vocabulary: its file, written by `fae vocabulary`.
        min_count: categories that `fae vocabulary` saw less often are row 0.
    """

    method: Literal["modulo", "hash", "vocabulary", "none"] = "hash"
    rows: Mapping[str, int] | None = _rows_of("data.coding.rows")
    max_rows: int | None = within(None, 2)
    vocabulary: str | None = None
    min_count: int = within(1, 1)

    def __post_init__(self) -> None:
        if self.rows is not None:
            _check_rows(self.rows, "data.coding.rows")
        if (self.method == "vocabulary") != (self.vocabulary is not None):
            raise ConfigError(
                f"data.coding: received method {self.method!r} and vocabulary {self.vocabulary!r}; the method 'vocabulary' needs the path "
                "of one (`fae vocabulary` writes it), the others have none"
            )


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from: exactly one source.

    Attributes:
        coding: from raw categories to rows.
        holdout: the share of the train samples, the last ones, that is for testing; for files that have no test files beside them.
        max_bad_lines: malformed lines of text that may be skipped; more end the run.
    """

    synthetic: SyntheticConfig | None = None
    parquet: ParquetConfig | None = None
    criteo: FilesConfig | None = None
    criteo_npy: CriteoNpyConfig | None = None
    avazu: FilesConfig | None = None
    taobao: TaobaoConfig | None = None
    csv: CsvConfig | None = None
    coding: CodingConfig = field(default_factory=CodingConfig)
    holdout: float | None = within(None, 0, 0.99, above=True)
    max_bad_lines: int = within(0, 0)

    def __post_init__(self) -> None:
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"data: received {' and '.join(given) if given else 'no source'}; give exactly one of {list(_SOURCES)}")
        self._check_splits()
        coding = self.coding
        if self.synthetic is not None or (self.parquet is not None and self.parquet.cardinalities is not None):
            if coding != CodingConfig():
                raise ConfigError(f"data.coding: received one for data.{self.source}, whose ids are rows already; leave it out")
        elif coding.method != "vocabulary" and coding.rows is None and coding.max_rows is None:
            raise ConfigError("data.coding: received neither rows nor max_rows; give the rows of each feature's table, or max_rows for all")

    def _check_splits(self) -> None:
        """Train files, and either test files or a share to hold out."""
        source = getattr(self, self.source)
        for name in ("train", "files"):
            if getattr(source, name, None) == ():
                raise ConfigError(f"data.{self.source}.{name}: received no files; name at least one")
        has_test = not hasattr(source, "test") or bool(source.test)
        if has_test == (self.holdout is not None):
            received = "test samples and data.holdout" if has_test else "neither test files nor data.holdout"
            raise ConfigError(
                f"data.{self.source}: received {received}; name files in data.{self.source}.test, or hold out the last samples of the "
                "train files with data.holdout, such as 0.1 (criteo, avazu, csv and parquet)"
            )

    @property
    def source(self) -> str:
        """The name of the one source."""
        return next(name for name in _SOURCES if getattr(self, name) is not None)


_SOURCES = tuple(f.name for f in fields(DataConfig) if f.name not in ("coding", "holdout", "max_bad_lines"))


def _check_rows(rows: Mapping[str, int], key: str) -> None:
    low = {name: number for name, number in rows.items() if number < 1}
    if low:
        raise ConfigError(f"{key}: received {low}; a table has at least 1 row")


def _rows(value: Any, key: str) -> Any:
    """The mapping itself, or the one in the JSON file it names."""
    if not isinstance(value, str):
        return value
    try:
        with g_pathmgr.open(value, "r", encoding="utf-8") as file:
            return json.load(file)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{key}: {value} is not a readable JSON file ({error}); give rows by column name") from None
