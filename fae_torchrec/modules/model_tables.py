"""The embedding tables of a model as a TableSet: what the calibrator, the hot set and the planner start from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec

_DTYPES: Mapping[DataType, str] = {DataType.FP32: "fp32", DataType.FP16: "fp16", DataType.BF16: "bf16"}
# Class names rather than classes: torch.optim and torchrec.optim each have their own of the same name.
_OPTIMIZERS: Mapping[str, Optimizer] = {
    "SGD": Optimizer.SGD,
    "Adagrad": Optimizer.ADAGRAD,
    "RowWiseAdagrad": Optimizer.ROWWISE_ADAGRAD,
    "Adam": Optimizer.ADAM,
}


def model_tables(model: nn.Module, optimizer: Optimizer = Optimizer.SGD) -> TableSet:
    """Lists the tables of every EmbeddingBagCollection of a model, in the model's order.

    Args:
        model: an unsharded model; the meta device will do.
        optimizer: the fused optimizer of tables that `apply_optimizer_in_backward` has not marked (TorchRec's own default is SGD).

    Raises:
        ConfigError: there is none, two tables share a name, or a table's dtype or optimizer is not supported.
    """
    specs = []
    for module in model.modules():
        if not isinstance(module, EmbeddingBagCollection):
            continue
        for config in module.embedding_bag_configs():
            if config.data_type not in _DTYPES:
                allowed = [dtype.name for dtype in _DTYPES]
                raise ConfigError(f"table {config.name!r} has data type {config.data_type.name}; hot/cold tables may have {allowed}")
            marks = getattr(module.embedding_bags[config.name].weight, "_optimizer_classes", [])
            specs.append(
                TableSpec(
                    name=config.name,
                    rows=config.num_embeddings,
                    dim=config.embedding_dim,
                    feature_names=tuple(config.feature_names),
                    dtype=_DTYPES[config.data_type],
                    optimizer=_optimizer(config.name, marks[0]) if marks else optimizer,
                )
            )
    if not specs:
        raise ConfigError(f"{type(model).__name__} has no EmbeddingBagCollection; hot/cold placement needs at least one")
    return TableSet(tuple(specs))


def _optimizer(table: str, optimizer_class: type) -> Optimizer:
    if optimizer_class.__name__ not in _OPTIMIZERS:
        raise ConfigError(
            f"table {table!r} is optimized by {optimizer_class.__name__}, received from apply_optimizer_in_backward; hot/cold tables may "
            f"use {sorted(_OPTIMIZERS)}; leave the table to stock sharding or choose one of these"
        )
    return _OPTIMIZERS[optimizer_class.__name__]
