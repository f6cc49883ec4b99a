"""Selection that looks at whole inputs: the rows that together make the most inputs all hot, by iterated peeling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fae_torchrec.core.candidates import Candidates

_STEP = 0.03
"""Share of the remaining bytes that one step of a peeling takes away: smaller is slower and hardly better."""
_PEELINGS = 20
_PATIENCE = 5
"""Peelings without a better set for any budget before the search ends."""
_BEYOND = 0.5
"""Share of the smallest budget that a peeling goes on to: which rows would leave last teaches the next peeling."""
_PRIOR = 0.5
"""Inputs' worth of belief that a row lives as long as the other rows of its table: what few inputs say of one row is mostly chance."""


def input_aware_masks(candidates: Candidates, rooms: Sequence[int]) -> list[np.ndarray]:
    """Selects rows for the largest share of inputs that are all hot, under several budgets at once.

    An input counts only if all its rows are hot, so the value of a row is not how often it is accessed but how many inputs it
    completes, which depends on the other hot rows. "The most hyperedges inside a set of a given weight" is the densest-subgraph problem of
    hypergraphs, NP-hard for a given weight; iterated peeling (Greedy++: Boob et al., WWW 2020; Chekuri, Quanrud and Torres, SODA 2022, for
    supermodular functions) is near-linear and converges to the optimum of the Lagrangian problem, that is at the corners of the concave
    hull of hot inputs over bytes. One peeling starts with every seen row hot and takes away, a few per cent at a time (Bahmani et al., VLDB
    2012), the rows that the fewest still-hot inputs need, per byte; inputs that lose a row are cold from then on. What a row was worth when
    it went is carried to the next peeling as its load. The best set that any peeling left at each budget is kept.

    The worth of a row is estimated on the profile's counted inputs, but not only by how many of them need it: for a row in few of them that
    is mostly chance (and the profile may have counted more inputs than it kept whole). So worth = accesses x share of its inputs that are
    still hot, the share drawn towards that of the row's table: (needed + 0.5 * table's share) / (kept accesses + 0.5).

    Args:
        candidates: the rows and the profile they come from.
        rooms: bytes for candidates, one per budget.

    Returns:
        bool [C] per budget, in the order given: rows of at most so many bytes. If all candidates fit, all are hot.

    Note:
        Memory: about 30 bytes per id in the counted inputs, 150 per row that they need and 40 per other candidate. Time: each of up to 20
        peelings follows every id once and looks, once per step, at every remaining row that the counted inputs need, and at the other
        rows by `_Units` of equal ones.
    """
    masks = [np.ones(len(candidates), dtype=np.bool_) for _ in rooms]
    tight = [number for number, room in enumerate(rooms) if room < candidates.total_bytes]
    if tight:
        peeling = _Peeling(candidates, sorted({rooms[number] for number in tight}, reverse=True))
        best = peeling.run()
        for number in tight:
            masks[number] = best[rooms[number]]
    return masks


def hot_input_count(candidates: Candidates, hot: np.ndarray) -> int:
    """How many of the profile's counted inputs a selection makes all hot."""
    of_input, of_candidate = candidates.counted_pairs
    cold = np.zeros(candidates.profile.counted_inputs.num_samples, dtype=np.bool_)
    cold[of_input[~hot[of_candidate]]] = True
    return len(cold) - int(cold.sum())


class _Links:
    """Which others each owner is linked to, given as pairs: owners 0..size-1."""

    def __init__(self, owner: np.ndarray, other: np.ndarray, size: int) -> None:
        self._others = other[np.argsort(owner, kind="stable")]
        self.sizes = np.bincount(owner, minlength=size)
        self._ends = np.cumsum(self.sizes)

    def of(self, owners: np.ndarray) -> np.ndarray:
        """The others of all these owners, one owner's after the other's."""
        sizes = self.sizes[owners]
        ends = np.cumsum(sizes)
        shift = self._ends[owners] - ends
        others: np.ndarray = self._others[np.repeat(shift, sizes) + np.arange(int(ends[-1]) if ends.size else 0)]
        return others


