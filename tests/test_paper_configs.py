"""The configs of the FAE paper's workloads: the model that each describes, and that it trains when its rows are scaled down."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from fae_torchrec import cli
from fae_torchrec.config import load_config
from fae_torchrec.experiment_data import open_data
from fae_torchrec.experiment_model import experiment_model

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"


class Workload(NamedTuple):
    """A model of the paper: widths as facebookresearch/dlrm writes them, input included; the top MLP's input follows from the rest."""

    bottom: str
    top: str
    tables: int
    rows: int
    embedding_dim: int
    batch_size: int


KAGGLE = {"tables": 26, "rows": 33_762_577}
RMC2 = Workload("13-512-256-64-16", "512-256-1", **KAGGLE, embedding_dim=16, batch_size=1024)
RMC3 = Workload("13-512-256-64", "512-512-256-1", 26, 266_000_000, embedding_dim=64, batch_size=2048)
RMC4 = Workload("1-512-256-64-16", "512-256-1", 21, 9_300_000, embedding_dim=16, batch_size=1024)
TAOBAO = Workload("1-64-16", "128-64-1", 3, 5_159_457, embedding_dim=16, batch_size=256)  # by DLRM; by TBSM it is RMC1
SYNTHETIC = {
    "kaggle": RMC2,
    "terabyte": RMC3,
    "criteo_terabyte_synthetic": RMC3._replace(batch_size=4096),
    "avazu_synthetic": RMC4,
    "taobao_synthetic": TAOBAO,
    "syn_m1": Workload("13-64", "512-1", **KAGGLE, embedding_dim=64, batch_size=1024),
    "syn_m2": Workload("13-512-64", "512-256-1", **KAGGLE, embedding_dim=64, batch_size=1024),
    "syn_m3": Workload("13-1024-512-64", "512-1024-256-1", **KAGGLE, embedding_dim=64, batch_size=1024),
    "syn_m4": Workload("13-1024-512-256-64", "512-1024-512-256-1", **KAGGLE, embedding_dim=64, batch_size=1024),
}
REAL = {"criteo_kaggle": RMC2, "criteo_terabyte_npy": RMC3, "avazu": RMC4}
TINY = (
    *("data.synthetic.scale=0.001", "data.synthetic.train_samples=4096", "data.synthetic.test_samples=1024"),
    *("profile.sample_rate=0.5", "placement.budget=30%", "train.batch_size=256", "train.steps=4", "train.swap_eval_batches=1"),
)


