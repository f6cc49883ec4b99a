"""The fused optimizer of both tiers, which looks like a stock one: one entry per table, under its stock key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torchrec.optim.fused import FusedOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

Entry: TypeAlias = tuple[torch.Tensor, Any]
"""A parameter and its state."""


def entry(optimizer: KeyedOptimizer, key: str) -> Entry:
    """One table of a stock optimizer.

    Args:
        optimizer: shows the table.
        key: what it calls its parameter.
    """
    param = optimizer.params[key]
    return param, optimizer.state[param]


class HotTierOptimizer(FusedOptimizer):
    """A fused optimizer of hot rows that shows only all-hot tables: a split table is shown by its home.

    Its parameter groups are always there, so a learning-rate schedule that walks the groups reaches the hot tier on every rank, also
    on one where no home lies.

    Args:
        inner: the fused optimizer of one of the hot tier's kernels.
        shown: by stock key, parameter and state (as stock shows them) of all-hot tables whose home, or a shard of it, lies on this rank.
    """

    def __init__(self, inner: KeyedOptimizer, shown: Mapping[str, Entry]) -> None:
        self._inner = inner
        params = {key: param for key, (param, _) in shown.items()}
        state = dict(shown.values())
        groups = [{"params": [], "lr": group["lr"]} for group in inner.param_groups]
        groups[0]["params"] = list(params.values())
        super().__init__(params, state, groups)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Hands the groups' learning rates to the kernels, as TorchRec's EmbeddingFusedOptimizer does."""
        self.step()

    def step(self, closure: Any = None) -> None:
        """Hands the groups' learning rates to the kernels; the update itself runs in backward."""
        for mine, group in zip(self.param_groups, self._inner.param_groups, strict=True):
            group["lr"] = mine["lr"]
        self._inner.step()

    def set_optimizer_step(self, step: int) -> None:
        """Hands the step count to the kernels, as TorchRec's EmbeddingFusedOptimizer does."""
        self._inner.set_optimizer_step(step)

    def update_hyper_parameters(self, params_dict: dict[str, Any]) -> None:
        """Hands hyperparameters to the kernels, as TorchRec's EmbeddingFusedOptimizer does."""
        self._inner.update_hyper_parameters(params_dict)


class HotColdFusedOptimizer(CombinedOptimizer):
    """Both tiers' fused optimizers as one whose state is the stock state.

    Reading the state writes changed hot rows back to their homes first (a collective where the hot tier is sharded, so all ranks must
    read it together); loading it promotes them again afterwards (a collective, as loading is done by all ranks).

    Args:
        hot: the hot tier's optimizers.
        stock: the optimizers of the cold tier and of the tables left to stock sharding.
        write_back: copies hot rows home.
        promote: copies homes to the hot tier.
    """

    def __init__(
        self, hot: list[HotTierOptimizer], stock: list[KeyedOptimizer], write_back: Callable[[], None], promote: Callable[[], None]
    ) -> None:
        self._write_back = write_back
        self._promote = promote
        super().__init__([*hot, *stock])

    @property
    def state(self) -> Mapping[torch.Tensor, Any]:
        """State by parameter, current in every row. A collective where the hot tier is sharded."""
        self._write_back()
        state: Mapping[torch.Tensor, Any] = super().state
        return state

    def post_load_state_dict(self) -> None:
        """Runs after a state dict was copied into `state`: the homes are current, the hot tier follows."""
        super().post_load_state_dict()
        self._promote()