class _Units:
    """What a peeling looks at and takes away: each row that a kept input needs by itself, and the others in bundles of equal ones.

    Most seen rows are in none of the inputs that were kept whole (27 of 30 M in a large profile). Those of one table and one count are
    alike in all that a peeling knows of them, so they are one unit until a step takes only a part of it.

    Attributes:
        order: int32 [C], the candidates unit after unit.
        first: int64 [U], where a unit begins in `order`.
        rows: int64 [U], rows of a unit.
        table: int64 [U], number of their table.
        row_bytes: int64 [U], bytes of one of the rows.
        expected: float64 [U], accesses of one of the rows that as many inputs as were kept have on average: the counts may be of more.
        load: float64 [U], what one of the rows was worth whenever it went.
    """

    def __init__(self, candidates: Candidates, needed: np.ndarray) -> None:
        """`needed`: int [K], the candidates that kept inputs need, ascending; they are units 0..K-1."""
        is_other = np.ones(len(candidates), dtype=np.bool_)
        is_other[needed] = False
        others = np.flatnonzero(is_other).astype(np.int32)
        counts = candidates.counts[others]
        counts = counts.astype(np.min_scalar_type(int(counts.max(initial=0))))  # numpy sorts 16 bits ten times as fast as 64
        by_count = np.argsort(counts, kind="stable")
        others, counts = others[by_count], counts[by_count]
        table = np.searchsorted(candidates.starts, others, side="right") - 1
        is_head = np.ones(len(others), dtype=np.bool_)
        is_head[1:] = (table[1:] != table[:-1]) | (counts[1:] != counts[:-1])
        heads = np.flatnonzero(is_head)
        self.order = np.concatenate([needed.astype(np.int32), others])
        self.first = np.concatenate([np.arange(len(needed)), len(needed) + heads])
        self.rows = np.diff(self.first, append=len(self.order))
        leader = self.order[self.first]
        self.table = np.searchsorted(candidates.starts, leader, side="right") - 1
        self.row_bytes = candidates.row_bytes[leader]
        profile = candidates.profile
        self.expected = candidates.counts[leader] * (profile.counted_inputs.num_samples / profile.num_samples)
        self.load = np.zeros(len(self.first))

    def split(self, units: np.ndarray, staying: np.ndarray) -> np.ndarray:
        """Parts units in two: the last `staying` rows keep the number; the first ones become units of their own, which are returned."""
        parts = np.arange(len(self.first), len(self.first) + len(units))
        for name in ("first", "rows", "table", "row_bytes", "expected", "load"):
            values = getattr(self, name)
            setattr(self, name, np.append(values, values[units]))
        self.rows[parts] -= staying
        self.first[units] += self.rows[parts]
        self.rows[units] = staying
        return parts

    def mask(self, units: np.ndarray) -> np.ndarray:
        """The rows of some units: bool [C]."""
        edges = np.zeros(len(self.order) + 1, dtype=np.int8)
        edges[self.first[units]] = 1
        edges[self.first[units] + self.rows[units]] -= 1
        mask = np.empty(len(self.order), dtype=np.bool_)
        mask[self.order] = np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_)
        return mask


