"""StepPlan: how many samples each stream gives at each step of a window, agreed so that every rank takes the same steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """The steps of one kind in a window.

    A stream is one rank's share of the data. Ranks usually have one stream each; an epoch that is finished on another number of ranks
    has as many streams as it had ranks when it began.

    Attributes:
        sizes: int64 [steps, streams], samples that each stream gives; at least one stream gives a sample at every step.
        full_step: samples of a full step of all streams. A sample then weighs as much in a smaller step as in a full one: the few that are
            left of a kind at the end would otherwise make a step as large as any, and a noisy one (benchmarks/accuracy.py). None: a step is
            the mean over its samples, as stock's last batch is.
    """

    sizes: np.ndarray
    full_step: int | None = None

    @property
    def steps(self) -> int:
        """Steps that every rank takes."""
        return len(self.sizes)

    def weight(self, step: int, streams: list[int], world_size: int) -> float:
        """What the mean loss of a rank with these streams must be multiplied with; see HotColdBatch.weight."""
        of_step = int(self.sizes[step].sum()) if self.full_step is None else self.full_step
        return int(self.sizes[step, streams].sum()) * world_size / of_step


def plan_window(
    available: np.ndarray, must_go: np.ndarray, finished: np.ndarray, batch_size: int, *, drop_last: bool, as_stock: bool = False
) -> tuple[StepPlan, np.ndarray]:
    """Plans the steps of one kind where the streams' samples wait in queues.

    As long as no queue overflows, all streams give full batches, and the surplus of those that have more waits for the next window.

    Args:
        available: int64 [streams], samples that wait.
        must_go: int64 [streams], batches that must go now because the queue would outgrow its buffer.
        finished: bool [streams], streams to which nothing will be added.
        batch_size: samples per stream and step.
        drop_last: whether a stream's samples that make no full batch at the end of the epoch are left out.
        as_stock: whether a step is the mean over its samples, however few.

    Returns:
        The plan, and the samples that each stream gives, int64 [streams].

    Example with batch_size 4 and two streams of 9 and 5 samples: one step of 4 + 4 in mid-epoch; 4 + 4 and 4 + 1 where two batches of the
    first must go; 4 + 4, 4 + 1 and 1 + 0 at the end, or 4 + 4 and 4 + 0 with `drop_last`.
    """
    if finished.all():
        if drop_last:  # not all that has no counterpart on every rank: where ranks differ in their hot samples, that may be most
            available = available // batch_size * batch_size
        steps = -(-available.max() // batch_size)
    else:
        steps = max(available[~finished].min() // batch_size, must_go.max())
    before = np.arange(steps, dtype=np.int64)[:, None] * batch_size
    sizes = np.clip(available[None] - before, 0, batch_size)
    return StepPlan(sizes, None if as_stock else batch_size * len(available)), sizes.sum(axis=0)


def plan_epoch(samples: int, streams: int, batch_size: int, *, drop_last: bool) -> StepPlan:
    """Plans the steps of one kind where all samples lie in one sequence: full batches, and the rest dealt as evenly as can be.

    Args:
        samples: of the kind.
        streams: shares.
        batch_size: samples per stream and step.
        drop_last: whether the last step is left out if it is not full.

    Returns:
        The plan: step k takes the samples from k * streams * batch_size on, stream after stream.
    """
    full, rest = divmod(samples, batch_size * streams)
    sizes = np.full((full, streams), batch_size, dtype=np.int64)
    if rest and not drop_last:
        last = rest // streams + (np.arange(streams) < rest % streams)
        sizes = np.concatenate([sizes, last[None]])
    return StepPlan(sizes, batch_size * streams)
