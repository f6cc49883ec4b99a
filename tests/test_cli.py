"""The command line: what each command writes and prints, and one clear message for bad input."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fae_torchrec import cli
from fae_torchrec.core.hot_set import HotSet
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from tests.small_config import ROWS, TEST_SAMPLES, TRAIN_SAMPLES, new_config, write_experiment, write_parquet

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = ("vocabulary", "profile", "place", "plan", "report", "segregate", "train", "compare", "doctor")


@pytest.fixture()
def config(tmp_path: Path) -> Path:
    """A tiny experiment's YAML; its output folder is tmp_path/out."""
    return write_experiment(tmp_path)


def written(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "out")) if (folder / "out").exists() else []


def environment(**more: str) -> dict[str, str]:
    """For a process of its own."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return {**clean, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **more}


def run_json(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Runs a command with --json; all of its standard output is one JSON object without NaN, and nothing is on standard error."""
    assert cli.main([*arguments, "--json", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    of_config = ("--json", "--config", "--set", "--max-bad-lines", "examples/configs/", *(() if command == "vocabulary" else ("--output",)))
    wanted = COMMANDS if not command else ("--json",) if command == "doctor" else of_config
    assert [word for word in wanted if word not in out] == []
    assert ("--ranks N" in out) == (command in ("place", "plan", "segregate", "train", "compare"))
    assert ("--hardware NAME" in out) == (command == "plan")
    assert ("--torchrec-stats" in out) == (command == "profile")
    assert ("--workers N" in out) == (command in ("profile", "segregate"))
    assert ("--store DIR" in out) == (command in ("segregate", "train", "compare"))
    of_train = ("--load DIR", "--save DIR", "--checkpoint DIR", "--checkpoint-every N", "--keep N", "--tensorboard DIR")
    assert all((option in out) == (command == "train") for option in of_train)


def test_help_does_not_wait_for_torch() -> None:
    script = """
import sys
from fae_torchrec import cli
try:
    cli.main(["train", "--help"])
except SystemExit:
    sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], env=environment(), stdout=subprocess.DEVNULL, timeout=60).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["bake"], ["train"], ["train", "--config", "c", "--placement", "hot"], ["compare", "--config"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: fae" in capsys.readouterr().err


def test_profile(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "--config", str(config), "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and written(tmp_path) == ["profile.npz"]
    profile = PopularityProfile.load(tmp_path / "out" / "profile.npz")
    assert f"{tmp_path}/out/profile.npz: profile {profile.fingerprint}" in out
    shares = dict(re.findall(r"t_(\w) +[\d,]+ rows +([\d.]+)", out))
    counts = sorted(profile.counts["t_v"].dense().tolist(), reverse=True)
    assert float(shares["v"]) == pytest.approx(100 * sum(counts[:20]) / sum(counts), abs=0.051), "20 rows are 1 % of 2,000"
    printed = run_json(capfd, "profile", "--config", str(config), "--output", str(tmp_path / "new" / "folder"))
    assert printed["path"] == str(tmp_path / "new" / "folder" / "profile.npz")
    assert (printed["fingerprint"], printed["total_samples"]) == (profile.fingerprint, TRAIN_SAMPLES)
    # A named profile may be brought into a folder that is not there yet.
    override = f"profile.path={printed['path']}"
    named = run_json(capfd, "profile", "--config", str(config), "--set", override, "--output", str(tmp_path / "third"))
    assert PopularityProfile.load(named["path"]).fingerprint == profile.fingerprint


def test_place(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["place", "--config", str(config), "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and written(tmp_path) == ["hot_set.npz", "placement.npz", "profile.npz"]
    placement = RowPlacement.load(tmp_path / "out" / "placement.npz")
    hot_set = HotSet.load(tmp_path / "out" / "hot_set.npz")
    assert (placement.hot_set_fingerprint, hot_set.policy) == (hot_set.fingerprint, "input_aware")
    assert hot_set.profile_fingerprint == PopularityProfile.load(tmp_path / "out" / "profile.npz").fingerprint
    assert f"{tmp_path}/out/placement.npz: placement {placement.fingerprint}" in out
    assert re.search(r"t_u +hot +40 of +40 rows", out)
    printed = run_json(capfd, "place", "--config", str(config))
    assert printed["fingerprint"] == placement.fingerprint
    assert printed["used_bytes"] == placement.hot_bytes <= printed["budget_bytes"] == int(sum(ROWS.values()) * 20 * 0.2)
    assert printed["pinned"] == ["t_u"]
    assert [row["hot_rows"] for row in printed["per_table"]] == [placement.hot_rows(name) for name in placement.tables.names]
    assert printed["curve"][-1]["byte_share"] <= 1


def test_train(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--ranks", "2", "--placement", "fae-unsegregated", "--set", "train.epochs=2"]
    printed = run_json(capfd, "train", "--config", str(config), *more)
    assert written(tmp_path) == ["hot_set.npz", "placement.npz", "profile.npz", "train.json"]
    assert printed == json.loads((tmp_path / "out" / "train.json").read_text())
    assert (printed["placement"], printed["ranks"], printed["samples"]) == ("fae-unsegregated", 2, 2 * (TRAIN_SAMPLES - 1))


def test_checkpoint_from_stock_on_two_ranks_to_fae_on_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What was scored when it was saved is what is scored when it is loaded, under another plan and number of ranks, and back."""
    config = write_experiment(tmp_path)
    write_parquet(tmp_path / "test.parquet", 202, seed=1)  # two ranks and one score the same samples
    first, second = (str(tmp_path / "checkpoints" / name) for name in ("first", "second"))
    short = ["--config", str(config), "--set", "train.steps=12"]
    stock = run_json(capfd, "train", *short, "--placement", "stock", "--ranks", "2", "--save", first)
    assert "loaded" not in stock
    assert cli.main(["train", *short, "--load", first, "--save", second, "--quiet"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"{first}: test AUC {stock['test_auc']:.4f}, logloss {stock['test_logloss']:.4f}"
    assert lines[-1] == second
    fae = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (fae["placement"], fae["ranks"], fae["loaded"]["path"]) == ("fae", 1, first)
    back = run_json(capfd, "train", *short, "--placement", "stock", "--load", second)
    for score in ("test_auc", "test_logloss", "test_accuracy"):
        assert fae["loaded"][score] == pytest.approx(stock[score], rel=1e-6)
        assert back["loaded"][score] == pytest.approx(fae[score], rel=1e-6)
    assert fae["test_logloss"] != fae["loaded"]["test_logloss"], "the control: training changes the scores"
    # Of another optimizer: one message, and no checkpoint is made.
    sgd = [*short, "--set", "train.optimizer=sgd", "--load", first, "--save", str(tmp_path / "third"), "--quiet"]
    assert cli.main(["train", *sgd]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"checkpoint {first} does not fit this model" in err
    assert not (tmp_path / "third").exists()


def test_compare(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--ranks", "1", "--set", "train.steps=12"]
    assert cli.main(["compare", "--config", str(config), *more]) == 0
    out, err = capfd.readouterr()
    assert written(tmp_path) == ["hot_set.npz", "placement.npz", "profile.npz", "report.html", "report.json", "report.md"]
    assert "stock on 1 rank\n" in err and "fae on 1 rank\n" in err and "Traceback" not in err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(run["placement"], run["ranks"], run["steps"]) for run in report["runs"]] == [("stock", 1, 12), ("fae", 1, 12)]
    assert report["command"] == ["fae", "compare", "--config", str(config), *more]
    assert report["data"]["train_samples"] == TRAIN_SAMPLES and report["data"]["rows"] == sum(ROWS.values())
    table = [line.split() for line in out.splitlines() if re.match(r" *1 +(stock|fae) ", line)]
    assert [(line[0], line[1]) for line in table] == [("1", "stock"), ("1", "fae")]
    for run, line in zip(report["runs"], table, strict=True):
        assert line[-2:] == [f"{run['test_auc']:.4f}", f"{run['test_logloss']:.4f}"]
    assert all(f"{tmp_path}/out/report.{kind}" in out for kind in ("json", "html", "md"))
    assert "</html>" in (tmp_path / "out" / "report.html").read_text()


def test_json_of_a_diverged_run_parses(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fae_torchrec.distributed import local_ranks

    diverged = {"test_auc": 0.0, "test_logloss": float("nan"), "train_loss": float("inf")}
    entry = {"placement": "fae", "ranks": 1, "samples_per_s": 1.0, "hot_batches": 0.5, "breakdown": {}, **diverged}
    monkeypatch.setattr(local_ranks, "run_on_local_ranks", lambda *args, **more: [entry])
    printed = run_json(capfd, "train", "--config", str(config))
    assert printed["test_logloss"] is None and printed["train_loss"] is None


def test_torchrun(config: Path, tmp_path: Path) -> None:
    """As torchrun starts it: the same command on every rank, which find each other by the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "fae_torchrec.cli", "train", "--config", str(config), "--quiet", "--json"]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            command, env=environment(RANK=rank, **where), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        for rank in "01"
    ]
    try:
        (out, err), (silent, other_err) = (rank.communicate(timeout=120) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], err + other_err
    assert silent == "", "only rank 0 speaks and writes"
    assert "Traceback" not in err + other_err
    assert written(tmp_path) == ["hot_set.npz", "placement.npz", "profile.npz", "train.json"]
    result = json.loads(out)
    assert result == json.loads((tmp_path / "out" / "train.json").read_text())
    assert (result["ranks"], result["samples"]) == (2, TRAIN_SAMPLES - 1)


def _remove(name: str) -> Callable[[Path], list[str]]:
    def spoil(folder: Path) -> list[str]:
        (folder / name).unlink()
        return []

    return spoil


def _sets(*overrides: str) -> Callable[[Path], list[str]]:
    return lambda folder: [word for override in overrides for word in ("--set", override)]


def _bad_id(split: str, value: int) -> Callable[[Path], list[str]]:
    def spoil(folder: Path) -> list[str]:
        write_parquet(folder / f"{split}.parquet", TRAIN_SAMPLES if split == "train" else TEST_SAMPLES, changes={"v": (150, value)})
        return []

    return spoil


def _other_tables(key: str) -> Callable[[Path], list[str]]:
    """A saved value of these tables, where the experiment has one row more in one of them."""

    def spoil(folder: Path) -> list[str]:
        saved = folder / "saved"
        assert cli.main(["place", "--config", str(folder / "run.yaml"), "--output", str(saved), "--quiet"]) == 0
        named = saved / ("profile.npz" if key == "profile.path" else "placement.npz")
        return ["--set", f"{key}={named}", "--set", "data.parquet.cardinalities={u: 40, v: 2001, w: 500}"]

    return spoil


def _unknown_key(folder: Path) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(path.read_text().replace("sample_rate:", "sampel_rate:"))
    return []


RANGE = r"id 2000 is out of range; allowed 0\.\.1999"
# name -> (command, what makes the input bad, what the message must say)
BAD: dict[str, tuple[str, Callable[[Path], list[str]], list[str]]] = {
    "no config": ("place", _remove("run.yaml"), [r"run\.yaml: no such file", "give the path"]),
    "no data": ("train", _remove("train.parquet"), [r"no parquet file at .*train\.parquet", r"holds \['test\.parquet'\]"]),
    "unknown key": ("compare", _unknown_key, [r"unknown key 'profile\.sampel_rate'", "sample_rate.*seed.*path"]),
    "unknown override": ("train", _sets("train.speed=9"), [r"unknown key 'train\.speed'", "'batch_size'", "'epochs'"]),
    "id of train data": ("compare", _bad_id("train", 2000), ["column 'v'", "row 150", RANGE]),
    "negative id": ("profile", _bad_id("train", -1), ["column 'v'", "row 150", r"id -1 is out of range; allowed 0\.\.1999"]),
    "id of test data": ("train", _bad_id("test", 2000), [r"test\.parquet: column 'v', row 150", RANGE]),
    "budget": ("place", _sets("placement.budget=799B"), ["budget of 799 bytes", "need 800 bytes", "give at least 800 bytes"]),
    "profile of other tables": ("place", _other_tables("profile.path"), ["popularity profile [0-9a-f]+ was made for", "2001 rows"]),
    "placement of other tables": ("train", _other_tables("placement.path"), ["row placement [0-9a-f]+ was made for", "2001 rows"]),
    "optimizer": ("compare", _sets("train.optimizer=adam"), ["'t_u' is optimized by adam", "'rowwise_adagrad'"]),
    "layers": ("train", _sets("model.over_arch=[1]"), ["at least two layers"]),
    "ranks": ("train", lambda folder: ["--ranks", "0"], ["--ranks: received 0; give at least 1"]),
    "ranks twice": ("compare", lambda folder: ["--ranks", "1", "1"], [r"--ranks: received \[1, 1\]", "none twice"]),
    "tables to leave": (
        "train",
        _sets("placement.stock_tables=[t_x]"),
        [r"placement.stock_tables: .*\['t_x'\] are not", "'t_u', 't_v', 't_w'"],
    ),
    "hot tier": ("compare", _sets("placement.hot_tier=row_wise"), ["no hot tier 'row_wise' on device 'cpu'", "table_wise on cpu"]),
    "nothing to load": ("train", lambda folder: ["--load", str(folder / "absent")], ["--load: there is no folder .*absent"]),
    "no checkpoint to load": ("train", lambda folder: ["--load", str(folder)], ["no checkpoint in ", "finished checkpoint"]),
    "target that exists": ("train", lambda folder: ["--save", str(folder)], ["--save: the folder .* exists already", "give a new folder"]),
    "target in a file": ("train", lambda folder: ["--save", str(folder / "run.yaml" / "x")], ["--save: .*because .*run.yaml is no folder"]),
    "more ranks than samples": ("train", lambda folder: ["--ranks", "204"], ["the test data hold 203 sample", "204 ranks"]),
}
# Profile and placement are right, whole and reusable.
FOUND_LATE = {"id of test data", "optimizer", "hot tier", "no checkpoint to load", "more ranks than samples"}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command, spoil, words = BAD[name]
    arguments = spoil(tmp_path)
    capfd.readouterr()
    assert cli.main([command, "--config", str(config), "--quiet", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"fae {command}: ") and err.count("\n") == 1, err
    assert [word for word in words if not re.search(word, err)] == [], err
    allowed = {"profile.npz", "hot_set.npz", "placement.npz"} if name in FOUND_LATE else {"profile.npz"} if name == "budget" else set()
    assert set(written(tmp_path)) <= allowed, "nothing half-written"
    for file in written(tmp_path):
        {"profile": PopularityProfile, "hot_set": HotSet, "placement": RowPlacement}[Path(file).stem].load(tmp_path / "out" / file)


def test_both_fingerprints(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from fae_torchrec.experiment import experiment_tables
    from fae_torchrec.experiment_data import open_data

    arguments = _other_tables("profile.path")(tmp_path)
    assert cli.main(["train", "--config", str(config), "--quiet", *arguments]) == 2
    err = capfd.readouterr().err
    for run in (new_config(tmp_path), new_config(tmp_path, arguments[-1])):
        assert experiment_tables(run, open_data(run)).fingerprint in err


def test_bad_input_as_a_process(config: Path, tmp_path: Path) -> None:
    _bad_id("train", 2000)(tmp_path)
    command = [sys.executable, "-m", "fae_torchrec.cli", "train", "--config", str(config)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    told = [line for line in re.split(r"[\r\n]+", done.stderr) if line and not line.startswith("calibrate")]
    assert len(told) == 1 and re.search(f"fae train: .*column 'v', row 150.*{RANGE}", told[0]), done.stderr
    assert written(tmp_path) == []


def test_compare_under_torchrun_is_refused(config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["compare", "--config", str(config)]) == 2
    assert "starts its own ranks" in capfd.readouterr().err
    for command in ("vocabulary", "place", "report", "segregate"):
        assert cli.main([command, "--config", str(config)]) == 2
        assert f"fae {command} is the work of one process" in capfd.readouterr().err


def test_other_errors_keep_their_traceback(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only bad input ends in a message; a bug must be seen."""
    monkeypatch.setattr(cli, "_run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--config", str(config)])
