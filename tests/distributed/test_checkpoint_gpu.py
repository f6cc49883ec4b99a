"""On a GPU: what hot/cold tables save, stock loads, and the other way round, in whatever memory the rows lie; training goes on alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fae_torchrec.training.checkpoint import load_checkpoint, save_checkpoint
from tests.distributed.small_model import Case, new_batch, optimizer_state, placement_of, shard, train, whole_tensors
from tests.gpu import CUDA, cuda_rank, on_device, requires_gpu

pytestmark = requires_gpu

CASE = Case("rowwise_adagrad")
FORMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "uvm": {"cold_tier": "uvm"},  # with a staging area
    "uvm_caching": {"cold_tier": "uvm_caching", "cold_cache_bytes": 2048},
    "host": {"cold_tier": "host"},
}


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    with cuda_rank():
        yield


def _new(form: str) -> Any:
    options = FORMS[form]
    return shard(CASE, None if options is None else placement_of(CASE), device=CUDA, **options or {})


def _batches(first: int, last: int) -> list[Any]:
    return on_device(new_batch(CASE, step, 0) for step in range(first, last))


def _state(model: Any) -> dict[str, torch.Tensor]:
    return {**whole_tensors(model.state_dict()), **optimizer_state(model)}


@pytest.fixture(scope="module")
def whole_run() -> dict[str, torch.Tensor]:
    model = _new("stock")
    train(model, _batches(0, 8))
    return _state(model)


@pytest.mark.parametrize(("saved", "loaded"), [(a, b) for a in FORMS for b in FORMS if a != b])
def test_saved_by_one_and_loaded_by_another(saved: str, loaded: str, tmp_path: Path, whole_run: dict[str, torch.Tensor]) -> None:
    first = _new(saved)
    train(first, _batches(0, 5))
    save_checkpoint(str(tmp_path / "state"), first, first.fused_optimizer)
    second = _new(loaded)
    train(second, _batches(20, 23))  # what it is now must go
    load_checkpoint(str(tmp_path / "state"), second, second.fused_optimizer)
    before, after = _state(first), _state(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    train(second, _batches(5, 8))
    for key, value in _state(second).items():
        torch.testing.assert_close(
            value, whole_run[key], rtol=1e-5, atol=1e-6 * float(whole_run[key].abs().max()), msg=lambda text, key=key: f"{key}: {text}"
        )
