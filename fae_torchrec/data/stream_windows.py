"""StreamWindows: any streams of batches, re-bundled on the fly into windows of hot and cold samples that the ranks have agreed on."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import Kind
from fae_torchrec.data.bundler import Bundler
from fae_torchrec.data.one_ahead import OneAhead, read_ahead
from fae_torchrec.data.segregate import hot_samples, plain_batch, select_samples, with_shared_lengths
from fae_torchrec.data.step_plan import StepPlan, plan_window
from fae_torchrec.data.window import Samples, Window

Agree = Callable[[np.ndarray], np.ndarray]
"""All-gathers small counts: int64 [k] of this rank -> int64 [world, k], row r from rank r. Every rank calls it equally often."""
Numbers = Callable[[int, int], np.ndarray]
"""The numbers, int64, of so many (second) samples of a stream from a position (first, from 0) on."""
OpenStream = Callable[[int], tuple[Iterable[Batch], Numbers]]
"""Opens a stream by its number: its batches and its samples' numbers."""

_FAILED, _STOPPED, _GOING = -1, 0, 1  # what a rank says of itself in the agreement
_CARRIED_SHARE = 8  # one part in so many of a stream's buffer may wait in each queue for the next window


class Stopped(Exception):
    """The windows were told to stop; every rank was."""


@dataclass
class _Stream:
    """One rank's share of the data while it is read."""

    batches: Iterator[Batch]
    numbers: Numbers
    queues: dict[Kind, Bundler]
    samples: int = 0
    finished: bool = False

    def num_bytes(self) -> int:
        return sum(queue.num_bytes for queue in self.queues.values())


class StreamWindow(Window):
    """A window whose samples lie in memory."""

    def __init__(
        self, plans: dict[Kind, StepPlan], streams: list[int], world_size: int, queues: dict[tuple[Kind, int], Bundler], like: Batch
    ) -> None:
        super().__init__(plans, streams, world_size)
        self._queues = queues
        self._like = like

    def skip(self, kind: Kind, steps: int) -> None:
        """As Window.skip; the samples are dropped."""
        for stream in self._streams if kind in self.plans else ():
            self._queues[kind, stream].split(int(self.plans[kind].sizes[:steps, stream].sum()))

    def _samples(self, kind: Kind, step: int) -> list[Samples]:
        sizes = [(stream, int(self.plans[kind].sizes[step, stream])) for stream in self._streams]
        return [self._queues[kind, stream].pop(size) for stream, size in sizes if size]

    def _template(self) -> Batch:
        return self._like


@dataclass(frozen=True)
class StreamOptions:
    """How streams are cut into windows; see HotColdDataLoader."""

    batch_size: int
    window_batches: int | None
    buffer_bytes: int
    drop_last: bool


