"""Counts what crosses ranks: every collective's bytes, where PyTorch hands it to its backend."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Within its `with` block, counts the collectives of this rank, DDP's and backward's included, without touching them.

    Bytes are those that leave this rank in the usual algorithms: all to all sends the parts of other ranks; all-gather its input to n-1
    ranks; all-reduce in a ring 2(n-1)/n of the tensor, reduce-scatter (n-1)/n of its input; a broadcast is counted as (n-1)/n of the
    tensor on every rank, since n-1 copies cross in all. A collective without a rule here makes the total unknown, never a silent zero.

    Args:
        rank: this rank.
        world_size: number of ranks n.

    Attributes:
        calls: number of calls by collective.
        sent_bytes: bytes that left this rank, by collective.
        uncounted: number of calls by collective that has no rule.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rank = rank
        self._world_size = world_size
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()

    @property
    def total_bytes(self) -> float:
        """Bytes that left this rank; NaN if a collective without a rule was called."""
        return math.nan if self.uncounted else self.sent_bytes.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if "c10d" in func.namespace:  # _c10d_functional's too: they would be missed, so they have no rule
            name = func.name().removeprefix("c10d::").split(".")[0].strip("_")
            self.calls[name] += 1
            sent = self._sent(name, args)
            if sent is None:
                self.uncounted[name] += 1
            else:
                self.sent_bytes[name] += sent
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: tuple[Any, ...]) -> int | None:
        """Bytes that one call sends from this rank, or None for a collective without a rule."""
        others = self._world_size - 1
        if name in ("barrier", "monitored_barrier", "check_for_nan"):
            return 0
        if name == "alltoall_base":
            tensor, splits = args[1], args[4]
            mine = splits[self._rank] * (_bytes(tensor) // max(tensor.shape[0], 1)) if splits else _bytes(tensor) // self._world_size
            return _bytes(tensor) - mine
        if name == "alltoall":
            return _bytes(args[1]) - _bytes(args[1][self._rank])
        if name in _PER_BYTE:
            source, share = _PER_BYTE[name]
            return int(_bytes(args[source]) * share(others, self._world_size))
        return None


_PER_BYTE: Mapping[str, tuple[int, Callable[[int, int], float]]] = {
    # name: (position of the counted tensor, bytes sent per byte of it)
    "allreduce": (0, lambda others, n: 2 * others / n),
    "allreduce_coalesced": (0, lambda others, n: 2 * others / n),
    "allgather_base": (1, lambda others, n: others),
    "allgather": (1, lambda others, n: others),
    "allgather_into_tensor_coalesced": (1, lambda others, n: others),
    "reduce_scatter_base": (1, lambda others, n: others / n),
    "reduce_scatter": (1, lambda others, n: others / n),
    "reduce_scatter_tensor_coalesced": (1, lambda others, n: others / n),
    "broadcast": (0, lambda others, n: others / n),
    "send": (0, lambda others, n: 1),
    "recv": (0, lambda others, n: 0),
}


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)
