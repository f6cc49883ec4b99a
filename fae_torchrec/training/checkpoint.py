"""Checkpoints through torch.distributed.checkpoint, in the stock layout: any plan and any number of ranks may load them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from fae_torchrec.core.errors import ConfigError, DataError, FAEError
from fae_torchrec.distributed.local_ranks import from_first_rank
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.training.training_state import Key, TrainingState, all_ranks, check_fits, widths_of

_EXTRA = "fae_extra"
_STEP = "fae_optimizer_step"


def save_checkpoint(
    path: str | os.PathLike[str],
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer | None,
    *,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Saves through torch.distributed.checkpoint: each rank writes its shards, the metadata come last. Collective.

    The folder holds what `torch.distributed.checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()})` writes,
    so stock TorchRec reads it; and in addition `extra`, the fused optimizers' step count (Adam), which no state dict has, and the
    fingerprint and hot tier of each row placement (for information: another placement may load it).

    Args:
        path: a folder that all ranks see; new, or without a checkpoint.
        model: sharded by any plan, stock's or ours.
        optimizer: the fused and dense optimizers, or None to save the weights alone. Parameter groups (learning rates) are not saved.
        extra: what else to remember, values that JSON can write; rank 0's counts.

    Raises:
        ConfigError: the folder holds a checkpoint already.
        DataError: `extra` is not for JSON.
        FAEError: a rank could not write its files (a full disk); on every rank alike, and there are no metadata.
    """
    text = from_first_rank(lambda: _prepare(Path(path), {"placements": _placements(model), **(extra or {})}), all_ranks())
    state = TrainingState(model, optimizer)
    values: dict[str, Any] = {"model": state.model_state, _EXTRA: text}
    if optimizer is not None:
        values["optimizer"] = {"state": state.optimizer_state["state"]}
    if state.step is not None:
        values[_STEP] = state.step
    with _one_line_errors(f"checkpoint {path} could not be written"):
        save(values, checkpoint_id=path)


@torch.no_grad()
def load_checkpoint(path: str | os.PathLike[str], model: DistributedModelParallel, optimizer: KeyedOptimizer | None) -> dict[str, Any]:
    """Loads what `save_checkpoint`, or stock's torch.distributed.checkpoint, saved; any plan and number of ranks. Collective.

    Names, shapes and files are checked first, so that an error leaves the model as it was. Values are converted to the model's dtypes.

    Args:
        path: the folder.
        model: sharded by any plan, stock's or ours.
        optimizer: its optimizers, or None to load the weights alone.

    Returns:
        `extra` and the placements it was saved under; empty for stock's.

    Raises:
        ConfigError: there is no checkpoint, or it was never finished.
        DataError: it is damaged.
        StateError: it is of another model; names each key. On every rank alike.
        FAEError: a rank could not read its files; on every rank alike.
    """
    metadata: Metadata = from_first_rank(lambda: _read_metadata(Path(path)), all_ranks())
    saved = metadata.state_dict_metadata
    state = TrainingState(model, optimizer)
    parts = ("model.",) if optimizer is None else ("model.", "optimizer.state.")  # what else a stock user saved is not ours
    given = {name: _saved_shape(entry) for name, entry in saved.items() if name.startswith(parts)}
    given = given or {name: None for name in saved}
    wanted = state.wanted(lambda weight: _saved_widths(saved.get(_name(weight))))
    check_fits(f"checkpoint {path}", given, {_name(key): value for key, value in wanted.items()})

    reshaped: dict[Key, torch.Tensor] = {}
    values: dict[str, Any] = {name: "" for name in (_EXTRA, _STEP) if name in saved}
    for key, value in state.values.items():
        shape = given[_name(key)]
        if shape is None or shape == state.entries[key].shape:
            values[_name(key)] = value
        elif state.pieces(key):
            values[_name(key)] = reshaped[key] = torch.empty(shape, dtype=state.entries[key].dtype)
    with _one_line_errors(f"checkpoint {path} could not be read"):
        load(values, checkpoint_id=path)
    for key, whole in reshaped.items():
        refitted = wanted[key].refit(whole)
        for piece, tensor in state.pieces(key):
            tensor.copy_(piece.of(refitted))
    for key, entry in state.entries.items():
        if entry.shape is None and key in state.values:
            state.set_object(key, values[_name(key)])
    state.commit(values.get(_STEP))
    extra: dict[str, Any] = json.loads(values.get(_EXTRA, "{}"))
    return extra