class _Peeling:
    """Repeated peelings down to the smallest budget, and the best set seen at every budget on the way."""

    def __init__(self, candidates: Candidates, rooms: Sequence[int]) -> None:
        self.rooms = rooms  # descending
        self.total_bytes, self.num_tables = candidates.total_bytes, len(candidates.tables)
        self.num_inputs = candidates.profile.counted_inputs.num_samples
        of_input, of_candidate = candidates.counted_pairs
        rows, of_unit = np.unique(of_candidate, return_inverse=True)
        self.units = _Units(candidates, rows)
        # Both ways, so that a peeling follows each pair once, whatever the number of its steps.
        self.inputs_of = _Links(of_unit, of_input, len(rows))
        self.units_of = _Links(of_input, of_unit.astype(np.int32), self.num_inputs)
        self.best = {room: (-1, np.zeros(0, dtype=np.bool_)) for room in rooms}

    def run(self) -> dict[int, np.ndarray]:
        idle = 0
        for _ in range(_PEELINGS):
            idle = 0 if self._peel() else idle + 1
            if idle == _PATIENCE:
                break
        return {room: hot for room, (_, hot) in self.best.items()}

    def _peel(self) -> bool:
        """One peeling; whether it left a better set for some budget."""
        better = False
        units = self.units
        hot = np.roll(np.arange(len(units.first)), -len(self.inputs_of.sizes))  # of equal rows, those that no input needs go first
        needed = self.inputs_of.sizes.copy()
        alive = np.ones(self.num_inputs, dtype=np.bool_)
        used, num_alive = self.total_bytes, self.num_inputs
        for room in (*self.rooms, int(self.rooms[-1] * _BEYOND)):
            while used > room and hot.size:
                worth = self._worth(needed, hot) / units.row_bytes[hot]
                target = max(room, int(used * (1 - _STEP)))
                leaving = _least(units.load[hot] + worth, units.rows[hot] * units.row_bytes[hot], used - target)
                gone, row_bytes = hot[leaving], units.row_bytes[hot[leaving]]
                rows = units.rows[gone]
                staying = np.zeros_like(rows)
                staying[-1] = (target - used + int(rows @ row_bytes)) // row_bytes[-1]  # of a bundle no more leave than have to
                spare = room - used + int((rows - staying) @ row_bytes)
                if spare > 0:
                    staying += _spared(rows - staying, row_bytes, worth[leaving], spare)
                used -= int((rows - staying) @ row_bytes)
                left = np.ones(len(hot), dtype=np.bool_)
                left[leaving[staying == 0]] = False
                hot = hot[left]
                parted = (staying > 0) & (staying < rows)
                gone[parted] = units.split(gone[parted], staying[parted])
                gone = gone[staying < rows]
                units.load[gone] += worth[leaving[staying < rows]]
                hit = self.inputs_of.of(gone[gone < len(needed)])
                died = np.sort(hit[alive[hit]])
                died = died[np.concatenate([[True], died[1:] != died[:-1]])] if died.size else died
                alive[died] = False
                num_alive -= died.size
                np.subtract.at(needed, self.units_of.of(died), 1)
            if room in self.best and num_alive > self.best[room][0]:
                self.best[room] = (num_alive, units.mask(hot))
                better = True
        units.load[hot] += self._worth(needed, hot) / units.row_bytes[hot]
        return better

    def _worth(self, needed: np.ndarray, hot: np.ndarray) -> np.ndarray:
        """Inputs that would go cold with a row of each hot unit, estimated: float64 [hot units]."""
        first = int(np.count_nonzero(hot >= len(needed)))  # of the units that inputs need
        here, kept, table = needed[hot[first:]], self.inputs_of.sizes[hot[first:]], self.units.table[hot]
        share = np.bincount(table[first:], here, self.num_tables) / np.maximum(np.bincount(table[first:], kept, self.num_tables), 1)
        worth: np.ndarray = self.units.expected[hot] * share[table]  # as below for a row that no input needs
        worth[first:] = self.units.expected[hot[first:]] * (here + _PRIOR * share[table[first:]]) / (kept + _PRIOR)
        return worth


def _least(score: np.ndarray, size: np.ndarray, total: int) -> np.ndarray:
    """The entries of the smallest scores whose sizes reach `total`, in that order, ties by position: int64."""
    most, places = len(score) // 32 + 1, np.zeros(0, dtype=np.int64)
    while places.size < len(score) and int(size[places].sum()) < total:  # not all are sorted: a few are mostly enough
        most = min(2 * most, len(score))
        places = np.flatnonzero(score <= np.partition(score, most - 1)[most - 1])
    places = places[np.argsort(score[places], kind="stable")]
    taken: np.ndarray = places[: int(np.searchsorted(np.cumsum(size[places]), total)) + 1]
    return taken


def _spared(rows: np.ndarray, row_bytes: np.ndarray, worth: np.ndarray, room: int) -> np.ndarray:
    """How many rows of each leaving unit can stay in `room` bytes, the best first (row sizes differ: a step may take too much): int64."""
    spared = np.zeros_like(rows)
    order = np.argsort(-worth, kind="stable")
    while (order := order[row_bytes[order] <= room]).size:
        fitting = int(np.searchsorted(np.cumsum((rows * row_bytes)[order]), room, side="right"))
        spared[order[:fitting]] = rows[order[:fitting]]
        room -= int((rows * row_bytes)[order[:fitting]].sum())
        if fitting < len(order):  # a part of the next one, whose rows then fit no more
            best = order[fitting]
            spared[best] = room // row_bytes[best]
            room -= int(spared[best] * row_bytes[best])
        order = order[fitting + 1 :]
    return spared
