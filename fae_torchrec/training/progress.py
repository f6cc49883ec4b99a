"""What a run has done so far, step by step: noted without waiting for the device, summed over ranks, kept across restarts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fae_torchrec.core.errors import StateError
from fae_torchrec.training.metrics import Scores

WARM_UP_STEPS = 5
"""Of each process, in no time that is told: the first steps trace the model and grow buffers."""
_CURVE_POINTS = 100
_SPREAD_BLOCKS = 5
_MAX_SPANS = 500  # of consecutive steps that are kept apart; a checkpoint holds 6 numbers for each
_MAX_LOSSES = 1000  # that are left on the device
# Columns of a span, over all ranks; seconds are means over ranks. Timed steps are those after the warm-up, and have no loading in them.
_STEPS, _SAMPLES, _LOSS_SUM, _LOADING_S, _TIMED_SAMPLES, _TIMED_S = range(6)
_COLUMNS = 6


@dataclass(frozen=True)
class TrainResult:
    """What a run gave; the same on every rank. A run that was resumed is one run: steps that a crash undid are not in it.

    Attributes:
        samples_per_s: over all ranks; the first steps (warm-up) and evaluations are left out, all loading and segregating is in, also that
            of the first steps, where a whole epoch may be segregated (a run that `steps` ends early pays for all that was segregated);
            checks of replicas are in.
        samples_per_s_spread: lowest and highest over fifths of the run.
        train_loss: mean over the last epoch (unless `steps` ends it, the same samples under every placement and order).
        loss_curve: (samples trained over all ranks, mean loss since the last point).
        test: scores after training.
        samples_by_kind: samples trained over all ranks, by kind of batch ("hot", "cold" or "mixed").
        steps_by_kind: steps, by kind.
        swap_losses: test losses that the schedule was told.
        wall_s: seconds of the whole run, evaluations included, mean over ranks.
    """

    samples_per_s: float
    samples_per_s_spread: tuple[float, float]
    train_loss: float
    loss_curve: list[tuple[int, float]]
    test: Scores
    samples_by_kind: dict[str, int]
    steps_by_kind: dict[str, int]
    swap_losses: list[float]
    wall_s: float

    @property
    def hot_share(self) -> float:
        """Hot batches, as a share of all."""
        return self.steps_by_kind.get("hot", 0) / sum(self.steps_by_kind.values())


@dataclass
class _Steps:
    """Steps of this rank that are not summed yet; one entry per step."""

    kinds: list[str] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)
    loading_s: list[float] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    fetched: list[torch.Tensor] = field(default_factory=list)  # losses before those, on the CPU

    def fetch(self) -> None:
        if self.losses:
            self.fetched.append(torch.stack(self.losses).to("cpu", torch.float64))
            self.losses.clear()


class RunLog:
    """Notes every step of this rank, and what all ranks' notes come to.

    A step costs a few appends; the device is not waited for (but once in 1,000 steps, for their losses). The clock starts when the log is
    made. A resumed run loads what the checkpoint's `state_dict` said and goes on, on any number of ranks.

    Args:
        group: the ranks, or None for one process.
        device: where the group communicates.

    Attributes:
        steps: of the run, the resumed part included.
        swap_losses: test losses that the schedule was told, the same on every rank.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        self._device = device
        self.steps = 0
        self.swap_losses: list[float] = []
        self._started = time.perf_counter()
        self._wall_s_before = 0.0
        self._new = _Steps()
        self._late_s = 0.0
        self._warm_up_left = WARM_UP_STEPS
        self._spans = np.zeros((0, _COLUMNS))
        self._by_kind: dict[str, list[float]] = {}  # kind -> steps, samples
        self._last_epoch = [-1.0, 0.0, 0.0]  # its number, loss times samples, samples
        self._last_step = [0.0, 0.0]  # samples, seconds without loading

    def step(self, kind: str, num_samples: int, loss: torch.Tensor, *, epoch: int, busy_s: float, loading_s: float) -> None:
        """Notes a step; every rank notes the same number of them.

        Args:
            kind: of the batch.
            num_samples: of this rank; 0 for a filler, whose loss then counts for nothing.
            loss: scalar, mean over these samples; detached here, fetched later.
            epoch: passes finished before this one.
            busy_s: host seconds of the step without those of loading.
            loading_s: host seconds that the step waited for batches.
        """
        new = self._new
        new.kinds.append(kind)
        new.samples.append(num_samples)
        new.epochs.append(epoch)
        new.busy_s.append(busy_s + self._late_s)
        new.loading_s.append(loading_s)
        new.losses.append(loss.detach())
        self._late_s = 0.0
        self.steps += 1
        if len(new.losses) >= _MAX_LOSSES:
            new.fetch()

    def add_busy(self, seconds: float) -> None:
        """Seconds that belong to the last step too: waiting for a device that had it queued."""
        if self._new.busy_s:
            self._new.busy_s[-1] += seconds
        else:  # it was summed already, so the next step takes them
            self._late_s += seconds

    def state_dict(self) -> dict[str, Any]:
        """The run so far, in values that JSON can write; the same on every rank. Collective: every rank calls it, after the same step."""
        wall_s = self._settle()
        return {
            "steps": self.steps,
            "spans": self._spans.tolist(),
            "by_kind": {kind: list(sums) for kind, sums in self._by_kind.items()},
            "last_epoch": list(self._last_epoch),
            "last_step": list(self._last_step),
            "swap_losses": list(self.swap_losses),
            "wall_s": wall_s,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned, on whatever number of ranks; what this log had noted is forgotten.

        Raises:
            StateError: a key is missing or unexpected.
        """
        allowed = {"steps", "spans", "by_kind", "last_epoch", "last_step", "swap_losses", "wall_s"}
        if state.keys() != allowed:
            raise StateError(f"the state of a run's log has the keys {sorted(state)}, allowed are exactly {sorted(allowed)}; save it again")
        self._new = _Steps()
        self.steps = int(state["steps"])
        self.swap_losses = list(state["swap_losses"])
        self._wall_s_before = float(state["wall_s"])
        self._spans = np.array(state["spans"], dtype=np.float64).reshape(-1, _COLUMNS)
        self._by_kind = {kind: list(sums) for kind, sums in state["by_kind"].items()}
        self._last_epoch, self._last_step = list(state["last_epoch"]), list(state["last_step"])

    def result(self, test: Scores) -> TrainResult:
        """The figures of the whole run, of at least one step. Collective: every rank calls it.

        Args:
            test: scores after training.
        """
        wall_s = self._settle()
        spans = self._spans
        loading_s_per_sample = spans[:, _LOADING_S].sum() / spans[:, _SAMPLES].sum()
        timed = spans[spans[:, _TIMED_SAMPLES] > 0]
        if not len(timed):  # a run as short as the warm-up: better its last step than nothing
            timed = np.array([[1.0, 0.0, 0.0, 0.0, *self._last_step]])

        def rates(of: np.ndarray) -> list[float]:
            with np.errstate(divide="ignore"):
                every = of[:, _TIMED_SAMPLES] / (of[:, _TIMED_S] + of[:, _TIMED_SAMPLES] * loading_s_per_sample)
            return [float(rate) for rate in every]

        of_blocks = rates(_grouped(timed, _SPREAD_BLOCKS))
        curve = _grouped(spans, _CURVE_POINTS)
        curve_samples = curve[:, _SAMPLES]
        return TrainResult(
            samples_per_s=rates(timed.sum(axis=0, keepdims=True))[0],
            samples_per_s_spread=(min(of_blocks), max(of_blocks)),
            train_loss=self._last_epoch[1] / self._last_epoch[2],
            loss_curve=[
                (int(trained), float(loss_sum / samples))
                for trained, loss_sum, samples in zip(curve_samples.cumsum(), curve[:, _LOSS_SUM], curve_samples, strict=True)
                if samples
            ],
            test=test,
            samples_by_kind={kind: int(samples) for kind, (_, samples) in self._by_kind.items()},
            steps_by_kind={kind: int(steps) for kind, (steps, _) in self._by_kind.items()},
            swap_losses=list(self.swap_losses),
            wall_s=wall_s,
        )

    def _settle(self) -> float:
        """Adds the new steps of all ranks to the sums; returns the seconds of the run so far. Collective."""
        new, self._new = self._new, _Steps()
        new.fetch()
        here, busy_s, loading_s = torch.tensor([new.samples, new.busy_s, new.loading_s], dtype=torch.float64)
        losses = torch.cat([torch.empty(0, dtype=torch.float64), *new.fetched])
        # A filler's loss says nothing, and may be no number.
        loss_sums = torch.where(here > 0, losses, 0) * here
        wall_s = torch.tensor([self._wall_s_before + time.perf_counter() - self._started], dtype=torch.float64)
        sums = torch.cat([here, loss_sums, busy_s, loading_s, wall_s]).to(self._device)
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        world_size = 1 if self._group is None else self._group.size()
        everyone = sums.cpu().numpy()
        if new.kinds:
            samples, loss_sum, seconds, loading = everyone[:-1].reshape(4, -1)
            self._add(new, samples, loss_sum, seconds / world_size, loading / world_size)
        return float(everyone[-1]) / world_size

    def _add(self, new: _Steps, samples: np.ndarray, loss_sums: np.ndarray, busy_s: np.ndarray, loading_s: np.ndarray) -> None:
        """Adds steps, one entry each, to the sums."""
        count = len(new.kinds)
        timed = np.arange(count) >= self._warm_up_left
        self._warm_up_left = max(self._warm_up_left - count, 0)
        spans = np.stack([np.ones(count), samples, loss_sums, loading_s, samples * timed, busy_s * timed], axis=1)
        self._spans = _grouped(np.concatenate([self._spans, spans]), _MAX_SPANS)
        kinds = np.array(new.kinds)
        for kind in dict.fromkeys(new.kinds):
            sums = self._by_kind.setdefault(kind, [0, 0])
            sums[0] += int((kinds == kind).sum())
            sums[1] += int(samples[kinds == kind].sum())
        if self._last_epoch[0] != new.epochs[-1]:
            self._last_epoch = [new.epochs[-1], 0.0, 0.0]
        last = np.array(new.epochs) == new.epochs[-1]
        self._last_epoch[1] += float(loss_sums[last].sum())
        self._last_epoch[2] += float(samples[last].sum())
        self._last_step = [float(samples[-1]), float(busy_s[-1])]


def _grouped(spans: np.ndarray, count: int) -> np.ndarray:
    """Sums neighbouring spans to at most `count` of about equally many steps."""
    steps = spans[:, _STEPS]
    group = (steps.cumsum() - steps) * min(count, len(spans)) // steps.sum()
    return np.asarray(np.add.reduceat(spans, np.flatnonzero(np.diff(group, prepend=-1)), axis=0))
