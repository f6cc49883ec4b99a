"""HotColdDataLoader from a store: the same exactly-once and resume as from a stream, an epoch as one window, shuffled by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError, FingerprintError, HotBatchError
from fae_torchrec.core.schedule import Policy, ShuffleSchedule
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.store import SegregatedStore
from fae_torchrec.data.store_writer import write_store
from fae_torchrec.data.stream_windows import Agree
from tests.data.simulated_ranks import (
    OTHER_PLACEMENT,
    PLACEMENT,
    Dealt,
    Rank,
    broken_promises,
    check_steps,
    only_epoch,
    run_one,
    run_ranks,
    unpack,
)

HOT = {
    "mixed": [n % 3 != 0 for n in range(50)],
    "all hot": [True] * 23,
    "all cold": [False] * 23,
    "few hot": [n == 30 for n in range(41)],
    "nothing": [],
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SegregatedStore]:
    folder: Path = tmp_path_factory.mktemp("stores")
    return {name: write_store(folder / name, Dealt(hot), PLACEMENT) for name, hot in HOT.items()}


Make = Callable[[int, Agree], HotColdDataLoader]


def _maker(store: SegregatedStore, world: int, state: dict[str, Any] | None = None, policy: Policy = "fae", **options: Any) -> Make:
    def make(rank: int, agree: Agree) -> HotColdDataLoader:
        schedule = ShuffleSchedule(policy, patience=2)
        loader = HotColdDataLoader(store, PLACEMENT, schedule=schedule, rank=rank, world_size=world, agree=agree, **options)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    return make


def test_one_epoch_by_hand(stores: dict[str, SegregatedStore]) -> None:
    # "few hot": sample 30 of 41 is hot. Batches of 8 on two ranks: cold 16, 16 and 8 (4 + 4), hot 1 (1 + 0).
    ranks = run_ranks(2, _maker(stores["few hot"], 2, batch_size=8, policy="fixed"))
    cold = [n for n in range(41) if n != 30]
    assert ranks[0].kinds == ["cold", "cold", "hot", "cold"]
    assert ranks[0].numbers() == [cold[0:8], cold[16:24], [30], cold[32:36]]
    assert ranks[1].numbers() == [cold[8:16], cold[24:32], [], cold[36:40]]
    check_steps([_steps_only(rank) for rank in ranks], 16)
    dropped = run_ranks(2, _maker(stores["few hot"], 2, batch_size=8, policy="fixed", drop_last=True))
    assert dropped[1].numbers() == [cold[8:16], cold[24:32]]


def _steps_only(rank: Rank) -> Rank:
    return Rank(rank.batches, rank.kinds, rank.error, rank.state)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_sample_once_whatever_stops_and_goes_on(stores: dict[str, SegregatedStore], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["mixed", "all hot", "all cold", "few hot"]), "store")
    world, other = data.draw(st.integers(1, 4), "world"), data.draw(st.integers(1, 4), "resumed on")
    options: dict[str, Any] = {
        "batch_size": data.draw(st.integers(1, 9), "batch_size"),
        "policy": data.draw(st.sampled_from(["fae", "fixed", "proportional"]), "policy"),
        "shuffle": data.draw(st.booleans(), "shuffle"),
        "seed": data.draw(st.integers(0, 3), "seed"),
        "prefetch": data.draw(st.sampled_from([0, 0, 2]), "prefetch"),
    }
    store, hot = stores[name], HOT[name]
    whole = run_ranks(world, _maker(store, world, **options), passes=2)
    stop = data.draw(st.integers(1, len(whole[0].batches)), "stop after")
    first = run_ranks(world, _maker(store, world, **options), passes=2, stop_after=stop)
    second = run_ranks(other, _maker(store, other, first[0].state, **options), passes=2)
    assert all(rank.error is None for rank in [*whole, *second])
    epoch = first[0].batches[-1].position.epoch  # type: ignore[union-attr]
    check_steps([_steps_only(rank) for rank in whole], options["batch_size"] * world)
    check_steps(only_epoch(second, epoch), options["batch_size"] * world)
    check_steps(only_epoch(second, epoch + 1), options["batch_size"] * other)
    assert _steps(second, epoch) == _steps(whole, epoch)[len(_steps(first, epoch)) :]
    for e in (0, 1):
        done = [n for _, numbers in _steps(first, e) + _steps(second, e) for n in numbers]
        assert sorted(done) == list(range(len(hot)))
    wanted = {n: parts for batch in Dealt(hot).batches(50) for n, parts in unpack(batch).items()}
    for rank in [*first, *second]:
        assert broken_promises(rank.batches) == []
        for batch in rank.batches:
            assert batch.sample_numbers.tolist() == batch.labels[: batch.num_samples].tolist()
            assert unpack(batch) == {n: wanted[n] for n in batch.sample_numbers.tolist()}
            assert all(hot[n] == (batch.kind == "hot") for n in batch.sample_numbers.tolist())


def _steps(ranks: list[Rank], epoch: int) -> list[tuple[str, list[int]]]:
    return [
        (batches[0].kind, sorted(n for batch in batches for n in batch.sample_numbers.tolist()))
        for batches in zip(*(rank.batches for rank in ranks), strict=True)
        if batches[0].position is not None and batches[0].position.epoch == epoch
    ]


def test_shuffling_moves_whole_batches_and_is_a_function_of_seed_and_epoch(stores: dict[str, SegregatedStore]) -> None:
    def epochs(**options: Any) -> Iterator[list[list[int]]]:
        loader = HotColdDataLoader(stores["mixed"], PLACEMENT, batch_size=2, schedule=ShuffleSchedule("fixed"), **options)
        return iter([run_one(loader).numbers(), run_one(loader).numbers()])

    plain, plain_again = epochs()
    first, second = epochs(shuffle=True, seed=5)
    assert plain == plain_again
    assert sorted(map(tuple, first)) == sorted(map(tuple, second)) == sorted(map(tuple, plain))
    assert first != second and first != plain
    assert [first, second] == list(epochs(shuffle=True, seed=5))
    assert first != next(epochs(shuffle=True, seed=6))


def test_an_empty_store_gives_nothing(stores: dict[str, SegregatedStore]) -> None:
    assert list(HotColdDataLoader(stores["nothing"], PLACEMENT, batch_size=2)) == []


def test_what_does_not_go_with_a_store_is_refused(stores: dict[str, SegregatedStore]) -> None:
    with pytest.raises(FingerprintError, match="was written for the placement"):
        HotColdDataLoader(stores["mixed"], OTHER_PLACEMENT, batch_size=2)
    with pytest.raises(ConfigError, match=r"'stock' needs the order of the data.*take 'proportional'"):
        HotColdDataLoader(stores["mixed"], PLACEMENT, batch_size=2, schedule=ShuffleSchedule("stock"))
    (rank,) = run_ranks(1, _maker(stores["mixed"], 1, batch_size=4), stop_after=2)
    assert rank.state is not None
    for change, message in (
        ({"store": "all hot"}, "saved with source 'store "),
        ({"batch_size": 5}, "saved with batch_size 4"),
        ({"shuffle": True}, "saved with seed None, this loader has 0"),
    ):
        options = {"store": "mixed", "batch_size": 4, **change}
        with pytest.raises(ConfigError, match=message):
            HotColdDataLoader(stores[options.pop("store")], PLACEMENT, **options).load_state_dict(rank.state)


def test_ranks_with_different_stores_are_told(stores: dict[str, SegregatedStore]) -> None:
    def make(rank: int, agree: Agree) -> HotColdDataLoader:
        return _maker(stores["mixed" if rank else "all hot"], 2, batch_size=4)(rank, agree)

    for rank in run_ranks(2, make):
        assert isinstance(rank.error, HotBatchError) and "ranks [1] would take other steps than rank 0" in str(rank.error)
