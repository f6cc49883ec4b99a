"""Vocabularies, against a Python Counter and a dict."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError, DataError, FingerprintError
from fae_torchrec.data.vocabulary import KeyChunk, Vocabulary, VocabularyCounter, fit_vocabulary

_categories = st.lists(st.none() | st.integers(-3, 12) | st.integers(-(2**63), 2**63 - 1), max_size=25)
_chunks = st.lists(_categories, max_size=8)


def _chunk(**categories: list[int | None]) -> KeyChunk:
    return {
        feature: (np.array([key or 0 for key in keys], dtype=np.int64), np.array([key is None for key in keys], dtype=np.bool_))
        for feature, keys in categories.items()
    }


def _by_dict(categories: list[int | None], min_count: int = 1, max_rows: int | None = None) -> dict[int, int]:
    counts = Counter(key for key in categories if key is not None)
    order = sorted((key for key in counts if counts[key] >= min_count), key=lambda key: (-counts[key], key))
    return {key: n + 1 for n, key in enumerate(order[: None if max_rows is None else max_rows - 1])}


def _as_dict(vocabulary: Vocabulary, feature: str) -> dict[int, int]:
    return dict(zip(vocabulary.keys[feature].tolist(), vocabulary.ids[feature].tolist(), strict=True))


class _Source:
    """Two shards; its arrays are used again for every chunk, as a fast reader's are."""

    feature_names = ("f", "g")
    name = "made up"
    num_shards = 2

    def __init__(self) -> None:
        self.reads: list[int] = []

    def read_keys(self, shard: int) -> Iterator[KeyChunk]:
        self.reads.append(shard)
        keys, missing = np.empty(3, dtype=np.int64), np.zeros(3, dtype=np.bool_)
        for start in (0, 1):
            keys[:] = [start, 7, 7 + shard]
            missing[:] = [True, False, False]
            yield {"f": (keys, missing), "g": (keys, np.ones(3, dtype=np.bool_))}


@settings(max_examples=80, deadline=None)
@given(_chunks, st.integers(1, 3), st.none() | st.integers(1, 6))
def test_ids_follow_the_counts(chunks: list[list[int | None]], min_count: int, max_rows: int | None) -> None:
    counter = VocabularyCounter(["f", "g"])
    for categories in chunks:
        counter.add(_chunk(f=categories, g=categories[:1]))
    vocabulary = counter.vocabulary(min_count=min_count, max_rows=max_rows)
    expected = _by_dict([key for categories in chunks for key in categories], min_count, max_rows)
    assert _as_dict(vocabulary, "f") == expected and vocabulary.rows["f"] == len(expected) + 1
    assert _as_dict(vocabulary, "g") == _by_dict([key for categories in chunks for key in categories[:1]], min_count, max_rows)


