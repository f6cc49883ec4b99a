"""Which rows are hot for a launched script: a saved placement, one of an earlier launch, or one made of a profile; and whether it pays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fae_torchrec.core.errors import BudgetError, FAEError
from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_ids import find_slots
from fae_torchrec.core.tables import TableKind
from fae_torchrec.launch_config import LaunchConfig
from fae_torchrec.launch_profile import profile_script
from fae_torchrec.launch_ranks import LaunchRanks
from fae_torchrec.launch_script import ScriptRun
from fae_torchrec.training.report_table import bytes_text, percent_text
from fae_torchrec.training.whole_file import write_whole

_MEASURING = ("profile_batches", "profile_rate", "seed", "stock_tables")
_SELECTING = ("hbm_budget", "policy", "pinned_max_rows")


@dataclass(frozen=True)
class Prepared:
    """What is known before the script runs.

    Attributes:
        placement: where rows would lie; None if the script fed no batch that could be counted.
        origin: where the placement comes from, for people.
        why_not: why FAE does not pay, for people; None where it does.
        profiled: what the profiling pass told, empty without one.
    """

    placement: RowPlacement | None
    origin: str
    why_not: str | None
    profiled: Mapping[str, Any] = field(default_factory=dict)


def prepare(config: LaunchConfig, script: ScriptRun, ranks: LaunchRanks, *, show_progress: bool = False) -> Prepared:
    """Loads, finds or makes the placement; writes profile, hot set and placement to the output folder. Every rank calls it.

    Raises:
        FAEError: on every rank: bad input, or the profiling pass failed.
    """
    key = ranks.share(lambda: _key(config, script, ranks.world_size))
    found = ranks.share(lambda: _found(config, key, ranks.world_size))
    if found is not None:
        prepared: Prepared = found
        return prepared
    profile: PopularityProfile | None = None
    told: dict[str, Any] = {}
    failure: Exception | None = None
    try:
        profile, told = profile_script(config, script, ranks, show_progress=show_progress)
    except Exception as error:  # on rank 0, of whichever rank it was; the others hear of it next
        failure = error

    def made() -> Prepared:
        if failure is not None:
            raise failure
        if profile is None:
            return Prepared(None, "", _nothing_fed(told), told)
        folder = Path(config.output)
        profile.save(folder / "profile.npz")
        placement = _selected(config, profile, folder)
        told["fresh_coverage"] = fresh_coverage(profile, placement)
        key_text = json.dumps({"measured": key[0], "selected": key[1], "script": script.text, "told": told}, indent=1)
        write_whole(key_text + "\n", folder / "launch_key.json")
        return _judged(config, placement, f"made from {profile.source}", ranks.world_size, told)

    prepared = ranks.share(made)
    return prepared


def forget(config: LaunchConfig) -> None:
    """Lets the next launch measure anew: what is in the output folder turned out to be of other tables."""
    Path(config.output, "launch_key.json").unlink(missing_ok=True)


def _key(config: LaunchConfig, script: ScriptRun, world_size: int) -> tuple[str, str]:
    """What the profile depends on, and what the selection depends on beside it; raises where the script is not there."""
    values = config.to_dict()
    target = script.target if script.is_module else str(Path(script.target).resolve())
    measured = fingerprint(
        "launch", target, script.check(), list(script.arguments), str(Path.cwd()), world_size, [values[k] for k in _MEASURING]
    )
    return measured, fingerprint("select", measured, [values[name] for name in _SELECTING])


def _found(config: LaunchConfig, key: tuple[str, str], world_size: int) -> Prepared | None:
    """What needs no pass over the script's batches."""
    folder = Path(config.output)
    if config.placement is not None:
        return _judged(config, RowPlacement.load(config.placement), f"the file {config.placement}", world_size, {})
    if config.profile is not None:
        profile = PopularityProfile.load(config.profile)
        folder.mkdir(parents=True, exist_ok=True)
        return _judged(config, _selected(config, profile, folder), f"made from the profile {config.profile}", world_size, {})
    path = folder / "launch_key.json"
    if config.fresh or not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["measured"] != key[0]:
            return None
        if kept["selected"] == key[1]:
            placement = RowPlacement.load(folder / "placement.npz")
        else:
            profile = PopularityProfile.load(folder / "profile.npz")
            placement = _selected(config, profile, folder)
            kept = {**kept, "selected": key[1], "told": {**kept["told"], "fresh_coverage": fresh_coverage(profile, placement)}}
            write_whole(json.dumps(kept, indent=1) + "\n", path)
    except BudgetError:
        raise
    except (FAEError, ValueError, KeyError):
        return None  # damaged, or of another version: measured anew
    return _judged(config, placement, f"of an earlier launch with the same script and arguments, in {folder}", world_size, kept["told"])


