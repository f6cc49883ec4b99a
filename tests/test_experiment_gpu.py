"""On a GPU: a whole run, from data files to scores. With hot and cold tiers in the stock order it is the stock run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fae_torchrec.experiment import prepare, run_placement
from tests.gpu import cuda_rank, requires_gpu
from tests.small_config import new_config

pytestmark = requires_gpu


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    with cuda_rank():
        yield


def _run(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    config = new_config(folder, "train.device=cuda", *overrides)
    config, placement = prepare(config, name, 1)
    return run_placement(0, config, name, placement, False)


@pytest.mark.parametrize("cold_tier", ["auto", "uvm_caching", "host"])
def test_the_stock_order_gives_the_stock_run(cold_tier: str, tmp_path: Path) -> None:
    stock = _run(tmp_path, "stock")
    ours = _run(tmp_path, "fae-unsegregated", f"placement.cold_tier={cold_tier}", "train.lookahead=5")
    for figure in ("train_loss", "test_logloss", "test_auc"):
        assert ours[figure] == pytest.approx(stock[figure], rel=1e-4)
    assert ours["steps"] == stock["steps"]
    assert ("staging" in ours["fast_memory"]) == (cold_tier == "auto")


def test_hot_and_cold_batches_train(tmp_path: Path) -> None:
    run = _run(tmp_path, "fae", "schedule.policy=proportional")
    assert run["steps_by_kind"]["hot"] > 0 and run["steps_by_kind"]["cold"] > 0
    assert 0.3 < run["test_logloss"] < 1.0
