"""Batches that are all hot or not, of the same kind on every rank at every step, in the order of a ShuffleSchedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError, HotBatchError
from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import Phase, ShuffleSchedule
from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.data.segregate import Bundler, concat_batches, hot_samples, select_samples

Agree = Callable[[np.ndarray], np.ndarray]
"""All-gathers small counts: int64 [k] of this rank -> int64 [world, k], row r from rank r. Every rank calls it equally often."""

_FAILED, _FINISHED, _MORE = -1, 0, 1  # what a rank says of its source in the agreement


@dataclass
class LoaderStats:
    """What one pass has done so far on this rank.

    Attributes:
        hot_batches: batches given out with the promise to be hot.
        cold_batches: batches given out of samples that are not all hot.
        mixed_batches: batches given out of leftovers or, with the schedule "stock", of unclassified samples.
        hot_samples: samples read that are all hot (0 with "stock": nobody looked).
        samples: samples read; hot_samples / samples is the share of hot inputs.
    """

    hot_batches: int = 0
    cold_batches: int = 0
    mixed_batches: int = 0
    hot_samples: int = 0
    samples: int = 0


def _alone(counts: np.ndarray) -> np.ndarray:
    return counts[None]


class HotColdDataLoader:
    """Segregates a stream into hot and cold batches (FAE §4.2-4.3: Input Classifier's output in the Shuffle Scheduler's order).

    A window of the stream is split into hot and cold samples, each in stream order. The ranks agree on how many full batches of each
    kind all of them have, and take these in the phases of the schedule; what is left over is carried into the next window. After the
    last window the leftovers of both kinds go out merged in stream order, as plain batches, equally many on every rank. Hence every
    rank takes a step of the same kind at the same time, and no sample is lost or repeated.

    Hot batches carry a HotKeyedJaggedTensor; all others a plain KeyedJaggedTensor.

    Memory: one window (window_batches source batches; the whole epoch for None), twice while it is being cut, and the carried samples:
    fewer than batch_size of each kind on one rank; on several ranks also the surplus of a rank with more samples of one kind than
    another rank, which grows with the square root of the stream where ranks draw alike and with the stream where they do not.

    Args:
        source_batches: this rank's batches, of any sizes: a re-iterable, or a function that starts a pass. Not read before iteration.
        placement: which rows are hot; the same on every rank.
        schedule: the order of the kinds; ShuffleSchedule() by default. With the policy "stock" batches are only cut to batch_size.
        batch_size: samples per batch and rank.
        window_batches: source batches per window; None takes the epoch as one window, as FAE does.
        agree: all-gather over the ranks; the default is for one rank.
        on_swap: see the attribute.

    Attributes:
        schedule: the order; its `observe` may be called between batches, with the same value on every rank.
        stats: LoaderStats of the current pass.
        on_swap: called as on_swap(phase) before the first batch of a phase whose kind differs from the previous phase's, on every rank
            at the same place in the stream, when the next batch is asked for (a pipeline that reads ahead has that many batches in
            flight). The size of `phase` was decided before, so what `observe` learns here acts from the phase after it.

    Raises:
        ConfigError: batch_size or window_batches is below 1.
    """

    def __init__(
        self,
        source_batches: Iterable[Batch] | Callable[[], Iterable[Batch]],
        placement: RowPlacement,
        *,
        schedule: ShuffleSchedule | None = None,
        batch_size: int,
        window_batches: int | None = 256,
        agree: Agree = _alone,
        on_swap: Callable[[Phase], None] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, received {batch_size}")
        if window_batches is not None and window_batches < 1:
            raise ConfigError(f"window_batches must be at least 1, or None for the whole epoch; received {window_batches}")
        self._source_batches = source_batches
        self._placement = placement
        self.schedule = ShuffleSchedule() if schedule is None else schedule
        self._batch_size = batch_size
        self._window_batches = window_batches
        self._agree = agree
        self.on_swap = on_swap
        self.stats = LoaderStats()
        self._spent: Iterator[Batch] | None = None  # a one-shot source that was iterated already

    def __iter__(self) -> Iterator[Batch]:
        """One pass.

        Yields:
            Batches of batch_size samples; leftovers (with "stock": the last batch) may be smaller.

        Raises:
            DataError: a source is one-shot and was read already; ids are out of range; a rank's source failed or ended so early that the
                ranks cannot take equally many steps (raised on every rank).
            HotBatchError: the ranks have other placements, batch sizes, windows or schedules (raised on every rank).
        """
        self.stats = LoaderStats()
        return self._segregated() if self.schedule.segregates else self._stock()

    def _open(self) -> Iterator[Batch]:
        given = self._source_batches
        source = iter(given() if callable(given) else given)
        if source is self._spent:
            raise DataError(
                "source_batches is an iterator that was read already, so a second pass would be empty; "
                "give a list, an object with __iter__ or a function that starts a new pass"
            )
        self._spent = source if source is given else None
        return source

    def _stock(self) -> Iterator[Batch]:
        """Stream order, cut to batch_size; no rank is asked."""
        queue = Bundler()
        for batch in self._open():
            samples = batch.sparse_features.stride()
            queue.add(batch, torch.arange(self.stats.samples, self.stats.samples + samples))
            self.stats.samples += samples
            while len(queue) >= self._batch_size:
                self.stats.mixed_batches += 1
                yield queue.pop(self._batch_size)[0]
        if len(queue):
            self.stats.mixed_batches += 1
            yield queue.pop(len(queue))[0]

    def _segregated(self) -> Iterator[Batch]:
        hot, cold = Bundler(), Bundler()
        source: Iterator[Batch] | None = None
        kind: str | None = None
        while True:
            status, failure = _FAILED, None
            try:
                source = self._open() if source is None else source
                status = self._fill(source, hot, cold)
            except Exception as error:  # the other ranks wait in the agreement: tell them first, then raise
                failure = error
            counts = self._agree_counts(len(hot), len(cold), status, failure)
            batches_hot, batches_cold = (counts[:, :2].min(axis=0) // self._batch_size).tolist()
            for phase in self.schedule.phases(batches_cold, batches_hot):
                if self.on_swap is not None and kind not in (None, phase.kind):
                    self.on_swap(phase)
                kind = phase.kind
                for _ in range(phase.count):
                    yield self._hot_batch(hot) if kind == "hot" else self._cold_batch(cold)
            if not (counts[:, 2] == _MORE).any():
                break
        left = counts[:, :2].sum(axis=1) - (batches_hot + batches_cold) * self._batch_size
        yield from self._leftovers(hot, cold, left)

    def _fill(self, source: Iterator[Batch], hot: Bundler, cold: Bundler) -> int:
        """Reads one window into the queues; returns whether there may be another."""
        taken = 0
        while taken != self._window_batches:
            batch = next(source, None)
            if batch is None:
                return _FINISHED
            taken += 1
            mask = hot_samples(batch.sparse_features, self._placement)
            for queue, index in ((hot, mask.nonzero().view(-1)), (cold, (~mask).nonzero().view(-1))):
                if index.numel():
                    queue.add(select_samples(batch, index), index + self.stats.samples)
            self.stats.samples += mask.numel()
            self.stats.hot_samples += int(mask.sum())
        return _MORE

    def _agree_counts(self, hot: int, cold: int, status: int, failure: Exception | None) -> np.ndarray:
        """Asks all ranks; int64 [world, 4] of hot samples, cold samples, status, name of what decides the order."""
        counts = self._agree(np.array([hot, cold, status, self._order_name()], dtype=np.int64))
        if failure is not None:
            raise failure
        failed = np.flatnonzero(counts[:, 2] == _FAILED).tolist()
        if failed:
            raise DataError(f"the sources of the ranks {failed} failed; their own error says why; all ranks stop together")
        if (counts[:, 3] != counts[0, 3]).any():
            differing = np.flatnonzero(counts[:, 3] != counts[0, 3]).tolist()
            raise HotBatchError(
                f"the ranks {differing} would take other steps than rank 0: their placement, batch_size, window_batches or schedule "
                f"differs (here: placement {self._placement.fingerprint}, batch_size {self._batch_size}, window_batches "
                f"{self._window_batches}, schedule {self.schedule.state_dict()}); give every rank the same, feedback included"
            )
        return counts

    def _order_name(self) -> int:
        """What decides the order of the kinds beside the counts, as a number that fits int64."""
        order = [self._placement.fingerprint, self._batch_size, self._window_batches, self.schedule.state_dict()]
        return int(fingerprint(order), 16)

    def _hot_batch(self, queue: Bundler) -> Batch:
        self.stats.hot_batches += 1
        batch, _ = queue.pop(self._batch_size)
        return Batch(
            dense_features=batch.dense_features,
            sparse_features=HotKeyedJaggedTensor.promise(batch.sparse_features),
            labels=batch.labels,
        )

    def _cold_batch(self, queue: Bundler) -> Batch:
        self.stats.cold_batches += 1
        return queue.pop(self._batch_size)[0]

    def _leftovers(self, hot: Bundler, cold: Bundler, left: np.ndarray) -> Iterator[Batch]:
        """Equally many plain batches on every rank; `left` is each rank's number of leftover samples, int64 [world]."""
        steps = int(-(-left.max() // self._batch_size))
        if left.min() < steps:
            raise DataError(
                f"the ranks have {left.tolist()} samples left and batch_size is {self._batch_size}, so rank {int(left.argmin())} cannot "
                f"take the {steps} steps that rank {int(left.argmax())} needs; give every rank's source the same number of samples"
            )
        if not steps:
            return
        parts = [queue.pop(len(queue)) for queue in (hot, cold) if len(queue)]
        merged = concat_batches([batch for batch, _ in parts])
        order = torch.cat([positions for _, positions in parts]).argsort()
        for index in order.tensor_split(steps):
            self.stats.mixed_batches += 1
            yield select_samples(merged, index)
