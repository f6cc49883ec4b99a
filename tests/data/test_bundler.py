"""Bundler: batches in, batches out, every sample whole and in order, and its bytes counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import DataError
from fae_torchrec.data.bundler import Bundler
from tests.data.simulated_ranks import make_batch, unpack


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), max_size=8), st.lists(st.integers(0, 7), max_size=12), st.booleans())
def test_samples_go_out_in_the_order_they_came(sizes: list[int], takes: list[int], weighted: bool) -> None:
    queue, wanted, first = Bundler(), {}, 0
    for size in sizes:
        batch = make_batch(first, [n % 3 == 0 for n in range(size)], weighted=weighted)
        queue.add(batch, np.arange(first, first + size) + 100)
        wanted.update(unpack(batch))
        first += size
    got: list[int] = []
    for turn, take in enumerate(takes):
        taken = queue
        if turn % 2 and take <= len(queue):
            taken = queue.split(take)  # cut off, then emptied by pops of 2
            assert len(taken) == take
            while len(taken):
                batch, numbers = taken.pop(min(2, len(taken)))
                got += [int(x) for x in batch.labels.tolist()]
                assert (numbers - 100).tolist() == batch.labels.tolist()
            assert taken.num_bytes == 0
        elif 1 <= take <= len(queue):
            batch, numbers = queue.pop(take)
            assert (numbers - 100).tolist() == batch.labels.tolist()
            assert unpack(batch) == {int(n): wanted[int(n)] for n in batch.labels.tolist()}
            got += [int(x) for x in batch.labels.tolist()]
    assert got == list(range(len(got))) and len(queue) == first - len(got)
    assert (queue.num_bytes == 0) == (len(queue) == 0)


def test_bytes_by_hand() -> None:
    queue = Bundler()
    queue.add(make_batch(0, [True, True, True]), np.arange(3))
    # Bags of f: 0, 1, 2 ids; of g: 1, 0, 1. Dense 3 * 2 * 4, labels 3 * 4, ids 5 * 8, lengths 6 * 4, numbers 3 * 8.
    assert queue.num_bytes == 24 + 12 + 40 + 24 + 24
    queue.pop(2)
    assert queue.num_bytes == 124 - 124 * 2 // 3  # a third of the batch


def test_more_than_there_is_cannot_be_taken() -> None:
    queue = Bundler()
    queue.add(make_batch(0, [True]), np.arange(1))
    for call in (queue.pop, queue.split):
        with pytest.raises(DataError, match="cannot take 2 samples out of 1 waiting"):
            call(2)
    with pytest.raises(DataError, match="cannot take 0 samples as a batch"):
        queue.pop(0)
