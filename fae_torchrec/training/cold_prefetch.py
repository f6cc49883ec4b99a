"""Schedule-aware prefetch: the cold rows of the coming cold batch are brought in before its turn, over the hot batches before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.profiler import record_function
from torchrec.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from torchrec.distributed.types import NoWait

from fae_torchrec.core.schedule import Kind
from fae_torchrec.data.batches import HotColdBatch, HotKeyedJaggedTensor
from fae_torchrec.distributed.hot_cold_module import ShardedHotColdModule
from fae_torchrec.distributed.staging import MOVES_COLD_ROWS


def kind_of(batch: Any) -> Kind:
    """The kind of a batch of any type: what a HotColdBatch says, else "hot" where the features are promised to be, else "mixed"."""
    if isinstance(batch, HotColdBatch):
        return batch.kind
    return "hot" if isinstance(getattr(batch, "sparse_features", None), HotKeyedJaggedTensor) else "mixed"


def coming_cold(kinds: Sequence[Kind]) -> int | None:
    """Place of the next batch that has cold rows: the first behind the one in training that is not hot.

    Its input dist needs no row and can be made at any time. If the batch in training is hot, all before it are, and every cold row is as it
    will be at its turn. If not, a cache still gets it right after that batch's forward (`RowCache`).

    Args:
        kinds: of the batch in training and of those behind it; the same on every rank.
    """
    return next((place for place, kind in enumerate(kinds) if place and kind != "hot"), None)


class ColdPrefetch:
    """Brings the cold rows of batches in ahead of their turn; every rank calls it for the same batches at the same step.

    Args:
        device: of the model. On CUDA rows come into the cache of UVM caching, on a stream of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._brought: set[int] = set()

    def caches(self, modules: Iterable[Any]) -> bool:
        """Whether there are caches or staging areas, to which rows can be brought right after the forward of a cold batch too."""
        return any(isinstance(module, ShardedHotColdModule) and module.prefetches for module in modules)

    def has(self, context: TrainPipelineContext) -> bool:
        """Whether the rows of a batch are on their way already."""
        return context.index in self._brought

    def bring(self, modules: Iterable[Any], context: TrainPipelineContext, dist_stream: torch.Stream | None, *, hot: bool) -> None:
        """Brings the cold rows of a batch in. A collective on the CPU, but for staging areas.

        Args:
            modules: the pipelined modules.
            context: of the batch, its input dist finished but for the last wait.
            dist_stream: where its input dist runs; None on the CPU.
            hot: whether the batch in training is hot; if not, its forward was queued, and only caches and staging areas get rows.
        """
        assert context.index is not None
        self._brought.add(context.index)
        for module in modules:
            if not isinstance(module, ShardedHotColdModule):
                continue
            if not module.prefetches and (self._stream is not None or not hot):
                continue
            name = module.forward.name
            request = context.input_dist_tensors_requests[name]
            if self._stream is None or dist_stream is None:
                features = request.wait()
                module.look_ahead(context.module_contexts[name], features, hot=hot)
            else:
                features = self._prefetch(module, context.module_contexts[name], request, dist_stream)
            context.input_dist_tensors_requests[name] = NoWait(features)

    def _prefetch(self, module: ShardedHotColdModule, module_context: Any, request: Any, dist_stream: torch.Stream) -> Any:
        """As TorchRec's `prefetch_embeddings`, and the ids and their context are kept for every stream that reads them."""
        assert self._stream is not None
        forward_stream = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(dist_stream):  # type: ignore[arg-type]
            features = request.wait()
        self._stream.wait_stream(dist_stream)
        with torch.cuda.stream(self._stream), record_function(MOVES_COLD_ROWS):
            for stream in (self._stream, forward_stream):
                features.record_stream(stream)
                module_context.record_stream(stream)
            module.look_ahead(module_context, features, forward_stream)
        return features

    def wait(self, context: TrainPipelineContext) -> None:
        """Before the forward of a batch: its rows must have come."""
        if context.index in self._brought and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def done(self, context: TrainPipelineContext) -> None:
        """After the step of a batch."""
        if context.index is not None:
            self._brought.discard(context.index)

    def forget(self, modules: Iterable[Any]) -> None:
        """Before the model is used for something else: a cached kernel must not take the rows of a coming batch for that of another."""
        if self._stream is None:
            return  # values that were looked up stay right: nothing but training changes rows
        for module in modules:
            if isinstance(module, ShardedHotColdModule):
                module.forget_prefetched()
        self._brought.clear()
