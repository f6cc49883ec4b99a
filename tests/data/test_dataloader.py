"""HotColdDataLoader on simulated ranks: every sample once, in order within its kind, the same kind on every rank at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError, HotBatchError
from fae_torchrec.core.schedule import Phase, Policy, ShuffleSchedule
from fae_torchrec.data.batches import HotKeyedJaggedTensor, is_hot_batch
from fae_torchrec.data.dataloader import Agree, HotColdDataLoader

# Two features look up rows 0..9; rows 0..4 are hot.
from tests.data.simulated_ranks import (
    OTHER_PLACEMENT,
    PLACEMENT,
    Stream,
    broken_promises,
    check_rank,
    disagreements,
    make_batch,
    run_one,
    run_ranks,
)


def test_one_rank_by_hand_with_the_epoch_as_one_window() -> None:
    # 0 1 4 6 7 8 are hot, 2 3 5 9 10 are cold; 3 hot and 2 cold batches; at rate 50: 1 cold, 2 hot, 1 cold, 1 hot.
    stream = Stream([n in (0, 1, 4, 6, 7, 8) for n in range(11)], sizes=[3])
    loader = HotColdDataLoader(stream.batches(), PLACEMENT, schedule=ShuffleSchedule("fixed"), batch_size=2, window_batches=None)
    rank = run_one(loader)
    assert rank.kinds == ["cold", "hot", "hot", "cold", "hot", "mixed"]
    assert rank.numbers() == [[2, 3], [0, 1], [4, 6], [5, 9], [7, 8], [10]]
    stats = loader.stats
    assert (stats.hot_batches, stats.cold_batches, stats.mixed_batches, stats.hot_samples, stats.samples) == (3, 2, 1, 6, 11)


def test_one_rank_by_hand_with_windows_of_two_source_batches() -> None:
    # Window 1 is 0..5: hot 0 1 4, cold 2 3 5. Window 2 is 6..10 and the carried 4 and 5. Window 3 is empty.
    stream = Stream([n in (0, 1, 4, 6, 7, 8) for n in range(11)], sizes=[3])
    loader = HotColdDataLoader(stream.batches(), PLACEMENT, schedule=ShuffleSchedule("fixed"), batch_size=2, window_batches=2)
    rank = run_one(loader)
    assert rank.kinds == ["cold", "hot", "cold", "hot", "hot", "mixed"]
    assert rank.numbers() == [[2, 3], [0, 1], [5, 9], [4, 6], [7, 8], [10]]


def test_two_ranks_by_hand() -> None:
    # Rank 0 has 4 hot and 2 cold samples, rank 1 has 2 and 4: one batch of each kind is agreed, the rest is mixed.
    streams = [Stream([n in (0, 1, 2, 5) for n in range(6)], [6]), Stream([n in (0, 3) for n in range(6)], [1])]
    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(streams[r].batches(), PLACEMENT, batch_size=2, agree=agree))
    assert [rank.trace for rank in ranks] == [["agree", "cold", "hot", "mixed"]] * 2
    assert ranks[0].numbers() == [[3, 4], [0, 1], [2, 5]]
    assert ranks[1].numbers() == [[1, 2], [0, 3], [4, 5]]


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_simulated_ranks_take_equal_steps_and_lose_nothing(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 3), "world")
    samples = data.draw(st.integers(0, 40), "samples")
    batch_size = data.draw(st.integers(1, 6), "batch_size")
    window = data.draw(st.sampled_from([None, 1, 2, 5]), "window_batches")
    policies: list[Policy] = ["fae", "fixed", "proportional"]
    policy = data.draw(st.sampled_from(policies), "policy")
    rate = data.draw(st.sampled_from([1.0, 30.0, 50.0, 100.0]), "rate")
    weighted = data.draw(st.booleans(), "weighted")
    # Ranks differ in how hot they are and, through the sizes of their source batches, in the window in which they end.
    hot = st.lists(st.booleans(), min_size=samples, max_size=samples) | st.sampled_from([[True] * samples, [False] * samples])
    streams = [
        Stream(data.draw(hot, "hot"), data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), "sizes"), weighted)
        for _ in range(world)
    ]
    ranks = run_ranks(
        world,
        lambda r, agree: HotColdDataLoader(
            streams[r].batches,
            PLACEMENT,
            schedule=ShuffleSchedule(policy, rate=rate),
            batch_size=batch_size,
            window_batches=window,
            agree=agree,
        ),
    )
    for rank, stream in zip(ranks, streams, strict=True):
        check_rank(rank, stream, batch_size)
    assert disagreements(ranks) == []


def test_a_loader_that_breaks_its_promise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # Negative control of `broken_promises`: a classifier that calls everything hot.
    monkeypatch.setattr("fae_torchrec.data.dataloader.hot_samples", lambda kjt, placement: torch.ones(kjt.stride(), dtype=torch.bool))
    stream = Stream([True] * 4 + [False] * 2 + [True] * 2, sizes=[4])
    rank = run_one(HotColdDataLoader(stream.batches(), PLACEMENT, batch_size=2))
    assert rank.kinds == ["hot"] * 4
    assert broken_promises(rank.batches) == [2]
    with pytest.raises(AssertionError):
        check_rank(rank, stream, 2)


def test_ranks_that_do_not_agree_are_caught() -> None:
    # Negative control of `disagreements`: the same loaders without an all-gather.
    streams = [Stream([True] * 4 + [False] * 4, [4]), Stream([True] * 2 + [False] * 6, [4])]
    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(streams[r].batches(), PLACEMENT, batch_size=2, agree=agree), lonely=True)
    assert disagreements(ranks) == [1]


def test_ranks_whose_sources_end_in_different_windows_stay_in_step() -> None:
    # 12 samples each: in batches of 1 and windows of 2 rank 0 needs seven windows (the last one empty), rank 1 needs one.
    streams = [Stream([n % 2 == 0 for n in range(12)], [1]), Stream([n % 3 == 0 for n in range(12)], [12])]
    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(streams[r].batches(), PLACEMENT, batch_size=2, window_batches=2, agree=agree))
    for rank, stream in zip(ranks, streams, strict=True):
        check_rank(rank, stream, 2)
    assert disagreements(ranks) == []
    assert ranks[0].trace.count("agree") == 7
    # 6 hot and 6 cold samples meet 4 and 8: two hot and three cold batches, and two samples left on each rank.
    assert [ranks[0].kinds.count(kind) for kind in ("hot", "cold", "mixed")] == [2, 3, 1]


def test_leftovers_of_both_kinds_are_merged_in_stream_order_and_cut_evenly() -> None:
    # The ranks share no kind of batch: everything is left over, 7 samples in ceil(7 / 3) = 3 batches.
    streams = [Stream([n != 3 for n in range(7)], [2]), Stream([n == 3 for n in range(7)], [5])]
    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(streams[r].batches(), PLACEMENT, batch_size=3, agree=agree))
    for rank in ranks:
        assert rank.trace == ["agree", "mixed", "mixed", "mixed"]
        assert rank.numbers() == [[0, 1, 2], [3, 4], [5, 6]]
        assert not any(is_hot_batch(batch) for batch in rank.batches)


def test_ranks_with_slightly_unequal_streams_still_take_equal_steps() -> None:
    streams = [Stream([True] * 9, [4]), Stream([True] * 8, [4])]
    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(streams[r].batches(), PLACEMENT, batch_size=3, agree=agree))
    assert disagreements(ranks) == []
    assert [rank.numbers() for rank in ranks] == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[0, 1, 2], [3, 4, 5], [6, 7]]]
    # 8 and 10 samples: two agreed batches leave 2 and 4; the 4 need two steps, so the 2 are taken in two steps as well.
    streams = [Stream([True] * 8, [4]), Stream([True] * 10, [4])]
    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(streams[r].batches(), PLACEMENT, batch_size=3, agree=agree))
    assert disagreements(ranks) == []
    assert [rank.numbers("mixed") for rank in ranks] == [[[6], [7]], [[6, 7], [8, 9]]]


def test_a_rank_with_too_few_samples_is_an_error_on_every_rank() -> None:
    streams = [Stream([True] * 9, [4]), Stream([True] * 4, [4])]
    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(streams[r].batches(), PLACEMENT, batch_size=2, agree=agree))
    for rank in ranks:
        assert isinstance(rank.error, DataError)
        assert "[5, 0] samples left and batch_size is 2" in str(rank.error)
        assert "rank 1 cannot take the 3 steps that rank 0 needs" in str(rank.error)
        assert rank.kinds == ["hot", "hot"]


def test_a_source_that_fails_stops_every_rank_before_the_next_step() -> None:
    def failing() -> Iterator[Batch]:
        yield make_batch(0, [True] * 4)
        yield make_batch(4, [True] * 4)
        batch = make_batch(8, [True] * 2)
        batch.sparse_features.values()[0] = 10
        yield batch

    def source(rank: int) -> Callable[[], Iterator[Batch]]:
        return failing if rank == 1 else lambda: iter(Stream([True] * 12, [4]).batches())

    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(source(r), PLACEMENT, batch_size=4, window_batches=1, agree=agree))
    assert isinstance(ranks[0].error, DataError) and "sources of the ranks [1] failed" in str(ranks[0].error)
    assert isinstance(ranks[1].error, DataError) and "id 10" in str(ranks[1].error) and "0..9" in str(ranks[1].error)
    assert ranks[0].trace == ranks[1].trace == ["agree", "hot", "agree", "hot", "agree"]


def test_a_source_that_cannot_be_opened_stops_every_rank() -> None:
    def missing() -> Iterator[Batch]:
        raise FileNotFoundError("train.parquet")

    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(missing if r == 0 else list, PLACEMENT, batch_size=4, agree=agree))
    assert isinstance(ranks[0].error, FileNotFoundError)
    assert isinstance(ranks[1].error, DataError) and "ranks [0] failed" in str(ranks[1].error)


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
            agree=agree,
        )

    for rank in run_ranks(2, make):
        assert isinstance(rank.error, HotBatchError)
        assert "ranks [1] would take other steps than rank 0" in str(rank.error)
        assert rank.trace == ["agree"]


def test_iterating_twice_starts_over() -> None:
    stream = Stream([n % 3 != 0 for n in range(20)], [4])
    for source in (stream.batches(), stream.batches):
        loader = HotColdDataLoader(source, PLACEMENT, schedule=ShuffleSchedule("fixed"), batch_size=3, window_batches=2)
        first, second = run_one(loader), run_one(loader)
        assert first.numbers() == second.numbers()
        assert first.trace == second.trace
        assert loader.stats.samples == 20


def test_stopping_early_and_starting_over_gives_the_first_batches_again() -> None:
    loader = HotColdDataLoader(Stream([True] * 20, [4]).batches(), PLACEMENT, batch_size=3, window_batches=2)
    first = next(iter(loader))
    assert next(iter(loader)).labels.tolist() == first.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("policy", ["fae", "stock"])
def test_a_one_shot_source_is_refused_the_second_time(policy: Policy) -> None:
    loader = HotColdDataLoader(iter(Stream([True] * 4, [4]).batches()), PLACEMENT, schedule=ShuffleSchedule(policy), batch_size=2)
    assert len(list(loader)) == 2
    with pytest.raises(DataError, match=r"read already.*function that starts a new pass"):
        list(loader)


@settings(deadline=None, max_examples=40)
@given(
    samples=st.integers(0, 30),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    batch_size=st.integers(1, 7),
    weighted=st.booleans(),
)
def test_stock_only_cuts_to_batch_size(samples: int, sizes: list[int], batch_size: int, weighted: bool) -> None:
    stream = Stream([n % 2 == 0 for n in range(samples)], sizes, weighted)
    loader = HotColdDataLoader(stream.batches(), PLACEMENT, schedule=ShuffleSchedule("stock"), batch_size=batch_size)
    rank = run_one(loader)
    assert rank.kinds == ["mixed"] * -(-samples // batch_size)
    assert rank.numbers() == [list(range(i, min(i + batch_size, samples))) for i in range(0, samples, batch_size)]
    check_rank(rank, stream, batch_size)
    assert (loader.stats.samples, loader.stats.hot_samples) == (samples, 0)


def test_stock_asks_no_other_rank() -> None:
    def agree(counts: np.ndarray) -> np.ndarray:
        raise AssertionError("asked")

    batches = Stream([True] * 5, [2]).batches()
    assert len(list(HotColdDataLoader(batches, PLACEMENT, schedule=ShuffleSchedule("stock"), batch_size=2, agree=agree))) == 3
    with pytest.raises(AssertionError, match="asked"):
        list(HotColdDataLoader(batches, PLACEMENT, batch_size=2, agree=agree))


def test_stock_and_cold_batches_do_not_keep_a_promise_of_the_source() -> None:
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


def test_one_rank_has_fewer_than_one_batch_of_each_kind_left() -> None:
    for window in (1, 3, None):
        loader = HotColdDataLoader(Stream([n % 7 < 4 for n in range(61)], [5]).batches(), PLACEMENT, batch_size=4, window_batches=window)
        rank = run_one(loader)
        mixed = [n for part in rank.numbers("mixed") for n in part]
        assert sum(n % 7 < 4 for n in mixed) < 4 and sum(n % 7 >= 4 for n in mixed) < 4


def test_on_swap_is_called_between_phases_of_different_kinds_also_across_windows() -> None:
    stream = Stream([n % 2 == 0 for n in range(16)], [8])
    events: list[object] = []
    loader = HotColdDataLoader(
        stream.batches(), PLACEMENT, schedule=ShuffleSchedule("fixed"), batch_size=2, window_batches=1, on_swap=events.append
    )
    for batch in loader:
        events.append("hot" if is_hot_batch(batch) else "cold")
    window = ["cold", Phase("hot", 1), "hot", Phase("cold", 1), "cold", Phase("hot", 1), "hot"]
    assert events == [*window, Phase("cold", 1), *window]


def test_on_swap_is_not_called_where_only_one_kind_exists() -> None:
    for hot in (True, False):
        calls: list[Phase] = []
        loader = HotColdDataLoader(Stream([hot] * 12, [3]).batches(), PLACEMENT, batch_size=2, window_batches=2, on_swap=calls.append)
        assert len(list(loader)) == 6
        assert calls == []


def test_feedback_given_in_on_swap_acts_from_the_phase_after() -> None:
    # 8 batches of each kind at rate 50: cold 4, hot 4 decided; then the loss rises, the rate is 25 and the next phases take 2.
    schedule = ShuffleSchedule("fae", rate=50.0)
    losses = iter([0.5, 0.6])
    phases: list[Phase] = []

    def on_swap(phase: Phase) -> None:
        phases.append(phase)
        schedule.observe(next(losses, 0.6))

    stream = Stream([n % 2 == 0 for n in range(32)], [32])
    loader = HotColdDataLoader(stream.batches(), PLACEMENT, schedule=schedule, batch_size=2, on_swap=on_swap)
    rank = run_one(loader)
    # Swap 1 (0.5 is remembered) comes before hot 4, swap 2 (0.6 rises) before cold 4, which was decided at 50.
    assert phases == [Phase("hot", 4), Phase("cold", 4), Phase("hot", 4)]
    assert schedule.rate == 25.0
    again = run_one(loader)
    assert phases[3:] == [Phase("hot", 2), Phase("cold", 2)] * 3 + [Phase("hot", 2)]
    assert sorted(map(tuple, rank.numbers())) == sorted(map(tuple, again.numbers()))


def test_sizes_below_one_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1, received 0"):
        HotColdDataLoader([], PLACEMENT, batch_size=0)
    with pytest.raises(ConfigError, match=r"window_batches must be at least 1.*received 0"):
        HotColdDataLoader([], PLACEMENT, batch_size=1, window_batches=0)
