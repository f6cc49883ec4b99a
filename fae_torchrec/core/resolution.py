"""What a sample of the inputs can resolve: whether a budget's boundary falls among rows seen only once, and the rate that would tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fae_torchrec.core.popularity import PopularityProfile


@dataclass(frozen=True)
class Resolution:
    """What the counts of a sample can say about the rows at a budget's boundary.

    Attributes:
        reached: the limit of what the sample resolves is reached: rows seen at least twice do not fill the budget, so its boundary lies
            among rows seen once or never, which the sample cannot tell apart. False if all rows of the tables fit: then there is none.
        seen_rows: rows seen, over the tables.
        seen_once_rows: rows of those that were seen once.
        seen_bytes: bytes of the rows seen.
        repeated_bytes: bytes of the rows seen at least twice.
        growth: the exponent by which `repeated_bytes` grows with the sampling rate here.
        sampling_rate: the rate at which the inputs were counted.
        resolving_rate: the rate at which rows seen at least twice would fill the budget, at most 1 and roughly (see `resolution`); the
            sample's own rate if the limit is not reached.
    """

    reached: bool
    seen_rows: int
    seen_once_rows: int
    seen_bytes: int
    repeated_bytes: int
    growth: float
    sampling_rate: float
    resolving_rate: float


def resolution(profile: PopularityProfile, tables: Iterable[str], budget_bytes: int) -> Resolution:
    """Says whether a budget asks more than the counts know, and which sampling rate would answer it.

    A row is seen twice or more at rate x with probability 1 - e^-a - a e^-a, a = x * (its accesses in all inputs), if its accesses are
    sampled as a Poisson process. The derivative by ln x is a² e^-a, twice the chance to be seen exactly twice. So the bytes B2(x) of the
    rows seen at least twice grow, at this rate, with the local exponent

        growth = d ln B2 / d ln x = 2 * bytes(seen exactly twice) / B2

    and by Heaps' law, which keeps the exponent, they fill the budget at x' = x * (budget / B2)^(1 / growth). (The exponent of all rows
    seen, bytes(seen once) / bytes(seen), is the same where Heaps' law holds exactly, but is lower where rows run out or a table is nearly
    unexplored: in the trials below it asked for a rate that filled the budget up to 2.1 times over.)

    How rough this is: for Zipf exponents of 0.8 to 1.3, 0.2 and 2 M rows, rates of 2 to 10 %, and budgets of 1.2 to 8 times B2, sampling at
    x' filled 0.8 to 1.05 of the budget. It falls short as rows run out. Accesses that come in bursts, several by one input, are seen
    together, which makes a row look more explored than it is: take it for a factor of two.

    Args:
        profile: counts at some sampling rate; at rate 1 there is no higher one, and `resolving_rate` is 1.
        tables: names of the tables whose rows compete for the budget.
        budget_bytes: fast memory for the rows.
    """
    specs = [profile.tables[name] for name in tables]
    counts = [profile.counts[spec.name].counts for spec in specs]
    row_bytes = np.array([spec.row_bytes for spec in specs], dtype=np.int64)
    seen = np.array([table_counts.size for table_counts in counts], dtype=np.int64)
    once, twice = (np.array([np.count_nonzero(table_counts == times) for table_counts in counts], dtype=np.int64) for times in (1, 2))
    seen_bytes, once_bytes, twice_bytes = (int(rows @ row_bytes) for rows in (seen, once, twice))
    repeated_bytes = seen_bytes - once_bytes
    growth = 2 * twice_bytes / repeated_bytes if repeated_bytes else 0.0
    reached = repeated_bytes < budget_bytes < sum(spec.total_bytes for spec in specs)
    rate = profile.sample_rate
    if reached:
        # Without rows seen exactly twice the counts do not grow, as far as they tell: only all inputs can say.
        rate = _grown(rate, budget_bytes / repeated_bytes, growth) if twice_bytes else 1.0
    return Resolution(reached, int(seen.sum()), int(once.sum()), seen_bytes, repeated_bytes, growth, profile.sample_rate, rate)


def _grown(rate: float, factor: float, growth: float) -> float:
    """The rate at which something that grows as rate**growth is `factor` times as large; at most 1."""
    # As logarithms: a power of a small growth may overflow.
    return float(np.exp(min(0.0, np.log(rate) + np.log(factor) / growth)))
