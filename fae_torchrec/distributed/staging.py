"""Staging: the cold rows of the coming batch lie beside the hot ones for its step, brought there while the step before runs. One rank.

The host knows which cold rows a batch needs before its step (`SplitAhead`). So a cold batch can be looked up and updated as a hot one, by
the one kernel of the hot rows, on rows that were copied from their homes into a staging area behind the hot rows' own. It has two halves:

    step i        forward, backward and update on half 0         (the device's own stream)
                  rows of step i + 1 are brought to half 1       (a stream of its own; what the link takes is hidden)
    step i + 1    rows that both steps have are copied over from half 0, as updated; the others of half 0 go home

Hot batches between them touch neither half. Nothing is looked up in a cache on the device, and no row is ever stale: a row has one owner
at any time, its half from the fetch to the end of its step, else its home. Optimizer state goes with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from fae_torchrec.core.errors import StagingError
from fae_torchrec.distributed.homes import LocalTable
from fae_torchrec.modules.lookups import HotGroup
from fae_torchrec.modules.tier_split import StagedRows

MOVES_COLD_ROWS = "## fae: cold rows on their way ##"
"""In a profiler's trace, the range in which rows are brought to a staging area or a cache, and home."""


class _Graph:
    """Lives as long as the graph that a backward needs."""


class StagedBatch:
    """A batch whose cold rows are staged, on its way through its step.

    Args:
        rows: what it needs.
    """

    def __init__(self, rows: StagedRows) -> None:
        self.rows = rows.rows
        self.half = rows.half
        self.updated = False  # its backward was queued
        self._graph: weakref.ref[_Graph] | None = None

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        for rows in self.rows:
            rows.record_stream(stream)

    def looked_up(self, output: torch.Tensor) -> None:
        """Tells of its forward: watches for its backward, or for the end of its graph."""
        if not output.requires_grad:
            return
        graph = _Graph()
        self._graph = weakref.ref(graph)

        def update(_: torch.Tensor, graph: _Graph = graph) -> None:
            self.updated = True  # the fused update follows in this backward

        output.register_hook(update)  # type: ignore[no-untyped-call]

    @property
    def awaits_backward(self) -> bool:
        """Whether a backward may still come."""
        return not self.updated and self._graph is not None and self._graph() is not None


