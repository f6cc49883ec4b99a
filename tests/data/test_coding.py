"""Codings, against the same arithmetic over Python integers and Python dicts."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.category_keys import CategoryError
from fae_torchrec.data.coding import CategoryCoding, category_coding
from fae_torchrec.data.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    keys={"f": np.array([-5, 0, 30]), "g": np.zeros(0, dtype=np.int64)}, ids={"f": np.array([2, 3, 1]), "g": np.zeros(0, dtype=np.int64)}
)
_int64 = st.integers(-(2**63), 2**63 - 1)


def _splitmix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def _encode(coding: CategoryCoding, keys: list[int], missing: list[bool]) -> list[int]:
    given_keys, given_missing = np.array(keys, dtype=np.int64), np.array(missing, dtype=np.bool_)
    before = given_keys.copy(), given_missing.copy()
    ids = coding.encode("f", given_keys, given_missing)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(given_keys, before[0])
    np.testing.assert_array_equal(given_missing, before[1])
    for rows in np.full((2, 3, len(keys)), -1):  # into a row of something larger, and in place
        assert np.shares_memory(coding.encode("f", given_keys, given_missing, out=rows[1]), rows) or not keys
        np.testing.assert_array_equal(rows, [[-1] * len(keys), ids, [-1] * len(keys)])
    np.testing.assert_array_equal(coding.encode("f", given_keys, given_missing, out=given_keys), ids)
    return ids.tolist()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(_int64 | st.integers(-3, 40), st.booleans()), max_size=30), st.integers(1, 50) | st.integers(1, 2**63 - 1))
def test_modulo_hash_and_vocabulary(categories: list[tuple[int, bool]], rows: int) -> None:
    keys, missing = [key for key, _ in categories], [gone for _, gone in categories]
    assert _encode(category_coding("modulo", {"f": rows}), keys, missing) == [0 if gone else key % rows for key, gone in categories]
    hashed = [0 if gone else _splitmix(key % 2**64) % rows for key, gone in categories]
    assert _encode(category_coding("hash", {"f": rows}), keys, missing) == hashed
    known = {-5: 2, 0: 3, 30: 1}
    coding = category_coding("vocabulary", {"f": 4}, VOCABULARY)
    assert _encode(coding, keys, missing) == [0 if gone else known.get(key, 0) for key, gone in categories]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=20))
def test_without_coding_the_key_is_the_row(keys: list[int]) -> None:
    assert _encode(category_coding("none", {"f": 10}), keys, [False] * len(keys)) == keys


@pytest.mark.parametrize(
    ("keys", "missing", "position", "shown"),
    [
        ([3, 10, 1], [0, 0, 0], 1, "is 10"), ([3, 9, -1, 10], [0, 0, 0, 0], 2, "is -1"), ([3, 0, 1], [0, 1, 0], 1, "is missing"),
        ([3, 0, 11], [0, 1, 0], 1, "is missing"), ([-(2**63)], [0], 0, "is -9223372036854775808"),
    ],
)  # fmt: skip
def test_without_coding_other_keys_are_errors(keys: list[int], missing: list[int], position: int, shown: str) -> None:
    coding = category_coding("none", {"f": 10})
    out = np.full(len(keys), 77)
    with pytest.raises(CategoryError, match=rf"feature 'f': category {position} of {len(keys)} .* {shown}; .* ids 0\.\.9") as caught:
        coding.encode("f", np.array(keys), np.array(missing, dtype=np.bool_), out=out)
    assert caught.value.position == position and isinstance(caught.value, DataError) and (out == 77).all()


def test_hash_spreads_what_modulo_crowds() -> None:
    keys, missing = np.arange(4096) * 1024, np.zeros(4096, dtype=np.bool_)
    crowded, spread = (np.unique(category_coding(method, {"f": 4096}).encode("f", keys, missing)) for method in ("modulo", "hash"))
    assert len(crowded) == 4 and abs(len(spread) - 4096 * (1 - np.exp(-1))) < 150  # of 4,096 balls in 4,096 bins


def test_a_vocabulary_gives_its_own_rows() -> None:
    coding = category_coding("vocabulary", vocabulary=VOCABULARY)
    assert coding.rows == {"f": 4, "g": 1}
    assert category_coding("vocabulary", {"f": 9}, VOCABULARY).rows == {"f": 9}  # a larger table, and not every feature
    assert coding.encode("g", np.array([1, 0]), np.array([False, True])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("method", "rows", "vocabulary", "message"),
    [
        ("mod", {"f": 3}, None, r"'mod' is unknown; allowed are \['modulo', 'hash', 'none', 'vocabulary'\]"),
        ("modulo", None, None, "needs the rows"),
        ("hash", {"f": 3, "g": 0}, None, "feature 'g' has 0 rows"),
        ("none", {"f": 2.0}, None, r"feature 'f' has 2\.0 rows"),
        ("none", {"f": True}, None, "feature 'f' has True rows"),
        ("modulo", {"f": 3}, VOCABULARY, "uses no vocabulary"),
        ("vocabulary", {"f": 4}, None, "needs a vocabulary"),
        ("vocabulary", {"f": 4, "h": 1}, VOCABULARY, r"no feature 'h'; it has \['f', 'g'\]"),
        ("vocabulary", {"f": 3}, VOCABULARY, "'f' needs 4 rows, its table has 3; .* max_rows=3"),
    ],
)
def test_settings_that_do_not_fit(method: str, rows: Any, vocabulary: Vocabulary | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        category_coding(method, rows, vocabulary)


@pytest.mark.parametrize("method", ["modulo", "hash", "none", "vocabulary"])
def test_a_feature_without_rows(method: str) -> None:
    coding = category_coding(method, {"g": 3}, VOCABULARY if method == "vocabulary" else None)
    with pytest.raises(ConfigError, match=r"'f', only for \['g'\]"):
        coding.encode("f", np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.bool_))


@pytest.mark.parametrize("method", ["modulo", "hash", "none", "vocabulary"])
def test_workers_get_the_same_coding(method: str) -> None:
    coding = category_coding(method, {"f": np.int64(40)}, VOCABULARY if method == "vocabulary" else None)  # type: ignore[dict-item]
    keys, missing = np.array([0, 30, 7]), np.zeros(3, dtype=np.bool_)
    copy = pickle.loads(pickle.dumps(coding))
    np.testing.assert_array_equal(copy.encode("f", keys, missing), coding.encode("f", keys, missing))
    said = {"method": method, "rows": {"f": 40}}
    if method == "vocabulary":
        said["vocabulary"] = VOCABULARY.fingerprint
    assert json.loads(json.dumps(copy.describe())) == coding.describe() == said
