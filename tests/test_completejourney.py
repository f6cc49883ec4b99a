"""The main job on real data: `fae compare` on completejourney keeps stock's test AUC (skipped where the data are not)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fae_torchrec.cli import main

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "completejourney"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here: it is not part of a clone")
def test_hot_and_cold_rows_keep_the_test_auc(tmp_path: Path) -> None:
    """2 ranks, 2 epochs, 15 % of all rows' bytes; one seed apart from another is about 0.002."""
    config = ROOT / "examples" / "configs" / "completejourney.yaml"
    assert main(["compare", "--config", str(config), "--output", str(tmp_path), "--quiet"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    stock, fae, placed = ({run["placement"]: run for run in report["runs"]}[name] for name in ("stock", "fae", "fae-unsegregated"))
    assert stock["test_auc"] > 0.8, "there is something to keep"
    assert abs(fae["test_auc"] - stock["test_auc"]) < 0.005
    assert abs(placed["test_auc"] - stock["test_auc"]) < 0.001, "placement alone changes nothing but rounding"
    assert report["placement"]["used_bytes"] <= 0.15 * report["data"]["bytes"]
    assert fae["hot_batches"] > 0.2
    assert abs(fae["hot_inputs"] - report["placement"]["hot_inputs"]) < 0.05, "as the profile foresaw"
    assert fae["bytes_crossed_per_sample"] < stock["bytes_crossed_per_sample"]
