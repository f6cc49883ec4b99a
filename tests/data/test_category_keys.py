"""Keys of raw categories, against int(x, 16) and a hash written a second time over Python integers."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import DataError
from fae_torchrec.data import category_keys as module
from fae_torchrec.data.category_keys import CategoryError, category_keys, hex_keys, mixed

_MASK = 2**64 - 1
HEX = pa.binary(8)
KEY_A = 39898768554013150
KEY_HEX = 4124577675871584950
KEY_UNICODE = 3223305277952212947
KEY_LONG = 7396309625325081985


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _hash(text: bytes) -> int:
    words = [int.from_bytes(text[at : at + 8], "little") for at in range(0, len(text), 8)]
    return _mix((len(text) + sum(_mix(word ^ _mix(number)) for number, word in enumerate(words))) & _MASK) % 2**63


def _lists(column: Any) -> tuple[list[int], list[bool]]:
    keys, missing = category_keys(column)
    assert keys.dtype == np.int64 and missing.dtype == np.bool_ and len(keys) == len(missing) == len(column)
    return keys.tolist(), missing.tolist()


_digits = st.text("0123456789abcdefABCDEF", min_size=8, max_size=8).map(str.encode)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | _digits, max_size=40), st.integers(0, 5), st.integers(0, 5))
def test_hex_digits_are_numbers(values: list[bytes | None], skip: int, cut: int) -> None:
    array = pa.array(values, HEX)[skip:]
    values = values[skip:]
    keys, missing, bad = hex_keys(pa.chunked_array([array[:cut], array[cut:]], HEX))
    assert keys.tolist() == [int(value or b"0", 16) for value in values]
    assert missing.tolist() == [value is None for value in values] and bad.tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | _digits | st.binary(min_size=8, max_size=8), min_size=1, max_size=40))
def test_what_is_not_hex_is_found(values: list[bytes | None]) -> None:
    good = [value is None or re.fullmatch(rb"[0-9a-fA-F]{8}", value) is not None for value in values]
    keys, missing, bad = hex_keys(pa.array(values, HEX))
    assert bad.tolist() == [position for position, is_good in enumerate(good) if not is_good]
    assert keys.tolist() == [int(value, 16) if value and is_good else 0 for value, is_good in zip(values, good, strict=True)]
    assert missing.tolist() == [value is None for value in values]


@pytest.mark.parametrize("place", range(8))
def test_every_byte_in_every_place(place: int) -> None:
    texts = [b"0" * place + bytes([byte]) + b"0" * (7 - place) for byte in range(256)]
    keys, _, bad = hex_keys(pa.array(texts, HEX))
    allowed = set(b"0123456789abcdefABCDEF")
    assert bad.tolist() == [byte for byte in range(256) if byte not in allowed]
    assert {byte: int(keys[byte]) for byte in allowed} == {byte: int(chr(byte), 16) << 4 * (7 - place) for byte in allowed}


def test_hex_in_many_pieces_into_given_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEX_PIECE", 16)
    numbers = np.random.default_rng(0).integers(0, 2**32, 1001)
    texts: list[bytes | None] = [b"%08x" % number for number in numbers.tolist()]
    texts[40], texts[700], texts[1000] = None, b"0000 00f", b"g0000000"
    rows, masks = np.full((2, 1001), -7), np.ones((2, 1001), dtype=np.bool_)
    keys, missing, bad = hex_keys(pa.array(texts, HEX), keys=rows[1], missing=masks[1])
    numbers[[40, 700, 1000]] = 0
    assert np.shares_memory(keys, rows) and np.shares_memory(missing, masks)
    np.testing.assert_array_equal(rows, [np.full(1001, -7), numbers])
    assert bad.tolist() == [700, 1000] and np.flatnonzero(missing).tolist() == [40] and masks[0].all()


def test_the_bytes_of_a_null_mean_nothing() -> None:
    data = pa.py_buffer(b"0000000f" + b"\xff" * 8 + b"0000000d" + b"0000000e")
    array = pa.FixedSizeBinaryArray.from_buffers(HEX, 4, [pa.py_buffer(b"\x09"), data])
    keys, missing, bad = hex_keys(array)
    assert (keys.tolist(), missing.tolist(), bad.tolist()) == ([15, 0, 0, 14], [False, True, True, False], [])
    keys, _, bad = hex_keys(pa.FixedSizeBinaryArray.from_buffers(HEX, 4, [None, data]))  # the control: the same bytes, not null
    assert (keys.tolist(), bad.tolist()) == ([15, 0, 13, 14], [1])


def test_bad_positions_count_through_the_chunks() -> None:
    chunks = [pa.array(values, HEX) for values in ([b"0000000a", b"        "], [], [None, b"0000000x"])]
    keys, missing, bad = hex_keys(pa.chunked_array(chunks))
    assert (keys.tolist(), missing.tolist(), bad.tolist()) == ([10, 0, 0, 0], [False, False, True, False], [1, 3])


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(4), pa.int64()])
def test_hex_needs_eight_bytes(kind: Any) -> None:
    with pytest.raises(DataError, match=r"fixed_size_binary\[8\], received"):
        hex_keys(pa.array([], kind))


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64()])
def test_integers_are_their_own_keys(kind: Any) -> None:
    assert _lists(pa.array([3, None, -1, 0, 127], kind)) == ([3, 0, -1, 0, 127], [False, True, False, False, False])
    assert _lists(pa.array([3, -128, None], kind)[1:]) == ([-128, 0], [False, True])


def test_the_ends_of_the_integers() -> None:
    assert _lists(pa.array([-(2**63), 2**63 - 1])) == ([-(2**63), 2**63 - 1], [False, False])
    assert _lists(pa.array([2**63 - 1, None], pa.uint64())) == ([2**63 - 1, 0], [False, True])
    for column in (pa.array([1, 2**63], pa.uint64()), pa.chunked_array([pa.array([1], pa.uint64()), pa.array([2**63, None], pa.uint64())])):
        with pytest.raises(CategoryError, match=r"f\.csv: value 1 of \d .* is 9223372036854775808; allowed are integers below") as caught:
            category_keys(column, "f.csv")
        assert caught.value.position == 1


def test_booleans_nulls_and_nothing() -> None:
    assert _lists(pa.array([True, None, False])) == ([1, 0, 0], [False, True, False])
    assert _lists(pa.nulls(2)) == ([0, 0], [True, True])
    for kind in (pa.int32(), pa.string(), pa.float32(), pa.dictionary(pa.int8(), pa.string())):
        assert _lists(pa.array([], kind)) == ([], [])
        assert _lists(pa.chunked_array([], kind)) == ([], [])


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_whole_floats_are_integers_with_gaps(kind: Any) -> None:
    column = pa.array([3.0, None, float("nan"), -0.0, -5.0], kind, from_pandas=False)
    assert _lists(column) == ([3, 0, 0, 0, -5], [False, True, True, False, False])


@pytest.mark.parametrize("broken", [1.5, float("inf"), -float("inf"), 2.0**53 + 2])
def test_other_floats_are_not_categories(broken: float) -> None:
    assert _lists(pa.array([2.0**53])) == ([2**53], [False])
    with pytest.raises(CategoryError, match="whole numbers") as caught:
        category_keys(pa.chunked_array([[1.0, None], [2.0, broken, 0.5]]), "column 'x'")
    assert caught.value.position == 3 and str(caught.value).startswith(f"column 'x': value 3 of 5 (counted from 0) is {broken!r}")


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.timestamp("s"), pa.decimal128(5, 2), pa.dictionary(pa.int8(), pa.date32())])
def test_other_types_have_no_categories(kind: Any) -> None:
    with pytest.raises(DataError, match=r"column 'x': type .* has no categories; allowed are integers"):
        category_keys(pa.nulls(2, kind), "column 'x'")


@settings(max_examples=80, deadline=None)
@given(st.lists(st.none() | st.binary(max_size=40), max_size=12), st.integers(0, 4))
@example([b"a", b"a\0", b"\0", b"\0\0", b"12345678", b"123456789", b""], 0)
@example([b"x"], 0)
def test_strings_are_hashed_as_written_here(values: list[bytes | None], skip: int) -> None:
    expected = [_hash(value) if value else 0 for value in values], [not value for value in values]
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        assert _lists(pa.array(values, kind)) == expected
        assert _lists(pa.array(values, kind)[skip:]) == (expected[0][skip:], expected[1][skip:])
    assert _lists(pa.chunked_array([pa.array(values, pa.binary())[:2], pa.array(values, pa.binary())[2:]])) == expected
    encoded = pa.array(values, pa.binary()).dictionary_encode()
    assert _lists(encoded) == expected and _lists(encoded[skip:]) == (expected[0][skip:], expected[1][skip:])


def test_the_keys_of_strings_are_fixed_forever() -> None:
    """Vocabularies and hashed tables that were saved depend on these numbers: never change them."""
    keys = {"a": KEY_A, "68fd1e64": KEY_HEX, "grün, 食品": KEY_UNICODE, "x" * 1000: KEY_LONG}
    assert _lists(pa.array(list(keys)))[0] == list(keys.values())
    assert _lists(pa.array([b"68fd1e64"], HEX))[0] == [KEY_HEX]  # the bytes count, not the type
    assert {text: _hash(text.encode()) for text in keys} == keys
    assert mixed(np.zeros(1, dtype=np.uint64))[0] == 0xE220A8397B1DCDAF  # splitmix64's published first number of seed 0


def test_strings_longer_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORD_PIECE", 7)
    rng = np.random.default_rng(0)
    values = [rng.bytes(size) for size in (1, 500, 56, 7, 8, 113, 3, 57, 0, 1)]
    assert _lists(pa.array(values))[0] == [_hash(value) if value else 0 for value in values]


def test_different_strings_have_different_keys() -> None:
    texts = [f"{number:x}" for number in range(200_000)] + ["0" * zeros for zeros in range(2, 500)]
    keys = np.array(_lists(pa.array(texts))[0])
    assert len(np.unique(keys)) == len(texts) and keys.min() >= 0
    ones = np.array([np.count_nonzero(keys & (1 << bit)) for bit in range(63)]) / len(keys)
    assert np.all(np.abs(ones - 0.5) < 0.01)  # nine standard deviations: no bit leans


def test_dictionaries_of_other_values() -> None:
    numbers = pa.DictionaryArray.from_arrays(pa.array([1, None, 0, 1], pa.int8()), pa.array([5, -7]))
    assert _lists(numbers) == ([-7, 0, 5, -7], [False, True, False, False])
    nothing = pa.DictionaryArray.from_arrays(pa.array([None, None], pa.int8()), pa.array([], pa.string()))
    assert _lists(nothing) == ([0, 0], [True, True])
    null_value = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.uint8()), pa.array(["a", None, ""]))
    assert _lists(null_value) == ([KEY_A, 0, 0], [False, True, True])
    with pytest.raises(CategoryError) as caught:
        category_keys(pa.DictionaryArray.from_arrays(pa.array([0, 0, 1], pa.int8()), pa.array([1.0, 1.5])))
    assert caught.value.position == 2


def test_an_error_from_a_worker_keeps_its_position() -> None:
    error = pickle.loads(pickle.dumps(CategoryError("what", 7)))
    assert str(error) == "what" and error.position == 7 and isinstance(error, DataError)
