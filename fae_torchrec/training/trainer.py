"""Trainer: one sharded model over epochs of hot and cold batches, with feedback, checkpoints and faults, read from top to bottom."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from fae_torchrec.core.errors import DataError, DivergedError
from fae_torchrec.data.batches import BatchSource, HotColdBatch, Position
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.distributed.hot_cold_module import ShardedHotColdModule
from fae_torchrec.training.finite_loss import FiniteLossGuard
from fae_torchrec.training.metrics import Scores, evaluate
from fae_torchrec.training.progress import RunLog, TrainResult
from fae_torchrec.training.run_checkpoints import CheckpointOptions, RunCheckpoints
from fae_torchrec.training.telemetry import Telemetry
from fae_torchrec.training.train_pipeline import FAETrainPipeline
from fae_torchrec.training.work import TrainedSamples

T = TypeVar("T")


@dataclass(frozen=True)
class TrainOptions:
    """How long to train, how to score, and what to look after.

    Attributes:
        epochs: passes over the train data.
        steps: ends the run after so many steps; None trains whole epochs.
        eval_batch_size: samples per rank and test batch.
        swap_eval_batches: test batches looked at after each phase for the schedule's feedback; 0 gives it none.
        check_replicas: compares the ranks' hot rows bit for bit every so many steps; 0 never.
        nan_check_steps: looks for a loss that is no finite number every so many steps, before every checkpoint and in every score; 0 never.
        lookahead: batches that the pipeline takes ahead.
        prefetch: without hot and cold tiers, TorchRec's pipeline that brings rows into the tables' caches ahead.
        log_every: steps between updates of the progress bar and of TensorBoard.
        tensorboard: folder for TensorBoard's events; None writes none.
        checkpoint: None keeps no checkpoints.
    """

    epochs: int = 1
    steps: int | None = None
    eval_batch_size: int = 4096
    swap_eval_batches: int = 4
    check_replicas: int = 0
    nan_check_steps: int = 100
    lookahead: int = 2
    prefetch: bool = False
    log_every: int = 50
    tensorboard: str | None = None
    checkpoint: CheckpointOptions | None = None


class Trainer:
    """Trains one model.

    Args:
        model: a DistributedModelParallel around a model that returns `(loss, (loss, logits, labels))`.
        optimizer: of the model, fused parts included.
        loader: this rank's train batches; its schedule is told the test scores after each phase, while it listens.
        test: the test data.
        options: see there.
        device: where to train.
        group: the ranks, or None for one process.
        show_progress: a progress bar, on rank 0.
        run: what identifies the run, values that JSON can write. Checkpoints that were saved under another are refused; so leave out what
            may change when the run goes on, such as the number of epochs.

    Attributes:
        trained: what this process has trained.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        loader: HotColdDataLoader,
        test: BatchSource,
        options: TrainOptions,
        device: torch.device,
        group: dist.ProcessGroup | None,
        *,
        show_progress: bool = False,
        run: Mapping[str, Any] | None = None,
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
        self._show_progress = show_progress
        self._hot_cold = [module for module in model.modules() if isinstance(module, ShardedHotColdModule)]
        self._pipeline = self.new_pipeline()
        self._taken = _Taken()
        self._swap_test: list[Batch] = []
        self._log = RunLog(group, device)
        self.trained = TrainedSamples()
        self._losses = FiniteLossGuard(group, device, every=options.nan_check_steps)
        self._checkpoints: RunCheckpoints | None = None
        if options.checkpoint is not None:
            self._checkpoints = RunCheckpoints(options.checkpoint, model, optimizer, device, run or {})
        self._telemetry: Telemetry
        self._position: Position | None = None  # of the batch that was trained last, in this process

    @property
    def steps(self) -> int:
        """Steps of the run so far, those before it was resumed included."""
        return self._log.steps

    def run(self) -> TrainResult:
        """Trains and scores; goes on from the newest checkpoint, if there is one. Collective: every rank runs it.

        Raises:
            ConfigError: the newest checkpoint is of another run.
            DataError: there is no sample to train or to score on; the loader's and the sources' own.
            DivergedError: a training or test loss is no finite number.
            FAEError: a checkpoint could not be written; the ones before it are whole.
            ReplicaError: the ranks' hot rows differ (only where they are checked).
            All of them on every rank alike.
        """
        with closing(self._loader), self._resume() as self._telemetry:
            self._model.train()
            for batches in self._stretches():
                self._train(batches)
                self._losses.check()  # before anything is made of weights that may have diverged
                if self._schedule_listens and self._phase_is_over():
                    self._tell_schedule()
                if self._checkpoints is not None and self._checkpoints.is_due(self._log.steps):
                    self._save()
            self._pipeline.detach()
            if not self._log.steps:
                raise DataError("there are no samples to train on; received an empty stream of train batches; give every rank at least one")
            self._save()
            scores = self._score(self._test_batches())
            self._telemetry.evaluation(scores, self._log.steps, tag="test")
        return self._log.result(scores)

    def new_pipeline(self) -> TrainPipelineSparseDist[HotColdBatch, Any]:
        """A pipeline as the run's. Ours where the model has hot and cold tiers; the stock baseline runs on the stock one."""
        if self._hot_cold:
            return FAETrainPipeline(self._model, self._optimizer, self._device, lookahead=self._options.lookahead)
        stock = PrefetchTrainPipelineSparseDist if self._options.prefetch else TrainPipelineSparseDist
        return stock(self._model, self._optimizer, self._device, custom_model_fwd=_weighted(self._model))

    def _resume(self) -> Telemetry:
        """Goes to the newest checkpoint, or stays at the start."""
        if self._checkpoints is not None:
            self._checkpoints.resume(self._loader, self._log)
        done, options = self._log.steps, self._options
        telemetry = Telemetry(
            self._group, show_progress=self._show_progress, tensorboard=options.tensorboard, log_every=options.log_every, first_step=done
        )
        if done:
            telemetry.text("resumed from the checkpoint that was made here", done)
        return telemetry

    def _stretches(self) -> Iterator[Iterator[HotColdBatch]]:
        """Cuts the epochs where the pipeline must be empty: before the schedule hears of a phase, at checkpoints, and at the end."""
        while self._loader.epoch < self._options.epochs and not self._is_finished():
            phases = self._taken.clocked(self._loader.phases())
            for _, batches in phases:
                stream = self._taken.noted(batches)
                if not self._schedule_listens:  # nobody waits for the end of a phase
                    stream = chain(stream, chain.from_iterable(self._taken.noted(more) for _, more in phases))
                for first in stream:
                    yield chain([first], islice(stream, self._steps_to_next_cut() - 1))
                    if self._is_finished():
                        return

    def _train(self, batches: Iterator[HotColdBatch]) -> None:
        """Trains on all batches."""
        while True:
            start, loading_s = time.perf_counter(), self._taken.seconds
            try:
                loss, _, _ = self._pipeline.progress(batches)
            except StopIteration:
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)  # what is still queued belongs to the steps, not to what follows
                    self._log.add_busy(time.perf_counter() - start)
                return
            self._note(loss, start, self._taken.seconds - loading_s)

    def _note(self, loss: torch.Tensor, start: float, loading_s: float) -> None:
        """After a step: checks what is due and tells all who keep records. Nothing here waits for the device, but every so many steps."""
        batch, step = self._taken.batches.popleft(), self._log.steps + 1
        assert batch.position is not None
        self._position, epoch = batch.position, batch.position.epoch
        if self._options.check_replicas and step % self._options.check_replicas == 0:
            for module in self._hot_cold:
                module.check_replicas()
        busy_s, waited_s = time.perf_counter() - start - loading_s, self._taken.take_seconds()
        self._log.step(batch.kind, batch.num_samples, loss, epoch=epoch, busy_s=busy_s, loading_s=waited_s)
        self._losses.add(step, batch.kind, batch.num_samples, loss)
        self.trained.add(batch)
        if self._checkpoints is not None:
            self._checkpoints.note(epoch, step, batch)
        stages = {"loading": self._taken.seconds, **getattr(self._pipeline, "stage_seconds", {})}
        rate = self._loader.schedule.rate
        self._telemetry.step(step, batch.kind, batch.num_samples, loss, busy_s + waited_s, stages, rate=rate)

    def _tell_schedule(self) -> None:
        """Looks at the test data and tells the schedule, the same on every rank."""
        self._pipeline.detach()
        scores = self._score(self._swap_batches())
        self._telemetry.evaluation(scores, self._log.steps)
        told = torch.tensor([scores.logloss, scores.auc, scores.accuracy], dtype=torch.float64, device=self._device)
        if self._group is not None:  # the ranks' schedules must not drift apart by a rounding
            dist.broadcast(told, src=dist.get_global_rank(self._group, 0), group=self._group)
        loss, auc, accuracy = told.tolist()
        self._log.swap_losses.append(loss)
        schedule = self._loader.schedule
        schedule.observe(loss, {"auc": auc, "accuracy": accuracy})
        if schedule.fell_back:  # for the first and only time: it gets no more feedback
            guard = schedule.guard
            assert guard is not None
            self._telemetry.text(
                f"the test {guard.metric} fell behind its best by more than {guard.band}: hot and cold batches are interleaved from now on",
                self._log.steps,
            )

    def _save(self) -> None:
        if self._checkpoints is not None and self._position is not None:
            self._checkpoints.save(self._log.steps, self._loader, self._position, self._log)

    def _score(self, batches: Iterable[Batch]) -> Scores:
        scores = evaluate(self._model, batches, self._device, self._group)
        if self._options.nan_check_steps and not math.isfinite(scores.logloss):  # the last update did it, which no training loss has shown
            raise DivergedError(
                f"the test loss after step {self._log.steps} is {scores.logloss}: the model has diverged; lower the learning rate, and "
                "begin again or go on from a checkpoint of an earlier step"
            )
        return scores

    def _test_batches(self) -> Iterator[Batch]:
        return self._test.batches(self._options.eval_batch_size, rank=self._rank, world_size=self._world_size)

    def _swap_batches(self) -> Iterator[Batch]:
        """The few test batches that are looked at after each phase: read the first time, for there may be many phases."""
        if self._swap_test:
            yield from self._swap_test
            return
        for batch in islice(self._test_batches(), self._options.swap_eval_batches):
            self._swap_test.append(batch)
            yield batch

    @property
    def _schedule_listens(self) -> bool:
        """Whether what the schedule is told can change anything that is still to come."""
        schedule = self._loader.schedule
        return schedule.listens and not schedule.fell_back and self._options.swap_eval_batches > 0

    def _phase_is_over(self) -> bool:
        return self._position is not None and self._position.cursor.left == 0

    def _is_finished(self) -> bool:
        return self._options.steps is not None and self._log.steps >= self._options.steps

    def _steps_to_next_cut(self) -> int:
        steps = self._log.steps
        to_end = sys.maxsize if self._options.steps is None else self._options.steps - steps
        return to_end if self._checkpoints is None else min(to_end, self._checkpoints.steps_to_next(steps))


