"""The random number generators of a rank, kept in a file: torch's (host and device), numpy's and Python's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.fingerprint import fingerprint


def rng_state(device: torch.device) -> dict[str, Any]:
    """What the global generators of this process stand at; of the CUDA devices `device` alone."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # users' code draws from it
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def restore_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Lets the generators go on from what `rng_state` gave; the device's only if it was saved on one of its type."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])


def branch_rng_state(state: dict[str, Any], rank: int) -> None:
    """Seeds the generators of a rank that was not there when the state was saved: another stream for each rank, the same each time."""
    seed = int(fingerprint(state["torch"].tolist(), rank), 16)
    torch.manual_seed(seed % 2**63)  # the devices' generators as well
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def save_rng_state(state: dict[str, Any], folder: Path, rank: int) -> None:
    """Writes a rank's state into a checkpoint's folder."""
    torch.save(state, _path(folder, rank))


def load_rng_state(folder: Path, rank: int, saved_ranks: int, device: torch.device) -> None:
    """Lets this rank's generators go on from a checkpoint's folder.

    Args:
        folder: of the checkpoint.
        rank: this rank.
        saved_ranks: how many ranks saved; a rank beyond them gets a seed drawn from rank 0's state.
        device: this rank's.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = _path(folder, rank if rank < saved_ranks else 0)
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # whatever unpickling damaged bytes raises
        raise DataError(
            f"{path} is missing or damaged ({type(error).__name__}: {error}); copy the whole folder, or take another"
        ) from error
    if rank < saved_ranks:
        restore_rng_state(state, device)
    else:
        branch_rng_state(state, rank)


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rng_{rank:05d}.pt"