def _selected(config: LaunchConfig, profile: PopularityProfile, folder: Path) -> RowPlacement:
    budget = config.budget_bytes(profile.tables.total_bytes)
    assert budget is not None  # LaunchConfig asks for one where no placement is given
    hot_set = select_hot_set(profile, budget, policy=config.policy, pinned_max_rows=config.pinned_max_rows)
    hot_set.save(folder / "hot_set.npz")
    placement = RowPlacement.from_hot_set(hot_set)
    placement.save(folder / "placement.npz")
    return placement


def _judged(config: LaunchConfig, placement: RowPlacement, origin: str, world_size: int, told: Mapping[str, Any]) -> Prepared:
    return Prepared(placement, origin, does_not_pay(placement, config.least_hot_inputs, world_size), told)


def fresh_coverage(profile: PopularityProfile, placement: RowPlacement) -> float | None:
    """Share of the accesses that are hot, of the samples that were not counted; None if all were, or they access nothing."""
    if profile.fresh_inputs is None:
        return None
    found = [find_slots(placement.hot_ids[name], profile.fresh_inputs.values[feature]) >= 0 for name, feature in placement.tables.lookups]
    accesses = sum(hot.size for hot in found)
    return sum(int(hot.sum()) for hot in found) / accesses if accesses else None


def does_not_pay(placement: RowPlacement, least_hot_inputs: float, world_size: int) -> str | None:
    """Why FAE does not pay with a placement, in words and figures; None where it does.

    FAE saves what hot batches need not do. It does not pay where there are few of them, nor, on a single rank, where the budget holds all
    tables: then nothing need be cold.
    """
    tables = placement.tables
    if world_size == 1 and tables.total_bytes <= placement.budget_bytes:
        return (
            f"all tables together take {bytes_text(tables.total_bytes)} and fit into the budget of {bytes_text(placement.budget_bytes)}: "
            "nothing need be cold"
        )
    if placement.hot_inputs >= least_hot_inputs:
        return None
    low, high = (percent_text(end) for end in placement.hot_inputs_interval)
    cold = sum(placement.kind(table) is not TableKind.HOT for table, _ in tables.lookups)
    hot_rows = sum(placement.hot_rows(name) for name in tables.names)
    return (
        f"only {percent_text(placement.hot_inputs)} % of the samples ({low} to {high} %) would be all hot, and hot batches are what FAE "
        f"gains by (least_hot_inputs: {percent_text(least_hot_inputs)} %): the budget of {bytes_text(placement.budget_bytes)} holds "
        f"{bytes_text(placement.hot_bytes)} of {bytes_text(tables.total_bytes)}, {hot_rows:,} rows that were seen to be accessed, and a "
        f"sample is hot only if each of its {cold} lookups in tables that are not all hot finds one of them. The accesses are spread too "
        "evenly for this budget, or too few batches were counted"
    )


def _nothing_fed(told: Mapping[str, Any]) -> str:
    used = ", ".join(told["used"]) or "none"
    return (
        f"the script fed no batch to a pipeline that fae launch knows ({told['ended']}; of the names that are replaced it used: {used}). "
        "fae launch replaces EmbeddingShardingPlanner, the default sharders and TrainPipelineSparseDist; a script that trains in another "
        "way needs the swaps of the README"
    )
