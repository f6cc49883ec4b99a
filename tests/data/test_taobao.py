"""The Taobao reader: its windows by hand and against a slow reading of the same text; and text that is not as it should be."""

from __future__ import annotations

import gzip
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data import taobao
from fae_torchrec.data.coding import category_coding
from fae_torchrec.data.taobao import TaobaoSource, window_ends
from fae_torchrec.data.vocabulary import fit_vocabulary

ROWS = {"user": 1000, "item": 1000, "category": 100}
PLAIN = category_coding("none", rows=ROWS)
Event = tuple[int, int, int, str, int]


def make_events(seed: int = 1, users: int = 12) -> list[Event]:
    """Users 5, 12, 19, ... with 1 to 40 events each, in random order; times repeat, items repeat, an item has one category."""
    rng = np.random.default_rng(seed)
    events: list[Event] = []
    for user in range(users):
        size = int(rng.integers(1, 41))
        items, times = rng.integers(0, 60, size), 1_511_544_000 + rng.integers(0, 50, size)
        kinds = rng.choice(["pv", "pv", "buy", "cart", "fav"], size)
        events += [
            (5 + 7 * user, int(item), int(item) % 9, str(kind), int(time)) for item, kind, time in zip(items, kinds, times, strict=True)
        ]
    return [events[i] for i in rng.permutation(len(events))]


def write(path: Path, events: list[Event], end: str = "\n") -> Path:
    data = "".join(f"{','.join(map(str, event))}{end}" for event in events).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def samples(source: TaobaoSource) -> list[tuple[list[int], list[int], list[int], float, float]]:
    """(users, items, categories, dense, label) of every sample."""
    result = []
    for shard in range(source.num_shards):
        for batch in source.read_shard(shard):
            bags = [[bag.tolist() for bag in batch.sparse_features[name].to_dense()] for name in source.feature_names]
            result += list(zip(*bags, batch.dense_features[:, 0].tolist(), batch.labels.tolist(), strict=True))
    return result


Window = tuple[int, list[int], list[int], int]


def slow_windows(events: list[Event], history: int, shortest: int, split: str) -> list[Window]:
    """(user, items, categories, gap) of every window there is, event by event."""
    found = []
    for user in {event[0] for event in events}:
        own = sorted((event for event in events if event[0] == user), key=lambda event: event[4])  # stable, as the reader is
        for last in range(shortest, len(own)):
            if split == "all" or (split == "test") == (last == len(own) - 1):
                window = own[max(0, last - history) : last + 1]
                found.append((user, [event[1] for event in window], [event[2] for event in window], own[last][4] - own[last - 1][4]))
    return found


@pytest.mark.parametrize("split", ["all", "train", "test"])
@pytest.mark.parametrize(("history", "shortest"), [(20, 20), (6, 2)])
def test_samples_are_the_windows_of_the_text(tmp_path: Path, split: str, history: int, shortest: int) -> None:
    events = make_events()
    source = TaobaoSource(
        [write(tmp_path / "u.csv", events)],
        coding=PLAIN,
        history=history,
        min_history=shortest,
        windows_per_user=99,
        split=split,  # type: ignore[arg-type]
    )
    every = samples(source)
    category = {event[1]: event[2] for event in events}
    found: list[Window] = []
    for right, wrong in zip(every[::2], every[1::2], strict=True):
        users, items, categories, dense, label = right
        assert label == 1 and wrong[4] == 0
        assert users == [users[0]] * len(items) and len(users) == len(categories) and shortest < len(users) <= history + 1
        assert wrong[0] == users and wrong[1][:-1] == items[:-1] and wrong[2][:-1] == categories[:-1] and wrong[3] == dense
        assert wrong[1][-1] != items[-1] and wrong[2][-1] == category[wrong[1][-1]], "another item, with its own category"
        found.append((users[0], items, categories, round(np.expm1(dense))))
    assert sorted(found) == sorted(slow_windows(events, history, shortest, split)) and len(found) > 2
    assert len(every) == source.num_samples == source.size_hint()