def _widths(module: nn.Module) -> list[tuple[int, int]]:
    """Inputs and outputs of a module's linear layers, in order."""
    return [(layer.in_features, layer.out_features) for layer in module.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_model_is_the_papers(name: str) -> None:
    workload = SYNTHETIC[name]
    config = load_config(CONFIGS / f"{name}.yaml", [f"data.synthetic.{key}=1" for key in ("scale", "train_samples", "test_samples")])
    data = open_data(config)
    assert data.name.startswith("synthetic ")
    dlrm: Any = experiment_model(config, data, torch.device("meta")).model
    tables = dlrm.sparse_arch.embedding_bag_collection.embedding_bag_configs()
    assert [table.embedding_dim for table in tables] == [workload.embedding_dim] * workload.tables
    assert sum(table.num_embeddings for table in tables) == workload.rows
    bottom = [int(width) for width in workload.bottom.split("-")]
    assert _widths(dlrm.dense_arch) == list(pairwise(bottom))
    # The dense vector beside the dot products of all pairs of the tables' vectors and it.
    vectors = workload.tables + 1
    top = [workload.embedding_dim + vectors * (vectors - 1) // 2, *(int(width) for width in workload.top.split("-"))]
    assert _widths(dlrm.over_arch) == list(pairwise(top))
    assert config.train.batch_size == workload.batch_size


def test_rmc1_is_the_papers_tbsm() -> None:
    """As facebookresearch/tbsm's bench/tbsm_bench.sh has it."""
    config = load_config(CONFIGS / "rmc1.yaml", [f"data.synthetic.{key}=1" for key in ("scale", "train_samples", "test_samples")])
    data = open_data(config)
    assert data.name.startswith("synthetic ") and data.train.num_dense == 1
    model: Any = experiment_model(config, data, torch.device("meta"))
    tables = model.embedding_collection.embedding_configs()
    assert {table.feature_names[0]: (table.num_embeddings, table.embedding_dim) for table in tables} == {
        "user": (987_994, 16),
        "item": (4_162_024, 16),
        "category": (9_439, 16),
    }
    arch = model.arch
    assert (_widths(arch.bottom), _widths(arch.tower)) == ([(1, 16)], [(22, 15), (15, 15)]), "16 + 6 pairs of 4 vectors"
    assert (_widths(arch.attention), _widths(arch.over)) == ([(20, 15), (15, 15), (15, 20)], [(30, 60), (60, 1)])
    assert arch.history == 20 and config.train.batch_size == 256
    real = load_config(CONFIGS / "taobao.yaml")
    assert real.data.taobao is not None and real.data.taobao.history == 20
    assert (real.model, real.train.batch_size) == (config.model, 256), "the real file gets the same model"


@pytest.mark.parametrize("name", REAL)
def test_the_real_files_get_the_same_model(name: str) -> None:
    workload, config = REAL[name], load_config(CONFIGS / f"{name}.yaml")
    assert config.data.synthetic is None and config.model.embedding_dim == workload.embedding_dim
    assert "-".join(map(str, config.model.dense_arch)) == workload.bottom.partition("-")[2]
    assert "-".join(map(str, config.model.over_arch)) == workload.top
    assert config.train.batch_size == workload.batch_size


@pytest.mark.parametrize("name", [*SYNTHETIC, "rmc1"])
def test_each_file_says_what_it_is(name: str) -> None:
    comment = [line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = " ".join(comment)
    assert "FAE's " in comment[0] + comment[1] and "synthetic" in text and f"--config examples/configs/{name}.yaml" in text


@pytest.mark.parametrize("name", ["rmc1", *sorted(SYNTHETIC.keys() - {"criteo_terabyte_synthetic"})])
def test_it_trains_at_a_tiny_scale(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Of Taobao's samples, with 63 ids each, hardly any is hot under a small budget: FAE's Fig. 5 has 1 % under 15 % of the bytes.
    own = ["placement.budget=80%"] if name in ("rmc1", "taobao_synthetic") else []
    overrides = [part for item in (*TINY, *own) for part in ("--set", item)]
    assert cli.main(["train", "--config", str(CONFIGS / f"{name}.yaml"), *overrides, "--output", str(tmp_path), "--quiet", "--json"]) == 0
    run = json.loads(capfd.readouterr().out)
    assert run["steps"] == 4 and run["samples"] == 4 * 256 and 0 < run["train_loss"] < 20
    assert 0 < run["hot_inputs"] < 1, "both kinds of samples"


@pytest.mark.parametrize(("rate", "lives"), [(None, True), (0.01, False)])
def test_the_dense_rate_leaves_the_bottom_mlp_alive(rate: float | None, lives: bool) -> None:
    # At 0.01, which the configs once had, Adagrad's first steps left most units of RMC2's bottom MLP at zero for every sample; how many was
    # chance, so that a run in another order could lose 0.036 of AUC.
    tiny = [part for part in TINY if "train_samples" not in part]
    overrides = [*tiny, "data.synthetic.train_samples=16384", *([] if rate is None else [f"train.dense_learning_rate={rate}"])]
    config = load_config(CONFIGS / "kaggle.yaml", overrides)
    data = open_data(config)
    model = experiment_model(config, data, torch.device("cpu"))
    dense = [weight for name, weight in model.named_parameters() if "embedding_bags" not in name]
    optimizer = torch.optim.Adagrad(dense, lr=config.train.dense_learning_rate)  # as `build_optimizer` has it
    for batch in data.train.batches(2048):
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
    bottom = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][:4]  # 512-256-64-16
    vectors, alive = batch.dense_features, []
    for layer in bottom:
        vectors = torch.relu(layer(vectors))
        alive.append(float((vectors > 0).any(0).float().mean()))
    assert (min(alive) > 0.5) == lives, alive
