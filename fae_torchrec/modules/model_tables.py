"""The embedding tables of a model as a TableSet: what the calibrator, the hot set and the planner start from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection, ManagedCollisionEmbeddingCollection
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.quant.embedding_modules import QuantManagedCollisionEmbeddingCollection

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec
from fae_torchrec.modules.lookups import TableConfig

COLLECTIONS = (EmbeddingBagCollection, EmbeddingCollection)
"""What a hot/cold module can stand for; by exact type, as DistributedModelParallel looks its sharders up."""
SHARDED_WHOLE = (
    FeatureProcessedEmbeddingBagCollection,
    FusedEmbeddingBagCollection,
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
    QuantEmbeddingBagCollection,
    QuantEmbeddingCollection,
    QuantManagedCollisionEmbeddingCollection,
)
"""The other modules that TorchRec's default sharders take, with the collections inside them."""
DTYPES: Mapping[DataType, str] = {DataType.FP32: "fp32", DataType.FP16: "fp16", DataType.BF16: "bf16"}
"""Dtypes of hot/cold tables."""
# Class names rather than classes: torch.optim and torchrec.optim each have their own of the same name.
OPTIMIZERS: Mapping[str, Optimizer] = {
    "SGD": Optimizer.SGD,
    "Adagrad": Optimizer.ADAGRAD,
    "RowWiseAdagrad": Optimizer.ROWWISE_ADAGRAD,
    "Adam": Optimizer.ADAM,
}
"""Fused optimizers of hot/cold tables, by the name of the class that `apply_optimizer_in_backward` received."""


def model_tables(model: nn.Module, optimizer: Optimizer = Optimizer.SGD, leave: Iterable[str] = ()) -> TableSet:
    """Lists the tables of every EmbeddingBagCollection and EmbeddingCollection of a model, in the model's order.

    Tables inside modules that TorchRec shards as a whole (feature processors, managed collisions, quantized collections) are not
    listed: they stay with stock sharding.

    Args:
        model: an unsharded model; the meta device will do.
        optimizer: the fused optimizer of tables that `apply_optimizer_in_backward` has not marked (TorchRec's own default is SGD).
        leave: names of tables to leave out because stock sharding keeps them; see `stock_tables` of FAEShardingPlanner.

    Raises:
        ConfigError: there is none, two tables share a name, a table's dtype or optimizer is not supported, or no table has a name that
            is to be left out.
    """
    collections = [module for _, module in sharded_modules(model) if type(module) in COLLECTIONS]
    names = {config.name for collection in collections for config in table_configs(collection)}
    leave = set(leave)
    if leave - names:
        raise ConfigError(
            f"tables to leave out: {sorted(leave - names)} are not tables of {type(model).__name__}, which has {sorted(names)}"
        )
    specs = [spec for collection in collections for spec in table_specs(collection, optimizer, leave)]
    if not specs:
        raise ConfigError(
            f"{type(model).__name__} has no EmbeddingBagCollection or EmbeddingCollection with a table to place (left out: "
            f"{sorted(leave)}); hot/cold placement needs at least one"
        )
    return TableSet(tuple(specs))


def sharded_modules(
    model: nn.Module, sharded_whole: Collection[type[nn.Module]] = SHARDED_WHOLE, path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a sharder takes, with their paths, as DistributedModelParallel walks the model: it does not look into them.

    Args:
        model: an unsharded model.
        sharded_whole: types that sharders take besides `COLLECTIONS`.
        path: of `model` itself.
    """
    if type(model) in COLLECTIONS or type(model) in sharded_whole:
        yield path, model
        return
    for name, child in model.named_children():
        yield from sharded_modules(child, sharded_whole, f"{path}.{name}" if path else name)


def table_configs(collection: nn.Module) -> list[TableConfig]:
    """The stock configs of a collection (EmbeddingBagCollection, EmbeddingCollection or a kin of theirs); none of other modules."""
    for listing in ("embedding_bag_configs", "embedding_configs"):
        if hasattr(collection, listing):
            return list(getattr(collection, listing)())
    return []


def table_weights(collection: nn.Module) -> Mapping[str, nn.Parameter]:
    """The unsharded weights [num_embeddings, embedding_dim] of an EmbeddingBagCollection or EmbeddingCollection, by table."""
    tables: Any = collection.embedding_bags if isinstance(collection, EmbeddingBagCollection) else collection.embeddings
    return {name: table.weight for name, table in tables.items()}


def table_specs(collection: nn.Module, optimizer: Optimizer, leave: Collection[str] = ()) -> list[TableSpec]:
    """The tables of one collection; arguments and errors as `model_tables`."""
    weights = table_weights(collection)
    pooled = isinstance(collection, EmbeddingBagCollection)
    return [_spec(config, weights[config.name], optimizer, pooled) for config in table_configs(collection) if config.name not in leave]


def optimizer_mark(weight: nn.Parameter) -> type | None:
    """The optimizer class with which `apply_optimizer_in_backward` marked a table, if it did."""
    # The mark's name in TorchRec 1.8.
    return next(iter(getattr(weight, "_optimizer_classes", [])), None)


def _spec(config: TableConfig, weight: nn.Parameter, optimizer: Optimizer, pooled: bool) -> TableSpec:
    if config.data_type not in DTYPES:
        raise ConfigError(
            f"table {config.name!r} has data type {config.data_type.name}; hot/cold tables may have {[dtype.name for dtype in DTYPES]}; "
            "leave the table to stock sharding or choose one of these"
        )
    mark = optimizer_mark(weight)
    if mark is not None and mark.__name__ not in OPTIMIZERS:
        raise ConfigError(
            f"table {config.name!r} is optimized by {mark.__name__}, received from apply_optimizer_in_backward; hot/cold tables may "
            f"use {sorted(OPTIMIZERS)}; leave the table to stock sharding or choose one of these"
        )
    return TableSpec(
        name=config.name,
        rows=config.num_embeddings,
        dim=config.embedding_dim,
        feature_names=tuple(config.feature_names),
        dtype=DTYPES[config.data_type],
        optimizer=optimizer if mark is None else OPTIMIZERS[mark.__name__],
        pooled=pooled,
    )
