"""Random numbers go on where they were saved, on every rank; a rank that is new gets a stream of its own."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fae_torchrec.core.errors import DataError
from fae_torchrec.training.rng_state import load_rng_state, rng_state, save_rng_state

CPU = torch.device("cpu")


def draws() -> list[float]:
    """Some of each generator; the first normal number leaves a second one waiting in numpy's and Python's."""
    of_numpy = [*np.random.random(2).tolist(), np.random.normal()]  # noqa: NPY002
    return [*torch.rand(3).tolist(), *of_numpy, random.random(), random.gauss(0, 1)]


def test_numbers_go_on(tmp_path: Path) -> None:
    drawn = {}
    for rank in (0, 1):
        torch.manual_seed(rank)
        np.random.seed(rank)  # noqa: NPY002
        random.seed(rank)
        draws()
        save_rng_state(rng_state(CPU), tmp_path, rank)
        drawn[rank] = draws()
    for rank in (1, 0):
        assert draws() != drawn[rank], "the control"
        load_rng_state(tmp_path, rank, 2, CPU)
        assert draws() == drawn[rank]
    branched = {}
    for rank in (2, 3, 2):
        load_rng_state(tmp_path, rank, 2, CPU)
        branched.setdefault(rank, []).append(draws())
    assert branched[2][0] == branched[2][1], "the same each time"
    assert len({tuple(values) for values in (*drawn.values(), branched[2][0], branched[3][0])}) == 4, "another stream for each rank"


def test_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rng_00000\.pt is missing or damaged"):
        load_rng_state(tmp_path, 0, 1, CPU)
    save_rng_state(rng_state(CPU), tmp_path, 0)
    whole = (tmp_path / "rng_00000.pt").read_bytes()
    (tmp_path / "rng_00000.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"rng_00000\.pt is missing or damaged"):
        load_rng_state(tmp_path, 0, 1, CPU)
