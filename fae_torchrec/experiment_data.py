"""The samples of an experiment: the configured source opened, and its vocabulary fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from fae_torchrec.config import RunConfig
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.data.avazu import FEATURES as AVAZU_FEATURES
from fae_torchrec.data.avazu import AvazuSource
from fae_torchrec.data.coding import CategoryCoding, category_coding
from fae_torchrec.data.criteo_npy import CriteoNpySource
from fae_torchrec.data.criteo_shape import SPARSE_NAMES
from fae_torchrec.data.criteo_tsv import CriteoTsvSource
from fae_torchrec.data.csv_source import CsvSource
from fae_torchrec.data.parquet import ParquetSource
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.synthetic import SyntheticCriteo
from fae_torchrec.data.taobao import FEATURES as TAOBAO_FEATURES
from fae_torchrec.data.taobao import TaobaoSource
from fae_torchrec.data.vocabulary import KeySource, Vocabulary, fit_vocabulary
from fae_torchrec.data_config import DataConfig

Open = Callable[[CategoryCoding, str], ShardedSource]
"""Opens "train" or "test" of raw data with a coding."""


@dataclass(frozen=True)
class ExperimentData:
    """The samples of an experiment.

    Attributes:
        name: what the data are, with everything that decides them.
        train: training samples.
        test: test samples.
        rows: feature -> rows of its table, in the order of the features.
    """

    name: str
    train: ShardedSource
    test: ShardedSource
    rows: Mapping[str, int]


def open_data(config: RunConfig) -> ExperimentData:
    """Opens the configured data; reads no sample yet.

    Raises:
        ConfigError: a file, a column, a row count or the vocabulary is missing, or the model has no dense column to work on.
    """
    data = config.data
    if data.synthetic is not None:
        return _synthetic(data)
    opened = _parquet(data) if data.parquet is not None else _raw(data)
    if not opened.train.num_dense:
        raise ConfigError(f"data.{data.source}.dense: received no columns; the dlrm model needs at least one dense column")
    return opened


def make_vocabulary(config: RunConfig, *, show_progress: bool = False) -> Vocabulary:
    """Fits the vocabulary that `data.coding` describes on the train data and saves it where `data.coding.vocabulary` says.

    Raises:
        ConfigError: the coding is not by vocabulary, or a file is missing.
        DataError: the data are malformed.
    """
    coding = config.data.coding
    if coding.vocabulary is None:
        raise ConfigError(
            f"data.coding.method: received {coding.method!r}; `fae vocabulary` needs 'vocabulary', and in data.coding.vocabulary the path "
            "that it shall write to"
        )
    features, open_split = _raw_source(config.data)
    unused = category_coding("hash", dict.fromkeys(features, 1))  # keys are read, and no id
    source = cast(KeySource, open_split(unused, "train"))
    max_rows = coding.max_rows if coding.rows is None else coding.rows
    vocabulary = fit_vocabulary(source, min_count=coding.min_count, max_rows=max_rows, progress=show_progress)
    vocabulary.save(coding.vocabulary)
    return vocabulary


def _synthetic(data: DataConfig) -> ExperimentData:
    synthetic = data.synthetic
    assert synthetic is not None
    criteo = partial(SyntheticCriteo, synthetic.dataset, scale=synthetic.scale, seed=synthetic.seed)
    train, test = criteo(num_samples=synthetic.train_samples), criteo(num_samples=synthetic.test_samples, split="test")
    return ExperimentData(train.name, train, test, train.cardinalities)


def _parquet(data: DataConfig) -> ExperimentData:
    parquet = data.parquet
    assert parquet is not None
    rows = {feature: parquet.cardinalities[feature] for feature in parquet.sparse}
    open_file = partial(ParquetSource, dense=parquet.dense, sparse=parquet.sparse, label=parquet.label, tables_rows=rows)
    train, test = open_file(parquet.train), open_file(parquet.test)
    return ExperimentData(train.name, train, test, rows)


def _raw(data: DataConfig) -> ExperimentData:
    """Data whose categories are coded as they are read."""
    features, open_split = _raw_source(data)
    coding = _coding(data, features)
    train, test = open_split(coding, "train"), open_split(coding, "test")
    described = ", ".join(f"{key} {value}" for key, value in coding.describe().items() if key != "rows")
    return ExperimentData(f"{train.name}, coding {described}", train, test, {feature: coding.rows[feature] for feature in features})


def _coding(data: DataConfig, features: Sequence[str]) -> CategoryCoding:
    coding = data.coding
    vocabulary = None if coding.vocabulary is None else Vocabulary.load(coding.vocabulary)
    if coding.rows is not None:
        missing = [feature for feature in features if feature not in coding.rows]
        if missing:
            raise ConfigError(f"data.coding.rows: no rows for the features {missing}; it has {sorted(coding.rows)}; add them")
    most = coding.max_rows
    given: Mapping[str, int] | None = coding.rows if vocabulary is None else vocabulary.rows
    if given is None:
        assert most is not None  # DataConfig asks for one of both
        given = dict.fromkeys(features, most)
    capped = most is not None and vocabulary is None
    rows = {
        feature: min(given[feature], most) if capped and most is not None else given[feature] for feature in features if feature in given
    }
    return category_coding(coding.method, rows, vocabulary)


def _raw_source(data: DataConfig) -> tuple[Sequence[str], Open]:
    """The features of the configured raw data, and how to open either split."""
    bad: dict[str, Any] = {"max_bad_lines": data.max_bad_lines}
    if (criteo := data.criteo) is not None:
        return SPARSE_NAMES, lambda coding, split: CriteoTsvSource(getattr(criteo, split), coding=coding, **bad)
    if (npy := data.criteo_npy) is not None:
        days = {"train": {"days": npy.train_days}, "test": {"days": [npy.test_day], "stage": npy.test_stage}}
        return SPARSE_NAMES, lambda coding, split: CriteoNpySource(
            npy.folder, coding=coding, sparse_part=npy.sparse_part, **cast(Any, days[split])
        )
    if (avazu := data.avazu) is not None:
        return AVAZU_FEATURES, lambda coding, split: AvazuSource(getattr(avazu, split), coding=coding, **bad)
    if (taobao := data.taobao) is not None:
        options = {key: value for key, value in vars(taobao).items() if key != "files"}
        return TAOBAO_FEATURES, lambda coding, split: TaobaoSource(taobao.files, coding=coding, split=cast(Any, split), **options, **bad)
    if (csv := data.csv) is not None:
        columns = {key: value for key, value in vars(csv).items() if key not in ("train", "test")}
        return csv.sparse, lambda coding, split: CsvSource(getattr(csv, split), coding=coding, **columns, **bad)
    raise ConfigError(f"data.{data.source}: its ids are rows already; a vocabulary is for raw categories (criteo, avazu, taobao, csv)")
