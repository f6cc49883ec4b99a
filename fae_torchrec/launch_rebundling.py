"""ScriptRebundling: a script's own training batches, sorted into hot and cold ones without changing how many steps it takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import Kind, ShuffleSchedule
from fae_torchrec.data.batches import HotColdBatch, HotKeyedJaggedTensor
from fae_torchrec.data.bundler import Bundler
from fae_torchrec.data.segregate import hot_samples, plain_batch, select_samples, with_shared_lengths
from fae_torchrec.data.stream_windows import Agree

_OPAQUE = -1  # said of a batch in place of its bytes


class RebundlingOptions(NamedTuple):
    """How batches are sorted; see LaunchConfig."""

    window_batches: int
    buffer_bytes: int
    pin_memory: bool = False
    split_ahead: Callable[[HotColdBatch, int], HotColdBatch] | None = None


class ScriptRebundling:
    """Takes the place of FAETrainPipeline's Rebundling where the script decides what a pass is.

    A window is the script's next batches, as many on every rank. Its samples go out in as many batches of the same sizes as they came in:
    so many of them all hot that every rank can fill them, and in the others the cold samples and the hot ones that are left. So the
    script takes the steps that it would have taken, each with the samples of as many steps, weighted as ever, and every sample of a
    window is trained once. (HotColdDataLoader, which need not keep the number of steps, wastes fewer hot samples.)

    While a window is trained one batch is read at each step, as in TorchRec's pipeline, in the caller's thread: only the first window is
    read at once. Iterators that are first seen while the model is in evaluation mode are passed through as they are, and so are batches
    that are no torchrec Batch on the CPU.

    Args:
        placement: which rows are hot.
        schedule: the order of the kinds within a window.
        model: asked whether it is training.
        agree: all-gather over the ranks; once when a pass begins and once for each window.
        rank: this rank.
        world_size: ranks.
        options: how.
        say: told, in one sentence, what was not as it should be.
    """

    def __init__(
        self,
        placement: RowPlacement,
        schedule: ShuffleSchedule,
        model: nn.Module,
        agree: Agree,
        rank: int,
        world_size: int,
        options: RebundlingOptions,
        say: Callable[[str], None],
    ) -> None:
        self._placement, self._schedule, self._model, self._agree = placement, schedule, model, agree
        self._rank, self._world_size, self._options, self._say = rank, world_size, options, say
        self._source: Iterator[Any] | None = None
        self._batches: Iterator[Any] = iter(())

    def __call__(self, source: Iterator[Any]) -> Iterator[Any]:
        """The batches to be trained on in place of an iterator's: the same iterator for the same one."""
        if source is not self._source:
            self._source = source
            self._batches = self._bundled(source) if self._model.training and self._schedule.segregates else source
        return self._batches

    def close(self) -> None:
        """Forgets the present iterator and the samples that were taken from it."""
        self._source, self._batches = None, iter(())

    def _bundled(self, source: Iterator[Any]) -> Iterator[Any]:
        first = next(source, None)
        said = self._agree(np.array([_describe(first)], dtype=np.int64))[:, 0]
        if (said == _OPAQUE).any():
            self._say(
                f"batches of type {type(first).__name__} are not sorted into hot and cold ones: that takes a torchrec.datasets.utils.Batch "
                "on the CPU on every rank; rows are placed all the same"
            )
            yield from source if first is None else chain([first], source)
            return
        size = max(1, min(self._options.window_batches, self._options.buffer_bytes // 2 // max(1, int(said.max()))))
        waiting: deque[_Read] = deque()
        read = 0  # samples of the pass

        def take() -> bool:
            nonlocal first, read
            batch, first = (next(source, None), None) if first is None else (first, None)
            if batch is not None:
                waiting.append(self._classified(batch, read))
                read += len(waiting[-1].numbers)
            return batch is not None

        while len(waiting) < size and take():
            pass
        while True:
            counts = self._agree(np.array([len(waiting), _fillable([r.hot for r in waiting])], dtype=np.int64))
            steps = int(counts[:, 0].min())
            if not steps:
                if counts[:, 0].any():
                    self._say(
                        f"the ranks fed different numbers of batches; {counts[:, 0].tolist()} by rank are left and were not trained, for a "
                        "step needs one of every rank (without fae launch the ranks would wait for each other here)"
                    )
                return
            window = [waiting.popleft() for _ in range(steps)]
            if (counts[:, 0] > steps).any():  # some rank's hot samples are not all in this window
                counts = self._agree(np.array([steps, _fillable([r.hot for r in window])], dtype=np.int64))
            for batch in self._cut(window, int(counts[:, 1].min())):
                if len(waiting) < size:
                    take()
                yield batch

    def _classified(self, batch: Batch, before: int) -> _Read:
        batch = plain_batch(batch)
        if batch.sparse_features.values().is_shared():  # a worker sent it: each tensor holds a file descriptor open
            batch = select_samples(batch, torch.arange(batch.sparse_features.stride()))
        batch = with_shared_lengths(batch)
        hot = hot_samples(batch.sparse_features, self._placement).numpy()
        return _Read(batch, hot, np.arange(before, before + len(hot)) * self._world_size + self._rank)

    def _cut(self, window: list[_Read], hot_steps: int) -> Iterator[HotColdBatch]:
        """The window's batches in the order of the schedule."""
        sizes = [len(read.numbers) for read in window]
        queues: dict[Kind, Bundler] = {"hot": Bundler(), "cold": Bundler()}
        for batch, hot, numbers in window:
            chosen: dict[Kind, np.ndarray] = {"hot": np.flatnonzero(hot), "cold": np.flatnonzero(~hot)}
            for kind, rows in chosen.items():
                queues[kind].add(batch, numbers[rows], rows if len(rows) < len(hot) else None)
        spare = len(queues["hot"]) - sum(sizes[:hot_steps])
        of_hot, left = queues["hot"].split(sum(sizes[:hot_steps])), queues["hot"]
        if spare:
            queues["cold"].add(*left.pop(spare))
        queues["hot"] = of_hot
        taken: dict[Kind, int] = {"hot": 0, "cold": 0}
        for kind in _order(self._schedule, len(window) - hot_steps, hot_steps):
            step, taken[kind] = taken[kind], taken[kind] + 1
            size = sizes[step if kind == "hot" else hot_steps + step]
            yield self._made(kind, step, *queues[kind].pop(size))

    def _made(self, kind: Kind, step: int, batch: Batch, numbers: np.ndarray) -> HotColdBatch:
        kjt = batch.sparse_features
        made = HotColdBatch(
            dense_features=batch.dense_features,
            sparse_features=HotKeyedJaggedTensor.promise(kjt) if kind == "hot" else kjt,
            labels=batch.labels,
            kind=kind,
            num_samples=len(numbers),
            sample_numbers=numbers,
        )
        if self._options.split_ahead is not None:
            made = self._options.split_ahead(made, step)
        return made.pin_memory() if self._options.pin_memory else made


class _Read(NamedTuple):
    """A batch of the script, which of its samples are hot, and its samples' numbers."""

    batch: Batch
    hot: np.ndarray
    numbers: np.ndarray


def _describe(batch: Any) -> int:
    """Bytes of a batch that can be sorted, 0 of none."""
    if batch is None:
        return 0
    if type(batch) is not Batch or not isinstance(batch.sparse_features, KeyedJaggedTensor):  # a subclass may have more than is sorted here
        return _OPAQUE
    kjt = batch.sparse_features
    tensors = [batch.dense_features, batch.labels, kjt.values(), kjt.lengths(), kjt.weights_or_none()]
    given = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if len(given) < 4 or any(tensor.device.type != "cpu" for tensor in given):
        return _OPAQUE
    if not len(batch.dense_features) == len(batch.labels) == kjt.stride():
        return _OPAQUE
    return max(1, sum(tensor.numel() * tensor.element_size() for tensor in given))


def _fillable(hot: list[np.ndarray]) -> int:
    """How many of the first batches hot samples can fill.

    Example: batches of 4, 4, 4 and 2 samples, 9 of them hot: two.
    """
    sizes, total = np.cumsum([len(mask) for mask in hot]), sum(int(mask.sum()) for mask in hot)
    return int(np.searchsorted(sizes, total, side="right"))


def _order(schedule: ShuffleSchedule, cold: int, hot: int) -> Iterator[Kind]:
    for phase in schedule.phases(cold, hot):
        for _ in range(phase.count):
            yield phase.kind
