"""A cache of rows that throws out the least recently used one, simulated access by access: what measured curves must agree with."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np


def simulated_misses(steps: np.ndarray, size: int) -> float:
    """Share of accesses in the second half of the steps that an LRU cache of this many rows misses."""
    cache: OrderedDict[int, None] = OrderedDict()
    misses = accesses = 0
    for number, step in enumerate(steps):
        for row in np.unique(step).tolist():
            if number >= len(steps) // 2:
                accesses += 1
                misses += row not in cache
            cache[row] = None
            cache.move_to_end(row)
            if len(cache) > size:
                cache.popitem(last=False)
    return misses / accesses
