"""Ranks simulated by threads around a loader, and the checkers that say what each was given."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.batches import HotColdBatch, is_hot_batch
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.stream_windows import Agree

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


class Dealt(ShardedSource):
    """A source of the samples 0, 1, ... in shards of 7, dealt as BatchSource says."""

    feature_names, num_dense, name = ("f", "g"), 2, "dealt"

    def __init__(self, hot: list[bool]) -> None:
        self.hot = hot

    @property
    def num_shards(self) -> int:
        return -(-len(self.hot) // 7)

    def read_shard(self, shard: int) -> Iterator[Batch]:
        yield make_batch(7 * shard, self.hot[7 * shard : 7 * shard + 7])

    def size_hint(self) -> int:
        return len(self.hot)


@dataclass
class Rank:
    """What one rank did: its batches, and the order of its steps and agreements."""

    batches: list[HotColdBatch] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    error: BaseException | None = None
    state: dict[str, Any] | None = None

    @property
    def kinds(self) -> list[str]:
        return [batch.kind for batch in self.batches]

    def numbers(self) -> list[list[int]]:
        """The samples' own numbers, which their labels are; none for a filler."""
        return [[int(x) for x in batch.labels[: batch.num_samples].tolist()] for batch in self.batches]


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


def run_ranks(
    world: int,
    make: Callable[[int, Agree], HotColdDataLoader],
    *,
    passes: int = 1,
    stop_after: int | None = None,
    feedback: Sequence[float] = (),
    lonely: bool = False,
) -> list[Rank]:
    """Runs each rank's loader in a thread of its own.

    Args:
        world: ranks.
        make: a rank's loader, given its all-gather.
        passes: epochs.
        stop_after: ends after so many steps; `state` of each rank is then what a checkpoint would hold. The feedback for a phase that
            ends there has been heard.
        feedback: test losses, one observed after each phase.
        lonely: ranks do not really agree.
    """
    gather = AllGather(world)
    ranks = [Rank() for _ in range(world)]

    def agree_of(rank: int) -> Agree:
        def agree(counts: np.ndarray) -> np.ndarray:
            assert counts.dtype == np.int64
            number = ranks[rank].trace.count("agree")
            ranks[rank].trace.append("agree")
            return counts[None] if lonely else gather(number, rank, counts)

        return agree

    def run(rank: int) -> None:
        mine, losses = ranks[rank], iter(feedback)
        try:
            loader = make(rank, agree_of(rank))
            while loader.epoch < passes:
                for phase, batches in loader.phases():
                    for batch in batches:
                        assert batch.kind == phase.kind
                        mine.batches.append(batch)
                        mine.trace.append(batch.kind)
                        if len(mine.batches) == stop_after:
                            assert batch.position is not None
                            if batch.position.cursor.left == 0 and (loss := next(losses, None)) is not None:
                                loader.schedule.observe(loss)  # as the Trainer does: what is told of a phase belongs to the state after it
                            mine.state = json.loads(json.dumps(loader.state_dict(batch.position)))
                            loader.close()
                            return
                    if (loss := next(losses, None)) is not None:
                        loader.schedule.observe(loss)
        except BaseException as error:
            mine.error = error
            gather.die()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a rank hangs"
    return ranks


def run_one(loader: HotColdDataLoader) -> Rank:
    """One more pass of a loader on one rank."""
    (rank,) = run_ranks(1, lambda rank, agree: loader, passes=loader.epoch + 1)
    if rank.error is not None:
        raise rank.error
    return rank


def unpack(batch: Batch) -> dict[int, tuple[object, ...]]:
    """Sample number -> everything that belongs to the sample; nothing for a filler."""
    kjt = batch.sparse_features
    samples = {}
    real = batch.num_samples if isinstance(batch, HotColdBatch) else len(batch.labels)
    for i, label in enumerate(batch.labels.tolist()[:real]):
        parts: list[object] = [batch.dense_features[i].tolist()]
        for key in list(kjt.keys()):
            jagged = kjt[key]
            begin, end = jagged.offsets()[i : i + 2].tolist()
            parts.append(jagged.values()[begin:end].tolist())
            if kjt.weights_or_none() is not None:
                parts.append(jagged.weights()[begin:end].tolist())
        samples[int(label)] = tuple(parts)
    return samples


def broken_promises(batches: Sequence[Batch]) -> list[int]:
    """The checker: numbers of batches that are marked hot and hold an id outside 0..4."""
    return [i for i, batch in enumerate(batches) if is_hot_batch(batch) and any(x > 4 for x in batch.sparse_features.values().tolist())]


def check_rank(rank: Rank, stream: Stream, batch_size: int) -> None:
    """Every sample of a stream once on its rank, whole, in stream order within its kind, in batches that are what they say."""
    assert rank.error is None
    wanted: dict[int, tuple[object, ...]] = {}
    for batch in stream.batches():
        wanted.update(unpack(batch))
    got: dict[int, tuple[object, ...]] = {}
    for batch in rank.batches:
        got.update(unpack(batch))
    assert sorted(n for part in rank.numbers() for n in part) == list(range(len(stream.hot)))
    assert got == wanted
    for kind in ("hot", "cold", "mixed"):
        numbers = [n for batch, part in zip(rank.batches, rank.numbers(), strict=True) if batch.kind == kind for n in part]
        assert numbers == sorted(numbers)
        assert kind == "mixed" or all(stream.hot[n] == (kind == "hot") for n in numbers)
    assert broken_promises(rank.batches) == []
    assert all(is_hot_batch(batch) == (batch.kind == "hot") for batch in rank.batches)
    assert all(0 <= len(part) <= batch_size for part in rank.numbers())


def check_steps(ranks: list[Rank], full_step: int) -> None:
    """Every rank takes the same kinds of steps, none of them empty, weighted by samples, and no number comes twice in an epoch.

    Args:
        ranks: that trained together.
        full_step: samples of a full step of all ranks that the epochs began with.
    """
    assert disagreements(ranks) == []
    seen: set[tuple[int, int]] = set()
    for batches in zip(*(rank.batches for rank in ranks), strict=True):
        assert len({batch.position for batch in batches}) == 1
        samples = sum(batch.num_samples for batch in batches)
        assert samples > 0
        for batch in batches:
            assert batch.weight == batch.num_samples * len(ranks) / (samples if batch.kind == "mixed" else full_step)
            assert batch.sparse_features.stride() == len(batch.labels) == max(batch.num_samples, 1)
            assert len(batch.sample_numbers) == batch.num_samples and batch.position is not None
            numbers = {(batch.position.epoch, number) for number in batch.sample_numbers.tolist()}
            assert not seen & numbers
            seen |= numbers


def only_epoch(ranks: list[Rank], epoch: int) -> list[Rank]:
    """What the ranks did in one epoch; agreements are left out."""
    of_epoch = [[batch for batch in rank.batches if batch.position is not None and batch.position.epoch == epoch] for rank in ranks]
    return [Rank(batches, [batch.kind for batch in batches]) for batches in of_epoch]


def disagreements(ranks: list[Rank]) -> list[int]:
    """The checker: ranks whose steps and agreements are not those of rank 0."""
    return [i for i, rank in enumerate(ranks) if rank.trace != ranks[0].trace]
