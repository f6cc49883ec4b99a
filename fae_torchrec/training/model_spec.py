"""What a model is built from, and the one way to build it: seeded before, its tables' fused optimizer marked after."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from fae_torchrec.core.errors import ConfigError, FAEError
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.modules.model_tables import COLLECTIONS, optimizer_mark, table_configs, table_weights

_OPTIMIZERS: Mapping[Optimizer, type[torch.optim.Optimizer]] = {
    Optimizer.SGD: torch.optim.SGD,
    Optimizer.ADAGRAD: torch.optim.Adagrad,
    Optimizer.ROWWISE_ADAGRAD: RowWiseAdagrad,
    Optimizer.ADAM: torch.optim.Adam,
}


@dataclass(frozen=True)
class ModelSpec:
    """What a model factory is given.

    Attributes:
        rows: feature -> rows of its table, in the order of the features of a batch.
        num_dense: columns of `batch.dense_features`, float32 [samples, num_dense].
        embedding_dim: `model.embedding_dim` of the config; columns of a table.
        dense_arch: `model.dense_arch`, widths; a factory may use them as it likes.
        over_arch: `model.over_arch`, widths.
        options: `model.options`, plain values as the config file has them.
        device: where the embedding collections must lie; "meta" to plan without memory. Other layers may lie on the CPU in any case.
    """

    rows: Mapping[str, int]
    num_dense: int
    embedding_dim: int
    dense_arch: tuple[int, ...] = ()
    over_arch: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


ModelFactory = Callable[[ModelSpec], nn.Module]
"""Makes an unsharded train module: forward(batch) gives (loss, (loss, logits [samples], labels [samples])), as TorchRec's DLRMTrain."""


def build_model(factory: ModelFactory, spec: ModelSpec, optimizer: Optimizer, learning_rate: float, seed: int) -> nn.Module:
    """Builds a train module whose tables are marked for their fused optimizer.

    Args:
        factory: makes the module.
        spec: what it is given.
        optimizer: fused into the backward of all tables of its EmbeddingBagCollections and EmbeddingCollections.
        learning_rate: of the tables.
        seed: of all weights; set before the factory is called.

    Raises:
        ConfigError: the factory failed, or what it made has no table, a table for no feature of the data or with too few rows, one on
            another device, or one that is marked already.
    """
    torch.manual_seed(seed)
    try:
        model = factory(spec)
    except Exception as error:  # whatever somebody else's code may raise
        raise failed(error, "it failed") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"it returned {type(model).__name__}; a torch.nn.Module is needed")
    collections = [module for module in model.modules() if type(module) in COLLECTIONS]
    if not any(table_configs(collection) for collection in collections):
        raise ConfigError(
            f"it returned a {type(model).__name__} without embedding tables; at least one EmbeddingBagCollection or EmbeddingCollection of "
            "TorchRec is needed"
        )
    for collection in collections:
        _check_tables(collection, spec)
        apply_optimizer_in_backward(_OPTIMIZERS[optimizer], collection.parameters(), {"lr": learning_rate})
    return model


def failed(error: Exception, what: str) -> FAEError:
    """What a model's own code raised, as one line: an error of ours as it is, any other with the place where it was raised."""
    if isinstance(error, FAEError):
        return error
    *_, last = traceback.extract_tb(error.__traceback__)
    return ConfigError(f"{what} with {type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno}); correct the model")


def _check_tables(collection: nn.Module, spec: ModelSpec) -> None:
    weights = table_weights(collection)
    for table in table_configs(collection):
        unknown = [feature for feature in table.feature_names if feature not in spec.rows]
        if unknown:
            raise ConfigError(f"its table {table.name!r} is for the features {unknown}, which the data lack; they have {list(spec.rows)}")
        needed = max(spec.rows[feature] for feature in table.feature_names)
        if table.num_embeddings < needed:
            raise ConfigError(
                f"its table {table.name!r} has {table.num_embeddings:,} rows, the ids of {table.feature_names} need {needed:,}; take "
                "spec.rows, or give the data fewer (data.coding)"
            )
        weight = weights[table.name]
        if weight.device.type != spec.device.type:
            raise ConfigError(
                f"its table {table.name!r} lies on {weight.device.type!r}, asked was {spec.device.type!r}; give the collection "
                "device=spec.device"
            )
        if optimizer_mark(weight) is not None:
            raise ConfigError(
                f"its table {table.name!r} has a fused optimizer already; leave apply_optimizer_in_backward out, train.optimizer decides"
            )
