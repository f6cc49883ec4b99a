"""OneAhead: one item is made ahead, never two; errors come where the item would; closing waits for what is in progress."""

from __future__ import annotations

import threading

import pytest

from fae_torchrec.data.one_ahead import OneAhead


class Maker:
    """Makes 0, 1, 2, ... and counts how often it was asked; 3 is an error where one is given."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.begun = 0
        self.error = error
        self.stopped = threading.Event()
        self.changed = threading.Condition()

    def make(self) -> int:
        with self.changed:
            self.begun += 1
            self.changed.notify_all()
        if self.stopped.is_set():
            raise RuntimeError("stopped")
        if self.error is not None and self.begun == 4:
            raise self.error
        return self.begun - 1

    def wait_for(self, begun: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.begun >= begun, timeout=10)


def test_exactly_one_item_is_made_ahead() -> None:
    maker = Maker()
    items = OneAhead(maker.make, maker.stopped.set)
    for k in range(5):
        maker.wait_for(k + 1)
        assert maker.begun == k + 1
        assert next(items) == k
    maker.wait_for(6)
    items.close()
    assert maker.begun == 7  # the last one was told to fail


@pytest.mark.parametrize("error", [StopIteration(), ValueError("broken")])
def test_an_error_comes_where_the_item_would_and_stays(error: BaseException) -> None:
    items = OneAhead(Maker(error).make, lambda: None)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(type(error)):
            next(items)
    items.close()


def test_closing_waits_for_the_item_in_progress() -> None:
    stop, done = threading.Event(), threading.Event()

    def make() -> int:
        assert stop.wait(10)
        done.set()
        raise RuntimeError("stopped")

    items = OneAhead(make, stop.set)
    items.close()
    assert done.is_set()


def test_closing_does_not_wait_for_ever() -> None:
    never = threading.Event()
    items = OneAhead(lambda: never.wait(10), lambda: None)
    items.close(timeout_s=0.01)
    never.set()