def _weighted(model: DistributedModelParallel) -> Callable[[HotColdBatch | None], tuple[torch.Tensor, Any]]:
    """The model with its loss weighted as the batch says; ranks that have equally many samples weigh 1."""

    def forward(batch: HotColdBatch | None) -> tuple[torch.Tensor, Any]:
        assert batch is not None
        loss, output = model(batch)
        return (loss if batch.weight == 1.0 else loss * batch.weight), output

    return forward


class _Taken:
    """What was taken from the loader: the batches that are not trained yet (they are trained in this order), and the time they took.

    It stands next to the loader, before any cutting and any pipeline, so that no loading escapes the clock.

    Attributes:
        batches: taken, not trained.
        seconds: host seconds of loading so far.
    """

    def __init__(self) -> None:
        self.batches: deque[HotColdBatch] = deque()
        self.seconds = 0.0
        self._told_s = 0.0

    def clocked(self, items: Iterator[T]) -> Iterator[T]:
        """The same items."""
        while True:
            start = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item

    def noted(self, batches: Iterator[HotColdBatch]) -> Iterator[HotColdBatch]:
        """The same batches."""
        for batch in self.clocked(batches):
            self.batches.append(batch)
            yield batch

    def take_seconds(self) -> float:
        """Seconds of loading since the last call."""
        new, self._told_s = self.seconds - self._told_s, self.seconds
        return new
