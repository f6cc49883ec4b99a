"""HostTier: a cold tier in host memory beside ranks that train on a GPU: looked up on the CPU, the pooled rows copied to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import Awaitable, LazyAwaitable, ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Multistreamable

from fae_torchrec.distributed.tiers import FAEContext, StockTier

HOST = torch.device("cpu")


@dataclass
class OnHost(Multistreamable):
    """Something of a batch that lies in host memory, where no stream is waited for.

    Attributes:
        value: a KJTList or a stock context.
    """

    value: Any

    def record_stream(self, stream: torch.Stream) -> None:
        """Nothing to do: the host has read or written it when the call returns."""


class HostTier(StockTier):
    """A stock collection on the CPU as the cold tier of ranks on a GPU.

    Its input dist copies the cold ids to the host, which waits for them; its lookup and its update run on the host's cores while the device
    has nothing of this step to do. Its output lies on the host; whoever joins the tiers copies it. Arguments: `StockTier`.
    """

    def input_dist(self, ctx: FAEContext, features: KeyedJaggedTensor) -> tuple[Multistreamable, list[Awaitable[Any]]]:
        """As StockTier's, on the host."""
        stock = self.module.create_context()
        ctx.sharding_contexts.append(None)  # the one awaitable looks after the stock contexts itself
        return OnHost(stock), [_HostAwaitable(self.module.input_dist(stock, features.to(HOST)))]

    def look_up(self, stock: Multistreamable, inputs: Sequence[Any]) -> LazyAwaitable[Any]:
        """As StockTier's; the output lies on the host."""
        assert isinstance(stock, OnHost)
        (features,) = inputs
        return super().look_up(stock.value, list(features.value))

    @property
    def num_inputs(self) -> int:
        """Awaitables that an input dist gives."""
        return 1

    @property
    def input_dists(self) -> list[nn.Module]:
        """None: no device takes part in the host's exchange."""
        return []

    def prime(self, device: torch.device, *, weighted: bool) -> None:
        """As StockTier's, on the host."""
        super().prime(HOST, weighted=weighted)


def host_env(env: ShardingEnv) -> ShardingEnv:
    """The same ranks in a group that communicates on the CPU. Collective: every rank of the world makes it."""
    if env.process_group is None or env.world_size == 1:
        return env
    return ShardingEnv.from_process_group(dist.new_group(dist.get_process_group_ranks(env.process_group), backend="gloo"))


class _HostAwaitable(Awaitable[Awaitable[OnHost]]):
    """Both waits of a stock input dist on the host."""

    def __init__(self, stock: Awaitable[Awaitable[KJTList]]) -> None:
        super().__init__()
        self._stock = stock

    def _wait_impl(self) -> Awaitable[OnHost]:
        return _HostIdsAwaitable(self._stock.wait())


class _HostIdsAwaitable(Awaitable[OnHost]):
    def __init__(self, stock: Awaitable[KJTList]) -> None:
        super().__init__()
        self._stock = stock

    def _wait_impl(self) -> OnHost:
        return OnHost(self._stock.wait())
