"""ReadyBatches: the next batches of either kind of a window, made by threads while others are trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

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
        split: what is done to each before, given the number of its step.
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
        self._closed = False
        self._pin_memory = pin_memory
        self._split = split
        self._ready: dict[Kind, deque[Future[HotColdBatch]]] = {kind: deque() for kind in window.plans}
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
            self._begun[kind] = self._begun.get(kind, 0) + 1
            return self._make(kind, self._begun[kind] - 1)
        batch = self._ready[kind].popleft()
        self._begin(kind)
        return batch.result()

    def close(self) -> None:
        """Ends the threads."""
        self._closed = True
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _begin(self, kind: Kind) -> None:
        if self._executor is None:
            return
        while len(self._ready[kind]) < self._ahead and self._begun.get(kind, 0) < self._window.steps(kind):
            step = self._begun.get(kind, 0)
            self._begun[kind] = step + 1
            self._ready[kind].append(self._executor.submit(self._make, kind, step))

    def _make(self, kind: Kind, step: int) -> HotColdBatch:
        batch = self._window.batch(kind, step)
        if self._split is not None:
            batch = self._split(batch, step)
        return batch.pin_memory() if self._pin_memory else batch
