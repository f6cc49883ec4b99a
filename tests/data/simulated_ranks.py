"""Ranks simulated by threads around a loader, and the checkers that say what each was given."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.batches import is_hot_batch
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
