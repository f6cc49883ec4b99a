"""An experiment's hot set and row placement: under its budget, as the planner finds it, or saved ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fae_torchrec.config import RunConfig
from fae_torchrec.core.hot_set import HotSet, select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet
from fae_torchrec.experiment_data import ExperimentData, open_data
from fae_torchrec.experiment_model import placed_tables
from fae_torchrec.experiment_plan import settled
from fae_torchrec.experiment_profile import make_profile, output_folder


def make_hot_set(config: RunConfig, profile: PopularityProfile) -> HotSet:
    """Selects the hot set under the configured budget; "auto" is what one rank leaves.

    Raises:
        BudgetError: the budget cannot hold the tables that are always hot.
        PlannerError: the budget is "auto", and something does not fit.
    """
    options = config.placement
    budget = options.budget_bytes(profile.tables.total_bytes)
    if budget is None:
        chosen = settled(config, open_data(config), profile, [1])[1]
        assert chosen is not None
        return chosen
    return select_hot_set(profile, budget, policy=options.policy, pinned_max_rows=options.pinned_max_rows, sizes=options.sizes)


def settle_hot_set(
    config: RunConfig, data: ExperimentData, profile: PopularityProfile, ranks: Iterable[int]
) -> tuple[RunConfig, HotSet | None]:
    """The config in which "auto" is replaced by what it stands for on these numbers of ranks, and the hot set; None with a saved placement.

    Errors as `make_hot_set`.
    """
    config, hot_set = settled(config, data, profile, ranks)
    if hot_set is None and config.placement.path is None:
        hot_set = make_hot_set(config, profile)
    return config, hot_set


def make_placement(config: RunConfig, tables: TableSet, hot_set: HotSet | None) -> tuple[RowPlacement, Path]:
    """Loads the placement that the config names, or makes it from a hot set; either way it lies in the output folder afterwards.

    A hot set is written beside it: it says how the rows were chosen, and from which profile.

    Raises:
        FingerprintError: the named placement is of other tables.
    """
    if config.placement.path is not None:
        placement = RowPlacement.load(config.placement.path)
        placement.check_tables(tables)
    else:
        assert hot_set is not None
        hot_set.save(output_folder(config) / "hot_set.npz")
        placement = RowPlacement.from_hot_set(hot_set)
    path = output_folder(config) / "placement.npz"
    placement.save(path)
    return placement, path


def place_rows(config: RunConfig, data: ExperimentData, ranks: Iterable[int] = (1,), *, show_progress: bool = False) -> RowPlacement:
    """The placement that the config names, or the one that its popularity profile gives, which is measured if need be.

    Raises:
        FAEError: bad input.
        PlannerError: the budget is "auto", and something does not fit.
    """
    return settle_rows(config, data, ranks, show_progress=show_progress)[1]


def settle_rows(
    config: RunConfig, data: ExperimentData, ranks: Iterable[int], *, show_progress: bool = False
) -> tuple[RunConfig, RowPlacement]:
    """As `place_rows`, with the config in which "auto" is replaced by what it stands for on these numbers of ranks."""
    tables, hot_set = placed_tables(config, data), None
    if config.placement.path is None:
        profile = make_profile(config, data, tables, show_progress=show_progress)
        config, hot_set = settle_hot_set(config, data, profile, ranks)
    return config, make_placement(config, tables, hot_set)[0]
