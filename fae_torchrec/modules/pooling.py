"""Joins the tiers of a pooled collection: cold bags are added into the hot tier's output, means are divided once."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from fae_torchrec.modules.lookups import HotGroup, Lookup


class TierJoin(nn.Module):
    """pooled = hot_pool + cold_pool, as one addition of the cold tier's few packed bags in place.

    Columns are counted in *units*, the greatest common divisor of all dims, so that one index covers tables of different dims.

    Args:
        lookups: the output's blocks in order.
        cold_columns: keys of the cold tier's blocks, in the order in which they come.
        cold_lookups: keys of the cold lookups in the order of `cold_at`.
        device: where the output lies.
    """

    cold_lookup: torch.Tensor
    cold_unit: torch.Tensor
    unit_lookup: torch.Tensor
    mean: torch.Tensor

    def __init__(self, lookups: Sequence[Lookup], cold_columns: Sequence[str], cold_lookups: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self._names = [lookup.name for lookup in lookups]
        self._dims = [lookup.dim for lookup in lookups]
        self._unit = gcd(*self._dims)
        units = [dim // self._unit for dim in self._dims]
        self._units = sum(units)
        first = dict(zip((lookup.key for lookup in lookups), torch.tensor([0, *units]).cumsum(0).tolist(), strict=False))
        count = {lookup.key: lookup.dim // self._unit for lookup in lookups}
        position = {key: i for i, key in enumerate(cold_lookups)}
        buffers = {
            # For each unit of a cold bag's row: its lookup, and its place in a row of the output.
            "cold_lookup": torch.tensor([position[key] for key in cold_columns for _ in range(count[key])], dtype=torch.int64),
            "cold_unit": torch.tensor([[first[key] + i] for key in cold_columns for i in range(count[key])], dtype=torch.int64),
            # For each unit of the output: its lookup, the mean ones among them.
            "unit_lookup": torch.arange(len(lookups)).repeat_interleave(torch.tensor(units)),
            "mean": torch.tensor([lookup.mean for lookup in lookups]),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(device), persistent=False)

    def units(self, cold_at: torch.Tensor) -> torch.Tensor:
        """Where each unit of the cold tier's output belongs: int64 [packed bags x units of the cold columns], from `cold_at`."""
        units = torch.add(self.cold_unit, cold_at.index_select(0, self.cold_lookup), alpha=self._units)
        return units.t().reshape(-1)

    def forward(
        self, hot: torch.Tensor, cold: torch.Tensor | None, units: torch.Tensor | None, lengths: torch.Tensor | None
    ) -> torch.Tensor:
        """Joins one batch.

        Args:
            hot: contiguous, [B, sum of dims] in whatever shape: sums over the hot ids; changed in place.
            cold: [packed bags, columns of the cold tier] sums, or None.
            units: where each unit of `cold` is added, as `units` says; None without `cold`.
            lengths: int [B, lookups]: ids of each bag in both tiers, where any lookup is a mean.

        Returns:
            [B, sum of dims].
        """
        if cold is not None and units is not None:
            hot = add_units(hot, cold, units, self._unit)
        values = hot.view(-1, self._units * self._unit)
        if lengths is not None:
            divisor = torch.where(self.mean, lengths.to(values.dtype).clamp_(min=1), 1)  # an empty bag is zero
            by_unit = divisor.index_select(1, self.unit_lookup).unsqueeze(2)
            values = (values.view(-1, self._units, self._unit) / by_unit).flatten(1)
        return values

    def keyed(self, values: torch.Tensor) -> KeyedTensor:
        """The joined batch by the stock names."""
        return KeyedTensor(keys=self._names, length_per_key=self._dims, values=values)


def join_groups(parts: Sequence[torch.Tensor], groups: Sequence[HotGroup]) -> torch.Tensor:
    """Lays the groups' bags side by side.

    Args:
        parts: [samples x lookups of the group, dim] by group, a sample's bags next to each other.
        groups: in the same order.

    Returns:
        Contiguous, [samples, sum of dims], or the one part as it is.
    """
    if len(parts) == 1:
        return parts[0]
    samples = parts[0].shape[0] // len(groups[0].lookups)
    widths = [len(group.lookups) * group.dim for group in groups]
    return torch.cat([part.view(samples, width) for part, width in zip(parts, widths, strict=True)], dim=1)


def add_units(out: torch.Tensor, added: torch.Tensor, at: torch.Tensor, unit: int) -> torch.Tensor:
    """Adds units of columns into `out`, in place, and gives it back.

    Args:
        out: contiguous; seen as [units, unit].
        added: of any shape; seen as [units added, unit].
        at: int64 [units added], the unit of `out` that each is added to.
        unit: columns of a unit.
    """
    joined: torch.Tensor = _AddUnits.apply(out, added, at, unit)  # type: ignore[no-untyped-call]
    return joined


class _AddUnits(torch.autograd.Function):
    """Adds units of columns into an output, in place; the gradient of both is the output's own, without a copy of it."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, added: torch.Tensor, at: torch.Tensor, unit: int) -> torch.Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(at)
        ctx.unit, ctx.shape = unit, added.shape
        out.view(-1, unit).index_add_(0, at, added.reshape(-1, unit).to(out.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (at,) = ctx.saved_tensors
        grad = grad.contiguous()
        return grad, grad.view(-1, ctx.unit).index_select(0, at).view(ctx.shape), None, None
