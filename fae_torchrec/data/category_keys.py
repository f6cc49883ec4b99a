"""Raw categories (hex digits, integers, strings) as int64 keys, before any coding into the rows of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from fae_torchrec.core.errors import DataError

_HEX_PIECE = 1 << 14  # values decoded at a time: 128 KiB of digits and as much of scratch stay in the cache
_WORD_PIECE = 1 << 14  # words of strings hashed at a time, likewise
_EXACT_FLOAT = 2.0**53
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class CategoryError(DataError):
    """A category that cannot be used.

    Attributes:
        position: where it stands in the array that was passed, counted from 0, so that a reader can name file and line.
    """

    def __init__(self, message: str, position: int = -1) -> None:
        super().__init__(message)
        self.position = position


def hex_keys(
    column: Any, *, keys: np.ndarray | None = None, missing: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers that 8 hex digits write, as in the Criteo logs. About 3 ns per value.

    Args:
        column: pyarrow FixedSizeBinaryArray(8) or ChunkedArray of it; null is missing.
        keys: int64 [n], contiguous: written to and returned, instead of a new array.
        missing: bool [n], contiguous: likewise.

    Returns:
        keys int64 [n] in 0..2**32-1, 0 where missing or bad; missing bool [n]; bad int64, ascending: positions of values that are
        not 8 hex digits (of either case), normally none. The caller names their file and line.

    Raises:
        DataError: the column is of another type.
    """
    if not pa.types.is_fixed_size_binary(column.type) or column.type.byte_width != 8:
        raise DataError(f"hex categories must be read as fixed_size_binary[8], received {column.type}; read or cast the column so")
    keys = np.empty(len(column), dtype=np.int64) if keys is None else keys
    missing = np.empty(len(column), dtype=np.bool_) if missing is None else missing
    bad = []
    start = 0
    for chunk in _chunks(column):
        stop = start + len(chunk)
        missing[start:stop] = _missing(chunk)
        digits = np.frombuffer(chunk.buffers()[1] or b"", dtype=np.uint8)[8 * chunk.offset : 8 * (chunk.offset + len(chunk))]
        bad.append(start + _decode_hex(digits, keys[start:stop], missing[start:stop]))
        start = stop
    return keys, missing, np.concatenate([np.empty(0, dtype=np.int64), *bad])


def category_keys(column: Any, owner: str = "categories") -> tuple[np.ndarray, np.ndarray]:
    """One key for each category of a column.

    Integers and booleans are their own keys. Floats are taken if they are whole numbers: that is how tools write integers with gaps.
    Strings and binaries are hashed over their bytes, also if these happen to be digits: read numbers as numbers. Null, NaN and the empty
    string are missing.

    A string's key is the same on every machine and in every version. Two different strings share a key, and are then one category, with
    a chance of 2**-63: among 100 million different strings, some pair does with a chance of about 1 in 1,800.

    Args:
        column: pyarrow Array or ChunkedArray of integers, booleans, floats, strings, binaries, or a dictionary of these. Lists are
            for the caller to flatten.
        owner: whose categories they are (file and column), for the message.

    Returns:
        keys int64 [n], 0 where missing, perhaps read-only (negative integers stay negative; a string's key is in 0..2**63-1); missing
        bool [n].

    Raises:
        CategoryError: a value has no key: a float that is not whole, an integer of 2**63 or more.
        DataError: the column is of a type that has no categories.
    """
    keys_of = _keys_of(column.type, owner)
    pieces = []
    start = 0
    for chunk in _chunks(column):
        try:
            pieces.append(keys_of(chunk))
        except CategoryError as error:
            position = start + error.position
            raise CategoryError(f"{owner}: value {position} of {len(column)} (counted from 0) is {error}", position) from None
        start += len(chunk)
    if len(pieces) == 1:
        return pieces[0]
    keys = np.concatenate([np.empty(0, dtype=np.int64), *(keys for keys, _ in pieces)])
    return keys, np.concatenate([np.empty(0, dtype=np.bool_), *(missing for _, missing in pieces)])