class RowHomes:
    """Where the cold rows of one group are at home: every tensor of its tables as one, row by row.

    Args:
        tables: all tables of the group with cold rows, in one kernel.

    Attributes:
        first: by table, its first row.
        tensors: weights and optimizer state by name, [rows, ...]; views.
    """

    def __init__(self, tables: Sequence[LocalTable]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.first: dict[str, int] = {}
        for name, tensor in tables[0].tensors().items():
            row = tensor[0].numel()
            whole = tensor.untyped_storage().nbytes() // tensor.element_size() // row
            self.tensors[name] = torch.as_strided(tensor, (whole, *tensor.shape[1:]), tensor.stride(), 0)
            for table in tables:
                part = table.tensors()[name]
                first, beyond = divmod(int(part.storage_offset()), row)
                alike = part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() and part.is_contiguous()
                if beyond or not alike or self.first.setdefault(table.table, first) != first:
                    raise NotOneTensorError(f"{table.table}/{name}")

    @staticmethod
    def of(groups: Sequence[HotGroup], tables: Iterator[LocalTable]) -> list[RowHomes | None] | None:
        """The homes of every group's cold rows; None for a group without; None at all where some do not lie in one tensor."""
        homes = {table.table: table for table in tables}
        of_groups = [[homes[name] for name in dict.fromkeys(lookup.table for lookup in group.lookups) if name in homes] for group in groups]
        try:
            return [RowHomes(of_group) if of_group else None for of_group in of_groups]
        except NotOneTensorError:
            return None


class NotOneTensorError(Exception):
    """Tables that share a kernel lie in several tensors, or in one whose rows differ in length."""


class Staging:
    """Moves cold rows between their homes and a staging area, in the order that training needs.

    Args:
        homes: of each group's cold rows; None for a group without.
        spare: by group, the rows behind its hot ones: two halves.
        capacity: by group, rows of a half.
        device: of the hot rows.

    Attributes:
        first_home: by table, its first row among the homes of its group's cold rows.
    """

    def __init__(
        self, homes: Sequence[RowHomes | None], spare: Sequence[LocalTable | None], capacity: Sequence[int], device: torch.device
    ) -> None:
        self.first_home = {table: row for home in homes if home is not None for table, row in home.first.items()}
        self._groups: list[_Area | None] = []
        for home, rows, half in zip(homes, spare, capacity, strict=True):
            area = None if home is None or rows is None else _Area(home.tensors, rows.tensors(), half)
            self._groups.append(area)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._current: StagedBatch | None = None  # the latest that was looked up, until its rows are home
        self._fetched: StagedBatch | None = None  # the one whose rows were brought ahead of its turn
        self._homes_change = False  # a lookup past the staging area may update homes at any time

    def fetch(self, batch: StagedBatch) -> None:
        """Brings the rows of a coming batch, if they can be brought by now; else `arrive` will.

        Call it after the forward of the batch with cold rows before it, or while only hot batches are trained.

        Args:
            batch: the next with cold rows.
        """
        busy = self._current is not None and self._current.half == batch.half
        if self._fetched is None and not busy and not self._homes_change:
            self._bring(batch)
            self._fetched = batch

    def arrive(self, batch: StagedBatch) -> None:
        """Before a batch is looked up: its rows are in its half, as all updates so far have left them.

        Args:
            batch: whose turn it is.

        Raises:
            StagingError: an earlier batch still awaits its backward.
        """
        before = self._current
        if before is batch:
            return
        self._check_no_backward_to_come()
        fetched, self._fetched = self._fetched, None
        if fetched is not batch:
            fetched = None
        with self._on_stream():
            if before is not None and before.updated and fetched is not None:
                self._pass_on(before, fetched)
        self._wait_for_stream(fetched is not None)  # not for what goes home now: the link has a step's time for that
        self._send_home()
        if fetched is None:
            self._bring(batch)
            self._wait_for_stream()
        self._current, self._homes_change = batch, False

    def past(self) -> None:
        """Before homes are looked up, and perhaps updated, past the staging area: they are up to date.

        Raises:
            StagingError: they may be updated, and an earlier batch still awaits its backward, which may update the same rows.
        """
        if torch.is_grad_enabled():
            self._check_no_backward_to_come()
            self._homes_change = True
        self.settle()

    def settle(self) -> None:
        """Brings all rows home, and forgets what was brought ahead: homes may be about to be read or changed."""
        if self._current is not None and not self._current.awaits_backward:
            self._send_home()
        self._fetched = None
        self._wait_for_stream()

    def _check_no_backward_to_come(self) -> None:
        if self._current is not None and self._current.awaits_backward:
            raise StagingError(
                "a batch with cold ids is looked up while an earlier one, whose cold rows lie in the staging area, still awaits its "
                "backward; take each batch's backward before the next forward (or let its loss go), or train without split_ahead"
            )

    def _bring(self, batch: StagedBatch) -> None:
        with self._on_stream():
            for area, rows in zip(self._groups, batch.rows, strict=True):
                if area is not None and rows.numel():
                    area.bring(rows, batch.half)
        self._keep(batch)

    def _pass_on(self, before: StagedBatch, batch: StagedBatch) -> None:
        """Rows that both batches have: from the half where they were just updated."""
        for area, old, new in zip(self._groups, before.rows, batch.rows, strict=True):
            if area is not None and old.numel() and new.numel():
                area.pass_on(old, before.half, new, batch.half)
        self._keep(batch)

    def _send_home(self) -> None:
        """What the latest batch has updated."""
        batch, self._current = self._current, None
        if batch is None or not batch.updated:
            return
        with self._on_stream():
            for area, rows in zip(self._groups, batch.rows, strict=True):
                if area is not None and rows.numel():
                    area.send_home(rows, batch.half)
        self._keep(batch)

    def _keep(self, batch: StagedBatch) -> None:
        if self._stream is not None:
            batch.record_stream(self._stream)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """On the stream of the staging area, behind what this stream has been given so far."""
        if self._stream is None:
            with torch.no_grad():
                yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(self._stream), record_function(MOVES_COLD_ROWS):
            yield

    def _wait_for_stream(self, needed: bool = True) -> None:
        if needed and self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class _Area:
    """The staging area of one group, and the homes of its rows.

    Args:
        homes: by name, [rows, ...].
        spare: by the same names, [2 x capacity, ...].
        capacity: rows of a half.
    """

    def __init__(self, homes: Mapping[str, torch.Tensor], spare: Mapping[str, torch.Tensor], capacity: int) -> None:
        # `.data`: between a forward and its backward the other half is written to, which autograd need not hear of.
        self._tensors = [(homes[name].data, spare[name].data) for name in homes]
        self._capacity = capacity
        self._slots = torch.arange(2 * capacity, device=next(iter(spare.values())).device)

    def bring(self, rows: torch.Tensor, half: int) -> None:
        first = half * self._capacity
        for home, spare in self._tensors:
            torch.index_select(home, 0, rows, out=spare[first : first + rows.numel()])

    def send_home(self, rows: torch.Tensor, half: int) -> None:
        first = half * self._capacity
        for home, spare in self._tensors:
            home.index_copy_(0, rows, spare[first : first + rows.numel()])

    def pass_on(self, old: torch.Tensor, old_half: int, new: torch.Tensor, new_half: int) -> None:
        first, count = new_half * self._capacity, new.numel()
        place = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
        both = old.index_select(0, place) == new
        mine = self._slots[first : first + count]
        source = torch.where(both, place.add_(old_half * self._capacity), mine)
        for _, spare in self._tensors:
            spare[first : first + count] = spare.index_select(0, source)
