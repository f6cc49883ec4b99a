"""examples/two_tower.py and its page: two collections, three ways in, on two ranks; hot batches are hot in both towers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from fae_torchrec import HotColdDataLoader, RowPlacement, ShuffleSchedule, model_tables
from fae_torchrec.config import load_config
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec
from fae_torchrec.training.model_factory import load_factory
from fae_torchrec.training.model_spec import ModelSpec, build_model
from tests.test_launch import fae

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "two_tower.py"
PAGE = (ROOT / "docs" / "your_model.md").read_text()
STEPS, BATCH = 12, 64
SMALL = ("--users", "2000", "--items", "4000", "--batch-size", str(BATCH), "--steps", str(STEPS))
ROWS = {"user": 2000, "segment": 64, "recent": 2048, "item": 4000, "brand": 200, "category": 2048}


@pytest.fixture
def two_tower(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    return import_module("two_tower")


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks told of the three ways."""
    folder = tmp_path_factory.mktemp("two_tower")
    driver = ROOT / "tests" / "launch_scripts" / "two_tower_ways.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(driver), str(folder), *SMALL, "--budget-mib", "0.06"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_the_planner_swap_gives_the_stock_losses(ways: list[dict[str, Any]]) -> None:
    for told in ways:
        assert len(told["off"]["losses"]) == STEPS
        assert told["planner"]["losses"] == pytest.approx(told["off"]["losses"], rel=1e-5)
        assert told["planner"]["auc"] == pytest.approx(told["off"]["auc"], abs=1e-3)
        assert told["pipeline"]["losses"][:STEPS] != pytest.approx(told["off"]["losses"], rel=1e-3), "other batches, other losses"
    assert ways[0]["off"]["losses"] != pytest.approx(ways[1]["off"]["losses"], rel=1e-3), "each rank has its own samples"
    assert ways[0]["planner"]["placement"] == ways[1]["planner"]["placement"] == ways[0]["pipeline"]["placement"]


def test_hot_batches_skip_the_cold_tier_of_both_towers(ways: list[dict[str, Any]]) -> None:
    for told in ways:
        stock, planner, pipeline = told["off"], told["planner"], told["pipeline"]
        assert (stock["cold_exchanges"], stock["hot_steps"]) == (0, 0)
        assert (planner["cold_exchanges"], planner["hot_steps"]) == (2 * (STEPS + 1), 0), "one test step"
        assert STEPS / 4 < pipeline["hot_steps"] < pipeline["steps"]
        assert STEPS <= pipeline["steps"] <= STEPS + 2
        assert pipeline["cold_exchanges"] == 2 * (pipeline["steps"] - pipeline["hot_steps"] + 1)
        assert planner["cold_tiers"] == pipeline["cold_tiers"] == 2, "both towers have cold rows"


def test_a_checkpoint_of_both_towers_is_a_stock_checkpoint(ways: list[dict[str, Any]]) -> None:
    for told in ways:
        assert told["loaded auc"] == pytest.approx(told["pipeline"]["auc"], abs=1e-3)
        assert "call its init_state()" in told["without a state"]
    assert ways[0]["pipeline"]["auc"] != pytest.approx(ways[0]["off"]["auc"], abs=1e-3), "loading changed the stock model"


def test_fae_launch_runs_the_file_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "fae.json").write_text('{"hbm_budget": "60KiB", "output": "out"}')
    done = fae(tmp_path, "launch", "--config", "fae.json", str(EXAMPLE), *SMALL, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "launch.json").read_text())
    assert (record["placement"], record["error"]) == ("fae", None)
    assert record["used"] == ["EmbeddingShardingPlanner", "TrainPipelineSparseDist"]
    hot = record["steps"]["hot"]
    assert hot > STEPS / 4
    assert (hot + record["steps"]["other"], record["steps"]["evaluation"]) == (STEPS, 1)
    placement = RowPlacement.load(tmp_path / "out" / "placement.npz")
    assert sorted(placement.tables.names) == sorted(f"t_{feature}" for feature in ROWS)
    assert all(placement.hot_rows(f"t_{feature}") for feature in ROWS)
    for text in ("EmbeddingShardingPlanner -> FAEShardingPlanner", f"{STEPS} training steps: {hot} all hot", "--fae off, 2 x cpu"):
        assert done.stdout.count(text) == 1, text


