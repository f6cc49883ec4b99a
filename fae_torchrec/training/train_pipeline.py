"""FAETrainPipeline: TorchRec's TrainPipelineSparseDist for hot and cold batches, with weights, re-bundling and schedule-aware prefetch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from torchrec.streamable import Pipelineable

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.data.batches import HotColdBatch
from fae_torchrec.data.stream_windows import Agree
from fae_torchrec.training.cold_prefetch import ColdPrefetch, coming_cold, kind_of
from fae_torchrec.training.rebundling import Rebundling
from fae_torchrec.training.stage_clock import StageClock

In = TypeVar("In", bound=Pipelineable)
Out = TypeVar("Out")

STAGES = ("copy", "input_dist", "forward", "backward", "optimizer", "prefetch")
_STOCK_LOOKAHEAD = 2  # TrainPipelineSparseDist holds the batch in training and two more


@dataclass
class StepCounts:
    """Steps taken, by kind: `hot` skipped the cold tier whole, `other` (cold or mixed) went through both tiers."""

    hot: int = 0
    other: int = 0


class FAETrainPipeline(TrainPipelineSparseDist[In, Out]):
    """Drop-in for TrainPipelineSparseDist: the same constructor, `progress(iterator)` and overlap of copy, input dist and compute.

    A batch whose `sparse_features` is a HotKeyedJaggedTensor keeps its promise through the copy to the device and all stages, so the input
    dist of the next batch and the compute of the current one may be of different kinds.

    The loss of a HotColdBatch is multiplied by its `weight`, so that ranks with fewer samples, or none, count as they should.

    With a `placement`, plain batches are re-bundled into hot and cold ones (`Rebundling`): a stock training loop need not change. All ranks
    then make the pipeline and take steps together.

    On CUDA with a cold tier behind UVM caching (`prefetch_pipeline`, which FAEShardingPlanner sets), the cold rows of the next cold or
    mixed batch are prefetched while the batch before it is trained, as PrefetchTrainPipelineSparseDist does; a hot batch needs none.

    With `lookahead` above 2 each of the two rounds of an input dist gets a whole step of its own to come in. Above 3 the prefetch follows
    the schedule: the cold rows of the next cold (or mixed) batch are brought in while the hot batches before it are trained, all of them.
    Hot batches never touch cold rows, so nothing changes. All batches taken ahead are held, with their exchanged ids. What is started when
    is decided from the kinds alone, which are the same on every rank. `detach` before anything else uses the model, as with stock's
    pipelines.

    Args:
        *args: as TrainPipelineSparseDist: model, optimizer, device, ...
        placement: makes hot and cold batches out of plain ones; None takes batches as they come.
        batch_size: samples per batch and rank, with a placement.
        schedule: order of the kinds, with a placement; default ShuffleSchedule(). Tell it test losses between two iterators, for none is
            asked for here.
        agree: as HotColdDataLoader's, with a placement; default: over a gloo group of its own of all ranks.
        loader_options: further arguments of HotColdDataLoader, with a placement.
        lookahead: batches taken ahead of the one in training, at least 2.
        **kwargs: as TrainPipelineSparseDist.

    Attributes:
        steps: steps finished so far, by kind.

    Raises:
        ConfigError: `lookahead` is below 2, or loader arguments lack a placement, or a placement lacks a batch size.
    """

    def __init__(
        self,
        *args: Any,
        placement: RowPlacement | None = None,
        batch_size: int | None = None,
        schedule: ShuffleSchedule | None = None,
        agree: Agree | None = None,
        loader_options: Mapping[str, Any] | None = None,
        lookahead: int = _STOCK_LOOKAHEAD,
        **kwargs: Any,
    ) -> None:
        if lookahead < _STOCK_LOOKAHEAD:
            raise ConfigError(f"lookahead must be at least {_STOCK_LOOKAHEAD}, as TrainPipelineSparseDist has it; received {lookahead}")
        given = {"batch_size": batch_size, "schedule": schedule, "agree": agree, "loader_options": loader_options}
        if placement is None and any(value is not None for value in given.values()):
            names = [name for name, value in given.items() if value is not None]
            raise ConfigError(f"{', '.join(names)}: only for batches that are re-bundled here; give a placement too, or none of these")
        if placement is not None and batch_size is None:
            raise ConfigError("a placement was given without batch_size, the samples per batch and rank of the batches to be made; give it")
        super().__init__(*args, **kwargs)
        self.steps = StepCounts()
        self._clock = StageClock(STAGES)
        self._lookahead = lookahead
        self._started: set[int] = set()  # contexts, by index, whose input dist was started
        self._cold_prefetch = ColdPrefetch(self._device)
        self._stock_forward: Callable[[In | None], tuple[torch.Tensor, Out]] = vars(self)["_model_fwd"]
        self._model_fwd = self._forward
        self._rebundling: Rebundling | None = None
        if placement is not None and batch_size is not None:
            self._rebundling = Rebundling(placement, batch_size, schedule, agree, self._device, loader_options or {}, self._model)

    @property
    def stage_seconds(self) -> Mapping[str, float]:
        """Seconds of the host so far, by stage: "copy", "input_dist", "forward", "backward", "optimizer", "prefetch".

        Loading is in none. On CUDA the host runs ahead of the device: what a stage queues there shows where the host waits for it.
        """
        return dict(self._clock.seconds)

    def progress(self, dataloader_iter: Iterator[In]) -> Out:
        """One training step, as TrainPipelineSparseDist.progress; StopIteration at the end.

        Args:
            dataloader_iter: the batches; the same iterator at every step of a pass.

        Raises:
            HotBatchError: on every rank alike: a promise is broken or the ranks disagree about the kind.
        """
        if self._rebundling is not None:
            dataloader_iter = self._rebundling(dataloader_iter)
        output: Out = super().progress(dataloader_iter)
        return output

    def fill_pipeline(self, dataloader_iter: Iterator[In]) -> None:
        """Fills the pipeline as stock does, and beyond with a lookahead above 2: a step takes one more batch."""
        super().fill_pipeline(dataloader_iter)
        while 0 < len(self.batches) < self._lookahead and self._lookahead > _STOCK_LOOKAHEAD:
            ended = self._dataloader_exhausted and dataloader_iter is self._dataloader_iter
            if ended or not self.enqueue_batch(dataloader_iter):
                return

    def start_sparse_data_dist(self, batch: In | None, context: TrainPipelineContext) -> None:
        """As stock, once for each batch: not again for one that is looked ahead at, or that was in flight when the model was detached."""
        if batch is None or context.index in self._started:
            return
        if context.index is not None:
            self._started.add(context.index)
        with self._clock("input_dist"):
            super().start_sparse_data_dist(batch, context)

    def wait_sparse_data_dist(self, context: TrainPipelineContext) -> None:
        """As stock."""
        with self._clock("input_dist"):
            super().wait_sparse_data_dist(context)

    def copy_batch_to_gpu(self, dataloader_iter: Iterator[In]) -> tuple[In | None, TrainPipelineContext | None]:
        """As stock."""
        with self._clock("copy"):
            copied: tuple[In | None, TrainPipelineContext | None] = super().copy_batch_to_gpu(dataloader_iter)
        return copied

    def inplace_copy_batch_to_gpu(self, dataloader_iter: Iterator[In]) -> tuple[In | None, TrainPipelineContext | None]:
        """As stock."""
        with self._clock("copy"):
            copied: tuple[In | None, TrainPipelineContext | None] = super().inplace_copy_batch_to_gpu(dataloader_iter)
        return copied

    def dequeue_batch(self) -> None:
        """Counts the batch that was just trained and makes room for the next."""
        if kind_of(self.batches[0]) == "hot":
            self.steps.hot += 1
        else:
            self.steps.other += 1
        self._started.discard(self.contexts[0].index)
        self._cold_prefetch.done(self.contexts[0])
        super().dequeue_batch()

    def detach(self) -> nn.Module:
        """As stock: the model can be used for something else, batches in flight are kept and `progress` goes on with them."""
        self._cold_prefetch.forget(self._pipelined_modules)
        model: nn.Module = super().detach()
        return model

    def reset(self) -> None:
        """As stock: drops the batches in flight; all ranks at the same step."""
        self._cold_prefetch.forget(self._pipelined_modules)
        self._cold_prefetch = ColdPrefetch(self._device)
        self._started.clear()
        if self._rebundling is not None:
            self._rebundling.close()
        super().reset()

    def _next_batch(self, dataloader_iter: Iterator[In]) -> In | None:
        with self._clock(None):
            batch: In | None = super()._next_batch(dataloader_iter)
        return batch

    def _wait_for_batch(self) -> None:
        super()._wait_for_batch()
        self._cold_prefetch.wait(self.contexts[0])
        if self._lookahead > _STOCK_LOOKAHEAD:
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Takes each batch in the queue one stage on, so that whatever is waited for was started a step ago."""
        if kind_of(self.batches[0]) == "hot":
            self._bring_rows(hot=True)
        for context in self.contexts:
            if context.index in self._started and context.fused_splits_awaitables:
                self.wait_sparse_data_dist(context)
        for batch, context in zip(self.batches, self.contexts, strict=True):
            self.start_sparse_data_dist(batch, context)

    def _bring_rows(self, *, hot: bool) -> None:
        coming = coming_cold([kind_of(batch) for batch in self.batches])
        if coming is None:
            return
        context = self.contexts[coming]
        distributed = context.index in self._started and not context.fused_splits_awaitables
        # Without gradient what is looked up could not be trained on later.
        if distributed and not self._cold_prefetch.has(context) and self._model.training and torch.is_grad_enabled():
            with self._clock("prefetch"):
                self._cold_prefetch.bring(self._pipelined_modules, context, self._data_dist_stream, hot=hot)

    def _forward(self, batch: In | None) -> tuple[torch.Tensor, Out]:
        with self._clock("forward"):
            return self._stock_forward(batch)

    def _backward(self, losses: torch.Tensor) -> None:
        if self._cold_prefetch.caches(self._pipelined_modules):
            self._bring_rows(hot=False)
        batch = self.batches[0]
        weight = batch.weight if isinstance(batch, HotColdBatch) else 1.0
        with self._clock("backward"):
            super()._backward(losses if weight == 1.0 else losses * weight)

    def _optimizer_step(self) -> None:
        with self._clock("optimizer"):
            super()._optimizer_step()