def test_63_ids_of_a_sample_by_default(tmp_path: Path) -> None:
    events = [(3, item, item % 4, "pv", item) for item in range(30)]
    source = TaobaoSource([write(tmp_path / "u.csv", events)], coding=PLAIN, split="test")
    (batch,) = list(source.batches(8))
    assert batch.sparse_features.lengths().tolist() == [21] * 6
    bags = {name: batch.sparse_features[name].values().view(2, 21) for name in source.feature_names}
    assert bags["user"].tolist() == [[3] * 21] * 2
    assert bags["item"][0].tolist() == list(range(9, 30)) and bags["item"][1, :-1].tolist() == list(range(9, 29))
    assert torch.equal(bags["category"], bags["item"] % 4)
    assert batch.dense_features.tolist() == pytest.approx(np.log(np.full((2, 1), 2.0)))
    assert batch.labels.tolist() == [1, 0]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    shortest=st.integers(1, 25),
    most=st.integers(1, 12),
    split=st.sampled_from(["train", "test", "all"]),
)
def test_windows_of_a_user_are_distinct_and_spread(counts: list[int], shortest: int, most: int, split: str) -> None:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    ends = window_ends(offsets, shortest, most, split)
    for begin, end in pairwise(offsets.tolist()):
        own = np.sort(ends[(ends >= begin) & (ends < end)])
        can = [last for last in range(begin + shortest, end) if split == "all" or (split == "test") == (last == end - 1)]
        assert set(own.tolist()) <= set(can) and len(own) == min(len(can), most)
        assert not can or own[-1] == can[-1], "the latest is taken"
        assert np.ptp(np.diff(own)) <= 1 if len(own) > 2 else True, "evenly spread"


def test_the_same_seed_gives_the_same_samples_in_any_process_and_another_seed_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taobao, "SHARD_WINDOWS", 16)
    path = write(tmp_path / "u.csv", make_events())

    def source(**settings: object) -> TaobaoSource:
        return TaobaoSource([path], coding=PLAIN, history=5, **settings)  # type: ignore[arg-type]

    first = source()
    expected = samples(first)
    assert first.num_shards > 3 and first.shard_sizes().sum() == len(expected)
    assert samples(pickle.loads(pickle.dumps(source()))) == samples(pickle.loads(pickle.dumps(first))) == expected
    (alone,) = list(source().read_shard(2))
    assert alone.sparse_features["item"].values().view(-1, 6).tolist() == [sample[1] for sample in expected[64:96]]
    assert samples(source(seed=1)) != expected and samples(source(negatives="popular")) != expected
    assert sorted(map(str, samples(source(seed=1))[::2])) == sorted(map(str, expected[::2])), "positives differ in their order only"


def test_uniform_negatives_know_no_popularity_and_popular_ones_do(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    items = np.where(rng.random(6000) < 0.7, 0, rng.integers(1, 11, 6000))
    path = write(tmp_path / "u.csv", [(user, int(items[30 * user + i]), 0, "pv", i) for user in range(200) for i in range(30)])
    shares = {}
    for negatives in ("uniform", "popular"):
        source = TaobaoSource([path], coding=PLAIN, negatives=negatives)  # type: ignore[arg-type]
        drawn = np.array([wrong[1][-1] for right, wrong in zip(samples(source)[::2], samples(source)[1::2], strict=True) if right[1][-1]])
        shares[negatives] = float((drawn == 0).mean())
    assert shares["uniform"] == pytest.approx(1 / 10, abs=0.06), "one of the ten items that are not the true one"
    assert shares["popular"] == pytest.approx(0.7 / 0.97, abs=0.08)


@pytest.mark.parametrize("name", ["crlf.csv", "cut.csv", "packed.csv.gz", "many"])
def test_the_form_of_the_text_does_not_matter(tmp_path: Path, name: str) -> None:
    events = make_events()
    expected = samples(TaobaoSource([write(tmp_path / "u.csv", events)], coding=PLAIN, history=5))
    path = tmp_path / name
    if name == "many":
        paths = [write(tmp_path / "a.csv", events[:50]), write(tmp_path / "b.csv.gz", events[50:])]
    elif name == "cut.csv":
        paths = [write(path, events)]
        path.write_bytes(path.read_bytes()[:-1])  # the last line has all its fields but no end
    else:
        paths = [write(path, events, "\r\n" if name == "crlf.csv" else "\n")]
    assert samples(TaobaoSource(paths, coding=PLAIN, history=5)) == expected


def test_some_behaviours_only(tmp_path: Path) -> None:
    events = make_events()
    path = write(tmp_path / "u.csv", events)
    views = [event for event in events if event[3] == "pv"]
    some = samples(TaobaoSource([path], coding=PLAIN, history=5, behaviours=("pv",)))
    assert some == samples(TaobaoSource([write(tmp_path / "v.csv", views)], coding=PLAIN, history=5)) and some


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1,2,3,pv", "expected 5 fields, received 4"),
        (b"1,2,,pv,7", "column 'category' is missing"),
        (b"1,2,3,,7", "behaviour '' is not one of"),
        (b"1,2,3,p\xe9,7", r"behaviour 'p\\\\xe9' is not one of"),
        (b"1,\xe9,3,pv,7", "column 'item'"),
        (b"1,2,3000000000,pv,7", "column 'category'"),
        (b"", "blank"),
    ],
)
def test_a_malformed_line_is_named_or_skipped(tmp_path: Path, line: bytes, message: str) -> None:
    events = make_events()
    whole = write(tmp_path / "u.csv", events)
    lines = whole.read_bytes().splitlines()
    bad = tmp_path / "bad.csv"
    bad.write_bytes(b"\n".join([*lines[:70], line, *lines[70:]]) + b"\n")
    with pytest.raises(DataError, match=rf"bad.csv, line 71: .*{message}"):
        samples(TaobaoSource([bad], coding=PLAIN, history=5))
    lenient = TaobaoSource([bad], coding=PLAIN, history=5, max_bad_lines=1, index_folder=tmp_path / "index")
    assert samples(lenient) == samples(TaobaoSource([whole], coding=PLAIN, history=5))
    assert lenient.skipped() == {str(bad): 1}


