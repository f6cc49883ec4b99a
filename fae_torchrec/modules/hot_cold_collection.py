"""What the unsharded hot/cold collections share, pooled or not: plain tensors for the hot rows, a stock collection for the cold tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableKind, TableSet
from fae_torchrec.modules.conversion import hot_rows_of, merge_into_stock
from fae_torchrec.modules.lookups import cold_configs, hot_groups
from fae_torchrec.modules.model_tables import model_tables, table_configs, table_weights
from fae_torchrec.modules.tier_split import HotBags


class HotColdCollection(nn.Module):
    """The tiers of one collection; its `state_dict` is the stock one, `<prefix>.<table>.weight`, whole tables, both ways.

    Args:
        stock: the stock collection; its weights are copied (unless it is on the meta device).
        placement: where the rows of its tables live.
        hot_device: device of the hot tier and of the output; ids are expected there. Default: the device of `stock`.
        cold_device: device of the cold tier. Default: the device of `stock`.
        new_cold_tier: makes the stock collection of the cold tier of its tables, on a device.

    Raises:
        ConfigError: a table's dtype or optimizer is not supported.
        FingerprintError: the placement lacks a table of `stock`, or has it with other rows or features.
    """

    prefix: str
    """Where its state has the tables: "embedding_bags" or "embeddings"."""

    def __init__(
        self,
        stock: EmbeddingBagCollection | EmbeddingCollection,
        placement: RowPlacement,
        hot_device: torch.device | None,
        cold_device: torch.device | None,
        new_cold_tier: Callable[[list[Any], torch.device], nn.Module],
    ) -> None:
        super().__init__()
        tables = model_tables(stock)
        placed = TableSet(tuple(placement.tables[name] for name in tables.names if name in placement.tables.names))
        placed.check_same(tables, f"row placement {placement.fingerprint}")  # it may hold the tables of other collections too
        configs = table_configs(stock)
        self._shapes = {config.name: (config.num_embeddings, config.embedding_dim) for config in configs}
        self._device = hot_device or stock.device
        self._kinds = {config.name: placement.kind(config.name) for config in configs}
        self._hot_ids = {config.name: torch.as_tensor(placement.hot_ids[config.name]) for config in configs}
        self._groups = hot_groups(configs, placement)
        dtypes = {name: weight.dtype for name, weight in table_weights(stock).items()}
        self.hot = nn.ParameterList(
            torch.zeros(group.num_slots + 1, group.dim, device=self._device, dtype=dtypes[group.lookups[0].table]) for group in self._groups
        )
        cold = cold_configs(configs, placement)
        self.cold: Any = new_cold_tier(cold, cold_device or stock.device) if cold else None
        self.register_state_dict_post_hook(_to_stock_keys)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_from_stock_keys)  # type: ignore[no-untyped-call]
        if stock.device.type != "meta":
            self.load_state_dict(stock.state_dict())

    def sum_hot(self, bags: list[HotBags]) -> list[torch.Tensor]:
        """Sums every bag's hot rows: [bags, dim] by group."""
        return [_sum_bags(weight, part) for weight, part in zip(self.hot, bags, strict=True)]

    def slots_of(self) -> Iterator[tuple[str, str, int, int]]:
        """Where each table's hot rows lie: (table, name of the parameter, its first row there, hot rows)."""
        for number, group in enumerate(self._groups):
            first = 1  # after the row of zeros for cold ids
            for table, rows in group.tables:
                yield table, f"hot.{number}", first, rows
                first += rows

    @property
    def device(self) -> torch.device:
        """Device of the hot tier and of the output."""
        return self._device


def _sum_bags(weight: torch.Tensor, bags: HotBags) -> torch.Tensor:
    weights = None if bags.weights is None else bags.weights.to(weight.dtype)
    sums: torch.Tensor = torch.nn.functional.embedding_bag(
        bags.slots, weight, bags.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True, padding_idx=0
    )
    return sums


def _to_stock_keys(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    """State dict hook: whole stock tables in place of the two tiers."""
    assert isinstance(module, HotColdCollection)
    hot = {table: state[prefix + name][first : first + rows] for table, name, first, rows in module.slots_of()}
    cold = {table: state.pop(f"{prefix}cold.{module.prefix}.{table}.weight", None) for table in module._kinds}
    for number in range(len(module.hot)):
        del state[f"{prefix}hot.{number}"]
    for table, kind in module._kinds.items():
        if kind is TableKind.SPLIT:
            weight = merge_into_stock(cold[table].detach(), hot[table].detach(), module._hot_ids[table])
        else:
            weight = hot[table] if kind is TableKind.HOT else cold[table]
        state[f"{prefix}{module.prefix}.{table}.weight"] = weight


def _from_stock_keys(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _metadata: dict[str, Any],
    _strict: bool,
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Load hook: the two tiers in place of whole stock tables; a table that is missing or has another shape keeps its rows."""
    assert isinstance(module, HotColdCollection)
    weights = dict(module.named_parameters())
    stock: dict[str, torch.Tensor] = {}
    for table, shape in module._shapes.items():
        key = f"{prefix}{module.prefix}.{table}.weight"
        if key not in state:
            missing.append(key)
        elif tuple(state[key].shape) != shape:
            errors.append(f"size mismatch for {key}: received shape {tuple(state[key].shape)}, the table has {shape}")
        else:
            stock[table] = state[key]
        state.pop(key, None)
    state.update({f"{prefix}hot.{number}": weight.detach().clone() for number, weight in enumerate(module.hot)})
    for table, name, first, rows in module.slots_of():
        if table in stock:
            state[prefix + name][first : first + rows] = hot_rows_of(stock[table], module._hot_ids[table])
    for table, kind in module._kinds.items():
        if kind is not TableKind.HOT:
            name = f"cold.{module.prefix}.{table}.weight"
            state[prefix + name] = stock.get(table, weights[name].detach())
