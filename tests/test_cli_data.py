"""The command line on raw data: every source and coding, malformed lines, workers and ranks, reports, and training."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fae_torchrec import cli
from fae_torchrec.config import load_config
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.data.cache_statistics import MeasuredCacheStatistics
from fae_torchrec.data.vocabulary import Vocabulary
from fae_torchrec.doctor import Environment
from fae_torchrec.experiment_data import open_data
from tests.raw_data import RAW
from tests.small_config import ROWS, TRAIN_SAMPLES, write_experiment, write_run
from tests.test_cli import environment, run_json, written


@pytest.fixture()
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny experiment on csv files, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return str(write_run(tmp_path, RAW["csv"](tmp_path)))


def spoil(path: Path, line: str) -> None:
    """Adds a line that is malformed."""
    with path.open("a") as file:
        file.write(f"{line}\n")


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


@pytest.mark.parametrize("source", RAW)
def test_every_raw_source(source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in full, sampled and placed, and coded by a vocabulary instead."""
    monkeypatch.chdir(tmp_path)
    path = str(write_run(tmp_path, RAW[source](tmp_path)))
    data = open_data(load_config(path))
    all_of_it = run_json(capfd, "profile", "--config", path, "--output", "all", *sets("profile.sample_rate=1"))
    profile = PopularityProfile.load("all/profile.npz")
    assert (profile.num_samples, profile.fingerprint, profile.source) == (data.train.num_samples, all_of_it["fingerprint"], data.name)
    for name, rows in data.rows.items():
        ids = np.concatenate([batch.sparse_features[name].values().numpy() for batch in data.train.batches(64)])
        assert profile.counts[f"t_{name}"].dense().tolist() == np.bincount(ids, minlength=rows).tolist()
    placed = run_json(capfd, "place", "--config", path, *sets("placement.pinned_max_rows=0", "placement.budget=60%"))
    sampled = PopularityProfile.load(tmp_path / "out" / "profile.npz")
    assert 0 < sampled.num_samples < sampled.total_samples == data.train.num_samples
    placement = RowPlacement.load(tmp_path / "out" / "placement.npz")
    assert placement.fingerprint == placed["fingerprint"] and 0 < placement.hot_bytes <= placed["budget_bytes"]
    assert placed["hot_inputs_interval"][0] <= placed["hot_inputs"] <= placed["hot_inputs_interval"][1]
    assert written(tmp_path) == ["hot_set.npz", "placement.npz", "profile.npz"]
    coding = sets("data.coding.method=vocabulary", "data.coding.vocabulary=v.npz")
    fitted = run_json(capfd, "vocabulary", "--config", path, *coding)
    vocabulary = Vocabulary.load("v.npz")
    assert (fitted["fingerprint"], fitted["rows"]) == (vocabulary.fingerprint, vocabulary.rows)
    assert fitted["path"] == str(tmp_path / "v.npz") and list(fitted["rows"]) == list(data.rows)
    coded = run_json(capfd, "profile", "--config", path, "--output", "coded", *coding)
    assert vocabulary.fingerprint in coded["source"]
    assert {table["table"]: table["rows"] for table in coded["skew"]} == {f"t_{name}": rows for name, rows in vocabulary.rows.items()}