@settings(max_examples=50, deadline=None)
@given(_chunks, st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_workers_counters_merge_to_the_same_vocabulary(chunks: list[list[int | None]], dealt: list[int]) -> None:
    alone, workers = VocabularyCounter(["f"]), [VocabularyCounter(["f"]) for _ in range(3)]
    for categories, worker in zip(chunks, dealt, strict=False):
        alone.add(_chunk(f=categories))
        workers[worker].add(_chunk(f=categories))
    workers[1].vocabulary()  # asking in between changes nothing
    for other in pickle.loads(pickle.dumps(workers[1:])):
        workers[0].merge(other)
    assert workers[0].vocabulary().fingerprint == alone.vocabulary().fingerprint


def test_many_chunks_are_counted_once_each() -> None:
    rng = np.random.default_rng(0)
    keys = [rng.zipf(1.3, 500) % 5000 for _ in range(60)]
    counter = VocabularyCounter(["f"])
    for chunk in keys:
        counter.add({"f": (chunk, np.zeros(500, dtype=np.bool_))})
    assert _as_dict(counter.vocabulary(), "f") == _by_dict(np.concatenate(keys).tolist())


@settings(max_examples=50, deadline=None)
@given(_categories, _categories)
def test_what_is_unknown_or_missing_is_row_0(fitted: list[int | None], asked: list[int | None]) -> None:
    counter = VocabularyCounter(["f"])
    counter.add(_chunk(f=fitted))
    known = _by_dict(fitted)
    keys, missing = _chunk(f=asked)["f"]
    before = keys.copy()
    ids = counter.vocabulary().encode("f", keys, missing)
    assert ids.tolist() == [0 if key is None else known.get(key, 0) for key in asked]
    np.testing.assert_array_equal(keys, before)
    assert counter.vocabulary().encode("f", keys, missing, out=keys) is keys
    np.testing.assert_array_equal(keys, ids)


def test_fitting_passes_over_a_source_once() -> None:
    source = _Source()
    vocabulary = fit_vocabulary(source)
    assert source.reads == [0, 1]
    assert _as_dict(vocabulary, "f") == {7: 1, 8: 2} and vocabulary.rows == {"f": 3, "g": 1}
    assert vocabulary.source == "made up (min_count 1, max_rows None)"
    assert fit_vocabulary(_Source(), min_count=3).rows == fit_vocabulary(_Source(), max_rows={"f": 2, "g": 1}).rows == {"f": 2, "g": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_count": 0}, "min_count must be at least 1, received 0"), ({"max_rows": 0}, "max_rows of feature 'f' .* received 0"),
        ({"max_rows": {"f": 3}}, "max_rows of feature 'g' must be given"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_before_the_pass(settings: dict[str, int], message: str) -> None:
    source = _Source()
    with pytest.raises(ConfigError, match=message):
        fit_vocabulary(source, **settings)
    assert source.reads == []


def test_other_features_are_refused() -> None:
    counter = VocabularyCounter(["f"])
    with pytest.raises(DataError, match=r"\['g'\] received, allowed are exactly \['f'\]"):
        counter.add(_chunk(g=[1]))
    with pytest.raises(DataError, match=r"\['f'\] and \['g'\] cannot be merged"):
        counter.merge(VocabularyCounter(["g"]))
    with pytest.raises(ConfigError, match=r"no feature 'g'; it has \['f'\]"):
        counter.vocabulary().encode("g", *_chunk(g=[1])["g"])


@pytest.mark.parametrize(
    ("keys", "ids", "message"),
    [
        ([3, 3], [1, 2], "ascending order"), ([4, 3], [1, 2], "ascending order"), ([1.5], [1], "received float64"),
        ([[1]], [[1]], "vector"), ([3, 4], [1, 1], "each of 1..2 once"), ([3, 4], [0, 1], "each of 1..2 once"),
        ([3, 4], [1, 3], "each of 1..2 once"), ([3, 4, 5], [1, 3, 3], "each of 1..3 once"),
        ([3, 4], [1], r"received int64 \[1\]"), ([3], [1.0], "received float64"),
    ],
)  # fmt: skip
def test_keys_and_ids_are_checked(keys: list[int], ids: list[int], message: str) -> None:
    Vocabulary({"f": np.array([3, 4])}, {"f": np.array([2, 1])})  # the control
    with pytest.raises(DataError, match=message):
        Vocabulary({"f": np.array(keys)}, {"f": np.array(ids)})


def test_keys_and_ids_name_the_same_features() -> None:
    with pytest.raises(DataError, match=r"\['f'\] and \['g'\]"):
        Vocabulary({"f": np.array([3])}, {"g": np.array([1])})


def test_round_trip(tmp_path: Path) -> None:
    counter = VocabularyCounter(["grün", "empty"])
    counter.add(_chunk(grün=[5, -(2**63), 5, 2**63 - 1, None], empty=[]))
    vocabulary = counter.vocabulary(source="day_0 … day_3")
    vocabulary.save(tmp_path / "v.npz")
    back = Vocabulary.load(tmp_path / "v.npz")
    assert back.fingerprint == vocabulary.fingerprint and back.source == vocabulary.source
    assert back.rows == {"grün": 4, "empty": 1} and list(back.rows) == list(vocabulary.rows)
    assert _as_dict(back, "grün") == {5: 1, -(2**63): 2, 2**63 - 1: 3} and back.keys["empty"].dtype == np.int64


def test_files_that_are_no_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    with pytest.raises(ConfigError, match=r"no file .* to read a vocabulary"):
        Vocabulary.load(path)
    Vocabulary({"f": np.array([3, 400])}, {"f": np.array([2, 1])}).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"v\.npz is damaged or not ours"):
        Vocabulary.load(path)
    path.write_bytes(whole)
    with np.load(path) as archive:
        members = dict(archive)
    np.savez(path, **members)
    Vocabulary.load(path)  # the control: written again unaltered, it still loads
    np.savez(path, **{**members, "keys.0": np.array([3, 401], dtype=np.uint16)})
    with pytest.raises(FingerprintError, match="altered"):
        Vocabulary.load(path)
    np.savez(path, **{**members, "ids.0": np.array([2, 2], dtype=np.uint8)})
    with pytest.raises(DataError, match=r"v\.npz: vocabulary of feature 'f': ids"):
        Vocabulary.load(path)


def test_the_fingerprint_names_what_decides_the_ids() -> None:
    def made(keys: list[int], ids: list[int], feature: str = "f", source: str = "") -> str:
        return Vocabulary({feature: np.array(keys)}, {feature: np.array(ids)}, source).fingerprint

    same = made([3, 4], [1, 2])
    assert made([3, 4], [1, 2], source="elsewhere") == same
    assert len({same, made([3, 4], [2, 1]), made([3, 5], [1, 2]), made([3, 4], [1, 2], "g")}) == 4
