"""ReadyBatches: the next batches of either kind of a window, made by threads while others are trained on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.schedule import Kind
from fae_torchrec.data.batches import HotColdBatch
from fae_torchrec.data.window import Window


class ReadyBatches:
    """Keeps a few batches of each kind ready: whichever kind the schedule wants next, its next batch is there.

    Args:
        window: where the batches come from.
        taken: steps of each kind that were taken before.
        ahead: batches of each kind made ready; 0 makes each when it is taken, without a thread.
        pin_memory: whether they are copied to pinned memory.
        split: what is done to each before, given the number of its step; by threads of its own, several batches at a time.
    """

    def __init__(
        self,
        window: Window,
        taken: dict[Kind, int],
        ahead: int,
        *,
        pin_memory: bool,
        split: Callable[[HotColdBatch, int], HotColdBatch] | None = None,
    ) -> None:
        self._window = window
        self._begun = dict(taken)
        self._ahead = ahead
        self._executor = ThreadPoolExecutor(window.threads, "fae-batch") if ahead else None
        self._splitters: ThreadPoolExecutor | None = None
        if ahead and split is not None:
            threads = min(ahead * len(window.plans), os.cpu_count() or 1)
            # One core each: teams of threads in every one of them would be in each other's way, and in the training's.
            self._splitters = ThreadPoolExecutor(threads, "fae-split", initializer=torch.set_num_threads, initargs=(1,))
        self._closed = False
        self._pin_memory = pin_memory
        self._split = split
        self._ready: dict[Kind, deque[Future[HotColdBatch | Future[HotColdBatch]]]] = {kind: deque() for kind in window.plans}
        for kind in window.plans:
            self._begin(kind)

    def take(self, kind: Kind) -> HotColdBatch:
        """The next batch of a kind.

        Raises:
            ConfigError: after `close`.
        """
        if self._closed:
            raise ConfigError(
                "this pass over the loader has ended, by close() or because another one was begun; take batches of the newest pass only"
            )
        if self._executor is None:
            step = self._begun.get(kind, 0)
            self._begun[kind] = step + 1
            return self._finished(self._window.batch(kind, step), step)
        begun = self._ready[kind].popleft()
        self._begin(kind)
        batch = begun.result()
        return batch.result() if isinstance(batch, Future) else batch

    def close(self) -> None:
        """Ends the threads."""
        self._closed = True
        for executor in (self._executor, self._splitters):  # the first gives work to the second
            if executor is not None:
                executor.shutdown(cancel_futures=True)

    def _begin(self, kind: Kind) -> None:
        if self._executor is None:
            return
        while len(self._ready[kind]) < self._ahead and self._begun.get(kind, 0) < self._window.steps(kind):
            step = self._begun.get(kind, 0)
            self._begun[kind] = step + 1
            self._ready[kind].append(self._executor.submit(self._make, kind, step))

    def _make(self, kind: Kind, step: int) -> HotColdBatch | Future[HotColdBatch]:
        batch = self._window.batch(kind, step)
        return self._finished(batch, step) if self._splitters is None else self._splitters.submit(self._finished, batch, step)

    def _finished(self, batch: HotColdBatch, step: int) -> HotColdBatch:
        if self._split is not None:
            batch = self._split(batch, step)
        return batch.pin_memory() if self._pin_memory else batch
