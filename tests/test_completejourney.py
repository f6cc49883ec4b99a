"""Real data (completejourney; skipped where they are not): the selections' hot inputs, and `fae compare`, which keeps stock's test AUC."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fae_torchrec.cli import main
from fae_torchrec.core.hot_set import Policy, select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.parquet import ParquetSource
from fae_torchrec.data.segregate import hot_samples

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "completejourney"


pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here: it is not part of a clone")

BUDGET_PERCENT = (2, 5, 10, 20)
"""Of all 33,225 rows, whose bytes are all the same."""


@pytest.fixture(scope="module")
def splits() -> dict[str, ParquetSource]:
    rows = json.loads((DATA / "cardinalities.json").read_text())
    columns = {"dense": ["quantity"], "sparse": list(rows), "label": "label", "tables_rows": rows}
    return {name: ParquetSource(DATA / f"{name}.parquet", **columns) for name in ("train", "test")}


@pytest.fixture(scope="module")
def profile(splits: dict[str, ParquetSource]) -> PopularityProfile:
    """All of train counted and kept."""
    rows = json.loads((DATA / "cardinalities.json").read_text())
    tables = TableSet(tuple(TableSpec(name, size, 16, (name,), optimizer=Optimizer.SGD) for name, size in rows.items()))
    return Calibrator(tables, sample_rate=1.0).run_source(splits["train"])


def hot_inputs(profile: PopularityProfile, splits: dict[str, ParquetSource], policy: Policy) -> dict[str, list[float]]:
    """Per cent of all samples that are all hot, by split and budget; no table is pinned."""
    row_bytes, rows = profile.tables.tables[0].row_bytes, sum(table.rows for table in profile.tables)
    shares: dict[str, list[float]] = {"train": [], "test": []}
    for percent in BUDGET_PERCENT:
        hot_set = select_hot_set(profile, rows * percent // 100 * row_bytes, policy=policy, pinned_max_rows=0)
        placement = RowPlacement.from_hot_set(hot_set)
        for name, source in splits.items():
            hot = sum(int(hot_samples(batch.sparse_features, placement).sum()) for batch in source.batches(65_536))
            shares[name].append(100 * hot / source.num_samples)
    assert shares["train"][-1] == pytest.approx(100 * hot_set.hot_inputs), "the whole of train was kept and is what the set reports"
    return shares


def test_input_aware_selection_finds_more_hot_inputs(profile: PopularityProfile, splits: dict[str, ParquetSource]) -> None:
    """The floors are those of a selection that re-weights samples by the rows they miss, itself better than plain counts (the control)."""
    aware, plain = (hot_inputs(profile, splits, policy) for policy in ("input_aware", "threshold"))
    assert [share >= least for share, least in zip(aware["train"], (2.4, 11.3, 25.8, 49.6), strict=True)] == [True] * 4, aware
    assert [share >= least for share, least in zip(aware["test"], (1.9, 9.6, 21.9, 42.1), strict=True)] == [True] * 4, aware
    assert plain["train"] == pytest.approx([0.4, 7.9, 22.3, 47.6], abs=0.1)
    assert plain["test"] == pytest.approx([0.4, 7.0, 19.1, 41.0], abs=0.1)


def test_hot_and_cold_rows_keep_the_test_auc(tmp_path: Path) -> None:
    """2 ranks, 2 epochs, 15 % of all rows' bytes; one seed apart from another is about 0.002."""
    config = ROOT / "examples" / "configs" / "completejourney.yaml"
    less = ["--set", "train.swap_eval_batches=1", "--set", "compare.count_batches=4"]
    assert main(["compare", "--config", str(config), "--output", str(tmp_path), "--quiet", *less]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    stock, fae, placed = ({run["placement"]: run for run in report["runs"]}[name] for name in ("stock", "fae", "fae-unsegregated"))
    assert stock["test_auc"] > 0.8, "there is something to keep"
    assert abs(fae["test_auc"] - stock["test_auc"]) < 0.005
    assert abs(placed["test_auc"] - stock["test_auc"]) < 0.001, "placement alone changes nothing but rounding"
    assert report["placement"]["used_bytes"] <= 0.15 * report["data"]["bytes"]
    assert fae["hot_batches"] > 0.2
    assert abs(fae["hot_inputs"] - report["placement"]["hot_inputs"]) < 0.05, "as the profile foresaw"
    assert fae["bytes_crossed_per_sample"] < stock["bytes_crossed_per_sample"]
