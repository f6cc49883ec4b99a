"""The turns of a comparison: in which order runs are made, and what the repeats of a run come to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

Entry = Mapping[str, Any]


def turns(names: Sequence[T], repeats: int) -> list[list[T]]:
    """The order of the runs: each turn runs every name once, in another order than the turn before.

    The first turn has the given order, each next one begins one name later, and after every name has been first the other direction
    follows. So each name is as often early as late, and is not always behind the same one.

    Args:
        names: what is run.
        repeats: turns.
    """
    orders = []
    for turn in range(repeats):
        cycle, first = divmod(turn, len(names))
        order = [names[(first + place) % len(names)] for place in range(len(names))]
        orders.append(order[::-1] if cycle % 2 else order)
    return orders


def summary(entries: Sequence[Entry], keys: Sequence[str]) -> dict[str, Any]:
    """The repeats of one run as one entry.

    Args:
        entries: of the repeats; what is not summarized is taken from the first.
        keys: of the figures. Each becomes the median over the repeats; where repeats differ, `KEY_spread` has the least and the most.

    Returns:
        The entry, with "repeats" (their number).
    """
    made = dict(entries[0])
    for key in keys:
        values = [entry[key] for entry in entries if entry.get(key) is not None]
        if len(values) == len(entries) > 1:
            made[key] = statistics.median(values)
            made.pop(f"{key}_spread", None)  # over parts of one run
            if min(values) < max(values):
                made[f"{key}_spread"] = [min(values), max(values)]
    made["repeats"] = len(entries)
    return made
