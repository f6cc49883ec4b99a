"""Which rows are hot: what to select under a budget of bytes, and the savable result."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from fae_torchrec.core.archive import load_archive, save_archive
from fae_torchrec.core.candidates import Candidates
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.core.input_aware import hot_input_count, input_aware_masks
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.resolution import resolution
from fae_torchrec.core.row_ids import checked_hot_ids, hot_bytes
from fae_torchrec.core.statistical_optimizer import StatisticalOptimizer
from fae_torchrec.core.tables import TableSet
from fae_torchrec.core.threshold import ThresholdChoice, ThresholdSelector

_KIND = "hot set"

Policy = Literal["input_aware", "threshold"]
POLICIES: tuple[Policy, ...] = ("input_aware", "threshold")
Sizes = Literal["exact", "estimated"]


@dataclass(frozen=True, eq=False)
class HotSet:
    """The rows worth fast memory (what FAE's Embedding Classifier tags, FAE §4.2). The arrays are read-only by agreement.

    Attributes:
        tables: the tables.
        hot_ids: table name -> int64 [hot rows], strictly ascending; all ids if the table is all hot.
        pinned: names of the tables that are all hot because they are small.
        budget_bytes: fast memory per rank that was allowed (weights and optimizer state).
        used_bytes: fast memory per rank that the hot rows take.
        policy: how it was selected, "input_aware" or "threshold".
        threshold: per cent of its table's accesses that make a row hot; None if no threshold was set (`input_aware`).
        coverage: share of counted accesses that are hot, 0..1.
        hot_inputs: share of inputs that are all hot, 0..1, estimated on inputs that were not counted, if there are any.
        hot_inputs_interval: ends of its interval (`estimate.CONFIDENCE`).
        resolution_reached: whether the budget ends among rows that the sample saw once or not at all, which it cannot tell apart.
        resolving_rate: sampling rate that would tell them apart, roughly; the profile's own if it does.
        profile_fingerprint: the parent.

    Raises:
        DataError: the hot ids of a table are missing, out of order, repeated or out of range.
    """

    tables: TableSet
    hot_ids: Mapping[str, np.ndarray]
    pinned: tuple[str, ...]
    budget_bytes: int
    used_bytes: int
    policy: str
    threshold: float | None
    coverage: float
    hot_inputs: float
    hot_inputs_interval: tuple[float, float]
    resolution_reached: bool
    resolving_rate: float
    profile_fingerprint: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "hot_ids", checked_hot_ids(self.tables, self.hot_ids))

    @cached_property
    def fingerprint(self) -> str:
        """Names the hot set by its parent, how it was selected, and the hot ids."""
        return fingerprint(
            _KIND,
            self.tables.fingerprint,
            self.profile_fingerprint,
            [self.policy, self.budget_bytes, self.used_bytes, self.threshold, list(self.pinned)],
            *self.hot_ids.values(),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the hot set to one .npz file, under a temporary name first; `path` may be a URI that iopath knows."""
        save_archive(
            path,
            _KIND,
            fingerprint=self.fingerprint,
            parent=self.profile_fingerprint,
            fields={
                "tables": self.tables.to_json(),
                "pinned": list(self.pinned),
                "budget_bytes": self.budget_bytes,
                "used_bytes": self.used_bytes,
                "policy": self.policy,
                "threshold": self.threshold,
                "coverage": self.coverage,
                "hot_inputs": self.hot_inputs,
                "hot_inputs_interval": list(self.hot_inputs_interval),
                "resolution_reached": self.resolution_reached,
                "resolving_rate": self.resolving_rate,
                "profile_fingerprint": self.profile_fingerprint,
            },
            arrays={"hot_ids": self.hot_ids},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HotSet:
        """Reads what `save` wrote.

        Raises:
            ConfigError: there is no such file.
            DataError: the file is damaged or holds something else.
            FingerprintError: the content is not what was saved.
        """
        return load_archive(
            path,
            _KIND,
            lambda fields, arrays: cls(
                **{
                    **fields,
                    "tables": TableSet.from_json(fields["tables"]),
                    "pinned": tuple(fields["pinned"]),
                    "hot_inputs_interval": tuple(fields["hot_inputs_interval"]),
                    **arrays,
                }
            ),
        )


def select_hot_set(
    profile: PopularityProfile,
    budget_bytes: int,
    *,
    policy: Policy = "input_aware",
    pinned_max_rows: int = 1024,
    sizes: Sizes = "exact",
) -> HotSet:
    """Selects the hot rows under a budget of bytes.

    Small tables are pinned: all hot whatever their counts, since one unseen value of a tiny table would make a whole input cold. Among
    all other rows that were seen:

    - `input_aware` takes those that together make the most inputs all hot (`input_aware.input_aware_masks`); if `threshold` makes more of
      the profile's counted inputs hot, it returns that set.
    - `threshold` takes every row with at least t per cent of its table's accesses, t as small as the budget allows, as FAE's Statistical
      Optimizer does (FAE §4.1); what is left is filled with rows just below (`threshold.ThresholdSelector`). A cutoff below one counted
      access is "seen once", and `resolution_reached` says so.

    A row that the profile never saw is not hot, however large the budget. An input is hot only if all its ids are, those of a multi-hot
    bag too: the policies see whole inputs, so a bag is hot only if all of it is.

    Args:
        profile: the counts and the inputs.
        budget_bytes: fast memory per rank, weights and optimizer state.
        policy: "input_aware" or "threshold".
        pinned_max_rows: tables of at most so many rows are pinned; 0 pins none.
        sizes: how `threshold` knows how many rows a threshold makes hot: "exact" tallies all counts (as cheap here as it gets);
            "estimated" is FAE's way, 35 random chunks of 1,024 rows of each table, the upper end of their interval held against the
            budget, which leaves a part of it unused (`statistical_optimizer`).

    Returns:
        The hot set; its `used_bytes` are at most `budget_bytes`.

    Raises:
        BudgetError: the pinned tables alone exceed the budget; says what they need.
        ConfigError: `pinned_max_rows` is negative, the budget is no whole number, or there is no such policy or way to know sizes.
    """
    if sizes not in ("exact", "estimated"):
        raise ConfigError(f"sizes {sizes!r} is not one of ['exact', 'estimated']; name one of those")
    return next(_select(profile, [budget_bytes], policy, pinned_max_rows, sizes == "estimated"))


class CurvePoint(NamedTuple):
    """What a budget buys: bytes used, hot inputs with the ends of their interval, coverage (shares 0..1)."""

    used_bytes: int
    hot_inputs: float
    hot_inputs_interval: tuple[float, float]
    coverage: float


def hot_inputs_curve(
    profile: PopularityProfile, budgets_bytes: Sequence[int], pinned_max_rows: int = 1024, *, policy: Policy = "input_aware"
) -> list[CurvePoint]:
    """How hot inputs and coverage grow with the budget, for the picture (FAE Fig. 5).

    Args:
        profile: the counts and the inputs.
        budgets_bytes: budgets of fast memory per rank, in any order; all are selected in one go.
        pinned_max_rows: as in `select_hot_set`.
        policy: as in `select_hot_set`.

    Returns:
        One point per budget, in the order given.

    Raises:
        BudgetError: a budget is smaller than the pinned tables.
        ConfigError: `pinned_max_rows` is negative, or there is no such policy.
    """
    selected = _select(profile, budgets_bytes, policy, pinned_max_rows)
    return [CurvePoint(hot.used_bytes, hot.hot_inputs, hot.hot_inputs_interval, hot.coverage) for hot in selected]


class ThresholdPoint(NamedTuple):
    """What an access threshold (per cent of a table's accesses) makes hot; shares 0..1."""

    threshold_percent: float
    used_bytes: int
    hot_rows: int
    hot_inputs: float
    hot_inputs_interval: tuple[float, float]
    coverage: float


def threshold_curve(profile: PopularityProfile, pinned_max_rows: int = 1024, points: int = 24) -> list[ThresholdPoint]:
    """Hot inputs and hot rows against FAE's access threshold, without a budget (the figure FAE chooses its threshold by).

    Args:
        profile: the counts and the inputs.
        pinned_max_rows: as in `select_hot_set`.
        points: thresholds at most, from the most accessed row's down to "seen once", evenly spaced on a logarithmic axis.

    Returns:
        Points of descending threshold; the last is where every seen row is hot: no sample of this rate resolves smaller thresholds.

    Raises:
        ConfigError: `pinned_max_rows` is negative.
    """
    candidates = Candidates(profile, pinned_max_rows)
    selector = ThresholdSelector(candidates)
    if not len(selector.levels):
        return []
    wanted = np.geomspace(selector.levels[0], selector.levels[-1], points)
    levels = selector.levels[np.unique(np.searchsorted(-selector.levels, -wanted * (1 - 1e-9), side="right") - 1)]
    curve = []
    for level in levels.tolist():
        hot_ids = candidates.hot_ids(selector.at(level))
        share = profile.hot_inputs(hot_ids)
        rows = sum(len(ids) for ids in hot_ids.values())
        used = hot_bytes(profile.tables, hot_ids)
        curve.append(ThresholdPoint(level, used, rows, share.value, (share.low, share.high), profile.coverage(hot_ids)))
    return curve


def _select(
    profile: PopularityProfile, budgets_bytes: Sequence[int], policy: str, pinned_max_rows: int, estimate_sizes: bool = False
) -> Iterator[HotSet]:
    """One hot set per budget, made as it is asked for: the ids of one may take 8 bytes for each of 100 M rows."""
    if policy not in POLICIES:
        raise ConfigError(f"policy {policy!r} is not one of {list(POLICIES)}; name one of those")
    for budget in budgets_bytes:
        if not isinstance(budget, (int, np.integer)):
            raise ConfigError(f"the budget must be a whole number of bytes, received {budget!r}; round it")
    budgets_bytes = [int(budget) for budget in budgets_bytes]
    candidates = Candidates(profile, pinned_max_rows)
    rooms = [candidates.room(budget) for budget in budgets_bytes]
    selector = ThresholdSelector(candidates)
    choices = [selector.select(room, _estimated_threshold(candidates, room) if estimate_sizes else 0.0) for room in rooms]
    if policy == "input_aware":
        for number, aware in enumerate(input_aware_masks(candidates, rooms)):
            by_threshold, by_inputs = (hot_input_count(candidates, hot) for hot in (choices[number].hot, aware))
            if by_inputs >= by_threshold:
                choices[number] = ThresholdChoice(aware, None)
    return (_hot_set(candidates, budget, policy, choice) for budget, choice in zip(budgets_bytes, choices, strict=True))


def _estimated_threshold(candidates: Candidates, room: int) -> float:
    optimizer = StatisticalOptimizer(candidates.profile, [table.name for table in candidates.tables], candidates.profile.seed)
    return optimizer.search(room).threshold_percent


def _hot_set(candidates: Candidates, budget_bytes: int, policy: str, choice: ThresholdChoice) -> HotSet:
    profile, hot_ids = candidates.profile, candidates.hot_ids(choice.hot)
    share = profile.hot_inputs(hot_ids)
    resolved = resolution(profile, [table.name for table in candidates.tables], candidates.room(budget_bytes))
    return HotSet(
        tables=profile.tables,
        hot_ids=hot_ids,
        pinned=tuple(table.name for table in candidates.pinned),
        budget_bytes=budget_bytes,
        used_bytes=hot_bytes(profile.tables, hot_ids),
        policy=policy,
        threshold=choice.threshold,
        coverage=profile.coverage(hot_ids),
        hot_inputs=share.value,
        hot_inputs_interval=(share.low, share.high),
        resolution_reached=resolved.reached,
        resolving_rate=resolved.resolving_rate,
        profile_fingerprint=profile.fingerprint,
    )
