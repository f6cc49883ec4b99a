"""fae plan, for a person and as JSON; budget: auto in every command that places rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fae_torchrec import cli
from fae_torchrec.config import load_config
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hardware import hardware_preset
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.distributed.hardware_topology import hardware_topology, machine_topology
from fae_torchrec.experiment_data import open_data
from fae_torchrec.experiment_plan import settled
from fae_torchrec.launch_config import LaunchConfig
from tests.small_config import ROWS, new_config, profile_of, write_experiment

TOTAL_BYTES = sum(ROWS.values()) * 20  # 4 weights and a row-wise state
AUTO = ["--set", "placement.budget=auto"]


def run_json(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.main([*arguments, "--json", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main([*arguments, "--quiet"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    return err


def test_for_a_person(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = str(write_experiment(tmp_path))
    assert cli.main(["plan", "--config", config, "--ranks", "2", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("2 rank(s) of cpu, batch size 32 per rank, placement ")
    assert lines[1].startswith("hot inputs ") and "coverage" in lines[1]
    for line in ("  budget: 10,160 bytes per rank", "    it was given", "  hot tier: replicated"):
        assert line in lines
    table = next(line for line in lines if line.startswith("  t_v"))
    assert table.split()[1:3] == ["split", "2,000"] and "rows take" in table and "table_wise x1" in table
    assert next(line for line in lines if line.startswith("  t_u")).endswith("small, so always hot (pinned_max_rows)")
    assert lines[-1] == str(tmp_path / "out" / "plan.json")


def test_as_json_on_gpus_that_are_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = str(write_experiment(tmp_path))
    told = run_json(capfd, "plan", "--config", config, *AUTO, "--hardware", "v100:4")
    assert told == json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (told["schema"], told["kind"], told["ranks"], told["device"]) == (1, "plan", 4, "cuda")
    assert told["hardware"]["name"] == "v100"
    assert [memory["total"] for memory in told["memory"]] == [hardware_preset("v100").fast_bytes] * 4
    assert all(memory["left"] == memory["total"] - sum(memory["parts"].values()) >= 0 for memory in told["memory"])
    assert {choice["what"] for choice in told["choices"]} == {"budget", "hot rows", "hot tier", "cold kernel"}
    (module,) = told["modules"]
    assert [table["table"] for table in module["tables"]] == ["t_u", "t_v", "t_w"]
    assert sum(table["hot_rows"] for table in module["tables"]) * 20 == told["hot_bytes"] <= TOTAL_BYTES
    assert {"hot_bytes", "cold_bytes", "exchanged_bytes", "cold_ids", "cold_rows"} == told["traffic"].keys()
    assert told["hot_inputs"]["low"] <= told["hot_inputs"]["value"] <= told["hot_inputs"]["high"]


def test_a_saved_placement(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = str(write_experiment(tmp_path))
    placed = run_json(capfd, "place", "--config", config)
    told = run_json(capfd, "plan", "--config", config, "--set", f"placement.path={placed['path']}", "--ranks", "2")
    assert told["placement"] == placed["fingerprint"]
    assert told["modules"][0]["tables"][1]["cold_ids_per_sample"] > 0, "the profile tells of a saved placement, too"


def test_bad_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = str(write_experiment(tmp_path))
    plan = ("plan", "--config", config)
    assert "--ranks: received 0; give at least 1" in refused(capfd, *plan, "--ranks", "0")
    assert "hardware 'v1000' is not one of" in refused(capfd, *plan, "--hardware", "v1000")
    assert "a plan is for one hardware and one number of ranks" in refused(capfd, *plan, "--hardware", "v100:1,4")
    assert "a plan is for one hardware and one number of ranks" in refused(capfd, *plan, "--hardware", "v100", "t4")
    assert "placement.budget: received 'much'" in refused(capfd, *plan, "--set", "placement.budget=much")
    assert not (tmp_path / "out" / "plan.json").exists()
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"base": "v100", "fast_bytes": 40_000, "name": "small"}))
    assert cli.main([*plan, *AUTO, "--hardware", str(small), "--quiet"]) == 2
    told = capfd.readouterr().err  # TorchRec's own remedies are in it, over several lines
    assert "budget 'auto': the model does not fit even without a hot row" in told and "Reduce the model size" in told


def test_auto_in_a_config(tmp_path: Path) -> None:
    config = new_config(tmp_path, "placement.budget=auto", "placement.hot_tier=auto")
    assert config.placement.budget_bytes(1000) is None
    data, profile = open_data(config), profile_of(config)
    found, hot_set = settled(config, data, profile, [1, 2])
    assert hot_set is not None
    assert found.placement.budget == hot_set.budget_bytes == TOTAL_BYTES // 10
    assert (found.placement.hot_tier, found.placement.cold_cache) == ("replicated", None)
    assert type(found).from_dict(found.to_dict()) == found, "what was found can be written down and read"
    again, none = settled(found, data, profile, [1])
    assert again == found and none is None
    with pytest.raises(ConfigError, match=r"placement\.hot_tier: received 'any'"):
        new_config(tmp_path, "placement.hot_tier=any")


@pytest.mark.parametrize("command", ["place", "segregate", "train"])
def test_auto_in_commands(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = str(write_experiment(tmp_path))
    told = run_json(capfd, command, "--config", config, *AUTO, "--ranks", "2")
    placement = RowPlacement.load(tmp_path / "out" / "placement.npz")
    assert placement.budget_bytes == TOTAL_BYTES // 10
    assert 0 < placement.hot_bytes <= placement.budget_bytes
    if command == "train":
        assert (told["ranks"], told["fast_memory"]["hot rows"]) == (2, placement.hot_bytes)


def test_a_launched_script_needs_a_budget() -> None:
    with pytest.raises(ConfigError, match='hbm_budget: received "auto"; a launched script needs bytes or a share'):
        LaunchConfig(hbm_budget="auto")


def test_topologies() -> None:
    hardware = hardware_preset("h100")
    topology = hardware_topology(hardware, 12)
    assert (topology.world_size, topology.local_world_size) == (12, 6), "hosts of one size, at most eight ranks each"
    assert topology.hbm_to_ddr_mem_bw == hardware.host_link_bandwidth / 1e3, "bytes per millisecond"
    assert topology.devices[0].storage.hbm == hardware.fast_bytes
    assert hardware_topology(hardware_preset("cpu"), 2).devices[0].storage.hbm == 0
    assert hardware_topology(hardware, 7).local_world_size == 7
    with pytest.raises(Exception, match="ranks: received 0"):
        hardware_topology(hardware, 0)
    assert machine_topology(2, "cpu").compute_device == "cpu"


def test_the_config_of_the_examples_can_be_planned(tmp_path: Path) -> None:
    path = write_experiment(tmp_path)
    assert load_config(path, ["placement.budget=auto"]).placement.budget == "auto"
