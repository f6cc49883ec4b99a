"""HotColdDataLoader: batches that are all hot or all cold, of the same kind on every rank at every step, resumable at any."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError, HotBatchError
from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import Cursor, Kind, Phase, ShuffleSchedule
from fae_torchrec.data.batches import BatchSource, HotColdBatch, Position
from fae_torchrec.data.one_ahead import OneAhead
from fae_torchrec.data.ready_batches import ReadyBatches
from fae_torchrec.data.store import SegregatedStore
from fae_torchrec.data.store_window import StoreWindow
from fae_torchrec.data.stream_windows import Agree, StreamOptions, StreamWindows
from fae_torchrec.data.streams import Streams
from fae_torchrec.data.window import Window

_GIB = 1 << 30


@dataclass
class LoaderStats:
    """What the present pass has given out so far on this rank.

    Attributes:
        batches: by kind ("hot", "cold", "mixed"); equal on all ranks.
        samples: samples, by kind; hot over all is the share of hot inputs.
    """

    batches: dict[Kind, int]
    samples: dict[Kind, int]


def alone(counts: np.ndarray) -> np.ndarray:
    """The all-gather of a rank that trains alone."""
    return counts[None]


class HotColdDataLoader:
    """Segregates samples into hot and cold batches (FAE §4.2-4.3: the Input Classifier's output in the Shuffle Scheduler's order).

    Streaming, from any source of batches: it is read window by window, and the samples of a window are re-bundled into hot and cold batches
    of `batch_size`. The ranks agree on a window's steps all at once, by one all-gather while the window before is trained on; full
    batches first, samples that make none wait for the next window, and what is left at the end goes out in smaller batches. A rank
    that has no sample for a step gives a filler. So every rank takes a step of the same kind at the same time, and no sample is lost
    or repeated. Memory: `buffer_bytes`, two source batches and the batches made ready; an epoch that is finished on fewer ranks than it was
    begun on takes that for each of its streams.

    From a store, which `fae segregate` wrote: an epoch is one window, nothing is classified, and nothing but the batches is in memory.

    Args:
        source: a BatchSource (the rank's share is read), a SegregatedStore, or this rank's own batches of any sizes: an iterable, or a
            function that starts a pass. The order of the samples is the source's; for a run that is to be resumed it may depend on `epoch`,
            but not on how often the source was read before or on torch's random numbers. Not read before iteration.
        placement: which rows are hot; the same on every rank.
        batch_size: samples per batch and rank.
        schedule: the order of the kinds; ShuffleSchedule() by default. With the policy "stock" samples are not classified: the batches are
            "mixed" and in the order of the source.
        rank: this rank.
        world_size: ranks.
        agree: all-gather over the ranks, once when a pass begins and once for each window. With `prefetch` above 0 a thread calls it, so it
            needs a process group of its own.
        window_batches: most source batches per window; None: as many as the buffer holds, at best the whole epoch, as in FAE.
        buffer_bytes: bytes of samples held, half of them for the window that is trained on, half for the next.
        drop_last: whether a rank's samples of either kind that make no full batch at the end of an epoch are left out (of a store: those
            that make no full step); else they are trained. Where the buffer overflows before, smaller batches are trained in any case.
        pin_memory: whether batches are copied to pinned memory (where there is CUDA).
        num_workers: processes that read and parse the source's shards; 0: this one. Only for a ShardedSource.
        prefetch: batches of each kind made ready ahead, by threads; 0 does everything in the caller's thread, when it asks.
        shuffle: whether each epoch of a store takes its batches in another order, drawn from `seed`.
        seed: of `shuffle`.
        split_ahead: splits each batch's ids by tier: a `SplitAhead` of the model, for training on a GPU. With `prefetch`, threads call it,
            several at a time.

    Attributes:
        schedule: the order of the kinds.
        split_ahead: as given; a change takes effect with the next pass.
        epoch: passes finished; the next iteration makes this pass, or what is left of it after `load_state_dict`.
        stats: LoaderStats of the present pass.

    Raises:
        ConfigError: a number is out of range, or an option does not go with the source.
        FingerprintError: the store was written for another placement.
    """

    def __init__(
        self,
        source: BatchSource | SegregatedStore | Iterable[Batch] | Callable[[], Iterable[Batch]],
        placement: RowPlacement,
        *,
        batch_size: int,
        schedule: ShuffleSchedule | None = None,
        rank: int = 0,
        world_size: int = 1,
        agree: Agree = alone,
        window_batches: int | None = None,
        buffer_bytes: int = _GIB,
        drop_last: bool = False,
        pin_memory: bool = False,
        num_workers: int = 0,
        prefetch: int = 2,
        shuffle: bool = False,
        seed: int = 0,
        split_ahead: Callable[[HotColdBatch, int], HotColdBatch] | None = None,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("buffer_bytes", buffer_bytes, 1),
            ("prefetch", prefetch, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, received {value}")
        if window_batches is not None and window_batches < 1:
            raise ConfigError(f"window_batches must be at least 1, or None for what the buffer holds; received {window_batches}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must be in 0..world_size-1, received rank={rank}, world_size={world_size}")
        self.schedule = ShuffleSchedule() if schedule is None else schedule
        self._store = source if isinstance(source, SegregatedStore) else None
        self._streams: Streams | None = None
        if isinstance(source, SegregatedStore):
            source.check(placement)
            if not self.schedule.segregates:
                raise ConfigError(
                    "the schedule 'stock' needs the order of the data, which a segregated store does not have; take 'proportional', the "
                    "least reordering, or read the data themselves"
                )
        else:
            self._streams = Streams(source, batch_size, num_workers)
        if shuffle and self._store is None:
            raise ConfigError("shuffle is for stores: streamed samples keep the order of their source; shuffle there, or write a store")
        self._placement = placement
        self._options = StreamOptions(batch_size, window_batches, buffer_bytes, drop_last)
        self._rank, self._world_size, self._agree = rank, world_size, agree
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._prefetch = prefetch
        self.split_ahead = split_ahead
        self._seed = seed if shuffle else None
        self.epoch = 0
        self.stats = LoaderStats({}, {})
        self._resume: Position | None = None
        self._streams_of: dict[int, int] = {}  # epoch -> its streams, where another number of ranks began it
        self._open: Callable[[], Generator[Any, None, None] | None] = lambda: None
        self._ahead: OneAhead[Window] | None = None

    def __iter__(self) -> Iterator[HotColdBatch]:
        """What is left of the current epoch, all phases in a row.

        Yields:
            Batches of batch_size samples; smaller ones at the end of an epoch and where ranks differ by more than the buffer holds, others
            where an epoch is finished on another number of ranks. `position` is where the loader stands after the batch.

        Raises:
            ConfigError: `agree` brings other ranks together than `world_size` says; or this pass was ended, by `close` or a newer one.
            DataError: a source is one-shot and was read already; a batch is malformed or not on the CPU, ids are out of range; a rank's
                source failed; the data have changed since the state that is resumed (raised on every rank).
            HotBatchError: the ranks have other data, placements, batch sizes, windows, schedules or states (raised on every rank).
        """
        with closing(self._begin_pass()) as phases:
            for _, batches in phases:
                yield from batches

    def phases(self) -> Iterator[tuple[Phase, Iterator[HotColdBatch]]]:
        """What is left of the current epoch, phase by phase; yields and raises as `__iter__` does.

        A phase is opened when it is asked for, with the schedule's rate of that moment: so what `observe` learns after a phase acts on the
        next one (another always follows, in this epoch or the next). All ranks must tell the schedule the same.

        Yields:
            (phase, its batches); the batches must be used up before the next phase is asked for.
        """
        return self._begin_pass()

    def _begin_pass(self) -> Generator[tuple[Phase, Iterator[HotColdBatch]], None, None]:
        self.close()
        opened = self._pass()
        self._open = weakref.ref(opened)  # a pass that nobody wants any more ends at once, not when garbage is collected
        return opened

    def _pass(self) -> Generator[tuple[Phase, Iterator[HotColdBatch]], None, None]:
        self.stats = LoaderStats({}, {})
        resume = self._resume
        place = resume or Position(self.epoch, 0, 0, 0, self.schedule.start(0, 0))
        number = -1
        with self._windows() as windows:
            for number, window in enumerate(windows):
                if number < place.window:
                    continue
                if resume is None or number > place.window:
                    place = self._at_start(number, window)
                elif _steps_of(place) != (found := _steps_of(self._at_start(number, window))):
                    raise _changed_data(place, found)
                taken: dict[Kind, int] = {"hot": place.hot, "cold": place.cold, "mixed": place.cold}
                for planned in window.plans:
                    window.skip(planned, taken[planned])
                with closing(ReadyBatches(window, taken, self._prefetch, pin_memory=self._pin_memory, split=self.split_ahead)) as ready:
                    while not place.cursor.done:
                        if not place.cursor.left:
                            place = place._replace(cursor=self.schedule.next_phase(place.cursor))
                        kind, count = place.cursor.kind, place.cursor.left
                        assert kind is not None
                        batches = self._phase(ready, place)
                        yield Phase(kind, count), batches
                        if next(batches, None) is not None:
                            raise ConfigError("the next phase was asked for before this one was used up; take all its batches first")
                        moved = count if kind == "hot" else 0
                        place = place._replace(hot=place.hot + moved, cold=place.cold + count - moved, cursor=place.cursor._replace(left=0))
        if resume is not None and number < resume.window:
            raise _changed_data(resume, (0, 0))
        self.epoch, self._resume = self.epoch + 1, None

    def _at_start(self, number: int, window: Window) -> Position:
        n_cold = window.steps("cold") if self.schedule.segregates else window.steps("mixed")
        return Position(self.epoch, number, 0, 0, self.schedule.start(n_cold, window.steps("hot")))

    def _phase(self, ready: ReadyBatches, place: Position) -> Iterator[HotColdBatch]:
        """The batches of the open phase."""
        kind = place.cursor.kind
        assert kind is not None
        while place.cursor.left:
            hot = kind == "hot"
            place = place._replace(hot=place.hot + hot, cold=place.cold + (not hot), cursor=place.cursor.step())
            batch = ready.take(kind)
            batch.position = place
            self.stats.batches[kind] = self.stats.batches.get(kind, 0) + 1
            self.stats.samples[kind] = self.stats.samples.get(kind, 0) + batch.num_samples
            yield batch

    @contextmanager
    def _windows(self) -> Iterator[Iterator[Window]]:
        if self._ahead is not None:
            self._ahead.join()  # two passes must not agree at the same time
        self._agree_on_pass()
        if self._store is not None:
            yield iter([self._store_window(self._store)])
            return
        assert self._streams is not None
        windows = StreamWindows(
            self._streams.opener(self._num_streams(self.epoch), self._world_size),
            self._num_streams(self.epoch),
            self._placement if self.schedule.segregates else None,
            self._options,
            self._rank,
            self._world_size,
            self._agree,
            ahead=self._prefetch > 0,
        )
        if not self._prefetch:
            yield windows
            return
        self._ahead = OneAhead(windows.__next__, windows.stop)
        try:
            yield self._ahead
        finally:
            self._ahead.close()
            windows.close()

    def _agree_on_pass(self) -> None:
        """Raises on every rank where they would not take the same steps. One number each, so that it arrives whatever differs."""
        own = fingerprint(self._order(), self.schedule.state_dict(), self._num_streams(self.epoch), self.epoch, self._resume)
        said = self._agree(np.array([int(own, 16)], dtype=np.int64))[:, 0]
        if len(said) != self._world_size:
            raise ConfigError(
                f"agree brought the numbers of {len(said)} ranks together, world_size is {self._world_size}; give "
                "gather_counts(dist.new_group(backend='gloo')) of exactly the ranks that train together"
            )
        if (said != said[0]).any():
            raise HotBatchError(
                f"the ranks {np.flatnonzero(said != said[0]).tolist()} would take other steps than rank 0: their placement, data, "
                f"schedule, loader options or resumed position differ; here the placement is {self._placement.fingerprint}, the options "
                f"{self._options}, the position {self._resume or 'the start'}; give every rank the same, feedback included"
            )

    def _num_streams(self, epoch: int) -> int:
        return self._streams_of.get(epoch, self._world_size)

    def _store_window(self, store: SegregatedStore) -> StoreWindow:
        return StoreWindow(
            store,
            self._num_streams(self.epoch),
            self._options.batch_size,
            self._rank,
            self._world_size,
            drop_last=self._options.drop_last,
            shuffle=None if self._seed is None else (self._seed, self.epoch),
        )

    def _order(self) -> dict[str, Any]:
        """What decides which samples make a batch, beside the source's samples and the number of streams."""
        of_source: dict[str, Any] = {}  # the source first: where it differs, that is what a message should say
        if self._store is not None:
            of_source = {"source": f"store {self._store.fingerprint}", "seed": self._seed}
        if self._streams is not None:
            of_source = {"source": self._streams.name, **{key: getattr(self._options, key) for key in ("window_batches", "buffer_bytes")}}
        return {
            **of_source,
            "placement": self._placement.fingerprint,
            "batch_size": self._options.batch_size,
            "drop_last": self._options.drop_last,
        }

    def state_dict(self, position: Position) -> dict[str, Any]:
        """What a checkpoint needs to go on after a batch: plain values that JSON can write, the same on every rank.

        Args:
            position: of the last batch that was trained on (`batch.position`), not of the last one given out: pipelines read ahead. If
                it ended a phase, tell the schedule what there is to tell of the phase first: the resumed run will not ask again.
        """
        return {
            "position": [*position[:-1], list(position.cursor)],
            "streams": self._num_streams(position.epoch),
            "order": self._order(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next pass go on where `state_dict` was taken.

        The epoch is finished in the saved order, whatever the number of ranks: its streams are dealt to the ranks there are, so that a step
        has the same samples; with more ranks than streams some take fillers until the epoch ends. A stream is read again from its
        start, without training; a store goes on at once.

        Raises:
            ConfigError: the state is of another source, placement, batch size, window, schedule, or (where the source is this rank's own
                batches) of another number of ranks.
        """
        order = self._order()
        for name, saved in state["order"].items():
            if saved != order.get(name):
                raise ConfigError(
                    f"the loader's state was saved with {name} {saved!r}, this loader has {order.get(name)!r}; resume with what was saved, "
                    "or start the epoch anew"
                )
        self.close()
        streams = int(state["streams"])
        if self._streams is not None:
            self._streams.opener(streams, self._world_size)  # raises where it cannot be
        self.schedule.load_state_dict(state["schedule"])
        epoch, window, cold, hot, cursor = state["position"]
        self._resume = Position(epoch, window, cold, hot, Cursor(*cursor))
        self.epoch, self._streams_of = epoch, {epoch: streams}

    def close(self) -> None:
        """Ends a pass that was not used up, and its threads. All ranks must stop at the same step."""
        if (opened := self._open()) is not None:
            opened.close()


def _steps_of(place: Position) -> tuple[int, int]:
    """Cold (or mixed) and hot steps of a position's window."""
    cursor = place.cursor
    hot = cursor.left if cursor.kind == "hot" else 0
    return place.cold + cursor.left_cold + cursor.left - hot, place.hot + cursor.left_hot + hot


def _changed_data(place: Position, found: tuple[int, int]) -> DataError:
    return DataError(
        f"the epoch cannot be finished: its window {place.window} had {_steps_of(place)} cold and hot steps when the state was saved, and "
        f"has {found} now, so the data have changed since; resume with the data as they were, or start anew"
    )
