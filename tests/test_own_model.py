"""A model of one's own under the commands: unpooled sequences compared on 1 and 2 ranks, predicted, planned; what is refused at once."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fae_torchrec import cli
from fae_torchrec.compare import compare
from fae_torchrec.config import RunConfig, load_config
from fae_torchrec.core.hardware import hardware_preset
from fae_torchrec.experiment_data import ExperimentData, open_data
from fae_torchrec.experiment_model import experiment_model, placed_tables
from fae_torchrec.what_if import what_if
from tests.raw_data import RAW
from tests.small_config import write_experiment, write_run
from tests.test_tbsm import FACTORY

MODEL = ("embedding_dim=16", "dense_arch=[16]", "over_arch=[8, 1]", "options={history: 4}")
SMALL = ("profile.sample_rate=0.9", "placement.budget=45%", "placement.pinned_max_rows=10", "train.batch_size=16", "schedule.policy=fixed")
COMPARED = (
    "compare.ranks=[1, 2]",
    "compare.placements=[stock, fae, fae-unsegregated]",
    "compare.count_batches=100",
    "compare.profile_steps=1",
)


def _config(folder: Path, *overrides: str) -> RunConfig:
    path = write_run(folder, RAW["taobao"](folder))
    model = [f"model.factory={FACTORY}", *(f"model.{item}" for item in MODEL)]
    return load_config(path, [*model, *SMALL, *COMPARED, *overrides])


def _slow_count(data: ExperimentData) -> tuple[int, int]:
    """Train samples, and their ids of all features."""
    batches = list(data.train.batches(1000))
    return sum(batch.labels.numel() for batch in batches), sum(batch.sparse_features.values().numel() for batch in batches)


@cache
def _compared(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    config = _config(folder)
    return config, compare(config, ["test"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own_model")


@pytest.mark.parametrize("ranks", [1, 2])
def test_unpooled_sequences_are_compared(folder: Path, ranks: int) -> None:
    config, report = _compared(folder)
    samples, ids = _slow_count(open_data(config))
    runs = {run["placement"]: run for run in report["runs"] if run["ranks"] == ranks}
    stock, fae = runs["stock"], runs["fae"]
    assert report["not_comparable"] == [] and {run["work"]["samples"] for run in runs.values()} == {samples}
    assert {run["work"]["ids"] for run in runs.values()} == {ids}
    assert len({run["work"]["start_weights"] for run in runs.values()}) == 1
    row_bytes = 16 * 4 + 4  # weights and the row-wise state
    assert stock["cold_rows_per_sample"] == pytest.approx(ids / samples), "a row for each id, not one for each bag"
    assert stock["cold_bytes_per_sample"] == pytest.approx(row_bytes * ids / samples)
    assert 0 < fae["cold_rows_per_sample"] < 0.9 * ids / samples
    assert 0 < fae["hot_inputs"] < 1 and 0 < fae["hot_batches"] < 1
    assert runs["fae-unsegregated"]["test_logloss"] == pytest.approx(stock["test_logloss"], rel=1e-4), "placement alone is stock's result"
    assert runs["fae-unsegregated"]["train_loss"] == pytest.approx(stock["train_loss"], rel=1e-4)
    if ranks == 1:
        assert stock["bytes_crossed_per_sample"] == fae["bytes_crossed_per_sample"] == 0
    else:  # half of all ids, rows and gradients at the least: by table or by row, on two ranks
        assert stock["bytes_crossed_per_sample"] > 0.4 * (8 + 2 * 64) * ids / samples
        assert fae["bytes_crossed_by_collective"]["alltoall_base"] < stock["bytes_crossed_by_collective"]["alltoall_base"]


def test_predictions_count_rows_by_id_and_the_model_s_multiplications(folder: Path) -> None:
    config = _config(folder)
    data = open_data(config)
    (outlook,) = what_if(config, machines=[(hardware_preset("v100"), [2])], shares=[0.45, 1.0])
    job = outlook.model.job
    model: Any = experiment_model(config, data, torch.device("meta"))
    assert not any(table.pooled for table in job.tables) and job.tables.names == placed_tables(config, data).names
    assert job.dense_parameters == sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("arch."))
    # Eight test samples with five steps each or fewer: the tower at every step, attention and the rest once.
    steps = float(next(iter(data.test.batches(8))).sparse_features["item"].lengths().float().mean())
    tower = sum(layer.weight.numel() for layer in model.arch.tower.modules() if isinstance(layer, nn.Linear)) + 4 * 4 * 16
    once = sum(
        layer.weight.numel()
        for part in (model.arch.bottom, model.arch.attention, model.arch.over)
        for layer in part.modules()
        if isinstance(layer, nn.Linear)
    )
    assert job.dense_macs == pytest.approx(steps * tower + once + 2 * 15 * 15 + 2 * 4 * 15)
    stock = next(option for option in outlook.options if option.placement == "hbm")
    ids = sum(curve.lookups for curve in outlook.model.access.curves) * config.train.batch_size
    dense = 4 * job.dense_parameters  # a ring of two sends all of it once
    assert stock.work.sent_bytes == pytest.approx((8 * ids + 4 * 3 * config.train.batch_size + 2 * 64 * ids) / 2 + dense)


def test_a_plan_of_unpooled_tables(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _config(folder)
    options = [f"model.factory={FACTORY}", *(f"model.{item}" for item in MODEL), *SMALL]
    arguments = [part for item in options for part in ("--set", item)]
    where = ["--config", str(folder / "run.yaml"), "--output", str(tmp_path)]
    assert cli.main(["plan", *where, *arguments, "--hardware", "v100:2", "--quiet", "--json"]) == 0
    (module,) = json.loads(capsys.readouterr().out)["modules"]
    assert module["path"] == "embedding_collection" and module["hot_cold"]
    assert [table["table"] for table in module["tables"]] == ["t_user", "t_item", "t_category"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (None, "no such file"),
        ("def other(spec): ...", r"has no function 'build'"),
        ("import torch\ndef build(spec): return torch.nn.Linear(1, 1)", "without embedding tables"),
        ("from fae_torchrec.training.dlrm import dlrm\ndef build(spec): return dlrm(spec).model", "its forward failed on 8 samples"),
        (
            "from fae_torchrec.training.dlrm import dlrm\ndef build(spec):\n  model = dlrm(spec)\n"
            "  model.register_forward_hook(lambda model, given, output: output[0])\n  return model",
            r"its forward gave a tensor \[\]; it must give \(loss, \(loss, logits, labels\)\)",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_errors_come_before_any_work(
    command: str, source: str | None, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_experiment(tmp_path)
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    arguments = [command, "--config", str(path), "--set", f"model.factory={tmp_path / 'mine.py'}:build", "--quiet"]
    assert cli.main(arguments) == 2
    captured = capfd.readouterr()
    assert re.search(told, captured.err) and f"model.factory {tmp_path / 'mine.py'}:build: " in captured.err
    assert not (tmp_path / "out").exists(), "nothing was profiled"
