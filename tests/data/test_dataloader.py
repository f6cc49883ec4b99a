"""HotColdDataLoader on one and more simulated ranks, by hand: what goes into each batch, and what bad input is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError, HotBatchError
from fae_torchrec.core.schedule import Phase, Policy, ShuffleSchedule
from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.stream_windows import Agree

# Two features look up rows 0..9; rows 0..4 are hot.
from tests.data.simulated_ranks import (
    OTHER_PLACEMENT,
    PLACEMENT,
    Dealt,
    Rank,
    Stream,
    broken_promises,
    check_rank,
    check_steps,
    disagreements,
    make_batch,
    run_one,
    run_ranks,
)

FIXED = ShuffleSchedule("fixed")
ELEVEN = Stream([n in (0, 1, 4, 6, 7, 8) for n in range(11)], sizes=[3])  # 2 3 5 9 10 are cold


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_one_rank_by_hand_with_the_epoch_as_one_window(prefetch: int) -> None:
    # 3 hot and 3 cold batches, the last cold one of a single sample; at rate 50: 2 cold, 2 hot, 1 cold, 1 hot.
    loader = HotColdDataLoader(ELEVEN.batches(), PLACEMENT, schedule=FIXED, batch_size=2, prefetch=prefetch)
    rank = run_one(loader)
    assert rank.kinds == ["cold", "cold", "hot", "hot", "cold", "hot"]
    assert rank.numbers() == [[2, 3], [5, 9], [0, 1], [4, 6], [10], [7, 8]]
    assert loader.stats.batches == {"cold": 3, "hot": 3}
    assert loader.stats.samples == {"cold": 5, "hot": 6}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_one_rank_by_hand_with_windows_of_two_source_batches(prefetch: int) -> None:
    # Window 1 is 0..5: hot 0 1 4, cold 2 3 5. Window 2 is 6..10 and the carried 4 and 5, more may come. Window 3 is 10.
    loader = HotColdDataLoader(ELEVEN.batches(), PLACEMENT, schedule=FIXED, batch_size=2, window_batches=2, prefetch=prefetch)
    assert run_one(loader).numbers() == [[2, 3], [0, 1], [5, 9], [4, 6], [7, 8], [10]]


def test_drop_last_leaves_out_what_makes_no_full_batch() -> None:
    rank = run_one(HotColdDataLoader(ELEVEN.batches(), PLACEMENT, schedule=FIXED, batch_size=2, drop_last=True))
    assert rank.numbers() == [[2, 3], [0, 1], [4, 6], [5, 9], [7, 8]]


def test_two_ranks_by_hand() -> None:
    # Rank 0 has 4 hot and 2 cold samples, rank 1 has 2 and 4: two steps of each kind, in the second of which one rank has nothing.
    streams = [Stream([n in (0, 1, 2, 5) for n in range(6)], [6]), Stream([n in (0, 3) for n in range(6)], [1])]
    make = _make(streams, batch_size=2, schedule=FIXED)
    ranks = run_ranks(2, make)
    assert [rank.trace for rank in ranks] == [["agree", "agree", "cold", "hot", "cold", "hot"]] * 2
    assert ranks[0].numbers() == [[3, 4], [0, 1], [], [2, 5]]
    assert ranks[1].numbers() == [[1, 2], [0, 3], [4, 5], []]
    # The last two steps have half the samples of a full one, and half its weight.
    assert [batch.weight for batch in ranks[0].batches] == [1.0, 1.0, 0.0, 1.0]
    assert [batch.weight for batch in ranks[1].batches] == [1.0, 1.0, 1.0, 0.0]
    # Numbers are unique over the ranks: position * ranks + rank.
    assert [batch.sample_numbers.tolist() for batch in ranks[1].batches] == [[3, 5], [1, 7], [9, 11], []]
    filler = ranks[0].batches[2]
    assert filler.labels.tolist() == [0.0] and filler.sparse_features.lengths().tolist() == [0, 0]
    assert filler.dense_features.tolist() == [[0.0, 0.0]]


def test_the_numbers_of_a_dealt_source_are_the_datas_own() -> None:
    source = Dealt([n % 3 == 0 for n in range(20)])
    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(source, PLACEMENT, batch_size=3, rank=r, world_size=2, agree=agree))
    for rank in ranks:
        assert [batch.sample_numbers.tolist() for batch in rank.batches] == rank.numbers()
    check_steps([Rank(rank.batches, rank.kinds) for rank in ranks], 6)


def test_a_small_last_step_weighs_by_its_samples_but_for_stock() -> None:
    # 11 samples in batches of 4: two kinds with 5 and 6 samples, or a stream whose last step is the mean over 3, as stock's is.
    loader = HotColdDataLoader(ELEVEN.batches(), PLACEMENT, schedule=FIXED, batch_size=4)
    assert [(batch.kind, batch.num_samples, batch.weight) for batch in loader] == [
        ("cold", 4, 1.0),
        ("hot", 4, 1.0),
        ("cold", 1, 0.25),
        ("hot", 2, 0.5),
    ]
    stock = HotColdDataLoader(ELEVEN.batches(), PLACEMENT, schedule=ShuffleSchedule("stock"), batch_size=4)
    assert [(batch.num_samples, batch.weight) for batch in stock] == [(4, 1.0), (4, 1.0), (3, 1.0)]


def _make(streams: list[Stream], **options: Any) -> Callable[[int, Agree], HotColdDataLoader]:
    def make(rank: int, agree: Agree) -> HotColdDataLoader:
        given = {"prefetch": 0, **options}
        return HotColdDataLoader(streams[rank].batches, PLACEMENT, rank=rank, world_size=len(streams), agree=agree, **given)

    return make


def test_a_loader_that_breaks_its_promise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # Negative control of `broken_promises`: a classifier that calls everything hot.
    monkeypatch.setattr("fae_torchrec.data.stream_windows.hot_samples", lambda kjt, placement: torch.ones(kjt.stride(), dtype=torch.bool))
    stream = Stream([True] * 4 + [False] * 2 + [True] * 2, sizes=[4])
    rank = run_one(HotColdDataLoader(stream.batches(), PLACEMENT, batch_size=2))
    assert rank.kinds == ["hot"] * 4
    assert broken_promises(rank.batches) == [2]
    with pytest.raises(AssertionError):
        check_rank(rank, stream, 2)


def test_ranks_that_do_not_agree_are_caught() -> None:
    # Negative control of `disagreements`: the same loaders, each alone.
    streams = [Stream([True] * 4 + [False] * 4, [4]), Stream([True] * 2 + [False] * 6, [4])]
    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(streams[r].batches(), PLACEMENT, batch_size=2, prefetch=0), lonely=True)
    assert disagreements(ranks) == [1]


def test_full_batches_wait_for_each_other_while_the_buffer_lasts() -> None:
    # Rank 0 is hot for six source batches and cold for six, rank 1 the other way round: with room to wait, every batch is full.
    streams = [Stream([True] * 12 + [False] * 12, [2]), Stream([False] * 12 + [True] * 12, [2])]
    ranks = run_ranks(2, _make(streams, batch_size=2, window_batches=1))
    assert all(batch.num_samples == 2 for rank in ranks for batch in rank.batches)
    # With a buffer of almost nothing they cannot wait: half of the batches are fillers, and nothing is lost.
    ranks = run_ranks(2, _make(streams, batch_size=2, window_batches=1, buffer_bytes=1))
    assert sum(batch.num_samples == 0 for batch in ranks[0].batches) == 12
    for rank, stream in zip(ranks, streams, strict=True):
        check_rank(rank, stream, 2)
    check_steps(ranks, 4)


def test_the_buffer_bounds_what_is_held() -> None:
    # One stream, all samples alike: 48 bytes of dense, label, ids and lengths, 8 of the number (bags of f and g differ by sample).
    stream = Stream([n % 2 == 0 for n in range(400)], [4])
    held: list[int] = []
    loader = HotColdDataLoader(stream.batches(), PLACEMENT, batch_size=4, buffer_bytes=4096, prefetch=0)
    with loader._windows() as windows:
        for window in windows:
            held.append(sum(queue.num_bytes for queue in window._queues.values()))  # type: ignore[attr-defined]
    assert len(held) > 8 and max(held) <= 2048 + 4 * 80


def test_a_source_that_fails_stops_every_rank_before_the_next_step() -> None:
    def failing() -> Iterator[Batch]:
        yield make_batch(0, [True] * 4)
        yield make_batch(4, [True] * 4)
        batch = make_batch(8, [True] * 2)
        batch.sparse_features.values()[0] = 10
        yield batch

    def source(rank: int) -> Callable[[], Iterator[Batch]]:
        return failing if rank == 1 else lambda: iter(Stream([True] * 12, [4]).batches())

    for prefetch in (0, 2):
        ranks = run_ranks(
            2,
            lambda r, agree, prefetch=prefetch: HotColdDataLoader(  # type: ignore[misc]
                source(r), PLACEMENT, batch_size=4, window_batches=1, rank=r, world_size=2, agree=agree, prefetch=prefetch
            ),
        )
        assert isinstance(ranks[0].error, DataError) and "sources of the ranks [1] failed" in str(ranks[0].error)
        assert isinstance(ranks[1].error, DataError) and "id 10" in str(ranks[1].error) and "0..9" in str(ranks[1].error)
        assert ranks[0].kinds == ranks[1].kinds == ["hot", "hot"]  # what was read before is trained on


def test_a_source_that_cannot_be_opened_stops_every_rank() -> None:
    def missing() -> Iterator[Batch]:
        raise FileNotFoundError("train.parquet")

    def make(rank: int, agree: Agree) -> HotColdDataLoader:
        return HotColdDataLoader(missing if rank == 0 else list, PLACEMENT, batch_size=4, rank=rank, world_size=2, agree=agree)

    ranks = run_ranks(2, make)
    assert isinstance(ranks[0].error, FileNotFoundError)
    assert isinstance(ranks[1].error, DataError) and "ranks [0] failed" in str(ranks[1].error)


def test_a_rank_that_stops_alone_is_told_to_the_others() -> None:
    stream = Stream([True] * 40, [4])

    def make(rank: int, agree: Agree) -> HotColdDataLoader:
        loader = HotColdDataLoader(stream.batches, PLACEMENT, batch_size=4, window_batches=1, rank=rank, world_size=2, agree=agree)
        if rank == 0:
            phases = loader.phases
            loader.phases = lambda: _only_first(phases(), loader)  # type: ignore[method-assign]
        return loader

    def _only_first(phases: Iterator[Any], loader: HotColdDataLoader) -> Iterator[Any]:
        yield next(phases)
        loader.close()
        loader.epoch += 1

    ranks = run_ranks(2, make)
    assert ranks[0].error is None
    assert isinstance(ranks[1].error, DataError) and "ranks [0] stopped early" in str(ranks[1].error)


@pytest.mark.parametrize("what", ["placement", "batch_size", "window_batches", "rate", "feedback"])
def test_ranks_with_different_settings_are_told_instead_of_hanging(what: str) -> None:
    def make(rank: int, agree: Agree) -> HotColdDataLoader:
        odd = rank == 1
        schedule = ShuffleSchedule(rate=25.0 if odd and what == "rate" else 50.0)
        for loss in (0.5, 0.6 if odd and what == "feedback" else 0.4):
            schedule.observe(loss)
        return HotColdDataLoader(
            Stream([True] * 8, [4]).batches(),
            OTHER_PLACEMENT if odd and what == "placement" else PLACEMENT,
            schedule=schedule,
            batch_size=2 if odd and what == "batch_size" else 4,
            window_batches=1 if odd and what == "window_batches" else 2,
            rank=rank,
            world_size=2,
            agree=agree,
            prefetch=0,
        )

    for rank in run_ranks(2, make):
        assert isinstance(rank.error, HotBatchError)
        assert "ranks [1] would take other steps than rank 0" in str(rank.error)
        assert rank.trace == ["agree"]


def test_iterating_twice_is_two_epochs_of_the_same_order() -> None:
    stream = Stream([n % 3 != 0 for n in range(20)], [4])
    for source in (stream.batches(), stream.batches):
        loader = HotColdDataLoader(source, PLACEMENT, schedule=FIXED, batch_size=3, window_batches=2)
        first, second = run_one(loader), run_one(loader)
        assert first.numbers() == second.numbers()
        assert first.kinds == second.kinds
        assert loader.epoch == 2 and sum(loader.stats.samples.values()) == 20


def test_stopping_early_and_starting_over_gives_the_first_batches_again() -> None:
    loader = HotColdDataLoader(Stream([True] * 20, [4]).batches(), PLACEMENT, batch_size=3, window_batches=2)
    first = next(iter(loader))
    assert next(iter(loader)).labels.tolist() == first.labels.tolist() == [0, 1, 2]
    assert loader.epoch == 0


@pytest.mark.parametrize("policy", ["fae", "stock"])
def test_a_one_shot_source_is_refused_the_second_time(policy: Policy) -> None:
    loader = HotColdDataLoader(iter(Stream([True] * 4, [4]).batches()), PLACEMENT, schedule=ShuffleSchedule(policy), batch_size=2)
    assert len(list(loader)) == 2
    with pytest.raises(DataError, match=r"read already.*function that starts a new pass"):
        list(loader)


def test_no_batch_keeps_a_promise_of_the_source() -> None:
    batch = make_batch(0, [False, True])
    marked = [Batch(batch.dense_features, HotKeyedJaggedTensor.promise(batch.sparse_features), batch.labels)]
    policies: tuple[Policy, ...] = ("stock", "fae")
    for policy in policies:
        for size in (1, 2):
            loader = HotColdDataLoader(marked, PLACEMENT, schedule=ShuffleSchedule(policy), batch_size=size)
            assert broken_promises(list(loader)) == []
    assert broken_promises(marked) == [0]


def test_an_empty_source_gives_nothing() -> None:
    policies: tuple[Policy, ...] = ("fae", "stock")
    for policy in policies:
        assert list(HotColdDataLoader([], PLACEMENT, schedule=ShuffleSchedule(policy), batch_size=2)) == []
    assert list(HotColdDataLoader([make_batch(0, [])], PLACEMENT, batch_size=2)) == []


def test_phases_come_one_by_one_and_feedback_acts_on_the_next() -> None:
    # 8 batches of each kind at rate 50; after the first phase 0.5 is remembered, after the second the loss rises.
    schedule = ShuffleSchedule("fae", rate=50.0)
    loader = HotColdDataLoader(Stream([n % 2 == 0 for n in range(32)], [32]).batches(), PLACEMENT, schedule=schedule, batch_size=2)
    seen = []
    for (phase, batches), loss in zip(loader.phases(), [0.5, 0.6, 0.6, 0.6, 0.6, 0.6], strict=True):
        assert len(list(batches)) == phase.count
        seen.append(phase)
        schedule.observe(loss)
    assert seen == [Phase("cold", 4), Phase("hot", 4), *[Phase("cold", 2), Phase("hot", 2)] * 2]


def test_a_phase_must_be_used_up_before_the_next() -> None:
    loader = HotColdDataLoader(ELEVEN.batches(), PLACEMENT, batch_size=2)
    phases = loader.phases()
    next(next(phases)[1])
    with pytest.raises(ConfigError, match="before this one was used up"):
        next(phases)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, received 0"),
        ({"window_batches": 0}, "window_batches must be at least 1.*received 0"),
        ({"buffer_bytes": 0}, "buffer_bytes must be at least 1"),
        ({"prefetch": -1}, "prefetch must be at least 0"),
        ({"rank": 2, "world_size": 2}, "received rank=2, world_size=2"),
        ({"num_workers": 1}, "num_workers: received 1.*a torch DataLoader has workers of its own"),
        ({"shuffle": True}, "shuffle is for stores"),
    ],
)
def test_wrong_options_are_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HotColdDataLoader([], PLACEMENT, **{"batch_size": 2, **options})


def test_threads_end_with_the_pass() -> None:
    import threading

    before = threading.active_count()
    loader = HotColdDataLoader(Stream([n % 2 == 0 for n in range(40)], [4]).batches(), PLACEMENT, batch_size=3, window_batches=2)
    list(loader)
    next(iter(loader))
    batches = iter(loader)
    next(batches)
    loader.close()
    assert threading.active_count() == before
    assert np.array_equal(next(iter(loader)).labels.numpy(), [1, 3, 5])
    loader.close()
