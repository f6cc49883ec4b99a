"""How samples access all tables, and what a budget of fast memory would make of it: hot inputs, and what hot and cold samples look up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import gammaincinv

from fae_torchrec.core.access_curve import AccessCurve, Floats, discount
from fae_torchrec.core.errors import BudgetError, ConfigError
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_ids import find_slots
from fae_torchrec.core.tables import TableSet

_SAME = 1e-9  # relative difference of densities that are the same
_GROUPS = 64  # of a table's bins, in each of which the share of hot samples is counted
_LEVELS = 128  # of the integral over what a coupled sample's features share


class Joint(Protocol):
    """How the lookups of one sample go together."""

    def hot_inputs(self, curves: Sequence[AccessCurve], hot: Sequence[Floats], density: float, partly: float) -> float:
        """Share of samples that are all hot.

        Args:
            curves: of the tables.
            hot: by table, float64 [bins], share of each bin's rows that is hot.
            density: lookups per sample and byte; rows above it are hot.
            partly: share of the rows of exactly this density that is hot.
        """

    def mass_of_hot(self, curves: Sequence[AccessCurve], hot: Sequence[Floats], number: int, density: float) -> Floats:
        """Where the lookups of hot samples go in table `number`: float64 [bins], adds up to 1 (or 0 if there are no hot samples)."""


class Independent:
    """Every lookup for itself: the chance of a hot sample is the product of the tables' coverages, for each lookup."""

    def hot_inputs(self, curves: Sequence[AccessCurve], hot: Sequence[Floats], density: float, partly: float) -> float:
        """See `Joint`."""
        return float(np.prod([float(curve.mass @ part) ** curve.lookups for curve, part in zip(curves, hot, strict=True)]))

    def mass_of_hot(self, curves: Sequence[AccessCurve], hot: Sequence[Floats], number: int, density: float) -> Floats:
        """See `Joint`."""
        mass = curves[number].mass * hot[number]
        total = float(mass.sum())
        return mass / total if total else mass


@dataclass(frozen=True)
class Coupled:
    """One-hot samples whose tables' tails move together: a survival Clayton copula, as `data.synthetic` draws them.

    Attributes:
        coupling: theta; above 0.
    """

    coupling: float

    def hot_inputs(self, curves: Sequence[AccessCurve], hot: Sequence[Floats], density: float, partly: float) -> float:
        """See `Joint`."""
        return float(np.exp(self._log_hot(curves, hot).sum(axis=0)).mean())

    def mass_of_hot(self, curves: Sequence[AccessCurve], hot: Sequence[Floats], number: int, density: float) -> Floats:
        """See `Joint`."""
        logs = self._log_hot(curves, hot)
        others = np.exp(logs.sum(axis=0) - logs[number])
        mass: Floats = (self._of_bins(curves[number]) @ others) * hot[number]
        total = float(mass.sum())
        return mass / total if total else mass

    @cached_property
    def _level(self) -> Floats:
        middles = (np.arange(_LEVELS) + 0.5) / _LEVELS
        level: Floats = np.maximum(gammaincinv(1.0 / self.coupling, middles), np.finfo(np.float64).tiny)
        return level

    def _below(self, tail: Floats) -> Floats:
        """The chance, at each level, that a lookup's survival is below `tail`: [len(tail), levels]."""
        with np.errstate(divide="ignore", over="ignore"):
            reach = np.maximum(tail, 1e-300) ** -self.coupling - 1.0
            chance: Floats = np.exp(-np.minimum(self._level[None] * reach[:, None], 745.0))
        chance[tail <= 0] = 0.0
        return chance

    def _of_bins(self, curve: AccessCurve) -> Floats:
        """At each level, the chance of a bin, that the survival lies between those of its ends: [bins, levels]."""
        between: Floats = -np.diff(self._below(np.append(curve.tail, 0.0)), axis=0)
        return between

    def _log_hot(self, curves: Sequence[AccessCurve], hot: Sequence[Floats]) -> Floats:
        """Log of the chance that a table's lookup is hot, at each level: [tables, levels]."""
        cold = np.array([max(1.0 - float(curve.mass @ part), 0.0) for curve, part in zip(curves, hot, strict=True)])
        logs: Floats = np.log1p(-np.minimum(self._below(cold), 1 - 1e-12))
        return logs


