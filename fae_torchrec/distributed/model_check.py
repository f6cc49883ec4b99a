"""The collections of a model that our sharders take, checked against a placement before any collective."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from torch import nn
from torchrec.distributed.types import ModuleSharder
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from fae_torchrec.core.errors import FingerprintError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind, TableSet, TableSpec
from fae_torchrec.distributed.input_error import input_error
from fae_torchrec.distributed.refusals import (
    check_collection,
    check_not_ours,
    check_optimizer,
    check_tables,
    check_weight_decay,
    fused_optimizer,
)
from fae_torchrec.distributed.sharder import FAEEmbeddingBagCollectionSharder, FAEEmbeddingCollectionSharder
from fae_torchrec.modules.model_tables import COLLECTIONS, sharded_modules, table_configs, table_specs


class PlannedCollection(NamedTuple):
    """A collection that our sharders take, as far as planning looks at it."""

    path: str
    names: tuple[str, ...]
    placed: tuple[TableSpec, ...]
    hot_cold: bool
    pooled: bool


def is_ours(sharder: ModuleSharder[nn.Module]) -> bool:
    """Whether a sharder is one of `get_fae_sharders` that makes hot/cold modules."""
    return isinstance(sharder, FAEEmbeddingBagCollectionSharder | FAEEmbeddingCollectionSharder)


def placed_collections(
    module: nn.Module, sharders: Sequence[ModuleSharder[nn.Module]], stock_tables: Sequence[str]
) -> list[PlannedCollection]:
    """The collections and the tables of theirs that may be placed, before anybody knows which rows are hot.

    Args:
        module: the unsharded model.
        sharders: `get_fae_sharders()`.
        stock_tables: names of tables left to stock sharding.

    Raises:
        PlannerError: `stock_tables` names what is no table.
    """
    ours = {sharder.module_type: sharder for sharder in sharders if is_ours(sharder)}
    modules = _modules(module, sharders)
    _check_stock_tables(modules, stock_tables)
    found = []
    for path, part in modules:
        if type(part) in ours:
            check_tables(part, stock_tables)
            default = fused_optimizer(part, ours[type(part)], stock_tables)
            names = tuple(config.name for config in table_configs(part))
            found.append(PlannedCollection(path, names, tuple(table_specs(part, default, stock_tables)), False, _is_pooled(part)))
    return found


def checked_collections(
    module: nn.Module,
    sharders: Sequence[ModuleSharder[nn.Module]],
    placement: RowPlacement,
    stock_tables: Sequence[str],
    *,
    replicated: bool,
    device_type: str,
    cold_beside_device: bool,
) -> list[PlannedCollection]:
    """The collections to plan under a placement.

    Args:
        module: the unsharded model.
        sharders: `get_fae_sharders()`.
        placement: where the rows live.
        stock_tables: names of tables left to stock sharding.
        replicated: whether every rank holds every hot row.
        device_type: where the ranks train.
        cold_beside_device: whether the cold tier's kernels run on the CPU while the ranks train on another device.

    Raises:
        FingerprintError: the placement belongs to other tables than the model's.
        PlannerError: a table uses what hot/cold tables do not support.
    """
    ours = {sharder.module_type: sharder for sharder in sharders if is_ours(sharder)}
    modules = _modules(module, sharders)
    _check_stock_tables(modules, stock_tables)
    collections = []
    for path, part in modules:
        if type(part) not in ours:
            check_not_ours(path, part, placement)
            continue
        check_tables(part, stock_tables)
        names = tuple(config.name for config in table_configs(part))
        hot_cold = any(name in placement.tables.names and placement.hot_rows(name) for name in names)
        if hot_cold:
            check_collection(path, part, stock_tables)
        default = fused_optimizer(part, ours[type(part)], stock_tables)
        placed = tuple(table_specs(part, default, stock_tables))
        if cold_beside_device and placed and not hot_cold:
            raise input_error(
                f"module {path!r}: the placement has no hot row of its tables {[table.name for table in placed]}, and with "
                "cold_tier='host' TorchRec would have to look the whole module up on the host; choose cold_tier='uvm', give the "
                "placement a hot row of them (a larger budget), or leave them to stock sharding (stock_tables)"
            )
        collections.append(PlannedCollection(path, names, placed, hot_cold, _is_pooled(part)))
    tables = TableSet(tuple(chain.from_iterable(collection.placed for collection in collections)))
    _check_same_tables(tables, placement)
    for table in tables:
        if placement.hot_rows(table.name):
            check_optimizer(table, device_type)
        if cold_beside_device and placement.kind(table.name) is not TableKind.HOT:
            check_optimizer(table, "cpu")
    if replicated:
        parts = dict(modules)
        for collection in collections:
            part = parts[collection.path]
            hot = [table for table in collection.placed if placement.hot_rows(table.name)]
            check_weight_decay(part, ours[type(part)], hot, device_type)
    return collections


def _is_pooled(part: nn.Module) -> bool:
    return isinstance(part, EmbeddingBagCollection)


def _modules(module: nn.Module, sharders: Iterable[ModuleSharder[nn.Module]]) -> list[tuple[str, nn.Module]]:
    return list(sharded_modules(module, {sharder.module_type for sharder in sharders}.difference(COLLECTIONS)))


def _check_stock_tables(modules: Iterable[tuple[str, nn.Module]], stock_tables: Sequence[str]) -> None:
    known = {config.name for _, part in modules for inner in part.modules() for config in table_configs(inner)}
    unknown = sorted(set(stock_tables) - known)
    if unknown:
        raise input_error(f"stock_tables {unknown} are not tables of the model, which has {sorted(known)}; correct the names")


def _check_same_tables(tables: TableSet, placement: RowPlacement) -> None:
    try:
        placement.check_tables(tables)
    except FingerprintError as error:
        unplaced = [name for name in tables.names if name not in placement.tables.names]
        if not unplaced:
            raise
        raise FingerprintError(
            f"{error}; or leave the tables that the placement does not know to stock sharding: FAEShardingPlanner(..., "
            f"stock_tables={unplaced})"
        ) from None
