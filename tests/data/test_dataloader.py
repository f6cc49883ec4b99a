"""HotColdDataLoader on simulated ranks: every sample once, in order within its kind, the same kind on every rank at every step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError, DataError, HotBatchError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import Phase, Policy, ShuffleSchedule
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.batches import HotKeyedJaggedTensor, is_hot_batch
from fae_torchrec.data.dataloader import Agree, HotColdDataLoader

# Two features look up rows 0..9; rows 0..4 are hot.
TABLES = TableSet((TableSpec("t", rows=10, dim=4, feature_names=("f", "g")),))
PLACEMENT = RowPlacement(TABLES, {"t": np.arange(5)}, "by hand", 0, 0.0, 0.0)
OTHER_PLACEMENT = RowPlacement(TABLES, {"t": np.arange(6)}, "by hand", 0, 0.0, 0.0)


def make_batch(first: int, hot: list[bool], *, weighted: bool = False) -> Batch:
    """Samples first, first + 1, ...: the label is the sample's number n, and its bags depend on n only.

    f has n % 3 hot ids; g has one hot id where n is even, no id where it is odd, and after it one cold id in a cold sample.
    """
    numbers = list(range(first, first + len(hot)))
    bags = [[(n + j) % 5 for j in range(n % 3)] for n in numbers]
    bags += [[n % 5] * (1 - n % 2) + ([] if is_hot else [5 + n % 5]) for n, is_hot in zip(numbers, hot, strict=True)]
    values = [x for bag in bags for x in bag]
    weights = [n + x / 10 for n, bag in zip(numbers * 2, bags, strict=True) for x in bag]
    labels = torch.tensor(numbers, dtype=torch.float32)
    return Batch(
        dense_features=labels.unsqueeze(1) + torch.tensor([0.25, 0.5]),
        sparse_features=KeyedJaggedTensor(
            keys=["f", "g"],
            values=torch.tensor(values, dtype=torch.int64),
            lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
            weights=torch.tensor(weights, dtype=torch.float32) if weighted else None,
            stride=len(hot),
        ),
        labels=labels,
    )


@dataclass
class Stream:
    """One rank's samples: which are hot, and the sizes in which the source gives them."""

    hot: list[bool]
    sizes: list[int]
    weighted: bool = False

    def batches(self) -> list[Batch]:
        made, first, turn = [], 0, 0
        while first < len(self.hot):
            part = self.hot[first : first + self.sizes[turn % len(self.sizes)]]
            made.append(make_batch(first, part, weighted=self.weighted))
            first += len(part)
            turn += 1
        return made


@dataclass
class Rank:
    """What one rank did: its batches, the kind of each, and the order of its steps and agreements."""

    batches: list[Batch] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    error: BaseException | None = None

    def numbers(self, *kinds: str) -> list[list[int]]:
        return [
            [int(x) for x in batch.labels.tolist()]
            for batch, kind in zip(self.batches, self.kinds, strict=True)
            if kind in kinds or not kinds
        ]