def read_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_checkpoint` was given as `extra`, and the placements, without a model. Collective.

    Args:
        path: the folder.

    Raises:
        ConfigError, DataError: as `load_checkpoint`.
    """

    def read() -> dict[str, Any]:
        values = {name: "" for name in _read_metadata(Path(path)).state_dict_metadata if name == _EXTRA}
        with _one_line_errors(f"checkpoint {path} could not be read"):
            load(values, checkpoint_id=path, no_dist=True)
        extra: dict[str, Any] = json.loads(values.get(_EXTRA, "{}"))
        return extra

    return from_first_rank(read, all_ranks())  # type: ignore[no-any-return]


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turns torch's CheckpointException, which every rank gets but which is no Exception and holds tracebacks, into an error of ours."""
    try:
        yield
    except CheckpointException as failure:
        causes = "; ".join(f"rank {rank}: {type(error).__name__}: {error}" for rank, (error, _) in failure.failures.items())
        raise FAEError(f"{what} ({causes}); look at the folder's disk and permissions") from failure


def _name(key: Key) -> str:
    """The name that torch.distributed.checkpoint gives to an entry of {"model": state dict, "optimizer": state dict}."""
    return ".".join((key[0], "state", *key[1:]) if key[0] == "optimizer" else key)


def _placements(model: DistributedModelParallel) -> dict[str, dict[str, str]]:
    """Fingerprint and hot tier by the path of each hot/cold collection."""
    return {
        path: {"fingerprint": plan.placement.fingerprint, "hot_tier": plan.hot_tier}
        for path, plan in model.plan.plan.items()
        if isinstance(plan, FAEModuleShardingPlan)
    }


def _prepare(path: Path, extra: Mapping[str, object]) -> str:
    """Checks the folder; returns `extra` as text."""
    if (path / ".metadata").exists():
        raise ConfigError(f"{path} holds a checkpoint already, which a failure half-way would destroy; give another folder or remove it")
    try:
        return json.dumps(extra)
    except (TypeError, ValueError) as error:
        raise DataError(f"extra: {error}; allowed are values that JSON can write (text, numbers, lists, dicts)") from error


def _read_metadata(path: Path) -> Metadata:
    """The metadata of a checkpoint whose files are all there, as long as the metadata say."""
    if not (path / ".metadata").is_file():
        raise ConfigError(f"no checkpoint in {path}: it has no .metadata, which is written last; give the folder of a finished checkpoint")
    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as error:  # whatever unpickling damaged bytes raises
        raise DataError(f"{path / '.metadata'} is damaged ({type(error).__name__}: {error}); take another checkpoint") from error
    lengths: dict[str, int] = {}
    for part in (metadata.storage_data or {}).values():
        lengths[part.relative_path] = max(lengths.get(part.relative_path, 0), part.offset + part.length)
    for name, length in lengths.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found is None or found < length:
            received = "missing" if found is None else f"{found} bytes long"
            raise DataError(f"{path / name} is {received}, at least {length} bytes were saved; copy the whole folder, or take another")
    return metadata


def _saved_shape(saved: object) -> tuple[int, ...] | None:
    return tuple(saved.size) if isinstance(saved, TensorStorageMetadata) else None


def _saved_widths(saved: object) -> list[int]:
    """Columns of each shard that a tensor was saved in."""
    return widths_of([(chunk.offsets, chunk.sizes) for chunk in saved.chunks]) if isinstance(saved, TensorStorageMetadata) else []
