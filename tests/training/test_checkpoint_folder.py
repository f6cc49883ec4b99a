"""Checkpoints of a run: named, pruned, whole or not taken, whatever fails on whichever rank; random numbers go on."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fae_torchrec.core.errors import ConfigError, FAEError
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.training.checkpoint_folder import CheckpointFolder
from tests.distributed.small_model import whole_tensors
from tests.training.small_run import CPU, new_model, placement_of, sharded


def _listing(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except FAEError as error:
        return str(error)
    return "no error"


def _cases(rank: int, path: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    model = new_model()
    model, optimizer = sharded(model, placement_of(model))
    dense = next(iter(model.parameters()))
    folder = CheckpointFolder(path / "run", keep=2)
    seen["first"] = folder.open()
    listings = []
    for step in (5, 10, 15, 20):
        with torch.no_grad():
            dense.fill_(step)
        torch.manual_seed(step + rank)
        folder.save(step, model, optimizer, {"what": step}, CPU)
        listings.append(_listing(folder.path))
    seen["listings"] = listings
    drawn, weights = torch.rand(3), {key: value.clone() for key, value in whole_tensors(model.state_dict()).items()}

    # No file of rank 1 may grow beyond 1 kB: its disk is full.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    seen["full disk"] = _error(lambda: folder.save(25, model, optimizer, {}, CPU))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()  # rank 0 cleans up after the error
    seen["after full disk"] = _listing(folder.path)
    dist.barrier()
    if rank == 0:
        (folder.path / "step_000000025" / "half").mkdir(parents=True)
    seen["name is taken"] = _error(lambda: folder.save(25, model, optimizer, {}, CPU))
    seen["not for JSON"] = _error(lambda: folder.save(30, model, optimizer, {"what": CPU}, CPU))
    seen["latest"] = folder.latest()

    if rank == 0:
        (folder.path / ".step_000000030.tmp" / "half").mkdir(parents=True)
    newest = CheckpointFolder(path / "run").open()
    assert newest is not None
    seen["after open"] = _listing(folder.path)
    with torch.no_grad():
        dense.fill_(0)
    seen["extra"] = folder.load(newest, model, optimizer, CPU)
    seen["same"] = torch.equal(torch.rand(3), drawn) and all(
        torch.equal(value, weights[key]) for key, value in whole_tensors(model.state_dict()).items()
    )
    if rank == 0:
        (newest / "rng_00001.pt").unlink()
    seen["damaged"] = _error(lambda: folder.load(newest, model, optimizer, CPU))
    (path / "a file").touch()
    seen["no folder"] = _error(CheckpointFolder(path / "a file").open)
    return seen


def test_two_ranks(tmp_path: Path) -> None:
    ranks = run_on_local_ranks(_cases, 2, tmp_path, timeout_s=120)
    for seen in ranks:
        assert seen["first"] is None
        assert seen["listings"] == [
            ["step_000000005"],
            ["step_000000005", "step_000000010"],
            ["step_000000010", "step_000000015"],
            ["step_000000015", "step_000000020"],
        ]
        assert "rank 1: OSError: [Errno 27] File too large" in seen["full disk"] and "step 25" in seen["full disk"]
        assert "the newest: " in seen["full disk"] and "step_000000020" in seen["full disk"]
        assert seen["after full disk"] == ["step_000000015", "step_000000020"]
        assert "step 25" in seen["name is taken"] and "not empty" in seen["name is taken"]
        assert "values that JSON can write" in seen["not for JSON"]
        assert seen["latest"] == tmp_path / "run" / "step_000000020", "the newer one has no metadata"
        assert seen["after open"] == ["step_000000015", "step_000000020", "step_000000025"], "the draft is removed"
        assert seen["extra"]["step"] == seen["extra"]["what"] == 20 and seen["extra"]["ranks"] == 2
        assert seen["same"]
        assert "rng_00001.pt is missing or damaged" in seen["damaged"], "on rank 0 as well"
        assert "a file" in seen["no folder"] and "where you may write" in seen["no folder"]


def test_keeps_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep=0"):
        CheckpointFolder(tmp_path, keep=0)


def test_latest_is_the_newest_finished(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert folder.latest() is None
    for name in ("step_000000999", "step_1000000000", "step_000001000", "step_12", ".step_2000000000.tmp", "step_000000005.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").touch()
    (tmp_path / "step_3000000000").mkdir()
    assert folder.latest() == tmp_path / "step_1000000000", "by number, not by name"
