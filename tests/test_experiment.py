"""An experiment's parts: hot set and placement, what is checked before training, and runs of every policy on 1 and 2 ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from fae_torchrec.config import RunConfig
from fae_torchrec.core.errors import BudgetError, ConfigError, DataError, FingerprintError
from fae_torchrec.core.hot_set import HotSet
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.experiment import check_run, experiment_tables, placed_tables, prepare, run_placement
from fae_torchrec.experiment_data import open_data
from fae_torchrec.experiment_placement import make_hot_set, make_placement
from fae_torchrec.experiment_store import make_store
from fae_torchrec.training.work import unequal_work
from tests.small_config import ROWS, TEST_SAMPLES, TRAIN_SAMPLES, new_config, profile_of, write_parquet

OTHER_ROWS = "data.parquet.cardinalities={u: 40, v: 2001, w: 500}"


def test_named_values_of_other_tables(tmp_path: Path) -> None:
    config = new_config(tmp_path)
    placement = prepare(config, "fae", 1)[1]
    given = experiment_tables(new_config(tmp_path, OTHER_ROWS), open_data(new_config(tmp_path, OTHER_ROWS)))
    for key, name in (("profile.path", "profile.npz"), ("placement.path", "placement.npz")):
        with pytest.raises(FingerprintError) as error:
            prepare(new_config(tmp_path, OTHER_ROWS, f"{key}={tmp_path / 'out' / name}", f"output={tmp_path / 'new'}"), "fae", 1)
        told = str(error.value)
        assert placement.tables.fingerprint in told and given.fingerprint in told
        assert "'t_v' with 2000 rows" in told and "'t_v' with 2001 rows" in told
    assert not (tmp_path / "new").exists(), "nothing was written"


def test_percent_budget(tmp_path: Path) -> None:
    row_bytes = 4 * 4 + 4  # four fp32 and the row-wise state
    total = sum(ROWS.values()) * row_bytes
    for budget, expected in (("20%", int(total * 0.2)), ("100%", total), ("2KiB", 2048)):
        config = new_config(tmp_path, f"placement.budget={budget}")
        hot_set = make_hot_set(config, profile_of(config))
        assert hot_set.budget_bytes == expected
        assert ROWS["u"] * row_bytes <= hot_set.used_bytes <= expected
    config = new_config(tmp_path, "placement.budget=799B")
    with pytest.raises(BudgetError, match=r"799 bytes cannot hold the 1 pinned tables, which need 800 bytes"):
        make_hot_set(config, profile_of(config))


def test_policy_and_sizes(tmp_path: Path) -> None:
    """Both policies stay within the budget; sizes that are estimated leave some of it unused, where the table is too large to count."""
    large = "data.parquet.cardinalities={u: 40, v: 90000, w: 500}"
    profile = profile_of(new_config(tmp_path, large))

    def select(*overrides: str) -> HotSet:
        return make_hot_set(new_config(tmp_path, large, "placement.budget=2000B", *overrides), profile)

    aware, exact = select(), select("placement.policy=threshold")
    estimated = select("placement.policy=threshold", "placement.sizes=estimated")
    assert (aware.policy, exact.policy, estimated.policy) == ("input_aware", "threshold", "threshold")
    assert aware.threshold is None and exact.threshold is not None and estimated.threshold is not None
    assert estimated.threshold > exact.threshold and estimated.used_bytes < exact.used_bytes <= 2000
    assert aware.used_bytes <= 2000 and len({aware.fingerprint, exact.fingerprint, estimated.fingerprint}) == 3


def test_placement_is_kept(tmp_path: Path) -> None:
    config = new_config(tmp_path)
    placement = prepare(config, "fae", 1)[1]
    assert sorted(os.listdir(tmp_path / "out")) == ["hot_set.npz", "placement.npz", "profile.npz"], "and no temporary file"
    named = new_config(tmp_path, f"placement.path={tmp_path / 'out' / 'placement.npz'}", f"output={tmp_path / 'new'}")
    again = prepare(named, "fae", 1)[1]
    assert again.fingerprint == placement.fingerprint == RowPlacement.load(tmp_path / "new" / "placement.npz").fingerprint
    assert os.listdir(tmp_path / "new") == ["placement.npz"], "no profile is needed"


def test_output_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = new_config(tmp_path, f"output={tmp_path / 'file' / 'out'}")
    with pytest.raises(ConfigError, match="output: cannot make the folder"):
        make_placement(config, *_tables_and_hot_set(new_config(tmp_path), config))


def _tables_and_hot_set(readable: RunConfig, config: RunConfig) -> tuple[Any, Any]:
    profile = profile_of(readable)
    return profile.tables, make_hot_set(config, profile)


@pytest.mark.parametrize(
    ("override", "names", "ranks", "message"),
    [
        ("placement.hot_tier=row_wise", ["fae"], 2, "no hot tier 'row_wise' on device 'cpu'"),
        ("placement.hot_tier=row_wise", ["stock"], 2, None),
        ("placement.hot_tier=table_wise", ["fae"], 2, None),
        ("train.optimizer=adam", ["stock", "fae"], 2, "optimized by adam"),
        ("train.optimizer=adam", ["stock"], 2, None),
        ("train.optimizer=adagrad", ["stock", "fae"], 2, None),
        ("train.device=cuda", ["stock"], 3, "this machine, which has 2 CUDA"),
        ("train.batch_size=8", ["fae"], TEST_SAMPLES + 1, f"the test data hold {TEST_SAMPLES} sample"),
        ("data.parquet.test=bad_id.parquet", ["fae"], 1, r"column 'w', row 150 .* id 500 is out of range; allowed 0\.\.499"),
        ("data.parquet.test=bad_label.parquet", ["stock"], 1, "must be 0 or 1, received 3"),
    ],
)
def test_what_is_checked_before_training(
    override: str, names: Sequence[str], ranks: int, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    write_parquet(tmp_path / "bad_id.parquet", TEST_SAMPLES, changes={"w": (150, 500)})
    write_parquet(tmp_path / "bad_label.parquet", TEST_SAMPLES, changes={"y": (150, 3)})
    config = new_config(tmp_path, override)
    data = open_data(config)
    placement, _ = make_placement(config, experiment_tables(config, data), make_hot_set(config, profile_of(config)))
    if message is None:
        check_run(config, data, placement, names, ranks)
        return
    with pytest.raises(Exception, match=message) as error:
        check_run(config, data, placement, names, ranks)
    assert isinstance(error.value, (ConfigError, DataError)) or type(error.value).__name__ == "PlannerError"


def test_tables_left_to_stock(tmp_path: Path) -> None:
    """They are neither profiled nor placed; their test ids are checked all the same."""
    config = new_config(tmp_path, "placement.stock_tables=[t_v]")
    data = open_data(config)
    assert placed_tables(config, data).names == ("t_u", "t_w")
    assert experiment_tables(config, data).names == ("t_u", "t_v", "t_w")
    placement = prepare(config, "fae", 2)[1]
    assert placement.tables.names == ("t_u", "t_w")
    assert PopularityProfile.load(tmp_path / "out" / "profile.npz").tables.names == ("t_u", "t_w")
    write_parquet(tmp_path / "bad_id.parquet", TEST_SAMPLES, changes={"v": (150, 2000)})
    bad = new_config(tmp_path, "placement.stock_tables=[t_v]", f"data.parquet.test={tmp_path / 'bad_id.parquet'}")
    with pytest.raises(DataError, match=r"column 'v', row 150"):
        check_run(bad, open_data(bad), placement, ["fae"], 2)
    # The placement of all tables is another one.
    everything = prepare(new_config(tmp_path, f"output={tmp_path / 'all'}"), "fae", 1)[1]
    assert everything.fingerprint != placement.fingerprint
    with pytest.raises(FingerprintError, match="first difference: saved table 't_v'"):
        prepare(new_config(tmp_path, "placement.stock_tables=[t_v]", f"placement.path={tmp_path / 'all' / 'placement.npz'}"), "fae", 1)


@pytest.mark.parametrize(
    ("tables", "words"),
    [("[t_v, t_x, v]", r"\['t_x', 'v'\] are not tables .* \['t_u', 't_v', 't_w'\]"), ("[t_u, t_v, t_w]", "at least one; .*and not all")],
)
def test_tables_that_cannot_be_left(tables: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^placement.stock_tables: .*{words}"):
        prepare(new_config(tmp_path, f"placement.stock_tables={tables}"), "stock", 1)
    assert not (tmp_path / "out").exists(), "before any work"


# name -> (placement, overrides, full batches of one and of two ranks)
RUNS: dict[str, tuple[str, list[str], tuple[int, int]]] = {
    "stock": ("stock", [], (22, 11)),
    "unsegregated": ("fae-unsegregated", [], (22, 11)),
    "fae": ("fae", [], (22, 11)),
    "two epochs": ("fae", ["train.epochs=2", "train.swap_eval_batches=0"], (44, 22)),
    "windows": ("fae", ["loader.window_batches=3"], (22, 11)),
    "proportional": ("fae", ["schedule.policy=proportional", "loader.window_batches=5"], (22, 11)),
    "fixed": ("fae", ["schedule.policy=fixed", "schedule.rate=10"], (22, 11)),
    "stock policy": ("fae", ["schedule.policy=stock"], (22, 11)),
    "one step": ("fae", ["train.steps=1"], (1, 1)),
    "few steps": ("fae", ["train.steps=6", "loader.window_batches=2", "train.optimizer=sgd"], (6, 6)),
    "stock, few steps": ("stock", ["train.steps=6", "train.epochs=3"], (6, 6)),
    "store": ("fae", ["loader.store={folder}/store", "loader.shuffle=true", "loader.prefetch=0"], (22, 11)),
    "resumed": ("fae", ["checkpoint.folder={folder}/checkpoints", "checkpoint.every_steps=4"], (22, 11)),
    "table-wise": ("fae-unsegregated", ["placement.hot_tier=table_wise"], (22, 11)),
    "left": ("fae-unsegregated", ["placement.stock_tables=[t_w]", "placement.check_replicas=5"], (22, 11)),
}


def _run_all(rank: int, folder: str) -> dict[str, dict[str, Any]]:
    entries = {}
    for name, (placed, overrides, _) in RUNS.items():
        config = new_config(Path(folder), *(override.format(folder=folder) for override in overrides), "train.batch_size=32")
        placement = RowPlacement.load(Path(folder, "left" if name == "left" else "out", "placement.npz"))
        if name == "resumed":
            run_placement(rank, replace(config, train=replace(config.train, steps=7)), placed, placement, False)
        scores_path = None if name == "resumed" else f"{folder}/{name}.npz"
        entries[name] = run_placement(rank, config, placed, placement, False, scores_path=scores_path)
    return entries


@cache
def entries(ranks: int) -> list[dict[str, dict[str, Any]]]:
    with TemporaryDirectory() as folder:
        config = new_config(Path(folder), f"loader.store={folder}/store")
        make_store(config, open_data(config), prepare(new_config(Path(folder)), "fae", ranks)[1])
        prepare(new_config(Path(folder), *RUNS["left"][1], f"output={folder}/left"), "fae", ranks)
        return run_on_local_ranks(_run_all, ranks, folder, timeout_s=240)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_runs(name: str, ranks: int) -> None:
    for rank in entries(ranks):
        entry = rank[name]
        expected = entries(ranks)[0][name]
        clocks = ("breakdown", "audit", "wall_s")  # milliseconds differ between runs, not between ranks; wall_s does
        assert {k: v for k, v in entry.items() if k not in clocks} == {k: v for k, v in expected.items() if k not in clocks}
        assert entry["audit"] == expected["audit"]
        epochs = 2 if name == "two epochs" else 1
        steps = RUNS[name][2][ranks - 1]
        assert entry["ranks"] == ranks
        if "train.steps" in str(RUNS[name][1]):
            assert entry["steps"] == steps
        else:  # the leftovers of hot and cold samples may need one more step in an epoch than the samples in stream order
            assert steps <= entry["steps"] <= steps + epochs
        if "train.steps" not in str(RUNS[name][1]):
            # Ranks that are dealt a source leave out what cannot be dealt; of a store they train everything.
            assert entry["samples"] == epochs * (TRAIN_SAMPLES if name == "store" else TRAIN_SAMPLES // ranks * ranks)
        assert sum(entry["steps_by_kind"].values()) == entry["steps"]
        assert (entry["fast_memory_bytes"] > 0) == (RUNS[name][0] != "stock")
        segregated = RUNS[name][0] == "fae" and name != "stock policy"
        assert ("hot" in entry["steps_by_kind"]) == (segregated and name != "one step")
        assert 0.3 < entry["test_logloss"] < 1.0
        assert (entry["hot_inputs"] is None) == (RUNS[name][0] == "stock")
        assert bool(entry["swap_losses"]) == (name in ("fae", "windows", "few steps", "store", "resumed"))
        assert (entry["bytes_crossed_per_sample"] > 0) == (ranks > 1)
    straight, resumed, store = (entries(ranks)[0][run] for run in ("fae", "resumed", "store"))
    assert resumed["resumed_from"].endswith("step_000000007") and "resumed_from" not in straight
    for what in (
        "test_auc",
        "test_logloss",
        "test_accuracy",
        "train_loss",
        "swap_losses",
        "steps_by_kind",
        "samples_by_kind",
        "loss_curve",
    ):
        assert resumed[what] == straight[what], "bit for bit as if it had not been interrupted"
    assert store["samples_by_kind"]["hot"] == pytest.approx(straight["samples_by_kind"]["hot"], abs=1)
    assert store["test_logloss"] != straight["test_logloss"], "shuffled"
    per_sample = {run: entries(ranks)[0][run]["cold_rows_per_sample"] for run in ("stock", "unsegregated")}
    assert per_sample["stock"] == pytest.approx(len(ROWS)), "three one-hot lookups, all cold"
    assert 0 < per_sample["unsegregated"] < per_sample["stock"]
    one, other = (entries(ranks)[0][run] for run in ("unsegregated", "table-wise"))
    for score in ("train_loss", "test_auc", "test_logloss", "cold_rows_per_sample"):
        assert other[score] == pytest.approx(one[score], rel=1e-5), "where hot rows lie changes nothing"
    assert (other["fast_memory"]["hot rows"] < one["fast_memory"]["hot rows"]) == (ranks > 1)
    left = entries(ranks)[0]["left"]
    assert left["test_logloss"] == pytest.approx(one["test_logloss"], rel=1e-5)
    assert left["cold_rows_per_sample"] > 1, "every lookup of the table that is left is outside the hot tier"


@pytest.mark.parametrize("ranks", [1, 2])
def test_work_and_memory(ranks: int) -> None:
    """Whatever the placement and the order, the same work; what the tiers take is what was planned, and FBGEMM's few offsets."""
    runs = entries(ranks)[0]
    alike = ("stock", "unsegregated", "fae", "windows", "proportional", "fixed", "stock policy", "table-wise", "left", "store")
    works = {name: runs[name]["work"] for name in alike}
    assert unequal_work(works) == []
    sums = [[work[key] for key in ("samples", "ids", "id_sum", "positives", "test_samples", "start_weights")] for work in works.values()]
    assert sums[:-1] == [sums[0]] * 9 and sums[0][0] == runs["stock"]["samples"]
    assert (sums[-1] == sums[0]) == (ranks == 1), "a store deals every sample"
    unequal = {name: " ".join(unequal_work({"stock": works["stock"], name: runs[name]["work"]})) for name in ("two epochs", "few steps")}
    assert "two epochs trained for epochs: 2, stock 1" in unequal["two epochs"]
    assert "few steps trained 6 steps" in unequal["few steps"] and "optimizer settings sgd" in unequal["few steps"]
    for name in alike:
        for tier in ("fast", "cold"):
            planned, allocated = runs[name][f"{tier}_memory_bytes"], runs[name][f"{tier}_memory_allocated_bytes"]
            assert planned <= allocated <= planned + 4096, (name, tier)
        assert runs[name]["host_peak_bytes"] == max(runs[name]["memory"]["host_bytes"]) > 2**26 and runs[name]["device_peak_bytes"] is None
    assert runs["stock"]["cold_memory_bytes"] > runs["fae"]["cold_memory_bytes"] * (1 if ranks == 1 else 0)
    assert runs["unsegregated"]["hot_lookups"] == pytest.approx(1 - runs["unsegregated"]["cold_rows_per_sample"] / len(ROWS))
    by_collective = runs["stock"]["bytes_crossed_by_collective"]
    assert sum(by_collective.values()) == pytest.approx(runs["stock"]["bytes_crossed_per_sample"])
    assert ("alltoall_base" in by_collective) == (ranks == 2)