def mixed(bits: np.ndarray) -> np.ndarray:
    """The bits of numbers mixed (one step of splitmix64, Steele et al., OOPSLA 2014): different numbers stay different.

    Args:
        bits: uint64, any shape.

    Returns:
        uint64 of the same shape, new.
    """
    z = bits + _GOLDEN
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _decode_hex(digits: np.ndarray, keys: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Writes the keys of digits uint8 [8 n]; returns the positions that are bad. Bytes are handled 64 at a time by the processor."""
    scratch = [np.empty(8 * min(_HEX_PIECE, len(keys)), dtype=kind) for kind in (np.uint8, np.uint8, np.bool_, np.bool_)]
    bad = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(keys), _HEX_PIECE):
        text = digits[8 * start : 8 * (start + _HEX_PIECE)]
        number, letter, good, is_letter = (array[: len(text)] for array in scratch)
        out = keys[start : start + _HEX_PIECE]
        np.subtract(text, 48, out=number)  # 0..9 for '0'..'9'
        np.bitwise_or(text, 32, out=letter)  # lower case
        np.subtract(letter, 97, out=letter)  # 0..5 for 'a'..'f'
        np.less(number, 10, out=good)
        np.less(letter, 6, out=is_letter)
        np.bitwise_or(good, is_letter, out=good)
        np.add(letter, 10, out=letter)
        np.minimum(number, letter, out=number)  # of a good digit, the other one is larger
        pairs, spare = number.view("<u2"), letter.view("<u2")  # first digit in the low byte
        np.left_shift(pairs, 4, out=spare)
        np.right_shift(pairs, 8, out=pairs)
        np.bitwise_or(pairs, spare, out=pairs)
        out[:] = pairs.astype(np.uint8).view(">u4")
        usable = good.view(np.uint64) == 0x0101010101010101
        present = ~missing[start : start + _HEX_PIECE]
        if not usable.all() or not present.all():
            bad.append(start + np.flatnonzero(present & ~usable))  # what stands in a null's bytes means nothing
            out *= usable & present  # a product has no branch to mispredict: ten times as fast as a masked store
    return np.concatenate(bad)


def _keys_of(kind: Any, owner: str) -> Callable[[Any], tuple[np.ndarray, np.ndarray]]:
    """What makes keys and missing of a pyarrow Array of a type."""
    if pa.types.is_dictionary(kind):
        of_values = _keys_of(kind.value_type, owner)
        if of_values is not _string_keys:  # an error must name the value's own position
            return lambda array: of_values(array.dictionary_decode())
        return _dictionary_keys
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return _integer_keys
    if pa.types.is_floating(kind):
        return _float_keys
    if pa.types.is_null(kind):
        return lambda array: (np.zeros(len(array), dtype=np.int64), np.ones(len(array), dtype=np.bool_))
    if any(is_kind(kind) for is_kind in _STRINGS):
        return _string_keys
    raise DataError(
        f"{owner}: type {kind} has no categories; allowed are integers, booleans, whole floats, strings, binaries and dictionaries of "
        "these; cast the column (lists: flatten it)"
    )


_STRINGS = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
    pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary,
)  # fmt: skip


def _integer_keys(array: Any) -> tuple[np.ndarray, np.ndarray]:
    missing = _missing(array)
    values = array.fill_null(False if pa.types.is_boolean(array.type) else 0)
    if pa.types.is_uint64(array.type):
        large = np.flatnonzero(values.to_numpy() > np.uint64(2**63 - 1))
        if large.size:
            raise CategoryError(f"{values[int(large[0])]}; allowed are integers below 2**63; write it as a string", int(large[0]))
    return values.cast(pa.int64()).to_numpy(), missing


def _float_keys(array: Any) -> tuple[np.ndarray, np.ndarray]:
    values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
    missing = _missing(array) | np.isnan(values)
    values = np.where(missing, 0.0, values)
    broken = np.flatnonzero((np.floor(values) != values) | (np.abs(values) > _EXACT_FLOAT))
    if broken.size:
        position = int(broken[0])
        raise CategoryError(
            f"{float(values[position])!r}; allowed are floats that are whole numbers of at most 2**53; cast the column to integers or "
            "strings, or read it as a dense feature",
            position,
        )
    return values.astype(np.int64), missing


def _dictionary_keys(array: Any) -> tuple[np.ndarray, np.ndarray]:
    keys, missing = (np.append(part, none) for part, none in zip(_string_keys(array.dictionary), (0, True), strict=True))
    index = array.indices.cast(pa.int64()).fill_null(len(array.dictionary)).to_numpy()
    return keys[index], missing[index]


def _string_keys(array: Any) -> tuple[np.ndarray, np.ndarray]:
    missing = _missing(array)
    array = array.cast(pa.large_binary())
    _, offsets, data = array.buffers()
    edges = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1] if len(array) else np.zeros(1, np.int64)
    lengths = np.diff(edges)
    missing |= lengths == 0
    keys = np.zeros(len(array), dtype=np.int64)
    used = np.flatnonzero(~missing)
    if used.size:
        keys[used] = _hashed(np.frombuffer(data, dtype=np.uint8), edges[used], lengths[used])
    return keys, missing


def _hashed(data: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """63-bit hashes of byte strings, in bounded extra memory whatever their lengths.

    A string is cut into little-endian words of 8 bytes, the last one filled with zeros. The hash is the low 63 bits of
    mixed(length + sum over words w = 0, 1, ... of mixed(word_w xor mixed(w))), modulo 2**64.

    Args:
        data: uint8, all bytes.
        begins: int64 [n], where each string begins in `data`.
        lengths: int64 [n], bytes of each, at least 1.

    Returns:
        int64 [n], none negative.
    """
    if len(data) < 8:
        data = np.append(data, np.zeros(8, dtype=np.uint8))
    last = len(data) - 8
    words_at = np.ndarray((last + 1,), dtype="<u8", buffer=data, strides=(1,))  # the word that begins at each byte
    word_starts = np.concatenate([[0], np.cumsum((lengths + 7) // 8)])
    sums = lengths.astype(np.uint64)
    for start in range(0, int(word_starts[-1]), _WORD_PIECE):
        stop = min(start + _WORD_PIECE, int(word_starts[-1]))
        first, end = int(np.searchsorted(word_starts, start, side="right")) - 1, int(np.searchsorted(word_starts, stop))
        cuts = np.maximum(word_starts[first:end], start) - start  # where the words of each string begin in this piece
        string = np.repeat(np.arange(first, end), np.diff(np.append(cuts, stop - start)))
        number = np.arange(start, stop) - word_starts[string]
        begin = begins[string] + 8 * number
        rest = np.minimum(lengths[string] - 8 * number, 8)
        # A word that would reach over the end of the data is loaded from before it and shifted.
        loaded = np.minimum(begin, last)
        words = words_at[loaded] >> (8 * (begin - loaded)).astype(np.uint64)
        words &= np.uint64(2**64 - 1) >> (8 * (8 - rest)).astype(np.uint64)
        words ^= mixed(number.astype(np.uint64))
        sums[first:end] += np.add.reduceat(mixed(words), cuts)
    return (mixed(sums) & np.uint64(2**63 - 1)).view(np.int64)


def _chunks(column: Any) -> list[Any]:
    return list(column.chunks) if isinstance(column, pa.ChunkedArray) else [column]


def _missing(array: Any) -> np.ndarray:
    """Where a pyarrow Array is null: bool [n], new. Ten times as fast as `is_null().to_numpy()`."""
    valid = array.buffers()[0] if array.null_count else None
    if valid is None:
        return np.zeros(len(array), dtype=np.bool_)
    first, skip = divmod(array.offset, 8)
    bits = np.frombuffer(valid, dtype=np.uint8)[first : first + (skip + len(array) + 7) // 8]
    null: np.ndarray = np.unpackbits(bits, bitorder="little")[skip : skip + len(array)] == 0
    return null
