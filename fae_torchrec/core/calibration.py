"""Measured steps fed back into a Hardware: its rates are changed as little as makes the cost model meet them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from fae_torchrec.core.cost_model import Work
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hardware import Hardware

_PULL = 0.1  # of the rates given, against the measured points: what the points say nothing about stays
_LEAST, _MOST = 0.02, 50.0  # times its old cost that a part may cost

_RATES: Mapping[str, str] = {
    "flops": "flops",
    "fast_rows": "fast_row_s",
    "fast_bytes": "fast_bandwidth",
    "host_rows": "host_row_s",
    "host_bytes": "host_bandwidth",
    "link_bytes": "host_link_bandwidth",
    "intra_bytes": "intra_host_bandwidth",
    "inter_bytes": "inter_host_bandwidth",
    "collectives": "collective_s",
    "split_ids": "split_id_s",
    "cache_ids": "cache_id_s",
    "tiers": "tier_s",
    "steps": "step_s",
}


class Point(NamedTuple):
    """A measured step: what it did, by the cost model, and how long it took."""

    work: Work
    seconds: float


def calibrated(hardware: Hardware, points: Sequence[Point]) -> Hardware:
    """Rates that meet measured points better.

    Each part's cost is scaled by a factor, by least squares over the points' relative errors, factors pulled towards 1: with few points
    nothing is fitted that they do not tell.

    Args:
        hardware: to begin with.
        points: at least one; of steps on this hardware.

    Raises:
        ConfigError: there are no points, or one took no time.
    """
    if not points:
        raise ConfigError("calibration needs at least one measured step, received none")
    if bad := [point.seconds for point in points if not point.seconds > 0]:
        raise ConfigError(f"calibration: a step takes more than 0 seconds, received {bad}")
    shares = np.array([[seconds / point.seconds for seconds in point.work.seconds(hardware).values()] for point in points])
    if hardware.device == "cuda":  # the host runs beside the device: it is the longer of both
        host = list(_RATES).index("steps")
        bound = shares[:, host] > shares.sum(axis=1) - shares[:, host]
        shares[bound, :host], shares[~bound, host] = 0.0, 0.0
    pull = _PULL * len(points) ** 0.5
    rows = np.concatenate([shares, pull * np.eye(shares.shape[1])])
    factors, _ = nnls(rows, np.concatenate([np.ones(len(points)), np.full(shares.shape[1], pull)]))
    factors = np.clip(factors, _LEAST, _MOST)
    changed = {
        name: getattr(hardware, name) * factor if name.endswith("_s") else getattr(hardware, name) / factor
        for name, factor in zip(_RATES.values(), factors.tolist(), strict=True)
    }
    return replace(hardware, **changed, name=f"{hardware.name}, calibrated", source=f"{hardware.source}; {len(points)} measured steps")