def test_vocabulary_as_text(config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    coding = sets("data.coding.method=vocabulary", "data.coding.vocabulary=v.npz")
    assert cli.main(["vocabulary", "--config", config, "--quiet", *coding]) == 0
    out, err = capfd.readouterr()
    vocabulary = Vocabulary.load("v.npz")
    assert err == "" and f"{tmp_path}/v.npz: vocabulary {vocabulary.fingerprint} of CSV" in out
    assert dict(re.findall(r"^  (\w+) +(\d+)$", out, re.M)) == {name: str(rows) for name, rows in vocabulary.rows.items()}
    assert written(tmp_path) == [], "the output folder is not for it"


def test_malformed_lines_are_skipped_counted_and_told(config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = run_json(capfd, "profile", "--config", config, "--output", "whole")
    spoil(tmp_path / "a.csv", "1,0.5,only three fields")
    spoil(tmp_path / "c.csv", "1,0.5,in the test data")
    assert cli.main(["profile", "--config", config, "--quiet"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and written(tmp_path) == []
    assert err.count("\n") == 1 and re.match(r"fae profile: .*a\.csv, line 92: expected 5 fields, received 3; .*max_bad_lines", err), err
    assert cli.main(["profile", "--config", config, "--quiet", "--max-bad-lines", "1"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and f"skipped 1 malformed line(s) of {tmp_path}/a.csv" in out
    printed = run_json(capfd, "profile", "--config", config, "--max-bad-lines", "1")
    profile = PopularityProfile.load(tmp_path / "out" / "profile.npz")
    assert printed["skipped"] == profile.skipped == {f"{tmp_path}/a.csv": 1}
    assert printed["skew"] == whole["skew"] and printed["total_samples"] == 150, "the other lines are counted as before"
    assert cli.main(["train", "--config", config, "--quiet", "--max-bad-lines", "0"]) == 2
    assert re.match(r"fae train: .*a\.csv, line 92: ", capfd.readouterr().err)


def _same(folder: Path) -> list[str]:
    return []


def _remove(name: str) -> Callable[[Path], list[str]]:
    def spoiling(folder: Path) -> list[str]:
        (folder / name).unlink()
        return []

    return spoiling


def _profile_for_vocabulary(folder: Path) -> list[str]:
    assert cli.main(["profile", "--config", str(folder / "run.yaml"), "--output", "p", "--quiet"]) == 0
    return sets("data.coding.method=vocabulary", "data.coding.vocabulary=p/profile.npz")


def _vocabulary_of_fewer(folder: Path) -> list[str]:
    coding = sets("data.coding.method=vocabulary", "data.coding.vocabulary=v.npz")
    sparse = sets("data.csv.sparse=[city]", "data.csv.integers=null", "data.csv.separators=null")
    assert cli.main(["vocabulary", "--config", str(folder / "run.yaml"), "--quiet", *coding, *sparse]) == 0
    return coding


def _bad_test_label(folder: Path) -> list[str]:
    spoil(folder / "c.csv", "2,0.5,city,7,tag")
    return []


# name -> (command, what makes the input bad, more arguments, what the message must say)
BAD: dict[str, tuple[str, Callable[[Path], list[str]], list[str], str]] = {
    "no rows": ("profile", _same, sets("data.coding={max_rows: null}"), "neither rows nor max_rows; give the rows"),
    "train file": ("profile", _remove("b.csv.gz"), [], r"b\.csv\.gz.*correct the path"),
    "test file": ("place", _remove("c.csv"), [], r"c\.csv"),
    "no vocabulary": (
        "profile", _same, sets("data.coding.method=vocabulary", "data.coding.vocabulary=absent.npz"), r"no file .*absent\.npz",
    ),
    "vocabulary is a profile": ("profile", _profile_for_vocabulary, [], r"profile\.npz: holds a popularity profile, not a vocabulary"),
    "vocabulary of fewer features": ("profile", _vocabulary_of_fewer, [], r"has no feature 'shop'; it has \['city'\]"),
    "vocabulary with hash": ("place", _same, sets("data.coding.vocabulary=v.npz"), "method 'hash' and vocabulary .*the others have none"),
    "fit without vocabulary": ("vocabulary", _same, [], r"data\.coding\.method: received 'hash'; `fae vocabulary` needs 'vocabulary'"),
    "two sources": ("profile", _same, sets("data.synthetic={}"), "received synthetic and csv; give exactly one"),
    "no such column": ("report", _same, sets("data.csv.label=bought"), r"\['bought'\] are not among them"),
    "workers": ("profile", _same, ["--workers", "0"], r"profile\.workers: received 0; it must be at least 1"),
    "bad lines": ("profile", _same, ["--max-bad-lines", "-1"], r"data\.max_bad_lines: received -1; it must be at least 0"),
    "batch size": ("profile", _same, ["--torchrec-stats", "--global-batch-size", "0"], "--global-batch-size: received 0; give at least 1"),
    "batch size of nothing": ("profile", _same, ["--global-batch-size", "64"], "received 64; .*--torchrec-stats with it"),
    "test label": ("train", _bad_test_label, sets("placement.pinned_max_rows=0"), "must be 0 or 1, received 2"),
    "policy": ("place", _same, sets("placement.policy=frequency"), "'frequency'; allowed: .*'input_aware', 'threshold'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command, spoiling, more, words = BAD[name]
    more = [*spoiling(tmp_path), *more]
    capfd.readouterr()
    assert cli.main([command, "--config", config, "--quiet", *more]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"fae {command}: ") and err.count("\n") == 1 and re.search(words, err), err
    assert written(tmp_path) == (["hot_set.npz", "placement.npz", "profile.npz"] if name == "test label" else []), "nothing half-written"


def test_workers_count_the_same(config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = run_json(capfd, "profile", "--config", config)
    two = run_json(capfd, "profile", "--config", config, "--workers", "2", "--output", "two")
    assert two | {"path": ""} == one | {"path": ""}
    spoil(tmp_path / "a.csv", "1")
    assert cli.main(["profile", "--config", config, "--workers", "2", "--quiet"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and re.match(r"fae profile: .*a\.csv, line 92: expected 5 fields, received 1; ", err) and err.count("\n") == 1, err


RANKS = """
import io, json, os, sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from fae_torchrec import cli
from fae_torchrec.distributed import local_ranks

results = []
with local_ranks.launched_group("cpu") as group:
    local_ranks.launched_group = lambda device: nullcontext(group)  # torchrun's ranks can meet only once
    for arguments in json.loads(sys.argv[1]):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main(["profile", "--config", os.path.abspath("run.yaml"), "--quiet", *arguments])
        results.append([code, out.getvalue(), err.getvalue()])
with open(f"rank{os.environ['RANK']}.json", "w") as file:
    json.dump(results, file)
"""


def test_ranks_of_torchrun_share_the_work(config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Shard 0, the first file, is rank 0's, and the second file is rank 1's. Several commands in the ranks' one start, which is slow."""
    for name, of in (("bad_a.csv", "a.csv"), ("bad_c.csv", "c.csv")):
        (tmp_path / name).write_bytes((tmp_path / of).read_bytes())
        spoil(tmp_path / name, "1,0.5")
    one = run_json(capfd, "profile", "--config", config, "--output", "one")
    both = sets("data.csv.train=[bad_a.csv, bad_c.csv]")
    commands: list[list[str]] = [
        ["--json"],
        [*sets("data.csv.train=[a.csv, bad_c.csv]"), "--output", "second"],
        [*both, "--max-bad-lines", "1", "--output", "sum"],
        [*both, "--max-bad-lines", "2", "--output", "skipped", "--json"],
    ]
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ranks.py", json.dumps(commands)]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert json.loads(first[0][1]) == {**one, "path": f"{tmp_path}/out/profile.npz"} and second[0] == [0, "", ""], "only rank 0 speaks"
    assert written(tmp_path) == ["profile.npz"]
    assert first[1] == second[1] and first[1][0] == 2, "an error of the second rank ends both"
    assert re.fullmatch(r"fae profile: .*bad_c\.csv, line 42: expected 5 fields, received 2; .*\n", first[1][2]), first[1]
    assert first[2] == second[2] and first[2][0] == 2, "each rank skipped as many as are allowed in all"
    assert re.match(r"fae profile: 2 malformed lines were skipped .* 1 are allowed", first[2][2]), first[2]
    assert json.loads(first[3][1])["skipped"] == {f"{tmp_path}/bad_{name}.csv": 1 for name in "ac"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["one", "out", "skipped"]


def test_statistics_for_torchrecs_planner(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(write_experiment(tmp_path))
    assert cli.main(["profile", "--config", path, "--torchrec-stats", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and written(tmp_path) == ["cache_statistics.json", "cache_statistics.npz", "profile.npz"]
    saved = tmp_path / "out" / "cache_statistics.npz"
    statistics = MeasuredCacheStatistics.load(saved)
    assert f"{saved}: cache statistics {statistics.fingerprint}" in out
    assert (statistics.global_batch_size, statistics.global_batches) == (32, TRAIN_SAMPLES // 32), "of train.batch_size"
    printed = run_json(capfd, "profile", "--config", path, "--torchrec-stats", "--global-batch-size", "128")["torchrec_stats"]
    assert printed.pop("path") == str(saved)
    assert printed == json.loads(saved.with_suffix(".json").read_text()) and printed["global_batch_size"] == 128
    assert {name: table["rows"] for name, table in printed["tables"].items()} == {f"t_{name}": rows for name, rows in ROWS.items()}
    assert MeasuredCacheStatistics.load(saved).fingerprint == printed["fingerprint"] != statistics.fingerprint
    assert cli.main(["profile", "--config", path, "--torchrec-stats", "--global-batch-size", "700", "--quiet"]) == 2
    assert "1 whole global batches of 700 samples" in capfd.readouterr().err
    assert MeasuredCacheStatistics.load(saved).fingerprint == printed["fingerprint"], "a failure leaves what was there"


def test_report(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_experiment(tmp_path))
    found = Environment(python=(3, 11, 7), packages={"torch": "2.13.0"}, cores=2, ram_bytes=2**34, machine="Linux")
    monkeypatch.setattr("fae_torchrec.popularity_report.collect", lambda: found)  # it would start a process
    assert cli.main(["report", "--config", path, "--quiet"]) == 0
    out, err = capfd.readouterr()
    names = ["popularity.html", "popularity.json", *(f"popularity_{name}.png" for name in ("budget", "hot_rows", "skew", "thresholds"))]
    assert err == "" and written(tmp_path) == [*names, "profile.npz"]
    report = json.loads((tmp_path / "out" / "popularity.json").read_text())
    shares = {name: f"{100 * chosen['hot_inputs']:.1f}" for name, chosen in report["placement"]["selections"].items()}
    assert dict(re.findall(r"^  (\w+) +([\d.]+) %", out, re.M)) == shares and shares.keys() == {"threshold", "input_aware"}
    assert [name for name in names if f"{tmp_path}/out/{name}" not in out] == []
    assert report["command"] == ["fae", "report", "--config", path, "--quiet"]
    printed = run_json(capfd, "report", "--config", path)
    assert printed == json.loads((tmp_path / "out" / "popularity.json").read_text())
    varying = ("created", "command")
    assert {k: v for k, v in printed.items() if k not in varying} == {k: v for k, v in report.items() if k not in varying}


def test_policies_are_placed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(write_experiment(tmp_path))
    large = sets("data.parquet.cardinalities={u: 40, v: 90000, w: 500}", "placement.budget=2000B")
    policies = (["input_aware"], ["threshold"], ["threshold", "placement.sizes=estimated"])
    placed = [run_json(capfd, "place", "--config", path, *large, *sets(f"placement.policy={name}", *more)) for name, *more in policies]
    assert [one["policy"] for one in placed] == ["input_aware", "threshold", "threshold"]
    assert placed[0]["threshold"] is None and 0 < placed[1]["threshold"] < placed[2]["threshold"]
    assert placed[2]["used_bytes"] < placed[1]["used_bytes"] <= 2000
    assert len({one["fingerprint"] for one in placed}) == 3
    assert not placed[0]["resolution"]["reached"]
    assert cli.main(["place", "--config", path, *large, "--set", "placement.budget=4KiB", "--quiet"]) == 0
    assert re.search(r"does not tell the rows .* apart .*; profile\.sample_rate of about [\d.]+ would", capfd.readouterr().out)


def test_raw_data_are_trained_on(config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Bags of words and all; hot rows and cold ones."""
    more = sets("train.steps=3", "placement.pinned_max_rows=0", "schedule.policy=fixed")
    printed = run_json(capfd, "train", "--config", config, *more)
    assert written(tmp_path) == ["hot_set.npz", "placement.npz", "profile.npz", "train.json"]
    assert (printed["placement"], printed["steps"], printed["samples"]) == ("fae", 3, 96)
    assert 0.3 < printed["test_logloss"] < 1.5 and 0 < printed["cold_rows_per_sample"] < 4
