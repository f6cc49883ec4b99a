"""What a reader of FAE's paper says stands in its Tables 4 and 5 and Fig. 14, for `fae report --paper --numbers FILE`: read and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.schema import read_mapping, read_section, within
from fae_torchrec.training.paper_tables import WORKLOADS


@dataclass(frozen=True)
class Scores:
    """Table 4, one scheme: accuracy in per cent, AUC (0 to 1) and log loss; None for what is not given."""

    accuracy: float | None = within(None, 0, 100)
    auc: float | None = within(None, 0, 1)
    logloss: float | None = within(None, 0)


@dataclass(frozen=True)
class ScoresOf:
    """Table 4, one workload."""

    baseline: Scores | None = None
    fae: Scores | None = None


@dataclass(frozen=True)
class TimesOf:
    """Table 5, one workload: minutes of training, one number or one for each number of GPUs."""

    baseline: float | Mapping[str, float] | None = within(None, 0, above=True)
    fae: float | Mapping[str, float] | None = within(None, 0, above=True)


@dataclass(frozen=True)
class Shares:
    """Fig. 14, one bar: per cent of the time, by the paper's categories."""

    forward: float | None = within(None, 0, 100)
    backward: float | None = within(None, 0, 100)
    optimizer: float | None = within(None, 0, 100)
    transfer: float | None = within(None, 0, 100)
    embedding_sync: float | None = within(None, 0, 100)


@dataclass(frozen=True)
class SharesOf:
    """Fig. 14, one workload."""

    baseline: Shares | None = None
    fae_hot: Shares | None = None
    fae_cold: Shares | None = None


@dataclass(frozen=True)
class Numbers:
    """The whole file: workload -> numbers, for each of the paper's tables that this project has no numbers of."""

    table4: Mapping[str, ScoresOf] | None = None
    table5: Mapping[str, TimesOf] | None = None
    fig14: Mapping[str, SharesOf] | None = None


def read_numbers(path: str) -> dict[str, Any]:
    """Reads the numbers.

    Args:
        path: a YAML file, or JSON if it ends in .json; docs/paper.md has a template.

    Returns:
        Plain values: path, and of table4, table5 and fig14 what the file gives, with its keys. Nothing that it lacks has a key. Beside the
        minutes of table5 stands time_ratio, computed: FAE's over the baseline's, one number or one for each number of GPUs that both have.

    Raises:
        ConfigError: the file cannot be read, holds no number, or has a key, a workload, a number of GPUs or a value that cannot be; the
            message starts with the file's name and names the dotted key.
    """
    try:
        numbers = read_section(Numbers, read_mapping(Path(path)))
        _check_names(numbers)
    except ConfigError as error:
        raise ConfigError(f"--numbers: {path}: {error}") from None
    found = _given(asdict(numbers))
    if not found:
        raise ConfigError(f"--numbers: {path} holds no number; give some (docs/paper.md has a template), or leave it out")
    for times in found.get("table5", {}).values():
        if ratio := _ratio(times.get("baseline"), times.get("fae")):
            times["time_ratio"] = ratio
    return {"path": str(path), **found}


def _check_names(numbers: Numbers) -> None:
    """Raises ConfigError where a key that is a name is none: a workload, or a number of GPUs."""
    for table, workloads in (("table4", numbers.table4), ("table5", numbers.table5), ("fig14", numbers.fig14)):
        for name in workloads or ():
            if name not in WORKLOADS:
                raise ConfigError(f"unknown workload {f'{table}.{name}'!r}; allowed are {', '.join(WORKLOADS)}")
    for name, times in (numbers.table5 or {}).items():
        for scheme in ("baseline", "fae"):
            minutes = getattr(times, scheme)
            for gpus in minutes if isinstance(minutes, Mapping) else ():
                if not re.fullmatch("[1-9][0-9]*", gpus):
                    key = f"table5.{name}.{scheme}"
                    raise ConfigError(f"{key}: received {gpus!r} for a number of GPUs; allowed are whole numbers from 1, such as 1, 2, 4")


def _given(values: Any) -> Any:
    """The values without what is None or empty."""
    if not isinstance(values, Mapping):
        return values
    kept = {key: _given(value) for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


def _ratio(baseline: Any, fae: Any) -> Any:
    """FAE's minutes over the baseline's; None or empty where they have no number of GPUs in common."""
    if isinstance(baseline, Mapping) and isinstance(fae, Mapping):
        return {gpus: fae[gpus] / minutes for gpus, minutes in baseline.items() if gpus in fae}
    return fae / baseline if isinstance(baseline, float) and isinstance(fae, float) else None
