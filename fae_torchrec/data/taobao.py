"""Taobao's UserBehavior.csv as sequences: 20 events of a user's history and one candidate item, as TBSM has them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.category_keys import CategoryError
from fae_torchrec.data.coding import CategoryCoding
from fae_torchrec.data.event_log import BEHAVIOURS, EventLog, open_event_log, read_event_log
from fae_torchrec.data.feature_batch import bag_batch
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.text_lines import TextLines
from fae_torchrec.data.vocabulary import KeyChunk

FEATURES = ("user", "item", "category")
SHARD_WINDOWS = 32_768
"""Windows per shard; each is two samples."""

_MOST_DRAWS = 1_000  # of another item, for one window
_EVENTS_PER_USER = 100  # of the public file (987,994 users, 100,150,807 events); only for progress bars


class _Windows(NamedTuple):
    """2 W samples of W windows: sample 2 w asks for the true candidate, 2 w + 1 for another item."""

    events: np.ndarray  # int64 [sum of lengths], positions in the log; the last of each bag is the candidate's
    users: np.ndarray  # int32 [2 W]
    lengths: np.ndarray  # int32 [2 W]
    gaps: np.ndarray  # float32 [2 W]


class TaobaoSource(ShardedSource):
    """A ShardedSource of sequences, after TBSM (facebookresearch/tbsm, tbsm_data_pytorch.py), which FAE trains as RMC1.

    A line is user, item, category, behaviour ("pv", "buy", "cart", "fav"), time in seconds; there is no header. Events are put in the
    order of (user, time). A *window* is an event with the `history` events of the same user before it; at most `windows_per_user`
    are taken, their last events spread evenly over the user's events, the latest among them. Each window makes two samples next to each
    other: label 1 with its own last item as the candidate, and label 0 with a random other item and that item's category instead. The
    windows are shuffled. Every feature is a bag of 21 ids, history first, the candidate last; the user is repeated, so that 63 ids
    decide whether a sample is hot, as in FAE.

    What differs from TBSM: it draws the windows' ends at random, and its own for negatives, from the last 200 events; it pads short
    histories with id 0, where here such bags are shorter (`min_history`); its dense feature, the step's number / 21, is the same in
    every sample. Here the dense feature is log(1 + seconds from the history's last event to the candidate's), the same in both samples.

    The whole log is read at first use and held: see `read_event_log` for its memory; a shard takes 150 MB more. A pickled copy takes the
    log along, so give an `index_folder` where several processes read: they share one memory-mapped log, and later runs need no text.

    Args:
        paths: the files, plain or .gz.
        coding: from the raw numbers to rows, for the features user, item and category.
        history: events before the candidate, at most.
        min_history: events before the candidate, at least; None: `history`, as users with fewer have no samples.
        windows_per_user: at most; TBSM's experiments take 10.
        behaviours: which events count; all, as in TBSM's data.
        negatives: "uniform" draws the other item from all distinct items, as TBSM's data; "popular" draws a random event's item.
        split: "train": windows that end before their user's last event; "test": those that end with it; "all": both.
        seed: of shuffling and drawing.
        max_bad_lines: malformed lines that may be skipped.
        index_folder: local folder to keep the sorted events in (12 bytes each); None: in memory.

    Attributes:
        feature_names: `FEATURES`, that is user, item, category.
        num_dense: 1.
        name: the files with sizes and times of writing, and every setting that decides the samples.

    Raises:
        ConfigError: a file is missing, or a setting is out of its range.
        DataError: (at first use) more lines are malformed than allowed, or there is no event, no window, or one item only.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        coding: CategoryCoding,
        history: int = 20,
        min_history: int | None = None,
        windows_per_user: int = 10,
        behaviours: Sequence[str] = BEHAVIOURS,
        negatives: Literal["uniform", "popular"] = "uniform",
        split: Literal["train", "test", "all"] = "all",
        seed: int = 0,
        max_bad_lines: int = 0,
        index_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        shortest = history if min_history is None else min_history
        if not 1 <= shortest <= history or windows_per_user < 1 or seed < 0:
            raise ConfigError(
                f"allowed: 1 <= min_history <= history, windows_per_user >= 1, seed >= 0; received history {history}, min_history "
                f"{min_history}, windows_per_user {windows_per_user}, seed {seed}"
            )
        if negatives not in ("uniform", "popular") or split not in ("train", "test", "all"):
            raise ConfigError(
                f"negatives must be 'uniform' or 'popular', split 'train', 'test' or 'all'; received {negatives!r}, {split!r}"
            )
        self.feature_names = FEATURES
        self.num_dense = 1
        self._lines = TextLines(paths, max_bad_lines=max_bad_lines)
        self._coding = coding
        self._history, self._min_history, self._windows_per_user = history, shortest, windows_per_user
        self._behaviours = tuple(behaviours)
        self._negatives, self._split, self._seed = negatives, split, seed
        self._index_folder = index_folder
        self.name = (
            f"Taobao, {split}, history {shortest}..{history}, {windows_per_user} windows per user, {negatives} negatives, seed {seed}, "
            f"behaviours {', '.join(behaviours)}: {self._lines.name}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out a memory-mapped log: pickle would copy it."""
        mapped = () if self._index_folder is None else ("_log", "_ends")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    @property
    def num_shards(self) -> int:
        """Runs of 32,768 windows (65,536 samples). The first call reads the files."""
        return -(-len(self._ends) // SHARD_WINDOWS)

    def shard_sizes(self) -> np.ndarray:
        """int64 [num_shards]. The first call reads the files."""
        starts = np.arange(0, len(self._ends), SHARD_WINDOWS, dtype=np.int64)
        return 2 * np.minimum(SHARD_WINDOWS, len(self._ends) - starts)

    def size_hint(self) -> int:
        """Samples if every user had 100 events, as in the public file; exact once the files are read."""
        if "_ends" in self.__dict__:
            return 2 * len(self._ends)
        return 2 * self._windows_per_user * self._lines.lines_hint() // _EVENTS_PER_USER

    def skipped(self) -> dict[str, int]:
        """File -> malformed lines skipped, once the files are read (also in an earlier run, with `index_folder`)."""
        return dict(self._log.skipped) if "_log" in self.__dict__ else {}

    def read_shard(self, shard: int) -> Iterator[Batch]:
        """The samples of one shard, in one batch.

        Raises:
            DataError: (coding "none") a number is no row of its table.
        """
        windows = self._windows(shard)
        bags = []
        for feature, keys in self._keys(windows).items():
            try:
                ids = self._coding.encode(feature, keys, np.zeros(len(keys), dtype=np.bool_), out=keys)
            except CategoryError as error:
                raise DataError(f"{self.name}: {feature} of an event: {error}") from error
            bags.append((ids, windows.lengths))
        labels = np.zeros(len(windows.lengths), dtype=np.float32)
        labels[::2] = 1
        yield bag_batch(self.feature_names, np.log1p(windows.gaps)[:, None], bags, labels)

    def read_keys(self, shard: int) -> Iterator[KeyChunk]:
        """The raw numbers of one shard's samples, as often as they are looked up; none is missing."""
        keys_of = self._keys(self._windows(shard))
        yield {feature: (keys, np.zeros(len(keys), dtype=np.bool_)) for feature, keys in keys_of.items()}

    def _keys(self, windows: _Windows) -> dict[str, np.ndarray]:
        return {
            "user": np.repeat(windows.users.astype(np.int64), windows.lengths),
            "item": self._log.items[windows.events].astype(np.int64),
            "category": self._log.categories[windows.events].astype(np.int64),
        }

    @cached_property
    def _log(self) -> EventLog:
        log = (
            read_event_log(self._lines, self._behaviours)
            if self._index_folder is None
            else open_event_log(self._lines, self._behaviours, self._index_folder)
        )
        if len(log.first_of_item) < 2:
            raise DataError(f"{self._lines.name}: all events have the same item, so that there is no other to draw; give a larger file")
        return log

    @cached_property
    def _ends(self) -> np.ndarray:
        """int64 [W], shuffled: the last event of each window."""
        ends = window_ends(self._log.offsets, self._min_history, self._windows_per_user, self._split)
        if not len(ends):
            raise DataError(
                f"{self._lines.name}: in split {self._split!r} no user has enough events for a history of {self._min_history}; "
                "lower min_history"
            )
        self._random(1, 0).shuffle(ends)
        return ends

    def _windows(self, shard: int) -> _Windows:
        log = self._log
        ends = self._ends[shard * SHARD_WINDOWS : (shard + 1) * SHARD_WINDOWS]
        user = np.searchsorted(log.offsets, ends, side="right") - 1
        starts = np.repeat(np.maximum(log.offsets[user], ends - self._history), 2)
        lengths = np.repeat(ends, 2) - starts + 1
        bags = np.cumsum(lengths)
        events = np.repeat(starts - (bags - lengths), lengths) + np.arange(bags[-1])
        events[bags[1::2] - 1] = self._other_events(ends, self._random(0, shard))
        return _Windows(events, np.repeat(log.users[user], 2), lengths.astype(np.int32), np.repeat(log.gaps[ends], 2))

    def _other_events(self, ends: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """An event of another item for each of `ends`."""
        log, uniform = self._log, self._negatives == "uniform"
        others = np.empty_like(ends)
        left = np.arange(len(ends))
        for _ in range(_MOST_DRAWS):
            drawn = random.integers(0, len(log.first_of_item) if uniform else len(log.items), size=left.size)
            others[left] = log.first_of_item[drawn] if uniform else drawn
            left = left[log.items[others[left]] == log.items[ends[left]]]
            if not left.size:
                return others
        raise DataError(
            f"{self.name}: {_MOST_DRAWS} draws found no other item for {left.size} windows, because nearly all events are of one item; "
            "take negatives 'uniform', or leave that item out"
        )

    def _random(self, purpose: int, shard: int) -> np.random.Generator:
        """A stream of its own for each shard: the counter's highest word."""
        key = np.random.SeedSequence([self._seed, purpose]).generate_state(2, np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, shard]))


def window_ends(offsets: np.ndarray, min_history: int, most: int, split: str) -> np.ndarray:
    """Chooses the windows: their last events, by user and from the latest backwards.

    Of a user with n events the numbers min_history..n-1 can be a last event ("train": ..n-2, "test": n-1 alone). Of m that can, k = min(m,
    most) are taken: those j m // k from the end, for j = 0..k-1, which are distinct, evenly spread, and the latest among them.

    Args:
        offsets: int64 [U + 1], of each user's events.
        min_history: events before the last, at least.
        most: windows per user, at most.
        split: "train", "test" or "all".

    Returns:
        int64 [windows], positions of events.
    """
    counts = np.diff(offsets)
    last = counts - (2 if split == "train" else 1)
    possible = np.maximum(last - min_history + 1, 0)
    taken = np.minimum(possible, 1 if split == "test" else most)
    number = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
    back = number * np.repeat(possible, taken) // np.repeat(taken, taken)
    ends: np.ndarray = np.repeat(offsets[:-1] + last, taken) - back
    return ends