@dataclass
class StreamWindows:
    """Fills window after window and agrees with the other ranks on its steps: one small all-gather for each window.

    Args:
        open_stream: gives the streams.
        num_streams: of all ranks together; rank r gives the streams r, r + world_size, ...
        placement: which rows are hot; None leaves all samples "mixed", in the order of the stream.
        options: how to cut.
        rank: this rank.
        world_size: ranks.
        agree: all-gather over the ranks.
        ahead: whether a thread reads each stream's next batch while one is classified.
    """

    open_stream: OpenStream
    num_streams: int
    placement: RowPlacement | None
    options: StreamOptions
    rank: int
    world_size: int
    agree: Agree
    ahead: bool = False
    _streams: dict[int, _Stream] | None = None
    _like: Batch | None = None
    _stopped: bool = False
    _last: bool = field(default=False)

    def stop(self) -> None:
        """Lets the window in progress, or the next, end soon with Stopped, after an agreement. Every rank must stop at the same window."""
        self._stopped = True

    def __next__(self) -> StreamWindow:
        """The next window.

        Raises:
            StopIteration: after the last.
            Stopped: after `stop`.
            DataError: a batch cannot be segregated, or a rank's source failed; on every rank (the others say which).
        """
        if self._last:
            raise StopIteration
        failure: Exception | None = None
        try:
            for stream in self._opened().values():
                self._fill(stream)
        except Exception as error:  # the other ranks wait in the agreement: tell them first, then raise
            failure = error
        counts = self._agree_counts(failure)
        self._last = bool(counts[:, 0].all())
        if self._like is None and not counts[:, 1:].any():
            raise StopIteration  # no rank has a single sample
        return self._cut(counts)

    def __iter__(self) -> Iterator[StreamWindow]:
        """Itself."""
        return self

    @property
    def _kinds(self) -> tuple[Kind, ...]:
        return ("mixed",) if self.placement is None else ("cold", "hot")

    def _mine(self) -> list[int]:
        return list(range(self.rank, self.num_streams, self.world_size))

    def _opened(self) -> dict[int, _Stream]:
        if self._streams is None:
            opened = {number: self.open_stream(number) for number in self._mine()}
            self._streams = {
                number: _Stream(self._reader(iter(batches)), numbers, {kind: Bundler() for kind in self._kinds})
                for number, (batches, numbers) in opened.items()
            }
        return self._streams

    def _reader(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return read_ahead(batches) if self.ahead else batches

    def close(self) -> None:
        """Ends the threads that read, and lets go of the samples that wait."""
        opened, self._streams = self._streams or {}, {}
        for stream in opened.values():
            if isinstance(stream.batches, OneAhead):
                stream.batches.close()

    def _fill(self, stream: _Stream) -> None:
        """Reads on until a window is full."""
        taken = 0
        while not (stream.finished or self._stopped or taken == self.options.window_batches):
            if taken and stream.num_bytes() >= self.options.buffer_bytes // 2:  # the other half is the window that is being trained on
                return
            batch = next(stream.batches, None)
            if batch is None:
                stream.finished = True
                return
            taken += 1
            self._queue(stream, plain_batch(batch))

    def _queue(self, stream: _Stream, batch: Batch) -> None:
        size = batch.sparse_features.stride()
        _check_batch(batch, self._like)
        if self._like is None:
            self._like = select_samples(batch, torch.arange(0))
        if not size:
            return
        numbers = stream.numbers(stream.samples, size)
        stream.samples += size
        if self.placement is None:
            stream.queues["mixed"].add(_unshared(batch), numbers)
            return
        batch = with_shared_lengths(_unshared(batch))
        hot = hot_samples(batch.sparse_features, self.placement).numpy()
        rows: dict[Kind, np.ndarray] = {"hot": np.flatnonzero(hot), "cold": np.flatnonzero(~hot)}
        for kind, of_kind in rows.items():
            stream.queues[kind].add(batch, numbers[of_kind], of_kind if len(of_kind) < size else None)

    def _agree_counts(self, failure: Exception | None) -> np.ndarray:
        """Asks all ranks.

        Returns:
            int64 [streams, 1 + 2 * kinds]: whether the stream is finished, and for each kind the samples that wait and the batches that
            must go now.
        """
        slots = -(-self.num_streams // self.world_size)
        width = 1 + 2 * len(self._kinds)
        mine = np.zeros((slots, width), dtype=np.int64)
        for slot, stream in enumerate((self._streams or {}).values()):
            waiting = [(len(queue), self._must_go(queue)) for queue in stream.queues.values()]
            mine[slot] = [stream.finished, *(count for pair in waiting for count in pair)]
        status = _FAILED if failure is not None else _STOPPED if self._stopped else _GOING
        said = self.agree(np.concatenate([[status, self._like is not None], mine.reshape(-1)]).astype(np.int64))
        if failure is not None:
            raise failure
        if status == _STOPPED:  # not `self._stopped`, which may have come since: then the others must be told by one more agreement
            raise Stopped
        failed, stopped = (np.flatnonzero(said[:, 0] == status).tolist() for status in (_FAILED, _STOPPED))
        if failed:
            raise DataError(f"the sources of the ranks {failed} failed; their own error says why; all ranks stop together")
        if stopped:
            raise DataError(f"the ranks {stopped} stopped early; their own error says why; every rank must stop at the same step")
        if not said[:, 1].all():
            self._share_likeness(said[:, 1])
        # Stream r + slot * world_size is slot number `slot` of rank r.
        of_ranks = said[:, 2:].reshape(self.world_size, slots, width)
        everyone: np.ndarray = of_ranks.transpose(1, 0, 2).reshape(-1, width)[: self.num_streams]
        return everyone

    def _must_go(self, queue: Bundler) -> int:
        """Full batches that leave no more waiting than may be carried into the next window."""
        may_wait = self.options.buffer_bytes // 2 // _CARRIED_SHARE
        if queue.num_bytes <= may_wait:
            return 0
        surplus = len(queue) * (1 - may_wait / queue.num_bytes)
        return min(-(-int(surplus) // self.options.batch_size), -(-len(queue) // self.options.batch_size))

    def _share_likeness(self, known: np.ndarray) -> None:
        """Tells ranks that have seen no batch so far what one looks like, so that they can take part with fillers."""
        if not known.any():
            return
        first = int(np.flatnonzero(known)[0])
        text = pickle.dumps(self._like) if self.rank == first else b""
        length = int(self.agree(np.array([len(text)], dtype=np.int64))[first, 0])
        mine = np.zeros(length, dtype=np.int64)
        mine[: len(text)] = np.frombuffer(text, dtype=np.uint8)[:length]
        text = self.agree(mine)[first].astype(np.uint8).tobytes()
        if self._like is None:
            self._like = pickle.loads(text)

    def _cut(self, counts: np.ndarray) -> StreamWindow:
        """Plans the window's steps and moves their samples out of the streams' queues."""
        plans: dict[Kind, StepPlan] = {}
        queues: dict[tuple[Kind, int], Bundler] = {}
        for k, kind in enumerate(self._kinds):
            available, must_go = counts[:, 1 + 2 * k], counts[:, 2 + 2 * k]
            plans[kind], given = plan_window(
                available,
                must_go,
                counts[:, 0].astype(bool),
                self.options.batch_size,
                drop_last=self.options.drop_last,
                as_stock=self.placement is None,
            )
            for number, stream in self._opened().items():
                queues[kind, number] = stream.queues[kind].split(int(given[number]))
                stream.queues[kind].compact()  # what is carried must not keep the window's batches in memory
        assert self._like is not None
        return StreamWindow(plans, self._mine(), self.world_size, queues, self._like)


def _check_batch(batch: Batch, like: Batch | None) -> None:
    """Checks what the ids' own checks do not: so a batch that cannot be cut is an error when it is read, on every rank.

    Raises:
        DataError: it is not on the CPU, its parts have other numbers of samples, or it is of another form than `like`.
    """
    dense, kjt, labels = batch.dense_features, batch.sparse_features, batch.labels
    devices = sorted({str(tensor.device) for tensor in (dense, kjt.values(), labels) if tensor.device.type != "cpu"})
    if devices:
        raise DataError(
            f"received a batch on {devices}; samples are segregated on the CPU: give batches before they are copied to a "
            "device (pin_memory=True makes that copy fast)"
        )
    if not len(dense) == len(labels) == kjt.stride():
        raise DataError(
            f"received a batch of {kjt.stride()} samples by its ids, {len(dense)} by its dense features and {len(labels)} by its labels; "
            "give one row of each for every sample"
        )
    if like is not None and _form(batch) != _form(like):
        names = "keys, dense shape, label shape, weights or not"
        raise DataError(f"batches of one stream must have the same form ({names}); received {_form(like)} and later {_form(batch)}")


def _form(batch: Batch) -> tuple[list[str], torch.Size, torch.Size, bool]:
    kjt = batch.sparse_features
    return list(kjt.keys()), batch.dense_features.shape[1:], batch.labels.shape[1:], kjt.weights_or_none() is not None


def _unshared(batch: Batch) -> Batch:
    """A copy, if a worker process sent the batch: each of its tensors holds a file descriptor open, and a window has thousands."""
    return select_samples(batch, torch.arange(batch.sparse_features.stride())) if batch.sparse_features.values().is_shared() else batch
