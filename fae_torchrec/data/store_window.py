"""StoreWindow: a whole epoch of a segregated store as one window, read batch by batch."""

from __future__ import annotations

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.schedule import Kind
from fae_torchrec.data.step_plan import StepPlan, plan_epoch
from fae_torchrec.data.store import SegregatedStore
from fae_torchrec.data.window import Samples, Window


class StoreWindow(Window):
    """All hot and all cold samples of a store, dealt to the ranks in runs of a batch.

    Args:
        store: the samples.
        num_streams: shares; rank r gives the shares r, r + world_size, ...
        batch_size: samples per share and step.
        rank: this rank.
        world_size: ranks.
        drop_last: whether a last step that is not full is left out.
        shuffle: None keeps the store's order; numbers (a seed, the epoch) shuffle the order of the full batches of all ranks together, as
            TorchRec's InMemoryBinaryCriteoIterDataPipe does with `shuffle_batches`; a last partial batch stays last.
    """

    threads = 2

    def __init__(
        self,
        store: SegregatedStore,
        num_streams: int,
        batch_size: int,
        rank: int,
        world_size: int,
        *,
        drop_last: bool,
        shuffle: tuple[int, int] | None,
    ) -> None:
        samples: dict[Kind, int] = {"cold": store.cold_samples, "hot": store.hot_samples}
        plans: dict[Kind, StepPlan] = {
            kind: plan_epoch(count, num_streams, batch_size, drop_last=drop_last) for kind, count in samples.items()
        }
        super().__init__(plans, list(range(rank, num_streams, world_size)), world_size)
        self._store = store
        self._batch_size = batch_size
        self._places = {kind: _places(plan, batch_size, shuffle, k) for k, (kind, plan) in enumerate(plans.items())}

    def _samples(self, kind: Kind, step: int) -> list[Samples]:
        sizes = self.plans[kind].sizes[step]
        first = int(self._places[kind][step])
        starts = first + np.cumsum(sizes) - sizes
        runs = [(int(starts[stream]), int(starts[stream] + sizes[stream])) for stream in self._streams if sizes[stream]]
        return [self._store.read(kind, start, stop) for start, stop in runs]  # type: ignore[arg-type]  # never "mixed"

    def _template(self) -> Batch:
        sparse = KeyedJaggedTensor(
            keys=list(self._store.feature_names),
            values=torch.zeros(0, dtype=torch.int64),
            weights=torch.zeros(0) if self._store.layout.weighted else None,
            lengths=torch.zeros(0, dtype=torch.int32),
            stride=0,
        )
        return Batch(torch.zeros(0, self._store.num_dense), sparse, torch.zeros(0))


def _places(plan: StepPlan, batch_size: int, shuffle: tuple[int, int] | None, kind: int) -> np.ndarray:
    """Number of the first sample of each step, int64 [steps]."""
    of_step = plan.sizes.sum(axis=1)
    places: np.ndarray = np.cumsum(of_step) - of_step
    if shuffle is not None:
        full = int((plan.sizes == batch_size).all(axis=1).sum())
        places[:full] = np.random.default_rng([*shuffle, kind]).permutation(places[:full])
    return places
