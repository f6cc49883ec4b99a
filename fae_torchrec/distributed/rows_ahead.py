"""Cold rows that are looked up before their batch's turn, on the CPU: what is kept of them, and the lookup that makes them trainable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class RowsAhead:
    """Cold rows that were looked up before their batch's turn.

    Attributes:
        loads: how often weights had been loaded by then: rows from before a load are not used.
        resume: makes kernels count a step as the current one (`StepCount.resume`).
        output: the stock collection's output, on its way.
        step: the batch's own step, known at its turn; its update belongs to it.
    """

    loads: int
    resume: Callable[[int], None]
    output: Any = None
    step: int = 0

    def take(self, step: int) -> Any:
        """The output, at the batch's turn."""
        assert self.output is not None
        self.step = step
        return self.output


class LookupAhead:
    """Stands for a lookup while a batch is looked up ahead: the values now, the forward that the update needs in backward.

    Args:
        lookup: from ids (that know their `device()`) to values.
        ahead: the batch's.
    """

    def __init__(self, lookup: Callable[[Any], torch.Tensor], ahead: RowsAhead) -> None:
        self._lookup, self._ahead = lookup, ahead

    def __call__(self, features: Any) -> torch.Tensor:
        """The lookup's values, trainable."""
        anchor = torch.empty(0, device=features.device(), requires_grad=True)  # what makes autograd call the backward
        values: torch.Tensor = _ValuesAhead.apply(anchor, self._lookup, self._ahead, features)  # type: ignore[no-untyped-call]
        return values


class _ValuesAhead(torch.autograd.Function):
    """A lookup's values, whose backward is that of a lookup made in backward."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, lookup: Callable[[Any], torch.Tensor], ahead: RowsAhead, features: Any) -> torch.Tensor:
        ctx.lookup, ctx.ahead, ctx.features = lookup, ahead, features
        values = lookup(features)
        return values.detach()  # a rank without a table gives a buffer of its own

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
        ctx.ahead.resume(ctx.ahead.step)
        with torch.enable_grad():
            values = ctx.lookup(ctx.features)
        values.backward(grad)
        return None, None, None, None
