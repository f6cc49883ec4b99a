"""HotColdDataLoader where something goes wrong, or comes from where nobody expects it: passes that overlap, odd batches, odd resumes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError, DataError, HotBatchError
from fae_torchrec.core.schedule import Guard, ShuffleSchedule
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.stream_windows import Agree
from tests.data.simulated_ranks import PLACEMENT, Dealt, Rank, Stream, check_steps, make_batch, run_ranks

TWENTY = Stream([n % 2 == 0 for n in range(20)], [4])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_new_pass_ends_the_one_before_and_only_that(prefetch: int) -> None:
    loader = HotColdDataLoader(TWENTY.batches, PLACEMENT, batch_size=2, prefetch=prefetch)
    old = iter(loader)
    next(old)
    new = iter(loader)
    first = next(new)
    with pytest.raises(ConfigError, match="this pass over the loader has ended"):
        next(old)
    del old
    assert sum(batch.num_samples for batch in [first, *new]) == 20


@pytest.mark.parametrize("end", ["close", "drop the pass"])
def test_a_pass_that_ends_early_lets_go_of_its_source_at_once(end: str) -> None:
    ended = threading.Event()

    def source() -> Iterator[Batch]:
        try:
            yield from TWENTY.batches()
        finally:
            ended.set()

    before = threading.active_count()
    loader = HotColdDataLoader(source, PLACEMENT, batch_size=2, window_batches=1)
    phases = loader.phases()
    next(phases)
    if end == "close":
        loader.close()
    else:
        del phases
    assert ended.is_set() and threading.active_count() == before


def test_a_resumed_pass_that_is_stopped_starts_over_where_it_was_resumed() -> None:
    loader = HotColdDataLoader(TWENTY.batches, PLACEMENT, batch_size=2)
    whole = [batch.sample_numbers.tolist() for batch in loader]
    batches = iter(loader)
    position = [next(batches) for _ in range(3)][-1].position
    assert position is not None
    resumed = HotColdDataLoader(TWENTY.batches, PLACEMENT, batch_size=2)
    resumed.load_state_dict(loader.state_dict(position))
    next(iter(resumed))  # somebody looks at a batch before the training begins
    assert [batch.sample_numbers.tolist() for batch in resumed] == whole[3:]
    assert [batch.sample_numbers.tolist() for batch in resumed] == whole  # the next epoch is whole again


def test_a_late_state_of_an_epoch_that_other_ranks_began_is_still_of_their_streams() -> None:
    # Pipelines read ahead: the pass is over when the last steps are saved.
    source = Dealt([n % 3 == 0 for n in range(30)])

    def make(rank: int, agree: Agree) -> HotColdDataLoader:
        return HotColdDataLoader(source, PLACEMENT, batch_size=2, rank=rank, world_size=2, agree=agree, prefetch=0)

    begun = run_ranks(2, make, stop_after=3)[0].state
    assert begun is not None
    loader = HotColdDataLoader(source, PLACEMENT, batch_size=2)
    loader.load_state_dict(begun)
    batches = list(loader)
    assert batches[-2].position is not None
    late = loader.state_dict(batches[-2].position)
    assert late["streams"] == 2
    loader = HotColdDataLoader(source, PLACEMENT, batch_size=2)
    loader.load_state_dict(late)
    assert [batch.sample_numbers.tolist() for batch in loader] == [batches[-1].sample_numbers.tolist()]
    position = next(iter(loader)).position
    assert position is not None and loader.state_dict(position)["streams"] == 1  # the next epoch is its own


@settings(deadline=None, max_examples=25)
@given(
    worlds=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    stops=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    window=st.sampled_from([None, 1, 2]),
    hot=st.sampled_from([2, 3, 7]),
    feedback=st.sampled_from([[], [0.1, 0.9], [0.5, 0.4, 0.6, 0.7]]),
)
def test_an_epoch_handed_from_ranks_to_ranks_has_every_sample_once(
    worlds: list[int], stops: list[int], window: int | None, hot: int, feedback: list[float]
) -> None:
    # With the second feedback the schedule's guard falls back in the middle of a window.
    source = Dealt([n % hot == 0 for n in range(45)])

    def legs(worlds: list[int], stops: list[int]) -> tuple[list[list[int]], int]:
        steps: list[list[int]] = []
        state: dict[str, Any] | None = None
        heard = 0
        for world, stop in zip(worlds, [*stops[: len(worlds) - 1], None], strict=True):

            def make(rank: int, agree: Agree, world: int = world, state: dict[str, Any] | None = state) -> HotColdDataLoader:
                schedule = ShuffleSchedule("fae", rate=25.0, patience=2, guard=Guard("logloss", 0.5))
                options: dict[str, Any] = {"rank": rank, "world_size": world, "agree": agree, "window_batches": window, "prefetch": 0}
                loader = HotColdDataLoader(source, PLACEMENT, schedule=schedule, batch_size=2, **options)
                if state is not None:
                    loader.load_state_dict(state)
                return loader

            ranks = run_ranks(world, make, stop_after=stop, feedback=feedback[heard:])
            assert [rank.error for rank in ranks] == [None] * world
            check_steps([Rank(rank.batches, rank.kinds) for rank in ranks], 2 * worlds[0])
            steps += [sorted(n for part in parts for n in part.sample_numbers) for parts in zip(*(r.batches for r in ranks), strict=True)]
            state = ranks[0].state
            if state is None:
                break
            heard += sum(b.position is not None and b.position.cursor.left == 0 for b in ranks[0].batches)
        return steps, heard

    steps, _ = legs(worlds, stops)
    assert sorted(n for step in steps for n in step) == list(range(45 // worlds[0] * worlds[0]))
    assert steps == legs(worlds[:1], [])[0]


@pytest.mark.parametrize(("now", "found"), [(9, r"\(0, 0\)"), (24, r"\(6, 2\)")])
def test_an_epoch_whose_data_have_changed_is_not_finished(now: int, found: str) -> None:
    loader = HotColdDataLoader(TWENTY.batches, PLACEMENT, batch_size=1, window_batches=2)
    position = list(loader)[-2].position
    assert position is not None and position.window == 2
    changed = Stream([n % 3 == 0 for n in range(now)], [4])
    resumed = HotColdDataLoader(changed.batches, PLACEMENT, batch_size=1, window_batches=2)
    resumed.load_state_dict(loader.state_dict(position))
    with pytest.raises(DataError, match=rf"its window 2 had \(2, 2\) cold and hot steps.*has {found} now"):
        list(resumed)


def test_ranks_with_other_policies_are_told() -> None:
    # Their agreements on windows would not even have the same size.
    def make(rank: int, agree: Agree) -> HotColdDataLoader:
        schedule = ShuffleSchedule("stock" if rank else "fae")
        return HotColdDataLoader(TWENTY.batches, PLACEMENT, schedule=schedule, batch_size=2, rank=rank, world_size=2, agree=agree)

    for rank in run_ranks(2, make):
        assert isinstance(rank.error, HotBatchError)


def test_a_rank_that_agrees_with_nobody_is_told_so() -> None:
    with pytest.raises(ConfigError, match=r"of 1 ranks together, world_size is 2; give gather_counts"):
        list(HotColdDataLoader(TWENTY.batches, PLACEMENT, batch_size=2, world_size=2))
    with pytest.raises(ConfigError, match="seed must be at least 0, received -1"):
        HotColdDataLoader(TWENTY.batches, PLACEMENT, batch_size=2, seed=-1)


def _parts(change: Callable[[Batch], tuple[Any, Any, Any]]) -> Batch:
    return Batch(*change(make_batch(4, [True, False])))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda: make_batch(4, [True, False]).to(torch.device("meta")), r"on \['meta'\]; samples are segregated on the CPU"),
        (lambda: _parts(lambda b: (b.dense_features, b.sparse_features, b.labels[:1])), "2 samples by its ids, 2 by its dense.* 1 by its"),
        (lambda: _parts(lambda b: (b.dense_features[:1], b.sparse_features, b.labels)), "1 by its dense features"),
        (lambda: _parts(lambda b: (b.dense_features[:, :1], b.sparse_features, b.labels)), "must have the same form"),
        (lambda: _parts(lambda b: (b.dense_features, b.sparse_features, b.labels[:, None])), "must have the same form"),
        (lambda: make_batch(4, [True, False], weighted=True), "must have the same form"),
    ],
)
def test_a_batch_that_cannot_be_segregated_stops_every_rank_when_it_is_read(odd: Callable[[], Batch], message: str) -> None:
    sources = [[make_batch(0, [True] * 4)] * 2, [make_batch(0, [True] * 4), odd()]]
    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(sources[r], PLACEMENT, batch_size=2, rank=r, world_size=2, agree=agree))
    assert isinstance(ranks[0].error, DataError) and "sources of the ranks [1] failed" in str(ranks[0].error)
    with pytest.raises(DataError, match=message):
        assert ranks[1].error is not None
        raise ranks[1].error
    assert ranks[0].batches == []


def test_batches_of_no_samples_are_passed_over() -> None:
    class Odd(Dealt):
        def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
            for batch in super().batches(batch_size, rank=rank, world_size=world_size):
                yield from (batch, make_batch(0, []))

    loader = HotColdDataLoader(Odd([n % 2 == 0 for n in range(8)]), PLACEMENT, batch_size=2)
    assert [batch.sample_numbers.tolist() for batch in loader] == [[1, 3], [0, 2], [5, 7], [4, 6]]


def test_fillers_of_a_rank_that_never_saw_a_sample_are_like_the_others_batches() -> None:
    batches = [
        Batch(batch.dense_features.double(), batch.sparse_features, batch.labels.long().unsqueeze(1))
        for batch in Stream([n % 3 == 0 for n in range(6)], [3], weighted=True).batches()
    ]
    sources = [[], batches]
    ranks = run_ranks(2, lambda r, agree: HotColdDataLoader(sources[r], PLACEMENT, batch_size=2, rank=r, world_size=2, agree=agree))
    assert [rank.error for rank in ranks] == [None, None]
    for filler, other in zip(*(rank.batches for rank in ranks), strict=True):
        assert (filler.num_samples, filler.weight, filler.labels.tolist()) == (0, 0.0, [[0]])
        assert (filler.dense_features.dtype, filler.labels.dtype) == (other.dense_features.dtype, other.labels.dtype)
        assert filler.sparse_features.weights().numel() == 0
        assert filler.sparse_features.keys() == other.sparse_features.keys()


def test_batches_of_worker_processes_do_not_wait_in_shared_memory() -> None:
    # Each of their tensors holds a file descriptor: a window of 1,000 uncopied batches is too many for most systems.
    (batch,) = Stream([True] * 4, [4]).batches()
    for tensor in (batch.dense_features, batch.labels, batch.sparse_features.values(), batch.sparse_features.lengths()):
        tensor.share_memory_()
    for policy in ("fae", "stock"):
        schedule = ShuffleSchedule(policy)  # type: ignore[arg-type]
        (made,) = HotColdDataLoader([batch], PLACEMENT, schedule=schedule, batch_size=4)
        assert torch.equal(made.sparse_features.values(), batch.sparse_features.values()) and torch.equal(made.labels, batch.labels)
        assert not any(tensor.is_shared() for tensor in (made.dense_features, made.labels, made.sparse_features.values()))


def test_ids_may_have_offsets_alone_and_tensors_any_strides() -> None:
    batch = make_batch(0, [True, False, True, True])
    kjt = batch.sparse_features
    odd = Batch(
        torch.stack([batch.dense_features] * 2, dim=2)[:, :, 0],
        KeyedJaggedTensor(keys=kjt.keys(), values=kjt.values().repeat_interleave(2)[::2], offsets=kjt.offsets().long()),
        torch.stack([batch.labels] * 2, dim=1)[:, 1],
    )
    plain, same = (list(HotColdDataLoader([given_batch], PLACEMENT, batch_size=2)) for given_batch in (batch, odd))
    assert [b.labels.tolist() for b in same] == [[1], [0, 2], [3]]
    for b, a in zip(plain, same, strict=True):
        assert b.dense_features.tolist() == a.dense_features.tolist() and b.labels.tolist() == a.labels.tolist()
        assert b.sparse_features.to_dict().keys() == a.sparse_features.to_dict().keys()
        assert b.sparse_features.values().tolist() == a.sparse_features.values().tolist()
        assert b.sparse_features.lengths().tolist() == a.sparse_features.lengths().tolist()
