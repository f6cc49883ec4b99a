"""Window: a part of an epoch whose steps all ranks have agreed on, from which batches of either kind are cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from torchrec.datasets.utils import Batch

from fae_torchrec.core.schedule import Kind
from fae_torchrec.data.batches import HotColdBatch, HotKeyedJaggedTensor
from fae_torchrec.data.filler import filler_like
from fae_torchrec.data.segregate import concat_batches
from fae_torchrec.data.step_plan import StepPlan

Samples = tuple[Batch, np.ndarray]
"""A plain batch and its samples' numbers, int64."""


class Window(ABC):
    """Agreed steps and the samples for them.

    Args:
        plans: the steps of each kind; a kind that is not there has none.
        streams: the streams that this rank gives.
        world_size: ranks.

    Attributes:
        plans: as given.
        threads: by how many threads `batch` may be called at a time; with 1, in the order of the steps of each kind.
    """

    threads = 1

    def __init__(self, plans: Mapping[Kind, StepPlan], streams: list[int], world_size: int) -> None:
        self.plans = plans
        self._streams = streams
        self._world_size = world_size

    def steps(self, kind: Kind) -> int:
        """Steps of a kind."""
        return self.plans[kind].steps if kind in self.plans else 0

    def skip(self, kind: Kind, steps: int) -> None:
        """Leaves the first steps of a kind out: they were taken before a run was resumed. Call it before any `batch`."""
        # Nothing to do where any step can be read by itself.
        return

    @abstractmethod
    def _samples(self, kind: Kind, step: int) -> list[Samples]:
        """What this rank's streams give at a step, one entry for each stream that gives any."""

    @abstractmethod
    def _template(self) -> Batch:
        """Any batch with the features, dtypes and dense columns of the data, from which a filler is made."""

    def batch(self, kind: Kind, step: int) -> HotColdBatch:
        """This rank's batch of a step.

        Args:
            kind: of the step.
            step: number among the steps of this kind.

        Returns:
            The samples of all its streams, or a filler where they give none.
        """
        parts = self._samples(kind, step)
        if not parts:
            return filler_like(self._template(), kind=kind)
        batch = concat_batches([part for part, _ in parts])
        numbers = np.concatenate([part for _, part in parts]) if len(parts) > 1 else parts[0][1]
        kjt = batch.sparse_features
        return HotColdBatch(
            dense_features=batch.dense_features,
            sparse_features=HotKeyedJaggedTensor.promise(kjt) if kind == "hot" else kjt,
            labels=batch.labels,
            kind=kind,
            weight=self.plans[kind].weight(step, self._streams, self._world_size),
            num_samples=len(numbers),
            sample_numbers=numbers,
        )
