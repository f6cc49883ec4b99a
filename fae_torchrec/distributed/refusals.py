"""What hot/cold tables do not support, refused at planning time with the table's name and what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ModuleSharder
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer, TableSpec
from fae_torchrec.distributed.input_error import input_error
from fae_torchrec.modules.model_tables import COLLECTIONS, DTYPES, OPTIMIZERS, optimizer_mark, table_configs, table_weights

_TO_STOCK = "leave the table to stock sharding (stock_tables), or plan this model with EmbeddingShardingPlanner"

# Fields of stock configs that TorchRec 1.8 honours and a second tier would break.
_CONFIG_FIELDS: Mapping[str, str] = {
    "use_virtual_table": "is a virtual table, whose rows come and go",
    "num_embeddings_post_pruning": "is pruned, so that its ids are not its rows",
    "enable_embedding_update": "lets its rows be written between steps, which would not reach its hot rows",
    "stash_weights": "stashes its weights between steps, when hot rows may be written back to it",
}
# Fields of ParameterConstraints: for every placed table, and for tables with hot rows.
_CONSTRAINT_FIELDS: Mapping[str, str] = {
    "batch_sizes": "declare a batch size per feature (variable batch)",
    "num_poolings": "declare several poolings per sample (variable batch)",
    "use_virtual_table": "make it a virtual table, whose rows come and go",
}
_KERNEL_FIELDS = ("output_dtype", "stochastic_rounding", "bounds_check_mode")

_BY_FBGEMM_NAME: Mapping[str, Optimizer] = {
    "sgd": Optimizer.SGD,
    "exact_sgd": Optimizer.SGD,
    "exact_adagrad": Optimizer.ADAGRAD,
    "rowwise_adagrad": Optimizer.ROWWISE_ADAGRAD,
    "exact_row_wise_adagrad": Optimizer.ROWWISE_ADAGRAD,
    "adam": Optimizer.ADAM,
}
_DECAYS = (WeightDecayMode.NONE, WeightDecayMode.L2, WeightDecayMode.DECOUPLE)


def check_constraints(placement: RowPlacement, constraints: Mapping[str, ParameterConstraints]) -> None:
    """Checks what the user's constraints ask of placed tables.

    Raises:
        PlannerError: they ask for what hot/cold tables do not support.
    """
    for table in placement.tables:
        constraint = constraints.get(table.name, ParameterConstraints())
        for field, what in _CONSTRAINT_FIELDS.items():
            if getattr(constraint, field):
                raise _refusal(f"the constraints of table {table.name!r} {what}: {field}={getattr(constraint, field)}")
        for field in _KERNEL_FIELDS:
            if placement.hot_rows(table.name) and getattr(constraint, field) is not None:
                raise _refusal(
                    f"the constraints of table {table.name!r} set {field}={getattr(constraint, field)}, which would miss its hot rows",
                    f"set it for all tables in the sharders' fused_params (get_fae_sharders), or {_TO_STOCK}",
                )


def check_not_ours(path: str, module: nn.Module, placement: RowPlacement) -> None:
    """Checks that no placed table is in a module that our sharders do not take.

    Raises:
        PlannerError: there is one: in a module that another sharder takes whole, such as one with feature processors, or in a collection
            for which the sharders hold none of ours.
    """
    placed = sorted({config.name for inner in module.modules() for config in table_configs(inner)} & set(placement.tables.names))
    if not placed:
        return
    if type(module) in COLLECTIONS:
        raise input_error(
            f"the sharders hold no FAE{type(module).__name__}Sharder, so nothing could build the hot tier of {placed} in "
            f"{path or 'the model'}; pass get_fae_sharders()"
        )
    raise input_error(
        f"tables {placed} of the placement belong to {path or 'the model'}, a {type(module).__name__}, which TorchRec shards as a whole: "
        "hot/cold tables support no feature processors, managed collisions, quantized or fused collections; make the placement without "
        "these tables (model_tables leaves them out) and stock sharding keeps them, or plan this model with EmbeddingShardingPlanner"
    )


def check_tables(collection: nn.Module, stock_tables: Collection[str]) -> None:
    """Checks the dtypes and optimizers of a collection's placed tables.

    Args:
        collection: an EmbeddingBagCollection or EmbeddingCollection.
        stock_tables: names of tables left to stock sharding.

    Raises:
        PlannerError: hot/cold tables may not have one of them.
    """
    weights = table_weights(collection)
    for config in table_configs(collection):
        if config.name in stock_tables:
            continue
        if config.data_type not in DTYPES:
            allowed = [dtype.name for dtype in DTYPES]
            raise _refusal(f"table {config.name!r} has data type {config.data_type.name}; hot/cold tables may have {allowed}")
        mark = optimizer_mark(weights[config.name])
        if mark is not None and mark.__name__ not in OPTIMIZERS:
            raise _refusal(
                f"table {config.name!r} is optimized by {mark.__name__} (apply_optimizer_in_backward); hot/cold tables may use "
                f"{sorted(OPTIMIZERS)}"
            )


def check_collection(path: str, collection: nn.Module, stock_tables: Collection[str]) -> None:
    """Checks the placed tables of one collection that will be hot/cold.

    Args:
        path: of the collection in the model.
        collection: an EmbeddingBagCollection or EmbeddingCollection.
        stock_tables: names of tables left to stock sharding.

    Raises:
        PlannerError: a table's config, or the collection itself, asks for what hot/cold tables do not support.
    """
    placed = [config for config in table_configs(collection) if config.name not in stock_tables]
    if isinstance(collection, EmbeddingCollection) and collection.need_indices():
        raise _refusal(
            f"{path}: tables {[config.name for config in placed]} are of an EmbeddingCollection with need_indices=True, which hot/cold "
            "tables do not support",
            f"use need_indices=False, or {_TO_STOCK}",
        )
    if isinstance(collection, EmbeddingBagCollection) and collection.is_weighted():
        mean = [config.name for config in placed if isinstance(config, EmbeddingBagConfig) and config.pooling is PoolingType.MEAN]
        if mean:
            raise _refusal(
                f"{path}: tables {mean} pool weighted ids by MEAN, which hot/cold tables do not support", f"use SUM, or {_TO_STOCK}"
            )
    for config in placed:
        for field, what in _CONFIG_FIELDS.items():
            value = getattr(config, field, None)
            if value is not None and value is not False:
                raise _refusal(f"table {config.name!r} {what} ({field}={value}), which hot/cold tables do not support")


def check_optimizer(table: TableSpec, device_type: str) -> None:
    """Checks that there is a fused kernel for a table with hot rows.

    Raises:
        PlannerError: there is none on the device.
    """
    if device_type == "cpu" and _cpu_kernel_lacks(table.optimizer):
        have = sorted(optimizer.value for optimizer in Optimizer if not _cpu_kernel_lacks(optimizer))
        raise input_error(
            f"table {table.name!r} is optimized by {table.optimizer.value}, for which FBGEMM 1.8 has no fused kernel on the CPU (neither "
            f"has stock sharding: it fails with a bare assertion); choose one of {have}, or train on cuda"
        )


def check_weight_decay(collection: nn.Module, sharder: ModuleSharder[nn.Module], tables: Iterable[TableSpec], device_type: str) -> None:
    """Checks that replicated hot rows would decay as stock's do.

    FBGEMM 1.8's row-wise Adagrad on the CPU lets the rows of tables with several features decay, and of no other table; the kernel of
    replicated hot rows has one feature for all tables. Modes that count steps or accesses by kernel would count a replicated kernel's
    lookup and update apart.

    Args:
        collection: an EmbeddingBagCollection or EmbeddingCollection.
        sharder: of that collection.
        tables: its tables with replicated hot rows.
        device_type: where they are trained.

    Raises:
        PlannerError: a table's hot rows would not decay, or not as stock's.
    """
    weights = table_weights(collection)
    for table in tables:
        marked: dict[str, Any] = next(iter(getattr(weights[table.name], "_optimizer_kwargs", [])), {})  # its name in TorchRec 1.8
        params = {**(sharder.fused_params or {}), **marked}
        mode = params.get("weight_decay_mode", WeightDecayMode.NONE)
        if mode not in _DECAYS:
            raise _refusal(
                f"table {table.name!r} has weight_decay_mode={mode}; replicated hot rows may have {[mode.name for mode in _DECAYS]}",
                f"use hot_tier='table_wise', or {_TO_STOCK}",
            )
        decays = params.get("weight_decay") and mode is not WeightDecayMode.NONE
        if device_type == "cpu" and decays and table.optimizer is Optimizer.ROWWISE_ADAGRAD and len(table.feature_names) > 1:
            raise _refusal(
                f"table {table.name!r} has weight_decay={params['weight_decay']} and the features {list(table.feature_names)}; on the CPU "
                "FBGEMM 1.8's row-wise Adagrad decays tables of several features alone, and replicated hot rows would not",
                f"use hot_tier='table_wise', train on cuda, or {_TO_STOCK}",
            )


def fused_optimizer(collection: nn.Module, sharder: ModuleSharder[nn.Module], stock_tables: Collection[str]) -> Optimizer:
    """The optimizer of a collection's unmarked tables: what the sharder's fused_params say, else FBGEMM's default.

    Raises:
        PlannerError: an unmarked table to be placed would have an optimizer that hot/cold tables do not support.
    """
    weights = table_weights(collection)
    unmarked = [c.name for c in table_configs(collection) if c.name not in stock_tables and optimizer_mark(weights[c.name]) is None]
    name: Any = getattr((sharder.fused_params or {}).get("optimizer"), "value", "exact_sgd")
    if unmarked and name not in _BY_FBGEMM_NAME:
        raise _refusal(
            f"tables {unmarked} carry no mark of apply_optimizer_in_backward and the sharder's fused_params name the optimizer {name!r}; "
            f"hot/cold tables may use {sorted(set(_BY_FBGEMM_NAME))}"
        )
    return _BY_FBGEMM_NAME.get(name, Optimizer.SGD)


def _cpu_kernel_lacks(optimizer: Optimizer) -> bool:
    """Whether FBGEMM 1.8 has no fused CPU kernel for an optimizer."""
    return optimizer is Optimizer.ADAM


def _refusal(what: str, remedy: str = _TO_STOCK) -> PlannerError:
    return input_error(f"{what}; {remedy}")
