"""Stops a run whose loss is no longer a number: on every rank at once, without waiting for the device at each step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fae_torchrec.core.errors import DivergedError

_NEVER = torch.iinfo(torch.int64).max


class FiniteLossGuard:
    """Keeps the losses of the last steps where they are, and looks at them together.

    Call `check` before a checkpoint is made too, so that none is kept of a run that has diverged.

    Args:
        group: the ranks, or None for one process.
        device: where the group communicates.
        every: steps between two looks; 0 never looks.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device | None = None, *, every: int = 100) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        self._device = device
        self._every = every
        self._steps: list[tuple[int, str, int]] = []
        self._losses: list[torch.Tensor] = []

    def add(self, step: int, kind: str, num_samples: int, loss: torch.Tensor) -> None:
        """Notes a step, the same one on every rank; every `every` steps this is `check`.

        Args:
            step: its number in the run.
            kind: of the batch.
            num_samples: of this rank; the loss of a filler, 0, is not looked at.
            loss: scalar; detached here.

        Raises:
            DivergedError: as `check`.
        """
        if not self._every:
            return
        self._steps.append((step, kind, num_samples))
        self._losses.append(loss.detach())
        if len(self._steps) >= self._every:
            self.check()

    def check(self) -> None:
        """Looks at the steps since the last look. Collective: every rank calls it, after the same step.

        Raises:
            DivergedError: a loss is NaN or infinite; on every rank alike: names the first such step, its kind and the lowest such rank.
        """
        if not self._steps:
            return
        rank, world_size = (0, 1) if self._group is None else (self._group.rank(), self._group.size())
        samples = torch.tensor([num_samples for *_, num_samples in self._steps])
        bad = ~torch.stack(self._losses).isfinite().cpu() & (samples > 0)
        first = int(bad.nonzero()[0]) * world_size + rank if bad.any() else _NEVER
        if self._group is not None:  # one number says both which step and which rank
            lowest = torch.tensor([first], device=self._device)
            dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._group)
            first = int(lowest)
        steps, self._steps = self._steps, []
        self._losses.clear()
        if first != _NEVER:
            step, kind, _ = steps[first // world_size]
            raise DivergedError(
                f"the training loss is not a finite number any more: first at step {step}, a {kind} batch, on rank {first % world_size}; "
                "lower the learning rate, or look for missing or huge values in that batch's dense features and labels; the checkpoints "
                "made before are kept, and if the newest one leads here again, remove it: the run goes on from the one before"
            )
