"""What `fae launch` is told: one small YAML or JSON file, of which only the budget must be given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fae_torchrec.config import PlacementConfig, parse_bytes
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.schema import merge, read_mapping, read_override, read_section, within

_PATHS = ("profile", "placement")
"""Keys whose relative paths are relative to the config file; `output` is relative to the current folder."""


@dataclass(frozen=True)
class LaunchSchedule:
    """In which order the hot and the cold batches of a window come.

    Attributes:
        policy: "proportional" spreads both kinds evenly, "fixed" takes them in turns, "stock" leaves the script's batches as they are (the
            rows are placed all the same).
        rate: with "fixed", per cent of a window's batches of a kind that one turn takes.
    """

    policy: Literal["proportional", "fixed", "stock"] = "proportional"
    rate: float = within(50.0, 1, 100)


@dataclass(frozen=True)
class LaunchConfig:
    """How a script is run with FAE.

    Attributes:
        hbm_budget: fast memory of a rank for hot rows, weights and optimizer state: bytes, such as "64MiB", or a percentage of all tables.
            Not needed with `placement`.
        profile: a saved PopularityProfile, instead of measuring one.
        placement: a saved RowPlacement, instead of making one.
        profile_batches: batches of each rank that are counted at most, the first that the script feeds.
        profile_rate: the chance of a sample of these to be counted; on the others the share of hot samples is estimated.
        seed: of that choice.
        policy: how the hot rows are selected, as `placement.policy` of a run.
        pinned_max_rows: tables of at most so many rows are always hot.
        hot_tier: every rank holds every hot row, or they are spread by table or (on CUDA) by row.
        cold_tier: where the cold rows lie, as FAEShardingPlanner's.
        cold_cache: bytes of fast memory for cold rows on their way, as FAEShardingPlanner's `cold_cache_bytes`; null: its default.
        stock_tables: names of tables that are left to stock sharding.
        schedule: the order of hot and cold batches.
        window_batches: batches of the script among which samples are sorted at a time.
        buffer: bytes of samples that a rank holds at most for that.
        least_hot_inputs: share of samples that must be all hot for FAE to pay.
        when_not_paying: what the script then runs on: TorchRec's own planner and pipeline, or FAE all the same.
        fresh: measures and selects anew, whatever the output folder holds.
        output: folder for profile, placement, the log of the profiling pass and launch.json.
    """

    hbm_budget: int | str | None = None
    profile: str | None = None
    placement: str | None = None
    profile_batches: int = within(1000, 1)
    profile_rate: float = within(0.75, 0, 1, above=True)
    seed: int = within(7, 0)
    policy: Literal["input_aware", "threshold"] = "input_aware"
    pinned_max_rows: int = within(1024, 0)
    hot_tier: Literal["replicated", "table_wise", "row_wise"] = "replicated"
    cold_tier: Literal["auto", "host", "uvm", "uvm_caching"] = "auto"
    cold_cache: int | str | None = None
    stock_tables: tuple[str, ...] = ()
    schedule: LaunchSchedule = field(default_factory=LaunchSchedule)
    window_batches: int = within(64, 1)
    buffer: int | str = "1GiB"
    least_hot_inputs: float = within(0.1, 0, 1)
    when_not_paying: Literal["stock", "fae"] = "stock"
    fresh: bool = False
    output: str = "runs/launch"

    def __post_init__(self) -> None:
        if self.hbm_budget is None and self.placement is None:
            raise ConfigError(
                'hbm_budget: missing; it says how much fast memory of each rank hot rows may take, such as "64MiB" or "10%" (or give '
                "`placement`, a saved RowPlacement)"
            )
        if self.profile is not None and self.placement is not None:
            raise ConfigError("profile and placement are both given; a placement needs no profile: leave one out")
        _ = self.budget_bytes(1), self.cold_cache_bytes, self.buffer_bytes  # what is unreadable fails here, before any work

    def budget_bytes(self, total_bytes: int) -> int | None:
        """The budget in bytes; None if none is given.

        Args:
            total_bytes: bytes of all rows of all placed tables, what a percentage is of.
        """
        if self.hbm_budget is None:
            return None
        try:
            budget = PlacementConfig(budget=self.hbm_budget).budget_bytes(total_bytes)
            if budget is None:
                raise ConfigError('placement.budget: received "auto"; a launched script needs bytes or a share, such as "64MiB" or "10%"')
            return budget
        except ConfigError as error:
            raise ConfigError(str(error).replace("placement.budget", "hbm_budget", 1)) from None

    @property
    def cold_cache_bytes(self) -> int | None:
        """`cold_cache` in bytes."""
        if self.cold_cache is None or str(self.cold_cache).strip() == "0":
            return None if self.cold_cache is None else 0
        return parse_bytes(self.cold_cache, "cold_cache")

    @property
    def buffer_bytes(self) -> int:
        """The buffer in bytes."""
        return parse_bytes(self.buffer, "buffer")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can write and `from_dict` reads."""
        return {**asdict(self), "stock_tables": list(self.stock_tables)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LaunchConfig:
        """Reads plain values.

        Raises:
            ConfigError: an unknown key, a wrong type, a value outside its range; the message has the dotted key.
        """
        return read_section(cls, values)


def load_launch_config(path: str | Path, overrides: Iterable[str] = ()) -> LaunchConfig:
    """Reads the file.

    Args:
        path: YAML, or JSON if it ends in .json.
        overrides: "dotted.key=value" with a YAML value; relative paths here are relative to the current folder.

    Raises:
        ConfigError: the file is missing or unreadable, or what it says is wrong; the message starts with the file's name.
    """
    path = Path(path)
    try:
        values = _resolved(read_mapping(path), path.parent)
        for override in overrides:
            values = merge(values, _resolved(read_override(override), Path.cwd()))
        return LaunchConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _resolved(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    for key in _PATHS:
        if isinstance(values.get(key), str) and "://" not in values[key]:
            values[key] = str((folder / Path(values[key]).expanduser()).absolute())
    return values
