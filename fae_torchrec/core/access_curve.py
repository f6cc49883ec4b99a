"""The access curve of one table: how likely each row is to be looked up, rows of like popularity together, the most popular first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.histogram import count_levels
from fae_torchrec.core.row_counts import RowCounts

Floats = npt.NDArray[np.float64]

_SINGLE = 1_000  # the most popular rows have bins of their own
_BINS_PER_DECADE = 128
_MOST_LEVELS = 4_096  # bins of a counted table


@dataclass(frozen=True, eq=False)
class AccessCurve:
    """How one table is accessed. The arrays are read-only by agreement.

    Attributes:
        rows: float64 [bins], rows of each bin; all rows of the table.
        chance: float64 [bins], the chance that one lookup goes to one given row of the bin, not ascending; times `rows` it adds up to 1.
        lookups: ids per sample, over all features of the table.
        seen: bins before this one are of rows that are known to be accessed; only these can be hot.

    Raises:
        ConfigError: the arrays do not describe a distribution.
    """

    rows: Floats
    chance: Floats
    lookups: float
    seen: int

    def __post_init__(self) -> None:
        total = float((self.rows * self.chance).sum())
        if self.rows.shape != self.chance.shape or not np.isclose(total, 1.0, atol=1e-6) or bool((np.diff(self.chance) > 1e-12).any()):
            raise ConfigError(
                f"an access curve needs as many chances as bins, descending, that add up to 1 over the rows; received {self.rows.shape} "
                f"rows, {self.chance.shape} chances, sum {total}"
            )

    @cached_property
    def mass(self) -> Floats:
        """Share of the lookups that go to each bin: float64 [bins]."""
        return self.rows * self.chance

    @cached_property
    def tail(self) -> Floats:
        """Share of the lookups that go to each bin or a less popular one: float64 [bins], 1 at first."""
        tail: Floats = np.minimum(self.mass[::-1].cumsum()[::-1], 1.0)
        return tail

    @classmethod
    def uniform(cls, rows: int, lookups: float = 1.0) -> AccessCurve:
        """All rows alike."""
        return cls(np.array([float(rows)]), np.array([1.0 / rows]), lookups, 1)

    @classmethod
    def zipf(cls, rows: int, exponent: float, shift: float = 1.0, lookups: float = 1.0) -> AccessCurve:
        """A bounded Zipf-Mandelbrot law: the density of rank r (0 = most popular) is (r + shift) ** -exponent, integrated over [r, r + 1).

        Args:
            rows: of the table.
            exponent: 0 is uniform.
            shift: above 0.
            lookups: ids per sample.
        """
        if not exponent:
            return cls.uniform(rows, lookups)
        edges = _edges(rows)
        mass = np.diff(_integral(edges + shift, exponent) - _integral(np.array([shift]), exponent))
        widths = np.diff(edges)
        return cls(widths, mass / mass.sum() / widths, lookups, len(widths))

    @classmethod
    def counted(cls, counts: RowCounts, lookups: float) -> AccessCurve:
        """Of counts, each less `discount`; what that leaves is shared by the rows that were not seen.

        Args:
            counts: of the table's rows.
            lookups: ids per sample.
        """
        levels, rows_at = (part.astype(np.float64) for part in count_levels(counts))
        unseen = counts.rows - counts.ids.size
        if not levels.size:
            return cls(np.array([float(counts.rows)]), np.array([1.0 / counts.rows]), lookups, 0)
        total, less = float((levels * rows_at).sum()), discount(counts)
        if levels.size > _MOST_LEVELS:
            levels, rows_at = _thinned(levels, rows_at)
        chance = (levels - less) / total
        if not unseen:
            return cls(rows_at, chance, lookups, len(rows_at))
        missing = less * counts.ids.size / total
        rest = min(missing / unseen, float(chance[-1]))  # unseen rows cannot be likelier than those seen once
        chance *= (1 - rest * unseen) / (1 - missing)
        return cls(np.append(rows_at, float(unseen)), np.append(chance, rest), lookups, len(rows_at))

    def distinct(self, samples: float, mass: Floats | None = None, part: Floats | None = None) -> Floats:
        """Expected distinct rows by bin that samples look up: float64 [bins].

        Args:
            samples: that look up `lookups` ids each.
            mass: share of lookups by bin, where these samples are not like all: float64 [bins]; it may add up to less than 1.
            part: share of each bin's rows that `mass` goes to, where not to all of them: float64 [bins].
        """
        rows = self.rows if part is None else self.rows * part
        chance = self.chance if mass is None else np.divide(mass, rows, out=np.zeros_like(rows), where=rows > 0)
        misses = np.log1p(-np.minimum(chance, 1 - 1e-12))
        found: Floats = -rows * np.expm1(self.lookups * samples * misses)
        return found


def discount(counts: RowCounts) -> float:
    """What a count is too high by: accesses that would have gone to rows that were not seen, had they been others.

    Good and Turing: an access goes to a row that was not seen as often as, among those counted, to one seen once. All seen rows are
    discounted alike (Kneser and Ney): popular rows lose next to nothing of their share.

    Returns:
        0 where every row was seen; less than 1.
    """
    unseen = counts.rows - counts.ids.size
    if not unseen or not counts.ids.size:
        return 0.0
    once = int((counts.counts == 1).sum())
    # Where all accesses are first ones nothing is known of the rest: every row alike.
    missing = min(once / counts.total, unseen / counts.rows)
    return missing * counts.total / counts.ids.size


def _edges(rows: int) -> Floats:
    """Ranks at which bins begin, and the end: single rows first, then evenly spaced on a logarithmic axis."""
    first = np.arange(min(rows, _SINGLE) + 1, dtype=np.float64)
    if rows <= _SINGLE:
        return first
    number = max(2, int(np.ceil(np.log10(rows / _SINGLE) * _BINS_PER_DECADE)))
    rest = np.unique(np.rint(np.geomspace(_SINGLE, rows, number + 1)))
    edges: Floats = np.concatenate([first, rest[1:]])
    return edges


def _integral(ranks: Floats, exponent: float) -> Floats:
    power = 1.0 - exponent
    found: Floats = np.log(ranks) if abs(power) < 1e-9 else ranks**power / power
    return found


def _thinned(levels: Floats, rows_at: Floats) -> tuple[Floats, Floats]:
    """Fewer levels: those within half a per cent or so of each other joined, which keeps their rows and accesses.

    Small levels, of which each has many rows, are further apart than that.
    """
    bins = np.floor(np.log(levels) / np.log(levels[0]) * (_MOST_LEVELS - 1))
    cuts = np.flatnonzero(np.diff(bins, prepend=bins[0] + 1))
    rows = np.add.reduceat(rows_at, cuts)
    return np.add.reduceat(levels * rows_at, cuts) / rows, rows
