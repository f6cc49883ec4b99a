"""The state of a sharded model and its optimizer, seen over all ranks: which value lies where, and what it may be loaded from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.optim.keyed import KeyedOptimizer

from fae_torchrec.core.errors import StateError

Key = tuple[str, ...]
"""("model", key) or ("optimizer", parameter key, state, ...)."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: first index and length per dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of this box of the whole tensor."""
        return whole[tuple(slice(first, first + length) for first, length in zip(self.offsets, self.sizes, strict=True))]


@dataclass(frozen=True)
class Entry:
    """One value of the state, whatever the ranks it lies on.

    Attributes:
        shape: of the whole tensor; None for what is no tensor.
        dtype: of the tensor.
        pieces: (rank, piece) in rank order; a plain tensor is one piece on every rank that holds it.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    pieces: tuple[tuple[int, Piece], ...]


@dataclass(frozen=True)
class Wanted:
    """An entry to be loaded, and what its table says about other shapes that it may come in.

    TorchRec keeps a row-wise state (row-wise Adagrad's) once per column shard: [shards * rows], where every other sharding has [rows].
    A column shard's value is the mean over its columns, so the mean weighted by widths is the value of the whole row, and each shard of
    a table newly cut by columns starts with that. A state of one number per shard (a step count) is treated alike. There and back is bit
    for bit: the mean of equal values is exact in float64.

    Attributes:
        entry: what is wanted.
        rows: rows of the table that it is optimizer state of; None for anything else, which keeps its shape.
        widths: columns of each shard that the table was saved in; one, whatever its width, where it was not cut by columns.
    """

    entry: Entry
    rows: int | None = None
    widths: tuple[int, ...] = (1,)

    def takes(self, shape: Sequence[int] | None) -> bool:
        """Whether it can be loaded from a tensor of this shape, or from no tensor (None)."""
        if shape is None or self.entry.shape is None:
            return shape is None and self.entry.shape is None
        return tuple(shape) == self.entry.shape or self._vector(shape) is not None

    def refit(self, value: torch.Tensor) -> torch.Tensor:
        """The value in the wanted shape.

        Args:
            value: of a shape that it takes.
        """
        vector = self._vector(value.shape)
        if tuple(value.shape) == self.entry.shape or vector is None or self.entry.shape is None:
            return value
        per_shard = value.reshape(-1, vector).to(torch.float64)
        share = torch.tensor(self.widths) if len(per_shard) == len(self.widths) else torch.ones(len(per_shard))
        share = share.to(per_shard)[:, None]
        return ((per_shard * share).sum(0) / share.sum()).repeat(self.entry.shape[0] // vector).to(value.dtype)

    def _vector(self, given: Sequence[int]) -> int | None:
        """Length of the vector that both a given shape and the entry hold once per shard; None where they do not."""
        shape = self.entry.shape
        if not self.rows or shape is None or len(given) != 1 or len(shape) != 1:
            return None
        if shape[0] % self.rows == 0:
            return self.rows if given[0] in (self.rows, self.rows * len(self.widths)) else None
        return 1 if given[0] and all(piece.sizes == (1,) for _, piece in self.entry.pieces) else None


class TrainingState:
    """What `state_dict()` of a model and of its optimizer give on this rank, and what all ranks hold together. Collective.

    Stock TorchRec lists a table's optimizer state on the ranks that hold a shard of it alone; `entries` is the union over ranks.

    Args:
        model: any sharded model.
        optimizer: its optimizer, or None for the weights alone.

    Attributes:
        model_state: the model's state dict.
        optimizer_state: the optimizer's state dict.
        values: the leaves of both on this rank; writing into their tensors and `commit` is loading.
        entries: the values of all ranks, the same on each of them.
        step: the fused optimizers' step count, where they keep one (Adam); the largest of all kernels and ranks.
    """

    def __init__(self, model: DistributedModelParallel, optimizer: KeyedOptimizer | None) -> None:
        self._model = model
        self._optimizer = optimizer
        self.model_state: dict[str, Any] = model.state_dict()
        self.optimizer_state: dict[str, Any] = {} if optimizer is None else optimizer.state_dict()
        self.values: dict[Key, Any] = {("model", key): value for key, value in self.model_state.items()}
        self.values.update(flat(("optimizer",), self.optimizer_state.get("state", {})))
        steps = [int(kernel.iter) for kernel in _counting_kernels(model)] if optimizer is not None else []
        mine = ({key: self._describe(key) for key in self.values}, steps)
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, mine)
        self.step: int | None = max((step for _, steps in of_ranks for step in steps), default=None)
        self.entries = _union([described for described, _ in of_ranks])

    def pieces(self, key: Key) -> list[tuple[Piece, torch.Tensor]]:
        """This rank's pieces of one entry, as views into the model; none for what is no tensor or lies on other ranks alone.

        Raises:
            StateError: a DTensor that TorchRec did not make.
        """
        value = self.values.get(key)
        if isinstance(value, ShardedTensor):
            shards = [(tuple(shard.metadata.shard_offsets), shard.tensor) for shard in value.local_shards()]
        elif isinstance(value, DTensor):
            local = value.to_local()
            if not isinstance(local, LocalShardsWrapper):
                raise StateError(
                    f"{'.'.join(key)} is a DTensor over {type(local).__name__}; allowed are tensors, ShardedTensors and the DTensors that "
                    "TorchRec makes; save the model with torch.distributed.checkpoint.state_dict instead"
                )
            shards = list(zip(local.local_offsets(), local.local_shards(), strict=False))  # a rank without a shard still has an offset
        elif isinstance(value, torch.Tensor):
            shards = [((0,) * value.dim(), value)]
        else:
            shards = []
        return [(Piece(tuple(offsets), tuple(tensor.shape)), tensor.detach()) for offsets, tensor in shards]

    def set_object(self, key: Key, value: object) -> None:
        """Puts in what is no tensor, for `commit`."""
        *parents, last = key[1:]
        target = self.model_state if key[0] == "model" else self.optimizer_state["state"]
        for parent in parents:
            target = target[parent]
        target[last] = value

    def commit(self, step: int | None = None) -> None:
        """Tells model and optimizer that their values were loaded, so that hot rows and caches follow. Collective.

        Args:
            step: the fused optimizers' step count; None leaves theirs.
        """
        # Torchrec 1.8 cannot load column shards of different widths, not even its own; their values are in place. The dict is a new one,
        # because DistributedModelParallel renames its keys.
        uneven = {key for key, entry in self.entries.items() if len(set(_widths(entry))) > 1}
        self._model.load_state_dict({key: x for key, x in self.model_state.items() if ("model", key) not in uneven}, strict=False)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(self.optimizer_state)
            for kernel in _counting_kernels(self._model) if step is not None else ():
                kernel.set_optimizer_step(step)
                kernel.iter_cpu.fill_(step)  # fbgemm 1.8 follows `iter` only while its copy on the host is 0

    def wanted(self, saved_widths: Callable[[Key], Sequence[int]]) -> dict[Key, Wanted]:
        """What is to be loaded, by key.

        Args:
            saved_widths: gives the columns of each shard that a table was saved in, in order, from the key of its weights.
        """
        wanted = {}
        for key, entry in self.entries.items():
            weight = self._weight_of(key)
            shape = self.entries[weight].shape if weight else None
            wanted[key] = Wanted(entry, shape[0], tuple(saved_widths(weight)) or (1,)) if weight and shape else Wanted(entry)
        return wanted

    def column_widths(self) -> dict[str, list[int]]:
        """Columns of each shard, in order, of each weight that is cut by columns."""
        widths = {key[1]: _widths(entry) for key, entry in self.entries.items() if key[0] == "model"}
        return {name: cut for name, cut in widths.items() if len(cut) > 1}

    def _weight_of(self, key: Key) -> Key | None:
        """The weight that an optimizer state belongs to: its key may have a prefix (CombinedOptimizer)."""
        if key[0] != "optimizer":
            return None
        parts = key[1].split(".")
        names = (("model", ".".join(parts[first:])) for first in range(len(parts)))
        return next((name for name in names if name in self.entries), None)

    def _describe(self, key: Key) -> Entry:
        value = self.values[key]
        pieces = self.pieces(key)
        if isinstance(value, ShardedTensor):
            shape, dtype = tuple(value.metadata().size), value.metadata().tensor_properties.dtype
        elif isinstance(value, torch.Tensor):
            shape, dtype = tuple(value.shape), value.dtype
        else:
            return Entry(None, None, ())
        # A sharded tensor may name the configured dtype instead of its shards'.
        dtype = pieces[0][1].dtype if pieces else dtype
        return Entry(shape, dtype, tuple((dist.get_rank(), piece) for piece, _ in pieces))


def all_ranks() -> dist.ProcessGroup:
    """The default process group."""
    assert dist.group.WORLD is not None, "a sharded model needs a process group"
    return dist.group.WORLD


def flat(path: Key, value: object) -> Iterator[tuple[Key, Any]]:
    """The leaves of nested mappings with their paths."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from flat((*path, str(name)), inner)
    else:
        yield path, value


def widths_of(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
    """Widths of the column blocks, in order, of a matrix that consists of (offsets, sizes) boxes."""
    return [width for _, width in sorted({(offsets[1], sizes[1]) for offsets, sizes in boxes if len(offsets) == 2})]


def _widths(entry: Entry) -> list[int]:
    return widths_of([(piece.offsets, piece.sizes) for _, piece in entry.pieces])


def check_fits(source: str, given: Mapping[str, Sequence[int] | None], wanted: Mapping[str, Wanted]) -> None:
    """Checks names and shapes before anything is loaded. No collective: give every rank the same.

    Args:
        source: what is being loaded, for the message.
        given: shape by name; None for what is no tensor.
        wanted: what is to be loaded, by name.

    Raises:
        StateError: a name is missing or unexpected, or a shape is another one.
    """
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    faults = []
    for name in missing:
        close = get_close_matches(name, unexpected, n=1, cutoff=0.8)
        faults.append(f"{name} is missing" + (f" (is it the unexpected {close[0]}?)" if close else ""))
    faults += [f"{name} is unexpected" for name in unexpected]
    for name, value in wanted.items():
        if name in given and not value.takes(given[name]):
            received, allowed = ("no tensor" if shape is None else f"shape {tuple(shape)}" for shape in (given[name], value.entry.shape))
            faults.append(f"{name}: received {received}, allowed {allowed}")
    if faults:
        more = f"; and {len(faults) - _TOLD} more" if len(faults) > _TOLD else ""
        raise StateError(
            f"{source} does not fit this model: {'; '.join(faults[:_TOLD])}{more}. Nothing was loaded. Load it into the model and the "
            "optimizer it was saved from, rename what was renamed, or give optimizer=None to load the weights alone. An optimizer that "
            "makes its state at the first step, as a dense Adam does, must have it before: call its init_state()"
        )


_TOLD = 8
"""Faults that a message tells."""


def _union(of_ranks: Sequence[Mapping[Key, Entry]]) -> dict[Key, Entry]:
    entries: dict[Key, Entry] = {}
    for described in of_ranks:
        for key, entry in described.items():
            known = entries.get(key)
            if known is None or not known.pieces:
                entries[key] = entry
            else:
                entries[key] = Entry(known.shape, known.dtype, known.pieces + entry.pieces)
    return entries


def _counting_kernels(model: DistributedModelParallel) -> Iterator[Any]:
    """The fused kernels that keep a step count (Adam's and its kin), which no state dict of torchrec 1.8 has."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", []):  # private, torchrec 1.8; the test of the step count fails if it moves
            for kernel in lookup.modules():
                if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen) and "iter" in kernel.state_dict():
                    yield kernel
