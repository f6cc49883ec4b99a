"""The command line of training: from a store, with checkpoints and TensorBoard, interrupted and resumed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fae_torchrec import cli
from fae_torchrec.config import RunConfig
from fae_torchrec.data.store import SegregatedStore
from fae_torchrec.distributed import local_ranks
from fae_torchrec.doctor import Environment
from fae_torchrec.training.sample_audit import check_audit
from tests.small_config import TRAIN_SAMPLES, write_experiment, write_run
from tests.test_cli import run_json, written

SYNTHETIC = {"synthetic": {"dataset": "kaggle", "scale": 0.001, "train_samples": 3000, "test_samples": 1000}}


@pytest.fixture()
def one_rank_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one rank is this process: starting another takes seconds."""
    stores = (tmp_path / f"rendezvous{number}" for number in range(100))

    def run(function: Callable[..., Any], world_size: int, *args: Any, device_type: str = "cpu") -> list[Any]:
        assert world_size == 1
        dist.init_process_group("gloo", init_method=f"file://{next(stores)}", rank=0, world_size=1)
        try:
            return [function(0, *args)]
        finally:
            dist.destroy_process_group()

    monkeypatch.setattr(local_ranks, "run_on_local_ranks", run)


@pytest.fixture()
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny experiment's YAML, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return str(write_experiment(tmp_path))


@pytest.mark.usefixtures("one_rank_here")
def test_segregate_and_train_from_the_store(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(write_run(tmp_path, SYNTHETIC))
    assert cli.main(["segregate", "--config", path, "--quiet"]) == 0
    out, err = capfd.readouterr()
    store = SegregatedStore.open("out/store")
    assert err == "" and written(tmp_path) == ["hot_set.npz", "placement.npz", "profile.npz", "store"]
    assert f"{tmp_path}/out/store: store {store.fingerprint} of placement {store.placement_fingerprint}\n" in out
    num_bytes = sum(file.stat().st_size for file in (tmp_path / "out" / "store").glob("*.arrow"))
    assert (
        f"3,000 samples, {100 * store.hot_samples / 3000:.1f} % of them all hot, {num_bytes / 3000:.1f} bytes on disk per sample\n" in out
    )
    again = run_json(capfd, "segregate", "--config", path, "--workers", "2")
    assert (again["written"], again["fingerprint"], again["samples"]) == (False, store.fingerprint, 3000)
    assert cli.main(["segregate", "--config", path, "--quiet"]) == 0 and "already there" in capfd.readouterr().out

    more = ["--set", "checkpoint.sample_audit=true", "--set", "train.epochs=2", "--set", "model.dense_arch=[16, 4]"]
    trained = run_json(capfd, "train", "--config", path, "--store", "out/store", "--checkpoint", "kept", *more)
    assert trained["samples_by_kind"] == {"cold": 2 * store.cold_samples, "hot": 2 * store.hot_samples}
    assert trained["test_auc"] > 0.55 and trained["test_logloss"] < 0.65
    audits = check_audit("kept/samples", 3000)
    assert list(audits) == [0, 1] and all(audit.exact for audit in audits.values()), "every sample once in each epoch"


@pytest.mark.usefixtures("one_rank_here")
def test_interrupted_and_resumed(config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    straight = run_json(capfd, "train", "--config", config, "--set", "train.epochs=2")
    options = ["--checkpoint", "kept: here", "--checkpoint-every", "5", "--keep", "2", "--tensorboard", "board", "--quiet"]
    resumable = ["train", "--config", config, "--set", "train.epochs=2", *options]
    assert cli.main([*resumable, "--set", "train.steps=13"]) == 0
    assert "resumed from" not in capfd.readouterr().out
    assert sorted(os.listdir("kept: here")) == ["step_000000010", "step_000000013"]
    assert cli.main(resumable) == 0
    out = capfd.readouterr().out
    assert out.startswith("resumed from kept: here/step_000000013\n")
    assert re.search(r"fae on 1 rank\(s\): [\d,]+ samples/s, [\d.]+ % of the batches hot, test AUC 0\.\d+", out)
    assert re.search(r"ms of a hot step, not overlapped: input_dist [\d.]+, forward [\d.]+, backward [\d.]+, optimizer [\d.]+", out)
    resumed = json.loads((tmp_path / "out" / "train.json").read_text())
    for what in ("test_auc", "test_logloss", "train_loss", "swap_losses", "steps_by_kind", "samples_by_kind"):
        assert resumed[what] == straight[what], "as if it had not been interrupted"
    assert resumed["samples"] == 2 * TRAIN_SAMPLES and any(name.startswith("events") for name in os.listdir("board"))
    # Finished, and asked again: nothing is left to train. A longer run goes on; what is loaded is not looked at.
    assert cli.main(resumable) == 0
    assert f"test AUC {straight['test_auc']:.4f}" in capfd.readouterr().out
    assert cli.main([*resumable, "--set", "train.epochs=3", "--set", "loader.workers=1", "--load", "kept: here", "--json"]) == 0
    out, err = capfd.readouterr()
    longer = json.loads(out)
    assert err == "step 46: resumed from the checkpoint that was made here\n"
    assert longer["samples"] == 3 * TRAIN_SAMPLES and "loaded" not in longer
    # Interrupted while it saved the model, and later: saved by the next attempt, and once.
    (tmp_path / "saved").mkdir()
    saving = [*resumable, "--save", "saved"]
    assert cli.main(saving) == 0
    inode = (tmp_path / "saved" / ".metadata").stat().st_ino
    assert cli.main(saving) == 0 and (tmp_path / "saved" / ".metadata").stat().st_ino == inode
    assert cli.main([*saving, "--set", "train.log_every=1"]) == 2 and "saved holds a checkpoint already" in capfd.readouterr().err
    # Of another run: refused before anything is trained.
    assert cli.main([*resumable, "--set", "train.learning_rate=0.5"]) == 2
    err = capfd.readouterr().err
    assert re.search("kept: here/step_[0-9]+ is of another run: train.learning_rate was 0.05, is 0.5; ", err), err
    newest = max(os.listdir("kept: here"))
    os.truncate(f"kept: here/{newest}/rng_00000.pt", 100)
    assert cli.main(resumable) == 2
    err = capfd.readouterr().err
    assert "rng_00000.pt is missing or damaged" in err and f"without the folder kept: here/{newest} the run would go on from" in err


@pytest.fixture()
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RunConfig]]:
    """The configs that ranks were started with; they do nothing."""
    configs: list[RunConfig] = []
    entry = {
        "placement": "fae",
        "ranks": 1,
        "samples_per_s": 1.0,
        "hot_batches": None,
        "breakdown": {},
        "test_auc": 0.5,
        "test_logloss": 1.0,
        "work": None,
    }

    def run(function: Callable[..., Any], world_size: int, config: RunConfig, *args: Any, device_type: str = "cpu") -> list[Any]:
        configs.append(config)
        return [entry]

    monkeypatch.setattr("fae_torchrec.compare.run_on_local_ranks", run)  # imported by this, before the other is replaced
    for name, result in (("_check_work", None), ("all_score_intervals", {})):  # there is no work and no score to look at
        monkeypatch.setattr(f"fae_torchrec.compare.{name}", lambda *_, result=result: result)
    monkeypatch.setattr(local_ranks, "run_on_local_ranks", run)
    yield configs


