"""The samples of an experiment: the configured source opened, and its vocabulary fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
from fae_torchrec.data.joined_source import JoinedSource
from fae_torchrec.data.parquet import ParquetSource
from fae_torchrec.data.sample_range import held_out
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.synthetic import SyntheticCriteo
from fae_torchrec.data.synthetic_taobao import SyntheticTaobao
from fae_torchrec.data.taobao import FEATURES as TAOBAO_FEATURES
from fae_torchrec.data.taobao import TaobaoSource
from fae_torchrec.data.vocabulary import KeySource, Vocabulary, fit_vocabulary
from fae_torchrec.data_config import CodingConfig, DataConfig, ParquetConfig

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
    opened = _coded_parquet(data) if data.parquet is not None and data.parquet.cardinalities is not None else _raw(data)
    if not opened.train.num_dense and config.model.factory is None:
        raise ConfigError(f"data.{data.source}.dense: received no columns; the dlrm model needs at least one dense column")
    return opened


def make_vocabulary(config: RunConfig, *, show_progress: bool = False) -> Vocabulary:
    """Fits the vocabulary that `data.coding` describes on the train data and saves it where `data.coding.vocabulary` says.

    Raises:
        ConfigError: the coding is not by vocabulary, or a file or the vocabulary's folder is missing.
        DataError: the data are malformed.
    """
    coding = config.data.coding
    if coding.vocabulary is None:
        raise ConfigError(
            f"data.coding.method: received {coding.method!r}; `fae vocabulary` needs 'vocabulary', and in data.coding.vocabulary the path "
            "that it shall write to"
        )
    folder = Path(coding.vocabulary).parent
    if "://" not in coding.vocabulary and not folder.is_dir():  # told before the pass over the data, not after it
        raise ConfigError(f"data.coding.vocabulary: there is no folder {folder} to write to; make it, or correct the path")
    data = config.data
    features, open_split = _raw_source(data)
    unused = category_coding("hash", dict.fromkeys(features, 1))  # keys are read, and no id
    source = cast(KeySource, _splits(data, partial(open_split, unused))[0])
    vocabulary = fit_vocabulary(source, min_count=coding.min_count, max_rows=_most_rows(coding, features), progress=show_progress)
    vocabulary.save(coding.vocabulary)
    return vocabulary


def _synthetic(data: DataConfig) -> ExperimentData:
    synthetic = data.synthetic
    assert synthetic is not None
    source = SyntheticTaobao if synthetic.dataset == "taobao" else partial(SyntheticCriteo, synthetic.dataset)
    shaped = partial(source, scale=synthetic.scale, seed=synthetic.seed)
    train, test = shaped(num_samples=synthetic.train_samples), shaped(num_samples=synthetic.test_samples, split="test")
    return ExperimentData(train.name, train, test, train.cardinalities)


def _coded_parquet(data: DataConfig) -> ExperimentData:
    """Parquet files whose ids are rows already."""
    parquet = data.parquet
    assert parquet is not None and parquet.cardinalities is not None
    rows = {feature: parquet.cardinalities[feature] for feature in parquet.sparse}
    train, test = _splits(data, lambda split: _parquet(parquet, split, tables_rows=rows))
    return ExperimentData(train.name, train, test, rows)


def _parquet(parquet: ParquetConfig, split: str, **options: Any) -> ShardedSource:
    columns: dict[str, Any] = {"dense": parquet.dense, "sparse": parquet.sparse, "label": parquet.label}
    files = [ParquetSource(path, **columns, **options) for path in getattr(parquet, split)]
    return files[0] if len(files) == 1 else JoinedSource(files)


def _raw(data: DataConfig) -> ExperimentData:
    """Data whose categories are coded as they are read."""
    features, open_split = _raw_source(data)
    coding = _coding(data, features)
    train, test = _splits(data, partial(open_split, coding))
    described = ", ".join(f"{key} {value}" for key, value in coding.describe().items() if key != "rows")
    train.name = f"{train.name}, coding {described}"  # it decides the ids: profiles, stores and checkpoints must tell it apart
    return ExperimentData(train.name, train, test, {feature: coding.rows[feature] for feature in features})


def _splits(data: DataConfig, open_split: Callable[[str], ShardedSource]) -> tuple[ShardedSource, ShardedSource]:
    """Train and test samples: files of their own, or the first and the last of the train files'."""
    if data.holdout is None:
        return open_split("train"), open_split("test")
    return held_out(open_split("train"), data.holdout)


def _coding(data: DataConfig, features: Sequence[str]) -> CategoryCoding:
    coding = data.coding
    if coding.vocabulary is None:
        return category_coding(coding.method, _most_rows(coding, features))
    vocabulary = Vocabulary.load(coding.vocabulary)
    return category_coding(coding.method, {feature: vocabulary.rows.get(feature, 1) for feature in features}, vocabulary)


def _most_rows(coding: CodingConfig, features: Sequence[str]) -> dict[str, int] | None:
    """The rows that the features' tables may have; None if nothing limits them (a vocabulary's)."""
    if coding.rows is None:
        return None if coding.max_rows is None else dict.fromkeys(features, coding.max_rows)
    missing = [feature for feature in features if feature not in coding.rows]
    if missing:
        raise ConfigError(f"data.coding.rows: no rows for the features {missing}; it has {sorted(coding.rows)}; add them")
    return {feature: min(coding.rows[feature], coding.max_rows or coding.rows[feature]) for feature in features}


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
    if (parquet := data.parquet) is not None and parquet.cardinalities is None:
        return parquet.sparse, lambda coding, split: _parquet(parquet, split, coding=coding)
    raise ConfigError(
        f"data.{data.source}: its ids are rows already; a vocabulary is for raw categories (criteo, avazu, taobao, csv, or parquet without "
        "cardinalities)"
    )