@dataclass(frozen=True, eq=False)
class KeptIds:
    """The ids of one table in whole samples that were kept.

    Attributes:
        samples: int64 [ids], which sample each belongs to.
        bins: int64 [ids], which bin of the table's access curve.
    """

    samples: npt.NDArray[np.int64]
    bins: npt.NDArray[np.int64]


_KEPT = ("samples", "bins")


class Sampled:
    """Whole samples that were kept: a sample is hot from the budget on that makes its least accessed id hot.

    Args:
        densities: float64 [samples], of each one's least accessed id, lookups per sample and byte; infinite for pinned tables' ids.
        kept: of each table.
    """

    def __init__(self, densities: Floats, kept: Sequence[KeptIds]) -> None:
        self._densities, self._kept = densities, kept

    def hot_inputs(self, curves: Sequence[AccessCurve], hot: Sequence[Floats], density: float, partly: float) -> float:
        """See `Joint`."""
        low, high = _around(density)
        cold, above = int((self._densities < low).sum()), int((self._densities > high).sum())
        equal = len(self._densities) - cold - above
        return (above + partly * equal) / max(len(self._densities), 1)

    def mass_of_hot(self, curves: Sequence[AccessCurve], hot: Sequence[Floats], number: int, density: float) -> Floats:
        """See `Joint`; how often a sample is hot that looks up a row of some bins, told from those that were kept."""
        curve, kept = curves[number], self._kept[number]
        groups = _groups(curve)
        of_ids, is_hot = groups[kept.bins], self._densities[kept.samples] >= _around(density)[0]
        seen = np.bincount(of_ids, minlength=groups[-1] + 1)
        share = np.bincount(of_ids[is_hot], minlength=groups[-1] + 1) / np.maximum(seen, 1)
        mass: Floats = curve.mass * hot[number] * share[groups]
        total = float(mass.sum())
        return mass / total if total else mass


def _around(density: float) -> tuple[float, float]:
    """What counts as the same density: both come from counts, by different roundings."""
    slack = _SAME * density if np.isfinite(density) else 0.0
    return density - slack, density + slack


def _groups(curve: AccessCurve) -> npt.NDArray[np.int64]:
    """Bins joined to some that take alike shares of the lookups, numbered: int64 [bins], ascending."""
    middle = np.minimum((1 - curve.tail + 0.5 * curve.mass) * _GROUPS, _GROUPS - 1).astype(np.int64)
    numbers: npt.NDArray[np.int64] = np.unique(middle, return_inverse=True)[1].astype(np.int64)
    return numbers


@dataclass(frozen=True, eq=False)
class HotShare:
    """What one budget makes hot. A row's density is its table's lookups per sample that go to it, over its bytes.

    Attributes:
        budget_bytes: fast memory per rank, weights and optimizer state.
        used_bytes: of it.
        hot: by table, float64 [bins], share of the bin's rows that is hot.
        hot_rows: by table.
        hot_inputs: share of samples that are all hot.
        coverage: by table, share of its lookups that are hot.
        of_hot: by table, where the lookups of hot samples go, all of them hot rows: float64 [bins]; adds up to 1, or to less where hot
            samples look up fewer ids of the table than the others.
        of_cold: by table, the same of cold samples.
    """

    budget_bytes: int
    used_bytes: float
    hot: tuple[Floats, ...]
    hot_rows: Floats
    hot_inputs: float
    coverage: Floats
    of_hot: tuple[Floats, ...]
    of_cold: tuple[Floats, ...]

    def of(self, kind: str) -> tuple[Floats, ...]:
        """Where the lookups of "hot" or "cold" samples go, by table."""
        return self.of_hot if kind == "hot" else self.of_cold


