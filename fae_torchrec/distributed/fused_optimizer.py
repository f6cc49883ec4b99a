"""The fused optimizer of both tiers, which looks like a stock one: one entry per table, under its stock key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torchrec.optim.fused import FusedOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer


class HotTierOptimizer(FusedOptimizer):
    """A fused optimizer of hot rows that shows only all-hot tables: a split table is shown by its home.

    Its parameter group is always there, so a learning-rate schedule that walks the groups reaches the hot tier on every rank, also
    on one where no home lies.

    Args:
        inner: the fused optimizer of one kernel of the hot tier.
        visible: names of the all-hot tables.
    """

    def __init__(self, inner: FusedOptimizer, visible: Iterable[str]) -> None:
        self._inner = inner
        keys = {f"{table}.weight": f"embedding_bags.{table}.weight" for table in visible}
        params = {keys[key]: param for key, param in inner.params.items() if key in keys}
        state = {param: inner.state[param] for param in params.values()}
        super().__init__(params, state, [{"params": list(params.values()), "lr": inner.param_groups[0]["lr"]}])

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Hands the group's learning rate to the kernel, as TorchRec's EmbeddingFusedOptimizer does."""
        self.step()

    def step(self, closure: Any = None) -> None:
        """Hands the group's learning rate to the kernel; the update itself runs in backward."""
        self._inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self._inner.step()

    def set_optimizer_step(self, step: int) -> None:
        """Hands the step count to the kernel, as TorchRec's EmbeddingFusedOptimizer does."""
        self._inner.set_optimizer_step(step)

    def update_hyper_parameters(self, params_dict: dict[str, Any]) -> None:
        """Hands hyperparameters to the kernel, as TorchRec's EmbeddingFusedOptimizer does."""
        self._inner.update_hyper_parameters(params_dict)


class HotColdFusedOptimizer(CombinedOptimizer):
    """Both tiers' fused optimizers as one whose state is the stock state.

    Reading the state writes changed hot rows back to their homes first; loading it promotes them again afterwards (a collective, as
    loading is done by all ranks).

    Args:
        hot: one optimizer per kernel of the hot tier.
        cold: the stock optimizer of the cold tier.
        write_back: copies hot rows home.
        promote: copies homes to the hot tier.
    """

    def __init__(
        self, hot: list[HotTierOptimizer], cold: KeyedOptimizer | None, write_back: Callable[[], None], promote: Callable[[], None]
    ) -> None:
        self._write_back = write_back
        self._promote = promote
        super().__init__([*hot, *([cold] if cold is not None else [])])

    @property
    def state(self) -> Mapping[torch.Tensor, Any]:
        """State by parameter, current in every row."""
        self._write_back()
        state: Mapping[torch.Tensor, Any] = super().state
        return state

    def post_load_state_dict(self) -> None:
        """Runs after a state dict was copied into `state`: the homes are current, the hot tier follows."""
        super().post_load_state_dict()
        self._promote()
