"""HotColdDataLoader as a whole, over seeds, schedules and 1-4 simulated ranks: every sample once, all ranks in step, resumable anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.schedule import Guard, Policy, ShuffleSchedule
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.stream_windows import Agree
from tests.data.simulated_ranks import OTHER_PLACEMENT, PLACEMENT, Dealt, Rank, Stream, check_rank, check_steps, only_epoch, run_ranks

POLICIES = st.sampled_from(["fae", "fixed", "proportional", "stock"])
FEEDBACK = st.lists(st.floats(0, 1, width=16), max_size=8)
OPTIONS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 6),
        "window_batches": st.sampled_from([None, 1, 2, 5]),
        "buffer_bytes": st.sampled_from([1, 1000, 1 << 20]),
        "prefetch": st.sampled_from([0, 0, 2]),  # threads are slow here
    }
)


def _schedule(policy: Policy, rate: float) -> ShuffleSchedule:
    return ShuffleSchedule(policy, rate=rate, patience=2, guard=Guard("logloss", 0.5) if policy == "fae" else None)


def _hot(data: st.DataObject, samples: int, label: str) -> list[bool]:
    """Skewed, empty and random kinds."""
    drawn: list[bool] = data.draw(
        st.lists(st.booleans(), min_size=samples, max_size=samples)
        | st.sampled_from(
            [[True] * samples, [False] * samples, [n % 7 == 0 for n in range(samples)], [n < samples // 2 for n in range(samples)]]
        ),
        label,
    )
    return drawn


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_rank_takes_the_same_steps_and_no_sample_is_lost(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 4), "world")
    options = data.draw(OPTIONS, "options")
    policy, rate = data.draw(POLICIES, "policy"), data.draw(st.sampled_from([1.0, 30.0, 50.0, 100.0]), "rate")
    feedback = data.draw(FEEDBACK, "feedback")
    weighted = data.draw(st.booleans(), "weighted")
    # Ranks differ in how many samples they have, how hot these are and, through the sizes of source batches, in the window they end in.
    streams = [
        Stream(
            _hot(data, data.draw(st.integers(0, 30), "samples"), "hot"),
            data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), "sizes"),
            weighted,
        )
        for _ in range(world)
    ]

    def run() -> list[Rank]:
        def make(rank: int, agree: Agree) -> HotColdDataLoader:
            schedule = _schedule(policy, rate)
            return HotColdDataLoader(
                streams[rank].batches, PLACEMENT, schedule=schedule, rank=rank, world_size=world, agree=agree, **options
            )

        return run_ranks(world, make, feedback=feedback)

    ranks, again = run(), run()
    for rank, stream in zip(ranks, streams, strict=True):
        check_rank(rank, stream, options["batch_size"])
    check_steps(ranks if options["prefetch"] == 0 else [_without_agreements(rank) for rank in ranks], options["batch_size"] * world)
    assert [rank.numbers() for rank in again] == [rank.numbers() for rank in ranks]
    assert [rank.kinds for rank in again] == [rank.kinds for rank in ranks]


def _without_agreements(rank: Rank) -> Rank:
    """Threads agree whenever they come to it: only the steps are in order."""
    return Rank(rank.batches, rank.kinds, rank.error, rank.state)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_run_stopped_at_any_step_is_finished_by_any_number_of_ranks(data: st.DataObject) -> None:
    world, other = data.draw(st.integers(1, 4), "world"), data.draw(st.integers(1, 4), "resumed on")
    options = {**data.draw(OPTIONS, "options"), "prefetch": 0}
    policy = data.draw(POLICIES, "policy")
    source = Dealt(_hot(data, data.draw(st.integers(4, 40), "samples"), "hot"))
    feedback = data.draw(FEEDBACK, "feedback")

    def maker(ranks: int, state: dict[str, Any] | None = None) -> Callable[[int, Agree], HotColdDataLoader]:
        def make(rank: int, agree: Agree) -> HotColdDataLoader:
            loader = HotColdDataLoader(
                source, PLACEMENT, schedule=_schedule(policy, 50.0), rank=rank, world_size=ranks, agree=agree, **options
            )
            if state is not None:
                loader.load_state_dict(state)
            return loader

        return make

    whole = run_ranks(world, maker(world), passes=2, feedback=feedback)
    steps = len(whole[0].batches)
    stop = data.draw(st.integers(1, steps), "stop after")
    first = run_ranks(world, maker(world), passes=2, stop_after=stop, feedback=feedback)
    # The feedback that the stopped run had heard is in the state; the rest comes after.
    phases = sum(a.position.cursor.left == 0 for a in first[0].batches)  # type: ignore[union-attr]
    second = run_ranks(other, maker(other, first[0].state), passes=2, feedback=feedback[phases:])
    for rank in [*first, *second]:
        assert rank.error is None
    # The steps of the broken epoch are those of the run that was not stopped, whatever ranks take them.
    epoch = first[0].batches[-1].position.epoch  # type: ignore[union-attr]
    check_steps(only_epoch(second, epoch), options["batch_size"] * world)
    check_steps(only_epoch(second, epoch + 1), options["batch_size"] * other)
    assert _steps(second, epoch) == _steps(whole, epoch)[len(_steps(first, epoch)) :]
    for e in (0, 1):  # what the dealing leaves out is the same for whoever began the epoch; later epochs are dealt to the new ranks
        share = len(source.hot) // (world if e <= epoch else other) * (world if e <= epoch else other)
        done = [n for kind, numbers in _steps(first, e) + _steps(second, e) for n in numbers]
        assert len(done) == len(set(done)) == share
    if other == world:
        assert _steps(first, 1) + _steps(second, 1) == _steps(whole, 1)


def _steps(ranks: list[Rank], epoch: int) -> list[tuple[str, list[int]]]:
    """Kind and samples over all ranks of each step of an epoch."""
    return [
        (batches[0].kind, sorted(n for batch in batches for n in batch.sample_numbers.tolist()))
        for batches in zip(*(rank.batches for rank in ranks), strict=True)
        if batches[0].position is not None and batches[0].position.epoch == epoch
    ]


def test_a_lost_sample_is_caught() -> None:
    # Negative control of the checkers: a loader that drops its last partial batches.
    streams = [Stream([n % 2 == 0 for n in range(9)], [3])]
    ranks = run_ranks(1, lambda r, agree: HotColdDataLoader(streams[0].batches, PLACEMENT, batch_size=2, drop_last=True, prefetch=0))
    with pytest.raises(AssertionError):
        check_rank(ranks[0], streams[0], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "saved with batch_size 2, this loader has 3"),
        ({"placement": OTHER_PLACEMENT}, "saved with placement"),
        ({"window_batches": 1}, "saved with window_batches None, this loader has 1"),
        ({"schedule": ShuffleSchedule("proportional")}, "schedule state is of policy 'fae'"),
        ({"source": Stream([True] * 8, [4]).batches}, "saved with source 'dealt', this loader has ''"),
    ],
)
def test_the_state_of_another_loader_is_refused(change: dict[str, Any], message: str) -> None:
    def loader(**change: Any) -> HotColdDataLoader:
        options = {"batch_size": 2, "prefetch": 0, **change}
        source, placement = options.pop("source", Dealt([True] * 8)), options.pop("placement", PLACEMENT)
        return HotColdDataLoader(source, placement, **options)

    (rank,) = run_ranks(1, lambda r, agree: loader(), stop_after=2)
    assert rank.state is not None
    loader().load_state_dict(rank.state)
    with pytest.raises(ConfigError, match=message):
        loader(**change).load_state_dict(rank.state)


def test_a_ranks_own_batches_cannot_be_dealt_anew() -> None:
    stream = Stream([True] * 8, [4])

    def make(rank: int, agree: Agree) -> HotColdDataLoader:
        return HotColdDataLoader(stream.batches, PLACEMENT, batch_size=2, rank=rank, world_size=2, agree=agree, prefetch=0)

    state = run_ranks(2, make, stop_after=1)[0].state
    assert state is not None
    with pytest.raises(ConfigError, match=r"2 rank\(s\) began is to be finished on 1"):
        HotColdDataLoader(stream.batches, PLACEMENT, batch_size=2).load_state_dict(state)