def test_a_hot_batch_is_hot_in_both_towers(two_tower: ModuleType) -> None:
    samples = two_tower.Samples.generated(40 * BATCH, ROWS, 3)
    hot_ids = {f"t_{feature}": np.unique(samples.ids[feature][: 20 * BATCH]) for feature in ROWS}
    tables = TableSet(tuple(TableSpec(f"t_{feature}", ROWS[feature], 8, (feature,)) for feature in ROWS))
    placement = RowPlacement(tables, hot_ids, "by hand", 0, 0.5, 0.5)

    def hot(batch: Any, features: tuple[str, ...]) -> torch.Tensor:
        """Whether all ids of a sample are hot, feature by feature and sample by sample."""
        ids = batch.sparse_features.to_dict()
        of_samples = [[set(bag.tolist()) <= set(hot_ids[f"t_{f}"].tolist()) for bag in ids[f].to_dense()] for f in features]
        return torch.tensor(of_samples).all(dim=0)

    one_tower = 0
    loader = HotColdDataLoader(
        lambda: samples.batches(range(40), BATCH, 0, 1), placement, batch_size=BATCH, schedule=ShuffleSchedule("proportional")
    )
    for batch in loader:
        users, items = hot(batch, two_tower.USER_FEATURES), hot(batch, two_tower.ITEM_FEATURES)
        if batch.kind == "hot":
            assert (users & items).all()
        else:
            assert not (users & items).any()
            one_tower += int((users ^ items).sum())
    assert loader.stats.batches["hot"] >= 20
    assert one_tower > BATCH, "hot in one tower is not hot"


def test_the_factory_makes_both_towers() -> None:
    config = load_config(ROOT / "examples" / "configs" / "two_tower.yaml").model
    assert config.factory is not None
    spec = ModelSpec(
        {"device_id": 90, "device_ip": 80, "device_model": 9, "device_type": 4, "device_conn_type": 3, "C1": 7, "C14": 50}, 1, 16
    )

    def made(users: Any) -> Any:
        factory = load_factory(str(config.factory))
        return build_model(factory, replace(spec, options={**config.options, **users}), Optimizer.ROWWISE_ADAGRAD, 0.1, seed=4)

    towers = made({})
    assert towers.user_tower.features == tuple(config.options["users"])
    assert towers.item_tower.features == ("C1", "C14")
    assert [table.name for table in model_tables(towers)] == [f"t_{feature}" for feature in spec.rows]
    for users in ([], ["nobody"], list(spec.rows)):
        with pytest.raises(ConfigError, match="name some, and not all, of the features"):
            made({"users": users})


def test_a_file_of_your_own(two_tower: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = two_tower.Samples.generated(2000, ROWS, 5)
    offsets = np.concatenate([[0], np.cumsum(samples.lengths["recent"])])
    columns = {name: pa.array(samples.ids[name]) for name in two_tower.FEATURES if name != "recent"}
    columns |= {"recent": pa.ListArray.from_arrays(offsets, samples.ids["recent"]), "label": pa.array(samples.labels.astype(int))}
    parquet.write_table(pa.table(columns), tmp_path / "clicks.parquet")
    read = two_tower.Samples.read(str(tmp_path / "clicks.parquet"), ROWS)
    for name in two_tower.FEATURES:
        np.testing.assert_array_equal(read.ids[name], samples.ids[name])
        np.testing.assert_array_equal(read.lengths[name], samples.lengths[name])
    np.testing.assert_array_equal(read.labels, samples.labels)
    parquet.write_table(pa.table(columns).drop_columns(["brand"]), tmp_path / "less.parquet")
    with pytest.raises(SystemExit, match=r"\['brand'\] are missing"):
        two_tower.Samples.read(str(tmp_path / "less.parquet"), ROWS)

    two_tower.main([*SMALL, "--data", str(tmp_path / "clicks.parquet"), "--fae", "planner", "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["steps"], told["ranks"], told["data"]) == (STEPS, 1, str(tmp_path / "clicks.parquet"))


def test_help_teaches(two_tower: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        two_tower.main(["--help"])
    shown = capsys.readouterr().out
    assert "three ways in" in shown
    assert "synthetic" in shown


def test_the_pages_code_is_the_examples() -> None:
    source = EXAMPLE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        assert any(f"\n{textwrap.indent(block, ' ' * indent)}" in source for indent in (0, 4, 8)), block
    lines = {line.strip() for line in source.splitlines()}
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)
    assert [line for line in diff.splitlines() if line[1:].strip() not in lines] == []
    assert sorted(line[0] for line in diff.splitlines()) == [" ", " ", "+", "+", "-", "-"]
