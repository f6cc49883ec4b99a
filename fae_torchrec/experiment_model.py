"""The model that an experiment's config describes, and its tables."""

from __future__ import annotations

from typing import Any

import torch

from fae_torchrec.config import RunConfig
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import TableSet
from fae_torchrec.experiment_data import ExperimentData
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.dlrm import build_dlrm


def experiment_model(config: RunConfig, data: ExperimentData, device: torch.device) -> Any:
    """The configured model, unsharded; on "meta" it takes no memory."""
    return build_dlrm(
        data.rows,
        data.train.num_dense,
        config.model.embedding_dim,
        config.model.dense_arch,
        config.model.over_arch,
        config.train.optimizer,
        config.train.learning_rate,
        config.train.seed,
        device,
    )


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
