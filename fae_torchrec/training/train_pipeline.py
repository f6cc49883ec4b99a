"""FAETrainPipeline: TorchRec's TrainPipelineSparseDist that keeps count of the kinds of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.streamable import Pipelineable

from fae_torchrec.data.batches import HotKeyedJaggedTensor

In = TypeVar("In", bound=Pipelineable)
Out = TypeVar("Out")


@dataclass
class StepCounts:
    """Steps taken, by kind: `hot` skipped the cold tier whole, `other` (cold or mixed) went through both tiers."""

    hot: int = 0
    other: int = 0


class FAETrainPipeline(TrainPipelineSparseDist[In, Out]):
    """Drop-in for TrainPipelineSparseDist: the same constructor, `progress(iterator)` and overlap of copy, input dist and compute.

    A batch whose `sparse_features` is a HotKeyedJaggedTensor keeps its promise through the copy to the device and both pipeline stages, so
    the input dist of the next batch and the compute of the current one may be of different kinds.

    Args:
        *args: as TrainPipelineSparseDist: model, optimizer, device, ...
        **kwargs: as TrainPipelineSparseDist.

    Attributes:
        steps: steps finished so far, by kind.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = StepCounts()

    def dequeue_batch(self) -> None:
        """Counts the batch that was just trained and makes room for the next."""
        # Any batch type of the user's will do; only one with these features can be hot.
        if isinstance(getattr(self.batches[0], "sparse_features", None), HotKeyedJaggedTensor):
            self.steps.hot += 1
        else:
            self.steps.other += 1
        super().dequeue_batch()
