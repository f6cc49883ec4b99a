"""OneAhead: an iterator whose next item is made by a thread while the present one is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class OneAhead(Iterator[Item], Generic[Item]):
    """Starts to make an item when the one before it is taken, never earlier: at most one waits.

    Args:
        make: makes the next item, called in the thread; raises StopIteration after the last.
        stop: makes a `make` in progress, or the next one, end soon with an exception, which is dropped.
    """

    def __init__(self, make: Callable[[], Item], stop: Callable[[], None]) -> None:
        self._make = make
        self._stop = stop
        self._wanted = threading.Semaphore(1)
        self._ready = threading.Semaphore(0)
        self._item: Item
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fae-one-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            try:
                self._item = self._make()
            except BaseException as error:  # it belongs to whoever takes the item
                self._error = error
            self._ready.release()
            if self._error is not None:
                return

    def __next__(self) -> Item:
        self._ready.acquire()
        if self._error is not None:
            self._ready.release()  # and again, if asked again
            raise self._error
        item = self._item
        del self._item  # it may be large, and the next one is on its way
        self._wanted.release()
        return item

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the thread by one more `make`, which `stop` makes fail: where items contain a collective, all ranks end after the same one.

        Args:
            timeout_s: how long to wait. A thread that waits for a rank that will not come is left behind, so that the error that brought
                this about can be told.
        """
        self._stop()
        self._wanted.release()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._error = StopIteration()  # the traceback of the one before holds what was being made, and its worker processes

    def join(self) -> None:
        """Waits for the thread, however long it takes."""
        self._thread.join()


def read_ahead(items: Iterator[Item]) -> OneAhead[Item]:
    """The items of an iterator, each read by a thread while the one before it is used; close it if it is not used up."""
    stopped = threading.Event()

    def read() -> Item:
        if stopped.is_set():
            raise StopIteration
        return next(items)

    return OneAhead(read, stopped.set)
