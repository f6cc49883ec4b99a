"""What the ranks tell each other in the input dist of a hot tier: the kind of the step and, for replicas, the hot rows they touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torchrec.distributed.types import Awaitable
from torchrec.streamable import Multistreamable

from fae_torchrec.core.errors import HotBatchError
from fae_torchrec.distributed.process_group import all_gather_single


@dataclass
class TouchedRows(Multistreamable):
    """The hot rows that the global batch touches, by group of tables; a slot is a row's number within its group.

    Attributes:
        own: per group, int64 [own], this rank's distinct slots, ascending.
        of_all: per group, int64 [sum over ranks of own], the slots of rank 0, then of rank 1, and so on.
        counts: how many slots each rank has of each group, [world][groups]; known to the host, so nothing waits for a size.
        union: per group, int64 [union], the distinct slots of all ranks, ascending; an empty list where it was not asked for.
    """

    own: list[torch.Tensor]
    of_all: list[torch.Tensor]
    counts: list[list[int]]
    union: list[torch.Tensor] = field(default_factory=list)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for slots in (*self.own, *self.of_all, *self.union):
            slots.record_stream(stream)


def exchange_touched_rows(
    own: list[torch.Tensor], misses: torch.Tensor, *, promised_hot: bool, group: dist.ProcessGroup, may_reduce: bool = True
) -> Awaitable[Awaitable[TouchedRows]]:
    """Starts the exchange of touched rows; on every rank at every step, also on one whose batch has no hot id.

    Two stages like TorchRec's `KJTAllToAll`: the counts travel first, then all groups' slots as one int32 tensor per rank.

    Args:
        own: per group, int64 [own], this rank's distinct slots, ascending, each below 2**31; the same groups on every rank.
        misses: int64 [1], ids of a batch promised to be hot that are not.
        promised_hot: the kind of this rank's batch; the ranks must agree.
        group: the ranks.
        may_reduce: whether to find the union too, with more than two ranks, so that the gradients may be summed over it
            (`exchange_compact_gradients`). It is found here because its size is known to the device alone, and the input dist waits for
            the device anyway, while backward should not.

    Returns:
        First wait: the counts are checked and the exchange of slots starts. Second wait: the touched rows.

    Raises:
        HotBatchError: at the first wait, on every rank alike; see `check_promise`.
    """
    return _CountsOfRowsAwaitable(own, misses, promised_hot, group, may_reduce)


def check_kind(misses: torch.Tensor, *, promised_hot: bool, group: dist.ProcessGroup | None) -> Awaitable[list[list[int]]]:
    """Starts the check that the ranks take the same kind of step and keep its promise, for tiers whose slots travel another way.

    Args:
        misses: int64 [1], ids of a batch promised to be hot that are not.
        promised_hot: the kind of this rank's batch; the ranks must agree.
        group: the ranks; with None or a single rank nothing travels and only this rank's promise is checked.

    Returns:
        What to wait for before any further collective; what it returns tells nothing.

    Raises:
        HotBatchError: when waited for, on every rank alike; see `check_promise`.
    """
    return _CountsAwaitable([], misses, promised_hot, group)


def check_promise(misses: Sequence[int], kinds: Sequence[bool]) -> None:
    """Checks one step of all ranks.

    Args:
        misses: per rank, ids of a batch promised to be hot that are not.
        kinds: per rank, whether its batch is promised to be hot.

    Raises:
        HotBatchError: the ranks take different kinds of batches, or a promise is broken.
    """
    if any(kind != kinds[0] for kind in kinds):
        hot = [rank for rank, kind in enumerate(kinds) if kind]
        raise HotBatchError(
            f"the ranks disagree about this step: the batches of ranks {hot} are promised to be hot, the others are not; every rank "
            "must take the same kind of batch at every step: feed all ranks from a HotColdDataLoader with the same placement and `agree`"
        )
    if any(misses):
        counted = {rank: count for rank, count in enumerate(misses) if count}
        raise HotBatchError(
            f"a batch promised to be hot holds cold ids (ids per rank: {counted}); the loader and the model must use the same "
            "placement, or the batch must be passed as a plain KeyedJaggedTensor, which is always right"
        )


class _CountsAwaitable(Awaitable[list[list[int]]]):
    """Gathers what the ranks count, checks the step and gives each rank's counts of rows."""

    def __init__(self, sizes: list[int], misses: torch.Tensor, promised_hot: bool, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self._sizes, self._misses, self._promised_hot = sizes, misses, promised_hot
        self._world = 1 if group is None else group.size()
        if self._world == 1:
            return
        # Filled on the device: a tensor made of a list would be a copy that the host waits for.
        filled = [torch.full_like(misses, number) for number in (*sizes, int(promised_hot))]
        self._sent = torch.cat([*filled, misses])  # kept until the collective has read it
        self._received = self._sent.new_empty(self._world * self._sent.numel())
        self._work = all_gather_single(self._received, self._sent, group=group, async_op=True)

    def _wait_impl(self) -> list[list[int]]:
        if self._world == 1:
            if self._promised_hot:  # else there is no promise to break, and no need to wait for the device
                check_promise(self._misses.tolist(), [True])
            return [self._sizes]
        self._work.wait()
        per_rank = self._received.view(self._world, -1).tolist()
        check_promise([numbers[-1] for numbers in per_rank], [bool(numbers[-2]) for numbers in per_rank])
        return [numbers[:-2] for numbers in per_rank]


class _CountsOfRowsAwaitable(Awaitable[Awaitable[TouchedRows]]):
    """Waits for every rank's counts, then starts the exchange of the slots themselves."""

    def __init__(
        self, own: list[torch.Tensor], misses: torch.Tensor, promised_hot: bool, group: dist.ProcessGroup, may_reduce: bool
    ) -> None:
        super().__init__()
        self._own, self._group, self._may_reduce = own, group, may_reduce
        self._counts = _CountsAwaitable([slots.numel() for slots in own], misses, promised_hot, group)

    def _wait_impl(self) -> Awaitable[TouchedRows]:
        return _RowsAwaitable(self._own, self._counts.wait(), self._group, self._may_reduce)


class _RowsAwaitable(Awaitable[TouchedRows]):
    """Waits for every rank's slots and sorts them by group."""

    def __init__(self, own: list[torch.Tensor], counts: list[list[int]], group: dist.ProcessGroup, may_reduce: bool) -> None:
        super().__init__()
        self._own, self._counts = own, counts
        self._needs_union = may_reduce and len(counts) > 2
        self._longest = max(sum(numbers) for numbers in counts)
        if self._longest:  # the counts are the same on every rank, so they skip together
            mine = torch.cat(own)
            # Half the bytes; a hot tier of 2**31 rows would fit no device.
            self._sent = torch.nn.functional.pad(mine.to(torch.int32), (0, self._longest - mine.numel()))
            self._received = self._sent.new_empty(len(counts) * self._longest)
            self._work = all_gather_single(self._received, self._sent, group=group, async_op=True)

    def _wait_impl(self) -> TouchedRows:
        of_all = self._own
        if self._longest:
            self._work.wait()
            per_rank = [
                slots[: sum(numbers)].split_with_sizes(numbers)
                for slots, numbers in zip(self._received.view(len(self._counts), -1), self._counts, strict=True)
            ]
            of_all = [torch.cat(slots).to(torch.int64) for slots in zip(*per_rank, strict=True)]
        union = [torch.unique(slots) for slots in of_all] if self._needs_union else []
        return TouchedRows(self._own, of_all, self._counts, union)
