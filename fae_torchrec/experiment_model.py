"""The model that an experiment's config describes, and its tables: the one place that builds it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import torch
from torch import nn

from fae_torchrec.config import RunConfig
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import TableSet
from fae_torchrec.experiment_data import ExperimentData
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.dlrm import dlrm
from fae_torchrec.training.model_factory import load_factory
from fae_torchrec.training.model_spec import ModelSpec, build_model
from fae_torchrec.training.model_trial import try_model

_TRIAL_SAMPLES = 8


def experiment_model(config: RunConfig, data: ExperimentData, device: torch.device) -> nn.Module:
    """The configured model, unsharded, its tables marked for their optimizer; on "meta" they take no memory.

    Raises:
        ConfigError: the factory that the config names is not there, fails, or makes what cannot be trained; see `build_model`.
    """
    return _model(config, data, data.rows, device)


def try_experiment(config: RunConfig, data: ExperimentData) -> float:
    """Runs the configured model on the first test samples, with tables of one row.

    Returns:
        Multiplications of one sample's forward; 0 without a test sample.

    Raises:
        ConfigError: as `experiment_model` and `try_model`.
    """
    model = _model(config, data, dict.fromkeys(data.rows, 1), torch.device("cpu"))
    for batch in islice(data.test.batches(_TRIAL_SAMPLES), 1):
        try:
            return try_model(model, batch)
        except ConfigError as error:
            raise ConfigError(f"{_named(config)}: {error}") from error
    return 0.0


def check_model(config: RunConfig, data: ExperimentData) -> None:
    """Finds before any work what is wrong with a model of somebody else's; the errors are those of `try_experiment`."""
    if config.model.factory is not None:
        try_experiment(config, data)


def experiment_tables(config: RunConfig, data: ExperimentData) -> TableSet:
    """The model's tables, from a model on the meta device."""
    return model_tables(experiment_model(config, data, torch.device("meta")))


def placed_tables(config: RunConfig, data: ExperimentData) -> TableSet:
    """The model's tables without those left to stock sharding: what is profiled and placed.

    Raises:
        ConfigError: `placement.stock_tables` names what is no table, or leaves none.
    """
    model = experiment_model(config, data, torch.device("meta"))
    try:
        return model_tables(model, leave=config.placement.stock_tables)
    except ConfigError as error:
        raise ConfigError(f"placement.stock_tables: {error}; name tables of the model, and not all of them") from None


def _model(config: RunConfig, data: ExperimentData, rows: Mapping[str, int], device: torch.device) -> nn.Module:
    model, train = config.model, config.train
    spec = ModelSpec(rows, data.train.num_dense, model.embedding_dim, model.dense_arch, model.over_arch, model.options, device)
    try:
        factory = dlrm if model.factory is None else load_factory(model.factory)
        return build_model(factory, spec, train.optimizer, train.learning_rate, train.seed)
    except ConfigError as error:
        raise ConfigError(f"{_named(config)}: {error}") from error


def _named(config: RunConfig) -> str:
    return "model" if config.model.factory is None else f"model.factory {config.model.factory}"
