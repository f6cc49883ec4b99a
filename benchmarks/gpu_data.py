"""The samples of benchmarks/gpu.py: one-hot, each table's accesses independent and by a Zipf law, and the placement a profile gives."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from gpu_scenarios import Workload
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.calibrator import Calibrator

NUM_DENSE = 13


class ZipfSamples:
    """Draws samples. The row of rank r of a table has probability ~ r ** -exponent; ranks are scattered over the ids by a fixed bijection.

    Args:
        rows: by feature.
        exponent: of all tables; 0 is uniform.
        seed: of the draws.
        device: where to draw; the ids come to the CPU.
    """

    def __init__(self, rows: dict[str, int], exponent: float, seed: int, device: torch.device) -> None:
        self._rows, self._exponent, self._device = rows, exponent, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def ids(self, samples: int) -> np.ndarray:
        """int64 [features, samples]."""
        return np.stack([self._of_table(rows, samples) for rows in self._rows.values()])

    def batches(self, samples: int, batch_size: int) -> list[Batch]:
        """The samples in batches; the last may be smaller."""
        ids, rng = self.ids(samples), np.random.default_rng(samples)
        dense, labels = rng.random((samples, NUM_DENSE), dtype=np.float32), rng.integers(0, 2, samples).astype(np.float32)
        return [
            Batch(
                torch.from_numpy(dense[first : first + batch_size]),
                one_hot(list(self._rows), np.ascontiguousarray(ids[:, first : first + batch_size])),
                torch.from_numpy(labels[first : first + batch_size]),
            )
            for first in range(0, samples, batch_size)
        ]

    def _of_table(self, rows: int, samples: int) -> np.ndarray:
        chance = torch.rand(samples, generator=self._generator, device=self._device, dtype=torch.float64)
        if self._exponent:
            mass = torch.arange(1, rows + 1, device=self._device, dtype=torch.float64).pow_(-self._exponent).cumsum_(0)
            rank = torch.searchsorted(mass, chance.mul_(mass[-1].clone())).clamp_(max=rows - 1)
        else:
            rank = chance.mul_(rows).to(torch.int64).clamp_(max=rows - 1)
        step = next(step for step in range(round(0.618 * rows) | 1, 2 * rows + 3, 2) if math.gcd(step, rows) == 1)
        ids: np.ndarray = rank.mul_(step).remainder_(rows).cpu().numpy()
        return ids


def one_hot(features: list[str], ids: np.ndarray) -> KeyedJaggedTensor:
    """Ids [features, samples] as a KeyedJaggedTensor that knows how many ids each key has: else the device is asked."""
    samples = ids.shape[1]
    return KeyedJaggedTensor(
        features,
        torch.from_numpy(ids.reshape(-1)),
        lengths=torch.ones(ids.size, dtype=torch.int32),
        stride=samples,
        length_per_key=[samples] * len(features),
    )


def profile_of(workload: Workload, tables: TableSet, samples: int, seed: int, device: torch.device) -> PopularityProfile:
    """Counts other samples of the same law."""
    drawn = ZipfSamples(workload.rows, workload.exponent, seed, device)

    def stream() -> Iterator[Batch]:
        for _ in range(0, samples, 1 << 18):
            yield from drawn.batches(1 << 18, 1 << 18)

    return Calibrator(tables, sample_rate=0.95, seed=seed).run(stream())


def placement_of(profile: PopularityProfile, budget_bytes: int) -> RowPlacement:
    """The rows that a hot set of these bytes makes hot; by threshold, for independent tables have no inputs that rows complete together."""
    return RowPlacement.from_hot_set(select_hot_set(profile, budget_bytes, policy="threshold"))
