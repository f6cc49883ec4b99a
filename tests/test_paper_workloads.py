"""What benchmarks/paper_workloads.py keeps of a comparison, by hand, and what its record says of the paper's eight workloads."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fae_torchrec.config import load_config

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "paper_workloads.json"
SHAPES = {"rmc1", "kaggle", "terabyte", "avazu_synthetic"}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("paper_workloads")


def _run(placement: str, auc: list[float], logloss: list[float], crossed: float) -> dict[str, Any]:
    each = [{"test_auc": a, "test_logloss": loss} for a, loss in zip(auc, logloss, strict=True)]
    return {
        **{"placement": placement, "ranks": 2, "hot_batches": None if placement == "stock" else 0.8, "each": each},
        **{"bytes_crossed_per_sample": crossed, "cold_rows_per_sample": crossed / 10},
    }


def _report(auc: list[float]) -> dict[str, Any]:
    stock, fae = _run("stock", [0.75, 0.76, 0.77], [0.5, 0.5, 0.5], 2000), _run("fae", auc, [0.501, 0.5, 0.503], 500)
    return {
        **{"created": "now", "runs": [stock, fae], "placement": {"budget_bytes": 300, "used_bytes": 250}},
        "data": {"name": "synthetic", "rows": 9_000, "bytes": 1_000, "train_samples": 64},
    }


@pytest.mark.parametrize(("auc", "mean", "holds"), [([0.751, 0.758, 0.77], -1 / 3000, True), ([0.752, 0.763, 0.773], 8 / 3000, False)])
def test_differences_are_taken_seed_by_seed(auc: list[float], mean: float, holds: bool, benchmark: Any) -> None:
    kept = benchmark.summary("RMC0", "fae compare", _report(auc))
    less = kept["less_stock"]
    assert less["test_auc"]["mean"] == pytest.approx(mean) and less["test_auc"]["holds"] is holds
    assert [less["test_logloss"][key] for key in ("mean", "low", "high")] == pytest.approx([0.004 / 3, 0.0, 0.003])
    assert less["test_logloss"]["holds"] is True
    assert (kept["budget_share"], kept["hot_share"], kept["seeds"]) == (0.3, 0.25, 3)


def test_the_table_has_means_with_their_ends(benchmark: Any) -> None:
    one = benchmark.summary("RMC0", "fae compare", _report([0.751, 0.758, 0.77]))
    cells = [cell.strip() for cell in benchmark.table({"workloads": {"rmc0": one}}).splitlines()[-1].split("|")[1:-1]]
    assert cells == [
        *("RMC0", "9,000", "64", "3", "25.0", "80.0", "0.7600 (0.7500 to 0.7700)", "0.7597 (0.7510 to 0.7700)"),
        *("-0.0003 (-0.0020 to +0.0010)", "0.5000", "0.5013 (0.5000 to 0.5030)", "+0.0013 (+0.0000 to +0.0030)", "0.250", "0.250"),
    ]


def test_each_is_a_config_with_its_overrides(benchmark: Any) -> None:
    for name, (title, overrides) in benchmark.WORKLOADS.items():
        config = load_config(ROOT / f"examples/configs/{name}.yaml", list(overrides))
        assert config.data.synthetic is not None and "shape" in title
        assert (config.compare.repeats, config.compare.vary_seed) == ((3, True) if name in SHAPES else (1, False))


def test_the_record_has_all_eight_and_fae_holds_on_each_shape() -> None:
    record = json.loads(RECORD.read_text())
    found = record["workloads"]
    assert found.keys() == {*SHAPES, "syn_m1", "syn_m2", "syn_m3", "syn_m4"}
    for name, one in found.items():
        assert one["data"]["name"].startswith("synthetic ") and f"examples/configs/{name}.yaml" in one["command"]
        assert one["runs"].keys() == {"stock", "fae"} and all(run["ranks"] == 2 for run in one["runs"].values())
        assert 0.5 < one["runs"]["fae"]["hot_batches"] < 1
        if name in SHAPES:
            assert one["seeds"] == 3 and all(abs(less["mean"]) <= 0.002 and less["holds"] for less in one["less_stock"].values())
