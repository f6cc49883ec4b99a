"""The state of a sharded model as plain whole tensors on rank 0: an ordinary PyTorch checkpoint, out of any plan and into any plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from fae_torchrec.core.errors import StateError
from fae_torchrec.distributed.local_ranks import from_first_rank
from fae_torchrec.training.training_state import Entry, Key, TrainingState, all_ranks, check_fits, flat

_STEP = "optimizer_step"
_WIDTHS = "column_widths"
_MESSAGE_BYTES = 256 << 20
"""Bytes that travel in one message, which bounds its buffer on a device."""


def whole_state(model: DistributedModelParallel, optimizer: KeyedOptimizer | None) -> dict[str, Any] | None:
    """Gathers the state as plain whole tensors on rank 0, for torch.save. Collective; one shard travels at a time.

    Rank 0 needs host memory for the whole state; `save_checkpoint` does not.

    Args:
        model: sharded by any plan, stock's or ours.
        optimizer: the fused and dense optimizers, or None for the weights alone. Parameter groups (learning rates) are not gathered.

    Returns:
        On rank 0 CPU tensors under the keys of the unsharded model: "model": {key: tensor}, "optimizer": {parameter key: {state:
        tensor}}; for Adam "optimizer_step"; for tables sharded by columns "column_widths": {key: [widths]}, because a row-wise
        optimizer state has a part [rows] per column shard then, one after the other. None on the other ranks.
    """
    state = TrainingState(model, optimizer)
    gathered: dict[str, Any] = {"model": {}, "optimizer": {}, _WIDTHS: state.column_widths()}
    if state.step is not None:
        gathered[_STEP] = state.step
    for key, entry in state.entries.items():
        whole = _gather(state, key, entry) if entry.shape is not None else state.values.get(key)
        target = gathered
        for name in key[:-1]:
            target = target.setdefault(name, {})
        target[key[-1]] = whole
    return gathered if dist.get_rank() == 0 else None


@torch.no_grad()
def load_whole_state(model: DistributedModelParallel, optimizer: KeyedOptimizer | None, state: Mapping[str, Any] | None) -> None:
    """Loads whole tensors into a model sharded by any plan. Collective; one shard travels at a time.

    Names and shapes are checked first, so that an error leaves the model as it was. Values are converted to the model's dtypes.

    Args:
        model: sharded by any plan, stock's or ours.
        optimizer: its optimizers, or None to load the weights alone.
        state: as `whole_state` gives it; `{"model": unsharded_model.state_dict()}` holds the weights of an unsharded model. Rank 0's
            counts, the other ranks may give None.

    Raises:
        StateError: it is of another model; names each key. On every rank alike.
    """
    values: dict[Key, Any] = {}

    def describe() -> tuple[dict[Key, tuple[int, ...] | _Object], dict[str, list[int]], int | None]:
        values.update(_leaves(state, ["model"] if optimizer is None else ["model", "optimizer"]))
        described = {key: tuple(value.shape) if isinstance(value, torch.Tensor) else _Object(value) for key, value in values.items()}
        rest = dict(state or {})
        return described, rest.get(_WIDTHS, {}), rest.get(_STEP)

    given, widths, step = from_first_rank(describe, all_ranks())
    target = TrainingState(model, optimizer)
    wanted = target.wanted(lambda weight: widths.get(weight[1], []))
    shapes = {".".join(key): value if isinstance(value, tuple) else None for key, value in given.items()}
    check_fits("the state", shapes, {".".join(key): value for key, value in wanted.items()})
    for key, entry in target.entries.items():
        if entry.shape is not None:
            _scatter(wanted[key].refit(values[key]) if values else None, target, key, entry)
        elif key in target.values:
            target.set_object(key, given[key].value)
    target.commit(step)


@dataclass(frozen=True)
class _Object:
    """What is no tensor, told apart from a shape."""

    value: Any


def _leaves(state: Mapping[str, Any] | None, parts: Sequence[str]) -> dict[Key, Any]:
    if not isinstance(state, Mapping) or not isinstance(state.get("model"), Mapping):
        received = f"a dict of {sorted(map(str, state))[:5]}" if isinstance(state, Mapping) else type(state).__name__
        raise StateError(f'the state is {received}; rank 0 must give a dict as whole_state does, or {{"model": weights by key}}')
    nested = {part: state.get(part, {}) for part in parts}
    if "state" in nested.get("optimizer", {}):  # TorchRec's own nesting, as torch's dcp_to_torch_save gives it
        nested["optimizer"] = nested["optimizer"]["state"]
    leaves = dict(flat((), nested))
    for key, value in leaves.items():
        # ShardedTensors and DTensors lie on the ranks that made them.
        if hasattr(value, "__torch_function__") and type(value) not in (torch.Tensor, torch.nn.Parameter):
            received = type(value).__name__
            raise StateError(f"{'.'.join(key)}: received a {received}, allowed is a whole tensor; use save_checkpoint for sharded state")
    return leaves


def _gather(state: TrainingState, key: Key, entry: Entry) -> torch.Tensor | None:
    """The whole tensor on rank 0, each piece from the first rank that holds it; None elsewhere."""
    rank = dist.get_rank()
    mine = dict(state.pieces(key))
    whole = torch.empty(entry.shape or (), dtype=entry.dtype) if rank == 0 else None
    owners = {piece: owner for owner, piece in reversed(entry.pieces)}
    for piece, owner in owners.items():
        if whole is not None:
            piece.of(whole).copy_(mine[piece] if owner == rank else _receive(piece.sizes, entry.dtype, owner))
        elif owner == rank:
            _send(mine[piece], 0)
    return whole


def _scatter(whole: torch.Tensor | None, state: TrainingState, key: Key, entry: Entry) -> None:
    """Copies rank 0's whole tensor into the pieces of all ranks, in their dtype."""
    rank = dist.get_rank()
    mine = dict(state.pieces(key))
    for owner, piece in entry.pieces:
        if whole is not None and owner != rank:
            _send(piece.of(whole).to(entry.dtype), owner)
        elif owner == rank:
            mine[piece].copy_(piece.of(whole) if whole is not None else _receive(piece.sizes, entry.dtype, 0))


def _send(tensor: torch.Tensor, rank: int) -> None:
    for message in torch.split(_bytes(tensor.contiguous()), _MESSAGE_BYTES):
        dist.send(message.to(_message_device()), rank)


def _receive(sizes: Sequence[int], dtype: torch.dtype | None, rank: int) -> torch.Tensor:
    tensor = torch.empty(tuple(sizes), dtype=dtype)
    for part in torch.split(_bytes(tensor), _MESSAGE_BYTES):
        message = torch.empty_like(part, device=_message_device())
        dist.recv(message, rank)
        part.copy_(message)
    return tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor: every dtype travels, bit for bit."""
    return tensor.view(-1).view(torch.uint8)


def _message_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