def test_options_are_keys(
    config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], given: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fae_torchrec.compare.collect", lambda: Environment(python=(3, 11, 7), packages={}, cores=2, ram_bytes=1, machine="")
    )
    run_json(capfd, "segregate", "--config", config, "--store", "a #store")
    options = ["--store", "a #store", "--checkpoint", "c", "--checkpoint-every", "7", "--keep", "1", "--tensorboard", "t"]
    run_json(capfd, "train", "--config", config, *options)
    (run,) = given
    assert run.loader.store == str(tmp_path / "a #store")
    assert (run.checkpoint.folder, run.checkpoint.every_steps, run.checkpoint.keep, run.train.tensorboard) == ("c", 7, 1, "t")
    every = ["--set", "checkpoint.folder=c", "--set", "train.tensorboard=t", "--store", "a #store", "--quiet"]
    assert cli.main(["compare", "--config", config, *every]) == 0
    assert [(each.checkpoint.folder, each.train.tensorboard) for each in given[1:]] == [(None, "t/stock_1"), (None, "t/fae_1")]
    assert {each.loader.store for each in given[1:]} == {run.loader.store}


# name -> (command, arguments, what the message must say)
BAD: dict[str, tuple[str, list[str], str]] = {
    "store of another placement": (
        "train",
        ["--store", "s", "--set", "placement.budget=10%"],
        "written for the placement [0-9a-f]{12}, given is the placement [0-9a-f]{12}; segregate",
    ),
    "compare with it": ("compare", ["--store", "s", "--set", "placement.budget=10%"], "written for the placement [0-9a-f]{12}, given"),
    "segregate over it": ("segregate", ["--store", "s", "--set", "placement.budget=10%"], "placement.*never overwritten: remove .*/s, or"),
    "no store": ("train", ["--store", "absent"], "there is no segregated store .*absent; make one with `fae segregate`"),
    "stock order from a store": ("train", ["--store", "s", "--set", "schedule.policy=stock"], "loader.store: .*'stock'.*'proportional'"),
    "segregate workers": ("segregate", ["--workers", "-1"], "loader.workers: received -1; it must be at least 0"),
    "every": ("train", ["--checkpoint", "c", "--checkpoint-every", "0"], "checkpoint.every_steps: received 0; it must be at least 1"),
    "checkpoints in a file": ("train", ["--checkpoint", "run.yaml/c"], "checkpoint.folder: .*because .*/run.yaml is no folder; give"),
    "keep": ("train", ["--checkpoint", "c", "--keep", "0"], "checkpoint.keep: received 0; it must be at least 1"),
}


def test_an_interrupt_is_one_line(config: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("fae_torchrec.commands.run_train", interrupt)
    assert cli.main(["train", "--config", config]) == 130
    assert capfd.readouterr() == ("", "fae train: interrupted\n")


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, config: str, capfd: pytest.CaptureFixture[str], given: list[RunConfig]) -> None:
    command, arguments, words = BAD[name]
    if "s" in arguments:
        run_json(capfd, "segregate", "--config", config, "--store", "s")
    assert cli.main([command, "--config", config, "--quiet", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and given == [], "nothing was trained"
    assert err.startswith(f"fae {command}: ") and err.count("\n") == 1 and re.search(words, err), err
