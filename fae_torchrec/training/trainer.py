"""Trainer: one sharded model over epochs of hot and cold batches, with the schedule's feedback, read from top to bottom."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer
from tqdm import tqdm

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.schedule import Phase
from fae_torchrec.data.batches import BatchSource
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.distributed.hot_cold_module import ShardedHotColdModule
from fae_torchrec.training.batch_kinds import with_kinds
from fae_torchrec.training.metrics import Scores, evaluate
from fae_torchrec.training.train_pipeline import FAETrainPipeline

_WARM_UP_STEPS = 5  # the first steps trace the model and grow buffers
_CURVE_POINTS = 100
_SPREAD_BLOCKS = 5


@dataclass(frozen=True)
class TrainOptions:
    """How long to train and how to score.

    Attributes:
        epochs: passes over the train data.
        steps: ends the run after so many steps; None trains whole epochs.
        eval_batch_size: samples per rank and test batch.
        swap_eval_batches: test batches looked at after each swap for the schedule's feedback; 0 gives it none.
        check_replicas: compares the ranks' hot rows bit for bit every so many steps; 0 never.
    """

    epochs: int = 1
    steps: int | None = None
    eval_batch_size: int = 4096
    swap_eval_batches: int = 4
    check_replicas: int = 0


@dataclass
class StepLog:
    """What every step of this rank did; one entry per step. `busy_s` has none of the loader's `loading_s` in it."""

    kinds: list[str] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)
    loading_s: list[float] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """What a run gave; the same on every rank.

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
        wall_s: seconds of the whole run, evaluations included.
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


class Trainer:
    """Trains one model.

    Args:
        model: a DistributedModelParallel around a model that returns `(loss, (loss, logits, labels))`.
        optimizer: of the model, fused parts included.
        loader: this rank's train batches; its schedule is told the test loss after each swap.
        test: the test data.
        options: how long.
        device: where to train.
        group: the ranks, or None for one process.
        show_progress: a progress bar, on rank 0.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: CombinedOptimizer,
        loader: HotColdDataLoader,
        test: BatchSource,
        options: TrainOptions,
        device: torch.device,
        group: dist.ProcessGroup | None,
        *,
        show_progress: bool = False,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._loader = loader
        self._test = test
        self._options = options
        self._device = device
        self._group = group
        self._rank = 0 if group is None else group.rank()
        self._world_size = 1 if group is None else group.size()
        self._show_progress = show_progress and self._rank == 0
        self._hot_cold = [module for module in model.modules() if isinstance(module, ShardedHotColdModule)]
        self._wants_feedback = loader.schedule.policy == "fae" and options.swap_eval_batches > 0
        self._swaps = 0
        self._swap_losses: list[float] = []
        loader.on_swap = self._on_swap

    def run(self) -> TrainResult:
        """Trains and scores. Collective: every rank runs it.

        Raises:
            DataError: there is no sample to train or to score on; the loader's and the sources' own.
            ReplicaError: the ranks' hot rows differ (only where they are checked); on every rank alike.
        """
        started = time.perf_counter()
        log = StepLog()
        # The stock baseline runs on the stock pipeline; ours is the same one, keeping count of kinds.
        pipeline_type = FAETrainPipeline if self._loader.schedule.segregates else TrainPipelineSparseDist
        pipeline: TrainPipelineSparseDist[Batch, Any] = pipeline_type(self._model, self._optimizer, self._device)
        self._model.train()
        with tqdm(desc="train", unit=" samples", unit_scale=True, disable=None if self._show_progress else True) as bar:
            for epoch in range(self._options.epochs):
                steps_left = None if self._options.steps is None else self._options.steps - len(log.kinds)
                loaded = _Loaded(self._loader, steps_left)
                for batches in self._until_swaps(loaded):
                    swaps = self._swaps
                    for samples in self._train(pipeline, batches, loaded, epoch, log):
                        bar.update(samples * self._world_size)
                    if self._wants_feedback and self._swaps > swaps:
                        self._tell_schedule(pipeline)
        pipeline.detach()
        if not log.kinds:
            raise DataError("there are no samples to train on; received an empty stream of train batches; give every rank at least one")
        scores = self._score(None)
        return self._result(log, scores, time.perf_counter() - started)

    def _train(
        self, pipeline: TrainPipelineSparseDist[Batch, Any], batches: Iterator[Batch], loaded: _Loaded, epoch: int, log: StepLog
    ) -> Iterator[int]:
        """Trains on all batches; yields the samples of each step."""
        while True:
            start, loading_s = time.perf_counter(), loaded.seconds
            try:
                loss, _, labels = pipeline.progress(batches)
            except StopIteration:
                if self._device.type == "cuda" and log.busy_s:
                    torch.cuda.synchronize(self._device)  # what is still queued belongs to the steps, not to the evaluation that follows
                    log.busy_s[-1] += time.perf_counter() - start
                return
            if self._options.check_replicas and (len(log.kinds) + 1) % self._options.check_replicas == 0:
                for module in self._hot_cold:
                    module.check_replicas()
            log.busy_s.append(time.perf_counter() - start - (loaded.seconds - loading_s))
            log.loading_s.append(loaded.take_seconds())
            log.kinds.append(loaded.kinds.popleft())
            log.samples.append(labels.numel())
            log.losses.append(loss.detach())
            log.epochs.append(epoch)
            yield labels.numel()

    def _until_swaps(self, batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
        """Cuts the stream where the kind changes, if the schedule wants feedback there: a cut drains the pipeline."""
        if not self._wants_feedback:
            yield batches
            return
        for _, phase in groupby(batches, key=lambda _: self._swaps):  # the loader counts a swap before it gives the batch
            yield phase

    def _on_swap(self, phase: Phase) -> None:
        self._swaps += 1

    def _tell_schedule(self, pipeline: TrainPipelineSparseDist[Batch, Any]) -> None:
        """After a swap: looks at the test loss and tells the schedule, the same value on every rank."""
        pipeline.detach()
        logloss = torch.tensor([self._score(self._options.swap_eval_batches).logloss], dtype=torch.float64, device=self._device)
        if self._group is not None:  # the ranks' schedules must not drift apart by a rounding
            dist.broadcast(logloss, src=0, group=self._group)
        loss = float(logloss)
        self._swap_losses.append(loss)
        self._loader.schedule.observe(loss)

    def _score(self, num_batches: int | None) -> Scores:
        batches = self._test.batches(self._options.eval_batch_size, rank=self._rank, world_size=self._world_size)
        return evaluate(self._model, islice(batches, num_batches), self._device, self._group)

    def _result(self, log: StepLog, scores: Scores, wall_s: float) -> TrainResult:
        everyone = self._of_all_ranks(log)
        samples, losses = everyone[0], everyone[3] / everyone[0]
        busy_s, loading_s = everyone[1] / self._world_size, everyone[2] / self._world_size
        loading_s_per_sample = loading_s.sum() / samples.sum()
        warm = min(_WARM_UP_STEPS, len(log.kinds) - 1)
        blocks = torch.arange(warm, len(log.kinds)).tensor_split(_SPREAD_BLOCKS)

        def rate(steps: torch.Tensor) -> float:
            trained = samples[steps].sum()
            return float(trained / (busy_s[steps].sum() + trained * loading_s_per_sample))

        rates = [rate(block) for block in blocks if block.numel()]
        last_epoch = torch.tensor(log.epochs) == log.epochs[-1]
        by_kind = {kind: torch.tensor([k == kind for k in log.kinds]) for kind in dict.fromkeys(log.kinds)}
        trained = samples.cumsum(0)
        curve = torch.arange(len(log.kinds)).tensor_split(min(_CURVE_POINTS, len(log.kinds)))
        return TrainResult(
            samples_per_s=rate(torch.arange(warm, len(log.kinds))),
            samples_per_s_spread=(min(rates), max(rates)),
            train_loss=_weighted(losses, samples, last_epoch),
            loss_curve=[(int(trained[part[-1]]), _weighted(losses, samples, part)) for part in curve],
            test=scores,
            samples_by_kind={kind: int(samples[mask].sum()) for kind, mask in by_kind.items()},
            steps_by_kind={kind: int(mask.sum()) for kind, mask in by_kind.items()},
            swap_losses=self._swap_losses,
            wall_s=wall_s,
        )

    def _of_all_ranks(self, log: StepLog) -> torch.Tensor:
        """float64 [4, steps] summed over ranks: samples, seconds without loading, seconds of loading, loss times samples."""
        samples, busy_s, loading_s = torch.tensor([log.samples, log.busy_s, log.loading_s], dtype=torch.float64)
        losses = torch.stack(log.losses).to("cpu", torch.float64)
        sums = torch.stack([samples, busy_s, loading_s, losses * samples]).to(self._device)
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        return sums.cpu()


def _weighted(losses: torch.Tensor, samples: torch.Tensor, index: torch.Tensor) -> float:
    return float((losses[index] * samples[index]).sum() / samples[index].sum())


class _Loaded:
    """One pass over the loader that notes each batch's kind as it is taken (they are trained in this order) and the time it took to come.

    It stands next to the loader, before any cutting, so that no loading escapes the clock.
    """

    def __init__(self, loader: HotColdDataLoader, steps: int | None) -> None:
        self._batches = islice(with_kinds(loader), steps)
        self.kinds: deque[str] = deque()
        self.seconds = 0.0
        self._taken_s = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            kind, batch = next(self._batches)
        finally:
            self.seconds += time.perf_counter() - start
        self.kinds.append(kind)
        return batch

    def take_seconds(self) -> float:
        """Seconds of loading since the last call."""
        new, self._taken_s = self.seconds - self._taken_s, self.seconds
        return new