def test_a_truncated_last_line_is_named(tmp_path: Path) -> None:
    events = make_events()
    path = write(tmp_path / "u.csv", events)
    path.write_bytes(path.read_bytes()[:-14])
    with pytest.raises(DataError, match=rf"u.csv, line {len(events)}: .*truncated"):
        samples(TaobaoSource([path], coding=PLAIN))


def test_a_kept_log_is_read_instead_of_the_text(tmp_path: Path) -> None:
    events = make_events()
    path = write(tmp_path / "u.csv", events)
    index = tmp_path / "some" / "index"
    expected = samples(TaobaoSource([path], coding=PLAIN, history=5))
    source = TaobaoSource([path], coding=PLAIN, history=5, index_folder=index)
    assert samples(source) == expected
    assert len(pickle.dumps(source)) < 4000, "the log does not travel"
    copied = pickle.loads(pickle.dumps(source))
    assert samples(copied) == expected
    (kept,) = list(index.iterdir())
    (kept / "items.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"is damaged .*remove this folder"):
        samples(TaobaoSource([path], coding=PLAIN, history=5, index_folder=index))
    write(path, events[:-40])
    assert samples(TaobaoSource([path], coding=PLAIN, history=5, index_folder=index)) != expected, "other files, another log"


def test_a_vocabulary_of_its_keys_codes_it(tmp_path: Path) -> None:
    source = TaobaoSource([write(tmp_path / "u.csv", make_events())], coding=PLAIN, history=5)
    vocabulary = fit_vocabulary(source)
    coded = samples(TaobaoSource([tmp_path / "u.csv"], coding=category_coding("vocabulary", vocabulary=vocabulary), history=5))
    for raw, ids in zip(samples(source), coded, strict=True):
        for feature, (name, values) in enumerate(vocabulary.keys.items()):
            assert [values[np.flatnonzero(vocabulary.ids[name] == i)[0]] for i in ids[feature]] == raw[feature]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "u.csv", make_events())
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.csv"):
        TaobaoSource([tmp_path / "empty.csv"], coding=PLAIN)
    with pytest.raises(DataError, match="no user has enough events"):
        samples(TaobaoSource([path], coding=PLAIN, history=50))
    with pytest.raises(DataError, match="same item"):
        samples(TaobaoSource([write(tmp_path / "one.csv", [(1, 1, 1, "pv", i) for i in range(30)])], coding=PLAIN))
    with pytest.raises(DataError, match="no event of behaviour"):
        samples(TaobaoSource([write(tmp_path / "pv.csv", [(1, i, 1, "pv", i) for i in range(30)])], coding=PLAIN, behaviours=["buy"]))
    with pytest.raises(DataError, match=r"item of an event: .*59"):
        samples(TaobaoSource([path], coding=category_coding("none", rows={**ROWS, "item": 59})))
    for wrong in ({"history": 0}, {"min_history": 21}, {"windows_per_user": 0}, {"seed": -1}, {"negatives": "none"}, {"split": "dev"}):
        with pytest.raises(ConfigError):
            TaobaoSource([path], coding=PLAIN, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="behaviours"):
        samples(TaobaoSource([path], coding=PLAIN, behaviours=["click"]))
