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
        Memory: about 30 bytes per id in the counted inputs and 100 per candidate. Time: each of up to 20 peelings follows every id once
        and looks at the remaining rows once per step.
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


class _Peeling:
    """Repeated peelings down to the smallest budget, and the best set seen at every budget on the way."""

    def __init__(self, candidates: Candidates, rooms: Sequence[int]) -> None:
        self.candidates = candidates
        self.rooms = rooms  # descending
        inputs = candidates.profile.counted_inputs
        self.num_inputs = inputs.num_samples
        of_input, of_candidate = candidates.counted_pairs
        # Both ways, so that a peeling follows each pair once, whatever the number of its steps.
        self.inputs_of = _Links(of_candidate, of_input, len(candidates))
        self.candidates_of = _Links(of_input, of_candidate, self.num_inputs)
        # Accesses that as many inputs as were kept have on average: the counts may be of more inputs.
        self.expected = candidates.counts * (inputs.num_samples / candidates.profile.num_samples)
        self.load = np.zeros(len(candidates))
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
        hot_rows = np.arange(len(self.candidates))
        needed = self.inputs_of.sizes.copy()
        alive = np.ones(self.num_inputs, dtype=np.bool_)
        used, num_alive = self.candidates.total_bytes, self.num_inputs
        for room in (*self.rooms, int(self.rooms[-1] * _BEYOND)):
            while used > room and hot_rows.size:
                row_bytes = self.candidates.row_bytes[hot_rows]
                worth = self._worth(needed, hot_rows) / row_bytes
                target = max(room, int(used * (1 - _STEP)))
                leaving = _least(self.load[hot_rows] + worth, row_bytes, used - target)
                if target == room:
                    _spare(leaving, worth, row_bytes, room - used + int(row_bytes[leaving].sum()))
                gone = hot_rows[leaving]
                self.load[gone] += worth[leaving]
                used -= int(row_bytes[leaving].sum())
                hot_rows = hot_rows[~leaving]
                hit = self.inputs_of.of(gone)
                died = np.sort(hit[alive[hit]])
                died = died[np.concatenate([[True], died[1:] != died[:-1]])] if died.size else died
                alive[died] = False
                num_alive -= died.size
                np.subtract.at(needed, self.candidates_of.of(died), 1)
            if room in self.best and num_alive > self.best[room][0]:
                self.best[room] = (num_alive, np.isin(np.arange(len(self.candidates)), hot_rows, assume_unique=True, kind="table"))
                better = True
        self.load[hot_rows] += self._worth(needed, hot_rows) / self.candidates.row_bytes[hot_rows]
        return better

    def _worth(self, needed: np.ndarray, hot_rows: np.ndarray) -> np.ndarray:
        """Inputs that would go cold with each hot row, estimated: float64 [hot rows]."""
        here, kept, table = needed[hot_rows], self.inputs_of.sizes[hot_rows], self.candidates.table_number[hot_rows]
        tables = len(self.candidates.tables)
        share = np.bincount(table, here, tables) / np.maximum(np.bincount(table, kept, tables), 1)
        worth: np.ndarray = self.expected[hot_rows] * (here + _PRIOR * share[table]) / (kept + _PRIOR)
        return worth


def _least(score: np.ndarray, size: np.ndarray, total: int) -> np.ndarray:
    """The entries of the smallest scores whose sizes reach `total`, ties by position: bool of the shape of `score`."""
    # Not all are sorted: the smallest sizes bound how many entries can be wanted.
    most = min(len(score), -(-total // int(size.min())))
    bound = np.partition(score, most - 1)[most - 1]
    places = np.flatnonzero(score <= bound)
    places = places[np.argsort(score[places], kind="stable")]
    taken = places[: int(np.searchsorted(np.cumsum(size[places]), total)) + 1]
    chosen = np.zeros(len(score), dtype=np.bool_)
    chosen[taken] = True
    return chosen


def _spare(leaving: np.ndarray, score: np.ndarray, size: np.ndarray, room: int) -> None:
    """Takes back the best of what leaves as far as it fits in `room` bytes (sizes differ, so the last step may have taken too much)."""
    while room >= int(size.min()):
        fitting = np.flatnonzero(leaving & (size <= room))
        if not fitting.size:
            break
        back = fitting[np.argmax(score[fitting])]
        leaving[back] = False
        room -= int(size[back])
