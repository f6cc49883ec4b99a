"""The config of `fae launch`: what is read, and that every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.launch import main, split_arguments
from fae_torchrec.launch_config import LaunchConfig, load_launch_config

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "configs" / "launch.json"


def test_the_smallest_config() -> None:
    config = load_launch_config(EXAMPLE)
    assert config == LaunchConfig(hbm_budget="64MiB")
    assert config.budget_bytes(10**12) == 64 * 2**20
    assert (config.when_not_paying, config.output, config.schedule.policy) == ("stock", "runs/launch", "proportional")


def test_yaml_overrides_and_paths(tmp_path: Path) -> None:
    (tmp_path / "fae.yaml").write_text("profile: kept/profile.npz\nschedule: {policy: fixed, rate: 20}\nhbm_budget: 1MiB\n")
    config = load_launch_config(tmp_path / "fae.yaml", ["hbm_budget=25%", "window_batches=8"])
    assert config.profile == str(tmp_path / "kept" / "profile.npz")
    assert config.budget_bytes(1000) == 250
    assert (config.window_batches, config.schedule.rate) == (8, 20.0)
    assert LaunchConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "hbm_budget: missing.*such as"),
        ({"hbm_bugdet": "64MiB"}, "unknown key 'hbm_bugdet'; did you mean 'hbm_budget'"),
        ({"hbm_budget": "64 elephants"}, "hbm_budget: received '64 elephants'"),
        ({"hbm_budget": "0%"}, "hbm_budget: received '0%'"),
        ({"hbm_budget": "1MiB", "when_not_paying": "stcok"}, "when_not_paying: received 'stcok'.*did you mean 'stock'"),
        ({"hbm_budget": "1MiB", "profile_batches": 0}, "profile_batches: received 0"),
        ({"hbm_budget": "1MiB", "profile_rate": 0}, "profile_rate: received 0"),
        ({"hbm_budget": "1MiB", "buffer": "lots"}, "buffer: received 'lots'"),
        ({"hbm_budget": "1MiB", "cold_cache": "some"}, "cold_cache: received 'some'"),
        ({"hbm_budget": "1MiB", "schedule": {"policy": "fae"}}, "schedule.policy: received 'fae'"),
        ({"hbm_budget": "1MiB", "profile": "a", "placement": "b"}, "both given"),
    ],
)
def test_mistakes_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LaunchConfig.from_dict(values)


def test_a_placement_needs_no_budget() -> None:
    assert LaunchConfig(placement="placement.npz").budget_bytes(10) is None


@pytest.mark.parametrize(
    ("given", "ours", "rest"),
    [
        (["--config", "c", "s.py", "--config", "x"], ["--config", "c"], ["s.py", "--config", "x"]),
        (["--config=c", "--json", "-m", "a.b", "-m"], ["--config=c", "--json"], ["-m", "a.b", "-m"]),
        (["--set", "a=1", "--config", "c", "--", "s.py"], ["--set", "a=1", "--config", "c"], ["s.py"]),
        (["--quiet", "-h"], ["--quiet", "--help"], []),
    ],
)
def test_options_end_where_the_script_begins(given: list[str], ours: list[str], rest: list[str]) -> None:
    assert split_arguments(given) == (ours, rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no script was given"),
        (["-m"], "no module was given"),
        (["missing.py"], "there is no script 'missing.py'"),
        (["-m", "no_such_module_here"], "there is no module 'no_such_module_here'"),
        (["-m", "no_such_package.train"], "there is no module 'no_such_package.train'"),
    ],
)
def test_a_script_that_is_not_there(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--config", str(EXAMPLE), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing is written before the script is found"


def test_help_is_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "The script takes as many steps as ever" in capsys.readouterr().out


def test_ranks_without_a_meeting_place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["--config", str(EXAMPLE), str(script)]) == 2
    assert "['RANK', 'MASTER_ADDR', 'MASTER_PORT'] are not in the environment" in capsys.readouterr().err
