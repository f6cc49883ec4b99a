"""The state of a hot/cold collection as stock gives it and takes it, and the hot rows brought home before and promoted after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.nn.modules.module import _IncompatibleKeys

from fae_torchrec.core.errors import StateError
from fae_torchrec.distributed.all_hot_tables import AllHotTable
from fae_torchrec.distributed.homes import Homes
from fae_torchrec.distributed.process_group import sum_of_disjoint
from fae_torchrec.modules.lookups import TableConfig


class StockState:
    """Saves and loads `<prefix>.<table>.weight` for every table of one collection.

    Args:
        prefix: "embedding_bags" or "embeddings".
        configs: every table.
        stock: the sharded stock modules that hold homes, and the tables each shows.
        all_hot: the tables of a replicated hot tier that no stock module holds.
        homes: moves hot rows.
        group: the ranks.
    """

    def __init__(
        self,
        prefix: str,
        configs: Sequence[TableConfig],
        stock: Sequence[tuple[nn.Module, Sequence[str]]],
        all_hot: Mapping[str, AllHotTable],
        homes: Homes,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._prefix, self._configs, self._stock = prefix, list(configs), list(stock)
        self._all_hot, self._homes, self._group = all_hot, homes, group

    def key(self, table: str) -> str:
        """The stock key of a table's weights."""
        return f"{self._prefix}.{table}.weight"

    def save(self, state: dict[str, Any], prefix: str, keep_vars: bool) -> dict[str, Any]:
        """Adds the stock state to `state`, hot rows brought home first."""
        self._homes.write_back()
        tables: dict[str, Any] = {}
        for module, names in self._stock:
            shown = module.state_dict(prefix="", keep_vars=keep_vars)
            tables.update({self.key(name): shown[self.key(name)] for name in names if self.key(name) in shown})
        tables.update({self.key(name): table.sharded_weight() for name, table in self._all_hot.items()})
        for config in self._configs:  # in stock's order
            if self.key(config.name) in tables:
                state[prefix + self.key(config.name)] = tables[self.key(config.name)]
        return state

    def load(self, state: Mapping[str, Any], strict: bool) -> _IncompatibleKeys:
        """Loads a stock state: whole tensors, or sharded in any way. Collective: all ranks take part.

        Raises:
            StateError: a key is missing or unexpected (with `strict`), or a tensor has another shape than its table; on every rank
                alike and before anything is overwritten.
        """
        names = [config.name for config in self._configs]
        missing = [self.key(name) for name in names if self.key(name) not in state]
        unexpected = sorted(state.keys() - {self.key(name) for name in names})
        if strict and (missing or unexpected):
            raise StateError(
                f"the state does not fit these tables: missing keys {missing}, unexpected keys {unexpected}; allowed are "
                f"{[self.key(name) for name in names]}; load a state of this model, or pass strict=False to leave tables as they are"
            )
        for config in self._configs:
            if self.key(config.name) in state:
                self._check_shape(config, state[self.key(config.name)])
        self._homes.write_back()  # what is not loaded must be current when homes are promoted
        for module, tables in self._stock:
            self._load_stock(module, [name for name in tables if self.key(name) in state], state)
        for name, table in self._all_hot.items():
            if self.key(name) in state:
                table.replica.weights.copy_(self._whole(state[self.key(name)], table.replica.weights))
        self._homes.promote()
        return _IncompatibleKeys(missing, unexpected)

    def _check_shape(self, config: TableConfig, value: Any) -> None:
        shape = (config.num_embeddings, config.embedding_dim)
        given = tuple(value.metadata().size if isinstance(value, ShardedTensor) else value.shape)
        if given != shape:
            raise StateError(f"{self.key(config.name)}: received shape {given}, the table has {shape}; load a state of this model")

    def _load_stock(self, module: nn.Module, tables: Sequence[str], state: Mapping[str, Any]) -> None:
        """Loads one stock module's tables; it takes whole tensors and shards cut as its own."""
        mine = module.state_dict()
        ours = dict(mine)  # those that stay, too: torchrec 1.8's EmbeddingCollection fails without any of its tables, strict or not
        for name in tables:
            value, own = state[self.key(name)], mine.get(self.key(name))
            if isinstance(value, ShardedTensor) and not (isinstance(own, ShardedTensor) and _cut_alike(value, own)):
                value = self._whole(value, torch.empty(0, dtype=value.dtype, device=_device_of(own)))
            ours[self.key(name)] = value
        module.load_state_dict(ours, strict=False)

    def _whole(self, value: Any, like: torch.Tensor) -> torch.Tensor:
        """A tensor of a stock state, put together from all ranks where it is sharded."""
        if not isinstance(value, ShardedTensor):
            tensor: torch.Tensor = value
            return tensor
        whole = torch.zeros(tuple(value.metadata().size), dtype=like.dtype, device=like.device)
        for shard in value.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            whole[row : row + rows, column : column + columns] = shard.tensor
        sum_of_disjoint(whole, self._group)
        return whole


def _cut_alike(a: ShardedTensor, b: ShardedTensor) -> bool:
    """Whether two tensors are sharded alike; every rank knows the metadata of both, so all answer the same."""
    return list(_cuts(a)) == list(_cuts(b))


def _cuts(tensor: ShardedTensor) -> Iterator[tuple[Any, ...]]:
    for shard in tensor.metadata().shards_metadata:
        yield tuple(shard.shard_offsets), tuple(shard.shard_sizes), str(shard.placement)


def _device_of(own: Any) -> torch.device:
    """Where a table put together from all ranks is held; the collective needs the group's device."""
    if isinstance(own, ShardedTensor):
        placement = own.metadata().shards_metadata[0].placement
        assert placement is not None  # TorchRec always says
        return placement.device()
    return torch.device("cpu") if own is None else own.device
