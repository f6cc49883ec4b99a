"""Bytes as people write them: 64MiB, 1.5 GiB, or a percentage of something."""

from __future__ import annotations

import math
import re

from fae_torchrec.core.errors import ConfigError

AUTO = "auto"
"""The budget that the planner finds by itself."""

_NUMBER = r"([0-9]*\.?[0-9]+)"
_UNITS = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


def parse_bytes(value: int | str, key: str = "bytes") -> int:
    """Reads a number of bytes: 1048576, "1048576", "64MiB", "1.5 GiB".

    Args:
        value: the number or text.
        key: what an error calls the value.

    Raises:
        ConfigError: another form, another unit, or less than one byte.
    """
    match = re.fullmatch(_NUMBER + r"\s*([A-Za-z]*)", str(value).strip())
    if isinstance(value, bool) or match is None or match[2] not in _UNITS:
        raise ConfigError(f"{key}: received {value!r}; give a number of bytes with one of {[u for u in _UNITS if u]}, such as 64MiB")
    count = int(float(match[1]) * _UNITS[match[2]])
    if count < 1:
        raise ConfigError(f"{key}: received {value!r}, less than one byte; give at least 1")
    return count


def parse_budget(value: int | str, total_bytes: int, key: str = "budget") -> int | None:
    """Reads a budget: bytes as `parse_bytes` reads them, a percentage, or "auto".

    Args:
        value: the budget.
        total_bytes: what a percentage is of.
        key: what an error calls the value.

    Returns:
        Bytes, rounded down; None for "auto".

    Raises:
        ConfigError: another form, or a share that is not above 0 % and at most 100 %.
    """
    text = str(value).strip()
    if text == AUTO:
        return None
    if text.endswith("%"):
        share = float(text[:-1]) if re.fullmatch(_NUMBER, text[:-1].strip()) else math.nan
        if not 0 < share <= 100:
            raise ConfigError(f"{key}: received {text!r}; a share must be more than 0% and at most 100%")
        return int(total_bytes * share / 100)
    return parse_bytes(value, key)