class AllGather:
    """An all-gather over threads; a rank that died fails the gathers it is missing in, instead of hanging the others."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.dead = False
        self._rounds: dict[int, dict[int, np.ndarray]] = {}
        self._changed = threading.Condition()

    def __call__(self, number: int, rank: int, counts: np.ndarray) -> np.ndarray:
        with self._changed:
            gathered = self._rounds.setdefault(number, {})
            gathered[rank] = counts.copy()
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(gathered) == self.world or self.dead, timeout=20)
            if len(gathered) < self.world:
                raise TimeoutError(f"gather {number}: only the ranks {sorted(gathered)} came")
            return np.stack([gathered[r] for r in range(self.world)])

    def die(self) -> None:
        with self._changed:
            self.dead = True
            self._changed.notify_all()


def run_ranks(world: int, make: Callable[[int, Agree], HotColdDataLoader], *, lonely: bool = False) -> list[Rank]:
    """Runs one pass of each rank's loader in a thread of its own. Lonely ranks do not really agree."""
    gather = AllGather(world)
    ranks = [Rank() for _ in range(world)]

    def agree_of(rank: int) -> Agree:
        def agree(counts: np.ndarray) -> np.ndarray:
            assert counts.dtype == np.int64
            number = ranks[rank].trace.count("agree")
            ranks[rank].trace.append("agree")
            return counts[None] if lonely else gather(number, rank, counts)

        return agree

    def one_pass(rank: int) -> None:
        mine = ranks[rank]
        try:
            loader = make(rank, agree_of(rank))
            done = (0, 0, 0)
            for batch in loader:
                stats = loader.stats
                counts = (stats.hot_batches, stats.cold_batches, stats.mixed_batches)
                (kind,) = (name for name, now, then in zip(("hot", "cold", "mixed"), counts, done, strict=True) if now == then + 1)
                done = counts
                mine.batches.append(batch)
                mine.kinds.append(kind)
                mine.trace.append(kind)
        except BaseException as error:
            mine.error = error
            gather.die()

    threads = [threading.Thread(target=one_pass, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a rank hangs"
    return ranks


def run_one(loader: HotColdDataLoader) -> Rank:
    (rank,) = run_ranks(1, lambda rank, agree: loader)
    if rank.error is not None:
        raise rank.error
    return rank


def unpack(batch: Batch) -> dict[int, tuple[object, ...]]:
    """Sample number -> everything that belongs to the sample."""
    kjt = batch.sparse_features
    samples = {}
    for i, label in enumerate(batch.labels.tolist()):
        parts: list[object] = [batch.dense_features[i].tolist()]
        for key in list(kjt.keys()):
            jagged = kjt[key]
            begin, end = jagged.offsets()[i : i + 2].tolist()
            parts.append(jagged.values()[begin:end].tolist())
            if kjt.weights_or_none() is not None:
                parts.append(jagged.weights()[begin:end].tolist())
        samples[int(label)] = tuple(parts)
    return samples


def broken_promises(batches: list[Batch]) -> list[int]:
    """The checker: numbers of batches that are marked hot and hold an id outside 0..4."""
    return [i for i, batch in enumerate(batches) if is_hot_batch(batch) and any(x > 4 for x in batch.sparse_features.values().tolist())]


def check_rank(rank: Rank, stream: Stream, batch_size: int) -> None:
    assert rank.error is None
    # Exactly once, with everything that belongs to the sample.
    wanted: dict[int, tuple[object, ...]] = {}
    for batch in stream.batches():
        wanted.update(unpack(batch))
    got: dict[int, tuple[object, ...]] = {}
    for batch in rank.batches:
        got.update(unpack(batch))
    assert sorted(n for part in rank.numbers() for n in part) == list(range(len(stream.hot)))
    assert got == wanted
    # Kinds are what they say, and only hot batches are marked.
    for part in rank.numbers("hot"):
        assert len(part) == batch_size and all(stream.hot[n] for n in part)
    for part in rank.numbers("cold"):
        assert len(part) == batch_size and not any(stream.hot[n] for n in part)
    assert broken_promises(rank.batches) == []
    assert [is_hot_batch(batch) for batch in rank.batches] == [kind == "hot" for kind in rank.kinds]
    # Stream order within a kind, leftovers last and in stream order too.
    mixed = [n for part in rank.numbers("mixed") for n in part]
    assert mixed == sorted(mixed)
    for kind, is_hot in (("hot", True), ("cold", False)):
        numbers = [n for part in rank.numbers(kind) for n in part] + [n for n in mixed if stream.hot[n] == is_hot]
        assert numbers == sorted(numbers)
    first_mixed = len(rank.kinds) - rank.kinds.count("mixed")
    assert set(rank.kinds[first_mixed:]) <= {"mixed"}
    assert all(1 <= len(part) <= batch_size for part in rank.numbers("mixed"))


def disagreements(ranks: list[Rank]) -> list[int]:
    """The checker: ranks whose steps and agreements are not those of rank 0."""
    return [i for i, rank in enumerate(ranks) if rank.trace != ranks[0].trace]


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
