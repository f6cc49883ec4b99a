"""`fae launch` on a training script that knows nothing of it: steps, samples, losses, what is said, and what comes back afterwards."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchrec.distributed
import torchrec.distributed.model_parallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from fae_torchrec.core.errors import FingerprintError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.segregate import hot_samples
from fae_torchrec.launch import main, run_script
from fae_torchrec.launch_config import LaunchConfig, load_launch_config
from fae_torchrec.launch_placement import Prepared, prepare
from fae_torchrec.launch_ranks import LaunchRanks
from fae_torchrec.launch_script import ScriptRun
from tests.launch_scripts.train_bags import DIM, FEATURES, batches

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "launch_scripts" / "train_bags.py"
ROWS, BATCH, STEPS = 20_000, 64, 20

Run = Callable[..., tuple[dict[str, Any], dict[str, Any], list[str]]]


def table_set(rows: int = ROWS) -> TableSet:
    return TableSet(tuple(TableSpec(f"t_{f}", rows, DIM, (f,)) for f in FEATURES))


def make_placement(folder: Path, *, rows: int = ROWS, hot_inputs: float = 0.75) -> Path:
    """The rows that the script's popular samples access are hot."""
    hot = {f"t_{f}": np.arange(ROWS // 100) for f in FEATURES}
    path = folder / "placement.npz"
    RowPlacement(table_set(rows), hot, "by hand", 100_000, hot_inputs, 0.8, (hot_inputs, hot_inputs)).save(path)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs the script in this process, on one rank: the record, what the script told, and what was announced."""
    make_placement(tmp_path)

    def once(*arguments: str, wanted: Any = "fae", told: bool = True, **config: Any) -> Any:
        with socket.socket() as free:
            free.bind(("", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **meeting}.items():
            monkeypatch.setenv(name, value)
        given = {"placement": str(tmp_path / "placement.npz"), "output": str(tmp_path / "output"), **config}
        said: list[str] = []
        script = ScriptRun(str(SCRIPT), ("--told", str(tmp_path), *arguments))
        record = run_script(LaunchConfig.from_dict(given), script, placement=wanted, announce=said.extend)
        return record, json.loads((tmp_path / "rank0.json").read_text()) if told else {}, said

    yield once
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def script_arguments(**values: Any) -> Namespace:
    return Namespace(**{"batch_size": BATCH, "short_last": 0, "rows": ROWS, "uniform": False, "tagged": False, **values})


def fillable(window: list[Any], placement: RowPlacement) -> int:
    """How many of a window's first batches its hot samples fill."""
    left = sum(int(hot_samples(batch.sparse_features, placement).sum()) for batch in window)
    steps = 0
    while steps < len(window) and left >= len(window[steps].labels):
        left, steps = left - len(window[steps].labels), steps + 1
    return steps


def test_steps_and_samples_are_the_scripts(run: Run, tmp_path: Path) -> None:
    record, told, said = run("--epochs", "2", "--short_last", "7", window_batches=8)
    given = list(batches(script_arguments(short_last=7), 0, 1, "train", STEPS))
    sizes = [len(batch.labels) for batch in given]
    for epoch in told["train"]:
        for begin in range(0, STEPS, 8):
            window = slice(begin, begin + 8)
            assert sorted(len(step) for step in epoch[window]) == sorted(sizes[window])
            numbers = sorted(number for step in epoch[window] for number in step)
            assert numbers == sorted(int(n) for batch in given[window] for n in batch.dense_features[:, 0])
        assert [number for step in epoch for number in step] != list(range(sum(sizes))), "they are sorted into other batches"
    placement = RowPlacement.load(tmp_path / "placement.npz")
    hot_steps = sum(fillable(given[begin : begin + 8], placement) for begin in range(0, STEPS, 8))
    assert record["steps"] == {"hot": 2 * hot_steps, "other": 2 * (STEPS - hot_steps), "evaluation": 5}
    assert hot_steps > STEPS / 2
    assert record["hot_lookups"] == 2 * hot_steps * BATCH * len(FEATURES)
    assert record["hot_lookup_bytes"] == record["hot_lookups"] * DIM * 4
    assert (record["samples"], record["placement"], record["error"]) == (2 * sum(sizes), "fae", None)
    assert len(record["step_seconds"]) == len(record["step_hot"]) == 2 * STEPS
    assert record["seconds"] == pytest.approx(sum(record["step_seconds"]))
    assert json.loads((tmp_path / "output" / "launch.json").read_text()) == record
    assert sum("EmbeddingShardingPlanner -> FAEShardingPlanner" in line for line in said) == 1
    assert any(f"{2 * STEPS} training steps: {2 * hot_steps} all hot" in line for line in said)


def test_evaluation_has_every_sample_once_in_the_scripts_order(run: Run) -> None:
    _, told, _ = run()
    expected = [[int(n) for n in batch.dense_features[:, 0]] for batch in batches(script_arguments(), 0, 1, "val", 5)]
    assert told["evaluated"] == [expected]


def test_validation_within_an_epoch(run: Run) -> None:
    record, told, _ = run("--validate_every", "6")
    (epoch,) = told["train"]
    assert len(epoch) == STEPS
    for begin in range(0, STEPS, 6):  # each part is a pass of its own, trained before the validation behind it
        part = epoch[begin : begin + 6]
        assert sorted(number for step in part for number in step) == list(range(BATCH * begin, BATCH * (begin + len(part))))
    assert len(told["evaluated"]) == 4 + 1
    assert record["steps"]["evaluation"] == 5 * 5
    assert record["steps"]["hot"] > STEPS / 2


def test_a_script_that_leaves_an_iterator_in_the_middle(run: Run) -> None:
    record, told, _ = run("--stop_after", "10", "--steps", "40", window_batches=5)
    (epoch,) = told["train"]
    assert sorted(number for step in epoch for number in step) == list(range(10 * BATCH)), "two whole windows"
    assert len(epoch) == record["steps"]["hot"] + record["steps"]["other"]
    # As in TorchRec's own pipeline, what was in flight comes first when the model is evaluated.
    assert [len(step) for step in told["evaluated"][0]] == [BATCH] * 7


def test_placement_alone_gives_the_stock_losses(run: Run) -> None:
    _, stock, _ = run(wanted="stock")
    record, placed, _ = run(schedule={"policy": "stock"})
    assert record["steps"]["hot"] == 0
    assert placed["train"] == stock["train"]
    assert placed["losses"] == pytest.approx(stock["losses"], abs=1e-5)
    _, sorted_, _ = run()
    assert sorted_["losses"] != pytest.approx(stock["losses"], abs=1e-5), "the losses depend on what was trained before"


@pytest.mark.parametrize("plan", ["default", "sharders"])
def test_scripts_that_plan_otherwise(run: Run, plan: str) -> None:
    """DistributedModelParallel makes the plan itself; with the script's own list of sharders, too."""
    record, _, _ = run("--plan", plan)
    assert record["used"] == ["EmbeddingShardingPlanner", "TrainPipelineSparseDist"]
    assert record["steps"]["hot"] > STEPS / 2


def test_batches_of_another_type_pass(run: Run) -> None:
    record, told, said = run("--tagged")
    assert record["steps"] == {"hot": 0, "other": STEPS, "evaluation": 5}
    assert [number for step in told["train"][0] for number in step] == list(range(STEPS * BATCH))
    assert any("batches of type TaggedBatch are not sorted" in line for line in said)


def test_a_script_with_a_loop_of_its_own(run: Run) -> None:
    record, told, said = run("--loop", "own")
    assert record["used"] == ["EmbeddingShardingPlanner"], "its rows are placed"
    assert len(told["train"]) == STEPS
    assert any("no training step of TrainPipelineSparseDist was seen" in line for line in said)


def test_where_it_does_not_pay_the_script_runs_on_stock(run: Run, tmp_path: Path) -> None:
    make_placement(tmp_path, hot_inputs=0.05)
    record, told, said = run()
    assert (record["wanted"], record["placement"]) == ("fae", "stock")
    assert sum("FAE does not pay here, because only 5.0 % of the samples" in line for line in said) == 2, "at the start and at the end"
    assert [number for step in told["train"][0] for number in step] == list(range(STEPS * BATCH))
    assert not any("FAEShardingPlanner" in line for line in said)
    record, _, said = run(when_not_paying="fae")
    assert record["placement"] == "fae"
    assert record["steps"]["hot"] > 0
    assert any("more steps were hot than the profile promised" in line for line in said), "the figure was made up by the test"


def test_everything_is_put_back(run: Run, tmp_path: Path) -> None:
    argv, path = list(sys.argv), list(sys.path)
    run()
    with pytest.raises(ValueError, match="the script fails at its end"):
        run("--fail", told=False)
    assert torchrec.distributed.TrainPipelineSparseDist is TrainPipelineSparseDist
    assert (sys.argv, sys.path) == (argv, path)
    record = json.loads((tmp_path / "output" / "launch.json").read_text())
    assert record["error"] == "ValueError: the script fails at its end"
    assert record["steps"]["hot"] + record["steps"]["other"] == STEPS


def test_another_models_placement_is_an_error_before_training(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_placement(tmp_path, rows=ROWS + 1)
    with pytest.raises(FingerprintError, match="t_user"):
        run(told=False)
    # As if it had been found in the output folder.
    placement = RowPlacement.load(tmp_path / "placement.npz")
    monkeypatch.setattr("fae_torchrec.launch_placement.prepare", lambda *_, **__: Prepared(placement, "of an earlier launch", None))
    (tmp_path / "output" / "launch_key.json").write_text("{}")
    with pytest.raises(FingerprintError, match="launch again, and it is made anew"):
        run(told=False, placement=None, hbm_budget="1MiB")
    assert not (tmp_path / "output" / "launch_key.json").exists()


def fae(folder: Path, *arguments: str, ranks: int = 1, module: str = "fae_torchrec.cli") -> subprocess.CompletedProcess[str]:
    """The command in processes of its own, started by torchrun if there are several ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--no-python"] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run(
        [*command, sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=folder, env=environment, timeout=200
    )


def test_two_ranks_profile_first_and_a_second_launch_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fae.json").write_text('{"hbm_budget": "200KiB", "output": "out"}')
    arguments = ("launch", "--config", "fae.json", str(SCRIPT), "--told", ".", "--short_last", "9")
    first = fae(tmp_path, *arguments, ranks=2)
    assert first.returncode == 0, first.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "launch.json").read_text())
    assert record["placement"] == "fae"
    assert record["hot_share"] > 0.5
    assert record["profiled"]["batches"] == 2 * STEPS
    assert 0.7 < record["profiled"]["fresh_coverage"] < 0.95 < record["placed"]["coverage"], "rows that were counted once pass for popular"
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [[len(step) for step in t["train"][0]] for t in told[:1]] == [[len(step) for step in t["train"][0]] for t in told[1:]]
    for rank, t in enumerate(told):
        given = [[int(n) for n in b.dense_features[:, 0]] for b in batches(script_arguments(short_last=9), rank, 2, "train", STEPS)]
        assert len(t["train"][0]) == STEPS
        assert sorted(n for step in t["train"][0] for n in step) == sorted(n for step in given for n in step)
    assert first.stdout.count("fae launch | replaced:") == 1, "one rank says it"
    assert first.stdout.count("the script is done") == 2, "what the script prints while it is profiled is in the log"
    assert "made from the first 40 batches" in first.stdout

    monkeypatch.chdir(tmp_path)
    config, script = load_launch_config("fae.json"), ScriptRun(str(SCRIPT), arguments[4:])
    monkeypatch.setattr("fae_torchrec.launch_placement.profile_script", lambda *_, **__: pytest.fail("the script is run again"))
    second = found(config, script)
    assert second.placement is not None
    assert second.placement.fingerprint == record["placed"]["fingerprint"]
    assert "of an earlier launch with the same script and arguments" in second.origin
    smaller = found(replace(config, hbm_budget="20KiB"), script)  # from the same profile
    assert smaller.placement is not None
    assert 0 < smaller.placement.hot_bytes <= 20 * 1024 < second.placement.hot_bytes
    others = (
        (config, replace(script, arguments=(*script.arguments, "--epochs", "2"))),
        (replace(config, profile_rate=0.5), script),
        (replace(config, fresh=True), script),
    )
    for changed in others:
        with pytest.raises(pytest.fail.Exception, match="the script is run again"):
            found(*changed)


def found(config: LaunchConfig, script: ScriptRun) -> Prepared:
    """What a second launch on two ranks begins with."""
    alone = LaunchRanks()
    alone.world_size = 2
    return prepare(config, script, alone)


def test_uniform_ids_do_not_pay(tmp_path: Path) -> None:
    (tmp_path / "fae.yaml").write_text("hbm_budget: 200KiB\n")
    wrapper = tmp_path / "alone.py"
    wrapper.write_text(
        "import os, runpy, socket, sys\n"
        "with socket.socket() as free:\n"
        "    free.bind(('', 0))\n"
        "    os.environ.update(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]))\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    shown = fae(tmp_path, "--config", "fae.yaml", "--json", str(wrapper), "--told", ".", "--uniform", module="fae_torchrec.launch")
    assert shown.returncode == 0, shown.stderr[-3000:]
    record = json.loads(shown.stdout.splitlines()[-1])
    assert record["placement"] == "stock"
    assert "would be all hot" in record["why_not"]
    assert record["placed"]["hot_inputs"] < 0.01
    assert record["steps"] == {"hot": 0, "other": STEPS, "evaluation": 5}
    assert "fae launch |" not in shown.stdout


def test_a_script_that_uses_none_of_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fae.json").write_text('{"hbm_budget": "64MiB"}')
    (tmp_path / "plain.py").write_text("import sys\nprint('plain', sys.argv[1:])\n")
    assert main(["--config", "fae.json", "plain.py", "--x"]) == 0
    said = capsys.readouterr().out
    assert "plain ['--x']" in said
    assert (
        "the script fed no batch to a pipeline that fae launch knows (the script ended; of the names that are replaced it used: none)"
        in said
    )
    assert "no training step of TrainPipelineSparseDist was seen" in said


def test_a_script_that_fails_before_it_feeds_a_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fae.json").write_text('{"hbm_budget": "64MiB"}')
    (tmp_path / "broken.py").write_text("raise OSError('no such data set')\n")
    assert main(["--config", "fae.json", "broken.py"]) == 2
    said = capsys.readouterr().err
    assert "the profiling pass of `broken.py` failed before the script fed a batch (the script raised OSError)" in said
    assert "OSError: no such data set" in said
    assert "runs/launch/profile_rank0.log" in said
