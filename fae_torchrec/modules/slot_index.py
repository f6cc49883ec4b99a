"""The map from row id to hot slot, on the device of the ids: a number a row, a bitmap of 1.5 bits a row, or a hash of the hot rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TypeAlias

import fbgemm_gpu  # noqa: F401  # registers torch.ops.fbgemm
import torch
from torch import nn

from fae_torchrec.core.errors import ConfigError, DataError

COMPACT_ABOVE_ROWS = 64_000_000
"""Rows of a collection above which the index is a bitmap by default: 256 MB as a plain array, 12 MB as a bitmap."""

_HASH_BYTES = 16  # a hot row's: two places, one of them free, of row and slot (int32)
_SLOT_LIMIT = 2**31  # slots are int32
_WORD = 64  # rows a word of the bitmap
_ROWS_A_BAG = 8
_BUILD_IDS = 1 << 20  # hot ids handled at a time while an index is built, which bounds what building takes beside the index


class _SlotIndex(nn.Module):
    """Several tables laid one after the other in one row space, their hot rows numbered in that order: a slot is the rank of its row.

    Table t's row r is row `rows[0] + ... + rows[t - 1] + r` of the space. A subclass fills its buffers, all of them non-persistent
    (a checkpoint stays stock's), and looks rows up.

    Arguments and errors: `new_slot_index`.
    """

    def __init__(self, rows: Sequence[int], hot_ids: Sequence[torch.Tensor], device: torch.device) -> None:
        super().__init__()
        _check(rows, hot_ids)
        self.num_rows = sum(rows)
        self.num_slots = sum(ids.numel() for ids in hot_ids)
        self._fill(_hot_rows(rows, hot_ids, device), device)

    def _fill(self, hot_rows: Iterator[torch.Tensor], device: torch.device) -> None:
        """Registers the buffers.

        Args:
            hot_rows: the hot rows of the whole space on `device`, ascending, some at a time.
            device: where the buffers lie.
        """
        raise NotImplementedError

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        """Looks rows up.

        Args:
            row: int64 [n], rows of the whole space, on the device of the index. All must be in 0..sum(rows)-1: the gathering kernel
                refuses what lies beyond its buffer (the bitmap's last word is padded with cold rows), nothing else is checked.

        Returns:
            int32 or int64 [n]: the slot of each row, or -1 where the row is cold.
        """
        raise NotImplementedError

    @staticmethod
    def bytes_of(num_rows: int, num_slots: int) -> int:
        """Bytes of an index of so many rows and hot rows."""
        raise NotImplementedError

    @property
    def index_bytes(self) -> int:
        """Bytes of memory the index takes on its device."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


class DenseSlotIndex(_SlotIndex):
    """The slot of every row as a number: 4 bytes a row, one read a lookup. Arguments and errors: `new_slot_index`."""

    slots: torch.Tensor

    @staticmethod
    def bytes_of(num_rows: int, num_slots: int) -> int:
        """Bytes of an index of so many rows and hot rows."""
        return 4 * num_rows

    def _fill(self, hot_rows: Iterator[torch.Tensor], device: torch.device) -> None:
        slots = torch.full((self.num_rows,), -1, dtype=torch.int32, device=device)
        first = 0
        for chunk in hot_rows:
            slots[chunk] = torch.arange(first, first + chunk.numel(), dtype=torch.int32, device=device)
            first += chunk.numel()
        self.register_buffer("slots", slots, persistent=False)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        """Looks rows up: int64 [n] in 0..sum(rows)-1 -> int32 [n], the slot or -1 where the row is cold."""
        return torch.index_select(self.slots, 0, row)


class BitmapSlotIndex(_SlotIndex):
    """A bit for every row and a count for every 64 rows: 1.5 bits a row, two reads and a popcount a lookup.

    Since a slot is the rank of its row, it is the number of hot rows before the row's word of 64 rows, plus the number of set bits
    below the row's own bit in that word. Arguments and errors: `new_slot_index`.
    """

    words: torch.Tensor
    before: torch.Tensor

    @staticmethod
    def bytes_of(num_rows: int, num_slots: int) -> int:
        """Bytes of an index of so many rows and hot rows."""
        return 12 * -(-num_rows // _WORD)

    def _fill(self, hot_rows: Iterator[torch.Tensor], device: torch.device) -> None:
        words = torch.zeros(-(-self.num_rows // _WORD), dtype=torch.int64, device=device)
        for chunk in hot_rows:
            # Every bit is added once, so the sum is the union, bit 63 (the sign) included.
            words.index_add_(0, chunk >> 6, torch.bitwise_left_shift(1, chunk & 63))
        before = torch.zeros(words.numel(), dtype=torch.int32, device=device)
        torch.cumsum(_popcount_(words[:-1].clone()), 0, dtype=torch.int32, out=before[1:])
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("before", before, persistent=False)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        """Looks rows up: int64 [n] in 0..sum(rows)-1 -> int32 [n], the slot or -1 where the row is cold."""
        word = row >> 6
        # The row's bit becomes the sign and later rows' bits fall off: what is left counts the hot rows up to this one.
        bits = torch.index_select(self.words, 0, word).bitwise_left_shift_((row & 63).bitwise_xor_(63))
        hot = bits >> 63  # arithmetic: all ones where the row is hot, 0 where it is cold
        rank = _popcount_(bits).add_(torch.index_select(self.before, 0, word))
        return rank.bitwise_and_(hot).sub_(1).to(torch.int32)


class HashSlotIndex(_SlotIndex):
    """FBGEMM's hash of the hot rows alone: 16 bytes a hot row, one kernel a lookup. Arguments and errors: `new_slot_index`.

    For GPUs, whose memory is what hot rows are to have, and where each of the bitmap's dozen small operations is a kernel. On a CPU its
    lookup takes longer than the others'.
    """

    places: torch.Tensor
    ends: torch.Tensor

    @staticmethod
    def bytes_of(num_rows: int, num_slots: int) -> int:
        """Bytes of an index of so many rows and hot rows."""
        return _HASH_BYTES * max(num_slots, 1) + 16

    def _fill(self, hot_rows: Iterator[torch.Tensor], device: torch.device) -> None:
        capacity = 2 * max(self.num_slots, 1)
        places, ends = torch.full((capacity, 2), -1, dtype=torch.int32), torch.tensor([0, capacity])
        first = 0
        for chunk in hot_rows:  # FBGEMM inserts on the CPU alone
            row = chunk.cpu()
            slot = torch.arange(first, first + row.numel())
            torch.ops.fbgemm.pruned_hashmap_insert(row, slot, torch.tensor([0, row.numel()]), places, ends)
            first += row.numel()
        self.register_buffer("places", places.to(device), persistent=False)
        self.register_buffer("ends", ends.to(device), persistent=False)
        self._bags = torch.empty(0, dtype=torch.int64, device=device)
        self._rows_of_bags = 0

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        """Looks rows up: int64 [n] in 0..sum(rows)-1 -> int64 [n], the slot or -1 where the row is cold."""
        if not row.numel():
            return row
        if self._rows_of_bags != row.numel() or self._bags.device != row.device:
            # FBGEMM looks bags up, a warp of a GPU each; eight rows at a time keep all of its lanes busy.
            bags = torch.arange(0, row.numel() + _ROWS_A_BAG, _ROWS_A_BAG, device=row.device)
            self._bags, self._rows_of_bags = bags.clamp_(max=row.numel()), row.numel()
        found: torch.Tensor = torch.ops.fbgemm.pruned_hashmap_lookup(row, self._bags, self.places, self.ends)
        return found


SlotIndex: TypeAlias = DenseSlotIndex | BitmapSlotIndex | HashSlotIndex


def slot_index_kind(num_rows: int, num_slots: int, device_type: str, compact_above_rows: int = COMPACT_ABOVE_ROWS) -> type[SlotIndex]:
    """Which index `new_slot_index` makes. Arguments: see there."""
    few = 4 * HashSlotIndex.bytes_of(num_rows, num_slots) <= DenseSlotIndex.bytes_of(num_rows, num_slots)
    if device_type == "cuda" and compact_above_rows and num_rows < _SLOT_LIMIT and few:
        return HashSlotIndex
    return DenseSlotIndex if num_rows <= compact_above_rows else BitmapSlotIndex


def new_slot_index(
    rows: Sequence[int], hot_ids: Sequence[torch.Tensor], device: torch.device, *, compact_above_rows: int = COMPACT_ABOVE_ROWS
) -> SlotIndex:
    """The dense index of a small row space, the bitmap of a large one; on CUDA the hash where few rows are hot (one in 16).

    Args:
        rows: rows of each table, at least 0.
        hot_ids: int64 [hot rows] of each table, on any device, strictly ascending, in 0..rows-1; may be empty, may be all rows.
        device: where the index lies; the rows looked up must be on the same device.
        compact_above_rows: the most rows (of all tables together) of a dense index. It costs 4 bytes x rows of fast memory, which
            hot rows could use: 256 MB at this default, 12 MB as a bitmap, whose lookup takes 1.5 to 2.5 times
            as long on an idle CPU, up to 8 times on a contended one (`benchmarks/slot_index.py`). 0 makes every index a bitmap, on every
            device.

    Raises:
        ConfigError: there are 2**31 hot rows or more.
        DataError: `rows` and `hot_ids` differ in length, or hot ids are not a strictly ascending int64 vector of their table's rows.
    """
    kind = slot_index_kind(sum(rows), sum(ids.numel() for ids in hot_ids), device.type, compact_above_rows)
    return kind(rows, hot_ids, device)


def _check(rows: Sequence[int], hot_ids: Sequence[torch.Tensor]) -> None:
    if len(rows) != len(hot_ids):
        raise DataError(f"received the rows of {len(rows)} tables and the hot ids of {len(hot_ids)}; give both of every table")
    slots = sum(ids.numel() for ids in hot_ids)
    if slots >= _SLOT_LIMIT:
        raise ConfigError(f"{slots} hot rows, but slots are int32: at most {_SLOT_LIMIT - 1} are allowed; lower the budget of fast memory")
    for table, (count, ids) in enumerate(zip(rows, hot_ids, strict=True)):
        if ids.dtype != torch.int64 or ids.ndim != 1:
            raise DataError(f"hot ids of table number {table} must be an int64 vector, received {ids.dtype} of shape {tuple(ids.shape)}")
        if ids.numel() and (int(ids[0]) < 0 or int(ids[-1]) >= count or not bool((ids[1:] > ids[:-1]).all())):
            raise DataError(
                f"hot ids of table number {table} run from {int(ids[0])} to {int(ids[-1])}; allowed: strictly ascending ids in "
                f"0..{count - 1}; use torch.unique on ids of this table"
            )


def _hot_rows(rows: Sequence[int], hot_ids: Sequence[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """The hot rows of the whole row space, ascending, at most `_BUILD_IDS` at a time."""
    for first_row, ids in zip(accumulate(rows, initial=0), hot_ids, strict=False):
        for chunk in torch.split(ids, _BUILD_IDS):
            yield chunk.to(device) + first_row


def _popcount_(words: torch.Tensor) -> torch.Tensor:
    """Replaces every int64 by the number of its set bits: sums of 2, 4, then 8 bits side by side, and all bytes added by one product.

    Right shifts of int64 copy the sign; every mask drops those copies. The product's top byte is at most 64, so it is not negative.
    Of the ways measured on a CPU (int32 halves, tables of 256 and of 65,536 entries) this one is the fastest.
    """
    part = (words >> 1).bitwise_and_(0x5555555555555555)
    words.sub_(part)
    torch.bitwise_right_shift(words, 2, out=part)
    words.bitwise_and_(0x3333333333333333).add_(part.bitwise_and_(0x3333333333333333))
    torch.bitwise_right_shift(words, 4, out=part)
    words.add_(part).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return words.mul_(0x0101010101010101).bitwise_right_shift_(56)
