"""fae compare --script: entries by hand, what is refused, and a real script under torchrun."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fae_torchrec import cli, compare_script
from fae_torchrec.compare_script import ScriptComparison, entry_of, unequal_scripts
from fae_torchrec.core.errors import ConfigError, FAEError
from fae_torchrec.launch_script import ScriptRun
from tests.test_launch import SCRIPT, make_placement

PRINTED = """\
W1126 14:00:00.000000 410 torch/distributed/run.py:852] a warning of torchrun
fae launch | train.py  (2 ranks)
\rEpoch 0:  50%\rEpoch 0: 100%
AUROC over val set: 0.61.
Evaluating test set:   0%|          | 0/5 [00:00<?, ?it/s]AUROC over test set: 0.5976331.
Number of test samples: 4096

fae launch | all figures: launch.json
"""


def record(**changes: Any) -> dict[str, Any]:
    """As `fae launch` writes it: 6 steps of 2 ranks, 4 of them hot."""
    return {
        "world_size": 2, "placement": "fae", "why_not": None, "steps": {"hot": 4, "other": 2, "evaluation": 3}, "hot_share": 4 / 6,
        "samples": 1200, "seconds": 3.0, "samples_per_s": 400.0, "step_seconds": [2.0, 0.1, 0.3, 0.2, 0.2, 0.2], "hot_lookup_bytes": 6000,
        "placed": {"hot_bytes": 5000}, "peak_bytes": {"host": 2**20}, "notes": [], "error": None, **changes,
    }  # fmt: skip


def test_entry_by_hand() -> None:
    entry = entry_of(record(), "fae:hbm_budget=1MiB", PRINTED, 1)
    assert (entry["placement"], entry["ranks"], entry["ran_on"]) == ("fae:hbm_budget=1MiB", 2, "fae")
    assert (entry["samples_per_s"], entry["step_ms"], entry["hot_batches"]) == (400.0, 200.0, 4 / 6)
    assert (entry["hot_bytes"], entry["spared_bytes_per_sample"]) == (5000, 10.0)
    assert (entry["samples"], entry["train_steps"], entry["evaluation_steps"]) == (1200, 6, 3)
    assert entry["printed_auroc"] == 0.5976331
    assert entry["said"] == ["AUROC over val set: 0.61.", "AUROC over test set: 0.5976331."]
    plain = entry_of(record(placement="stock", placed=None), "stock", "epoch\ndone\n", 50)
    assert (plain["said"], plain["printed_auroc"], plain["hot_batches"], plain["hot_bytes"]) == (["epoch", "done"], None, None, None)
    assert plain["step_ms"] == 200.0, "shorter than the warm-up: its last step"


def test_unequal_scripts() -> None:
    stock, fae = (entry_of(record(), name, "", 0) for name in ("stock", "fae"))
    assert unequal_scripts({"stock": stock, "fae": fae}) == []
    assert unequal_scripts({"stock": stock, "fae": {**fae, "samples": 1199}}) == ["fae trained samples: 1,199, stock: 1,200"]
    assert unequal_scripts({"stock": stock, "fae": {**fae, "train_steps": 7}}) == ["fae took training steps: 7, stock: 6"]
    assert unequal_scripts({"stock": stock, "fae": {**fae, "evaluation_steps": 2}}) == ["fae took evaluation steps: 2, stock: 3"]
    none = {**stock, "train_steps": 0}
    assert unequal_scripts({"stock": none, "fae": none})[0] == "stock took no training step that could be seen"


@pytest.fixture
def comparison(tmp_path: Path) -> ScriptComparison:
    """Of a script that is there, with a launch config that has a budget."""
    (tmp_path / "train.py").write_text("")
    (tmp_path / "launch.json").write_text('{"hbm_budget": "64MiB"}')
    script = ScriptRun(str(tmp_path / "train.py"), ("--epochs", "1"))
    return ScriptComparison(script, str(tmp_path / "launch.json"), output=str(tmp_path / "out"))


Calls = list[list[str]]


@pytest.fixture
def calls(comparison: ScriptComparison, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The commands that would have been run; each writes its record: of stock 400 samples/s, of the n-th run of fae 500 + n."""
    commands: Calls = []

    def fake(command: list[str], log: Path) -> int:
        commands.append(command)
        log.write_text(PRINTED)
        wanted = command[command.index("--placement") + 1]
        rate = 400.0 if wanted == "stock" else 500.0 + sum("fae" in each for each in commands)
        pays = "hbm_budget=1GiB" not in command
        more = {} if pays else {"placement": "stock", "why_not": "all tables fit"}
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "launch.json").write_text(json.dumps(record(placement=wanted, samples_per_s=rate) | more))
        return 0

    monkeypatch.setattr(compare_script, "run_logged", fake)
    monkeypatch.setattr(compare_script, "collect", lambda: None)  # a process that imports torch
    monkeypatch.setattr(compare_script, "describe_environment", lambda _: {})
    return commands