class AccessModel:
    """How samples access the tables of a model.

    Args:
        tables: the tables.
        curves: table name -> its access curve.
        joint: how the lookups of a sample go together.
        source: where the figures come from, free text.
    """

    def __init__(self, tables: TableSet, curves: Mapping[str, AccessCurve], joint: Joint, source: str) -> None:
        if missing := sorted(set(tables.names) - curves.keys()):
            raise ConfigError(f"access curves of the tables {missing} are missing; give one for every table")
        self.tables = tables
        self.curves = tuple(curves[name] for name in tables.names)
        self.source = source
        self._joint = joint
        self._shares: dict[tuple[int, int], HotShare] = {}

    @classmethod
    def uniform(cls, tables: TableSet) -> AccessModel:
        """Every row alike: no popular rows."""
        curves = {table.name: AccessCurve.uniform(table.rows, len(table.feature_names)) for table in tables}
        return cls(tables, curves, Independent(), "uniform accesses")

    @classmethod
    def from_profile(cls, profile: PopularityProfile, tables: TableSet, pinned_max_rows: int = 1024) -> AccessModel:
        """As a profile counted it.

        Args:
            profile: of these tables, or of tables with the same names and rows.
            tables: with the bytes to plan for.
            pinned_max_rows: tables of at most so many rows are always hot; use the same in `share`.

        Raises:
            FingerprintError: the profile is of other tables.
        """
        profile = profile.for_tables(tables)
        inputs = profile.counted_inputs if profile.fresh_inputs is None else profile.fresh_inputs
        found = profile.counts
        curves = {name: AccessCurve.counted(found[name], found[name].total / profile.num_samples) for name in tables.names}
        least = np.full(inputs.num_samples, np.inf)
        kept: dict[str, list[KeptIds]] = {name: [] for name in tables.names}
        for name, feature in tables.lookups:
            table, counts, curve = tables[name], profile.counts[name], curves[name]
            places = find_slots(counts.ids, inputs.values[feature])
            seen = np.where(places >= 0, counts.counts[np.maximum(places, 0)] if counts.ids.size else 0, 0)
            # The curve's chance, not the plain share of counts, so that both compare alike with a density.
            less = discount(counts)
            scale = float(curve.mass[: curve.seen].sum()) / max(counts.total - less * counts.ids.size, 1e-12)
            chance = np.maximum(seen - less, 0.0) * scale
            bins = np.searchsorted(-curve.chance, -chance * (1 + _SAME), side="left")
            samples = inputs.input_of_id(feature)
            kept[name].append(KeptIds(samples, np.minimum(bins, len(curve.chance) - 1)))
            if table.rows > pinned_max_rows:
                np.minimum.at(least, samples, chance * curve.lookups / table.row_bytes)
        joined = [KeptIds(*(np.concatenate([getattr(of, part) for of in of_table]) for part in _KEPT)) for of_table in kept.values()]
        return cls(tables, curves, Sampled(least, joined), f"profile {profile.fingerprint}")

    def share(self, budget_bytes: int, pinned_max_rows: int = 1024) -> HotShare:
        """What a budget makes hot: tables of at most `pinned_max_rows` rows, and of the others the rows of the greatest density.

        What was asked for is kept: the same budget is looked at for many numbers of ranks.

        Raises:
            BudgetError: the pinned tables alone exceed the budget.
        """
        key = budget_bytes, pinned_max_rows
        if key not in self._shares:
            self._shares[key] = self._select(budget_bytes, pinned_max_rows)
        return self._shares[key]

    def chosen(self, hot: Sequence[Floats], hot_inputs: float) -> HotShare:
        """What given hot rows make.

        Args:
            hot: by table, float64 [bins], share of each bin's rows that is hot.
            hot_inputs: share of samples that are all hot, known from elsewhere.
        """
        used = sum(float(curve.rows @ part) * table.row_bytes for curve, part, table in zip(self.curves, hot, self.tables, strict=True))
        return self._shared(round(used), list(hot), hot_inputs, 0.0)

    def _select(self, budget_bytes: int, pinned_max_rows: int) -> HotShare:
        pinned = [table.rows <= pinned_max_rows for table in self.tables]
        least = sum(table.total_bytes for table, always in zip(self.tables, pinned, strict=True) if always)
        if least > budget_bytes:
            raise BudgetError(
                f"the budget is {budget_bytes} bytes, tables of at most {pinned_max_rows} rows, which are always hot, take {least}; give "
                "at least that, or pin fewer tables"
            )
        density, partly = self._cut(budget_bytes - least, pinned)
        hot = []
        for number, (curve, always) in enumerate(zip(self.curves, pinned, strict=True)):
            if always:
                hot.append(np.ones_like(curve.chance))
                continue
            of_bins = self._density(number)
            part = np.where(of_bins > density, 1.0, np.where(of_bins == density, partly, 0.0))
            part[curve.seen :] = 0.0
            hot.append(part)
        return self._shared(budget_bytes, hot, self._joint.hot_inputs(self.curves, hot, density, partly), density)

    def _density(self, number: int) -> Floats:
        curve, table = self.curves[number], self.tables.tables[number]
        density: Floats = curve.chance * curve.lookups / table.row_bytes
        return density

    @cached_property
    def _ranked(self) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
        """All bins that can be hot, densest first: densities, bytes, and the number of the table."""
        densities = [self._density(number)[: curve.seen] for number, curve in enumerate(self.curves)]
        sizes = [curve.rows[: curve.seen] * table.row_bytes for curve, table in zip(self.curves, self.tables, strict=True)]
        owner = np.repeat(np.arange(len(self.curves)), [curve.seen for curve in self.curves])
        order = np.argsort(-np.concatenate(densities), kind="stable")
        return np.concatenate(densities)[order], np.concatenate(sizes)[order], owner[order]

    def _cut(self, room: float, pinned: Sequence[bool]) -> tuple[float, float]:
        """The density from which rows are hot, and the share of those of exactly this density that still fits."""
        densities, sizes, owner = self._ranked
        free = ~np.array(pinned)[owner]
        densities, sizes = densities[free], sizes[free]
        ends = sizes.cumsum()
        if not len(ends) or ends[-1] <= room:
            return (float(densities[-1]), 1.0) if len(ends) else (np.inf, 1.0)  # infinite: a sample of pinned tables' ids alone is hot
        density = float(densities[int(np.searchsorted(ends, room, side="right"))])
        above, equal = float(sizes[densities > density].sum()), float(sizes[densities == density].sum())
        return density, (room - above) / equal

    def _shared(self, budget_bytes: int, hot: list[Floats], hot_inputs: float, density: float) -> HotShare:
        hot_inputs = min(max(hot_inputs, 0.0), 1.0)
        rows = np.array([float(curve.rows @ part) for curve, part in zip(self.curves, hot, strict=True)])
        coverage = np.array([float(curve.mass @ part) for curve, part in zip(self.curves, hot, strict=True)])
        if all(bool((part >= 1).all()) for part in hot):
            hot_inputs = 1.0
        # Where more samples are hot than lookups (many empty bags), hot samples have only those.
        most = np.minimum(coverage / max(hot_inputs, 1e-12), 1.0)
        of_hot = tuple(self._joint.mass_of_hot(self.curves, hot, number, density) * most[number] for number in range(len(hot)))
        of_cold = tuple(
            np.maximum(curve.mass - hot_inputs * own, 0.0) / (1 - hot_inputs) if hot_inputs < 1 else np.zeros_like(curve.mass)
            for curve, own in zip(self.curves, of_hot, strict=True)
        )
        used = sum(float(count) * table.row_bytes for count, table in zip(rows, self.tables, strict=True))
        return HotShare(budget_bytes, used, tuple(hot), rows, hot_inputs, coverage, of_hot, of_cold)
