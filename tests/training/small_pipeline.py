"""Batches of given kinds for the small models, and pipelines that write down in which order things begin: what the pipeline tests run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import train_pipelines

from fae_torchrec.core.schedule import Kind
from fae_torchrec.data.batches import HotColdBatch, HotKeyedJaggedTensor
from fae_torchrec.data.filler import filler_like
from fae_torchrec.data.segregate import select_samples
from fae_torchrec.distributed.hot_cold_module import ShardedHotColdModule
from fae_torchrec.training.train_pipeline import FAETrainPipeline
from tests.distributed import small_model
from tests.distributed.small_model import Case, dense_optimizer, placement_of

CPU = torch.device("cpu")
KINDS: dict[str, Kind] = {"H": "hot", "C": "cold", "M": "mixed"}
SEQUENCE = "HHHCCHCMH"


def of_kind(batch: Batch, kind: Kind, weight: float = 1.0) -> HotColdBatch:
    """The batch as a loader gives it; nobody checks that a cold one is cold."""
    kjt = HotKeyedJaggedTensor.promise(batch.sparse_features) if kind == "hot" else batch.sparse_features
    return HotColdBatch(batch.dense_features, kjt, batch.labels, kind, weight, batch.labels.numel())


def new_batches(case: Case, kinds: str, rank: int, size: int = 16) -> list[HotColdBatch]:
    """A batch for each letter of `kinds`."""
    placement = placement_of(case)
    return [
        of_kind(small_model.new_batch(case, step, rank, size, hot_only=placement if letter == "H" else None), KINDS[letter])
        for step, letter in enumerate(kinds)
    ]


def shared(batches: Sequence[HotColdBatch], splits: Sequence[tuple[int, int]], rank: int, *, weighted: bool = True) -> list[HotColdBatch]:
    """One of two ranks' part of joined batches: the first samples of each, or the others; a filler where it has none."""
    parts = []
    for step, batch in enumerate(batches):
        first, others = splits[step % len(splits)]
        mine = torch.arange(first) if rank == 0 else torch.arange(first, first + others)
        weight = 2 * len(mine) / (first + others) if weighted else 1.0
        parts.append(of_kind(select_samples(batch, mine), batch.kind, weight) if len(mine) else filler_like(batch))
        parts[-1].weight = weight
    return parts


def run_pipeline(
    model: DistributedModelParallel,
    batches: Sequence[Batch],
    after_step: Callable[[int, Any], None] | None = None,
    device: torch.device = CPU,
    **options: Any,
) -> FAETrainPipeline[Any, Any]:
    """Trains on all batches; calls `after_step` with the number of steps done and the pipeline."""
    pipeline: FAETrainPipeline[Any, Any] = FAETrainPipeline(model, dense_optimizer(model), device, **options)
    stream = iter(batches)
    for step in range(len(batches)):
        pipeline.progress(stream)
        if after_step is not None:
            after_step(step + 1, pipeline)
    return pipeline


@contextmanager
def traced() -> Iterator[list[str]]:
    """Writes down, while it lasts, what pipelines begin for which batch: its input dist, its rows ahead of its turn, its forward, update.

    `start3` is the input dist of the fourth batch.
    """
    events: list[str] = []
    number_of: dict[int, int] = {}
    contexts: list[Any] = []  # kept, so that an id is one context's

    def data_dist(modules: Any, batch: Any, context: Any) -> None:
        events.append(f"start{context.index}")
        _data_dist(modules, batch, context)
        for module_context in context.module_contexts.values():
            number_of[id(module_context)] = context.index
            contexts.append(module_context)

    def look_ahead(self: Any, ctx: Any, *args: Any, **options: Any) -> None:
        events.append(f"rows{number_of[id(ctx)]}")
        _look_ahead(self, ctx, *args, **options)

    def look_up(self: Any, ctx: Any, inputs: Any) -> Any:
        events.append(f"forward{number_of.get(id(ctx), ' of no pipeline')}")
        return _look_up(self, ctx, inputs)

    def dequeue_batch(self: Any) -> None:
        events.append(f"update{self.contexts[0].index}")
        _dequeue_batch(self)

    with (
        mock.patch.object(train_pipelines, "_start_data_dist", data_dist),
        mock.patch.object(ShardedHotColdModule, "look_ahead", look_ahead),
        mock.patch.object(ShardedHotColdModule, "_look_up", look_up),
        mock.patch.object(FAETrainPipeline, "dequeue_batch", dequeue_batch),
    ):
        yield events


_data_dist = train_pipelines._start_data_dist
_look_ahead = ShardedHotColdModule.look_ahead
_look_up = ShardedHotColdModule._look_up
_dequeue_batch = FAETrainPipeline.dequeue_batch