def test_commands_and_turns(comparison: ScriptComparison, calls: Calls, tmp_path: Path) -> None:
    names = ("stock", "fae", "fae:hbm_budget=1GiB,policy=threshold")
    given = ScriptComparison(comparison.script, comparison.launch, ("seed=3",), names, (2,), 2, 1, comparison.output)
    report = compare_script.compare_script(given, ["fae"])
    placements = [command[command.index("--placement") + 1] + ("+" if "policy=threshold" in command else "") for command in calls]
    assert placements == ["stock", "fae", "fae+", "fae", "fae+", "stock"]
    first = calls[0][1:]
    assert first[:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    assert first[6:11] == ["fae_torchrec.launch", "--config", comparison.launch, "--set", "seed=3"]
    assert first[-3:] == [comparison.script.target, "--epochs", "1"]
    assert calls[2][12:16] == ["--set", "hbm_budget=1GiB", "--set", "policy=threshold"]
    fae = report["runs"][1]
    assert (fae["repeats"], len(fae["each"]), fae["samples_per_s_spread"][0]) == (2, 2, min(each["samples_per_s"] for each in fae["each"]))
    assert len(report["warnings"]) == 1 and "all tables fit" in report["warnings"][0]
    logs = sorted(path.name for path in Path(given.output, "runs").iterdir())
    assert len(logs) == 12 and logs[0] == "fae_2_0.json" and "fae_hbm_budget_1GiB_policy_threshold_2_1.log" in logs
    assert not Path(given.output, "launch", "launch.json").exists(), "each run's record is its own"


def test_unequal_runs_are_refused(comparison: ScriptComparison, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def unequal(record: Any, placement: str, text: str, warm_up: int) -> dict[str, Any]:
        return {**entry_of(record, placement, text, warm_up), "samples": 1200 if placement == "stock" else 1100}

    monkeypatch.setattr(compare_script, "entry_of", unequal)
    given = ScriptComparison(comparison.script, comparison.launch, repeats=3, output=comparison.output)
    with pytest.raises(
        ConfigError, match=r"did not do the same work; on 1 rank: fae trained samples: 1,100, stock: 1,200.*--allow-unequal"
    ):
        compare_script.compare_script(given, [])
    assert len(calls) == 2, "found after the first turn"
    allowed = ScriptComparison(comparison.script, comparison.launch, output=comparison.output, allow_unequal=True)
    assert compare_script.compare_script(allowed, [])["not_comparable"] == ["on 1 rank: fae trained samples: 1,100, stock: 1,200"]


def test_a_run_that_fails(comparison: ScriptComparison, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], log: Path) -> int:
        log.write_text("reading\nValueError: no such day\nE1126 14:00:00.0 410 api.py:1] failed (exitcode: 1) local_rank: 0\nTraceback\n")
        return 1

    monkeypatch.setattr(compare_script, "run_logged", fails)
    with pytest.raises(
        FAEError, match=r"code 1 under the placement stock on 1 rank.*reading / ValueError: no such day\. All.*stock_1_0\.log"
    ):
        compare_script.compare_script(comparison, [])


def test_a_launch_config_that_is_no_good_is_found_first(comparison: ScriptComparison, calls: Calls) -> None:
    given = ScriptComparison(comparison.script, comparison.launch, placements=("stock", "fae:hbm_bugdet=1GiB"), output=comparison.output)
    with pytest.raises(ConfigError, match="unknown key 'hbm_bugdet'"):
        compare_script.compare_script(given, [])
    assert calls == [] and not Path(comparison.output).exists()


def test_a_real_script(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both placements by torchrun, from a saved placement."""
    config = {"placement": str(make_placement(tmp_path)), "window_batches": 10}
    (tmp_path / "launch.json").write_text(json.dumps(config))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = ["--script", str(SCRIPT), "--launch", str(tmp_path / "launch.json"), "--output", str(tmp_path / "out")]
    assert cli.main(["compare", *given, "--quiet", "--json", "--", "--told", str(tmp_path), "--steps", "20"]) == 0
    report = json.loads(capfd.readouterr().out)
    stock, fae = report["runs"]
    assert (stock["ran_on"], fae["ran_on"], report["not_comparable"], report["warnings"]) == ("stock", "fae", [], [])
    for run in (stock, fae):
        assert (run["train_steps"], run["samples"], run["evaluation_steps"]) == (20, 20 * 64, 5)
        assert run["step_ms"] > 0 and run["samples_per_s"] > 0 and run["host_peak_bytes"] > 2**26
        assert run["each"][0]["said"][-1].endswith("the script is done")
    assert fae["hot_batches"] >= 0.5 and stock["hot_batches"] is None and fae["hot_bytes"] > 0
    markdown, page = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert re.search(r"\| 1 \| fae \| [\d,]+ \| [\d.]+ \|", markdown) and "the script is done" in markdown
    assert "What the script printed last" in page and "bytes crossed ranks" not in page
