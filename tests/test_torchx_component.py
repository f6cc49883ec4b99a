"""The TorchX components as torchx sees them: parsed from the file, given command-line arguments, prepared for the local scheduler."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.runner import get_runner
from torchx.specs import AppDef
from torchx.specs.finder import get_component

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "torchx_components" / "fae.py"


def materialize(component: str, *arguments: str) -> AppDef:
    with get_runner() as runner:
        info = runner.dryrun_component(f"{FILE}:{component}", list(arguments), scheduler="local_cwd")
    app: AppDef = info._app
    return app


@pytest.mark.parametrize("command", ["compare", "report", "segregate"])
def test_one_process_runs_the_command_line_with_this_interpreter(command: str) -> None:
    overrides = "train.steps=3,compare.placements=[stock, fae],train.epochs=2"
    more = ["--ranks", "1", "2"]
    app = materialize(command, "--config", "examples/configs/demo.yaml", "--output", "out", "--overrides", overrides, "--", *more)
    (role,) = app.roles
    assert (app.name, role.name) == (f"fae-{command}", command)
    assert (role.entrypoint, role.num_replicas) == (sys.executable, 1)
    assert role.args[:2] == ["-m", "fae_torchrec.cli"]
    assert role.args[2:] == [
        command, "--config", "examples/configs/demo.yaml", "--output", "out",
        "--set", "train.steps=3", "--set", "compare.placements=[stock, fae]", "--set", "train.epochs=2", *more,
    ]  # fmt: skip


def test_output_is_left_to_the_config() -> None:
    assert materialize("compare", "--config", "c.yaml").roles[0].args[2:] == ["compare", "--config", "c.yaml"]


@pytest.mark.parametrize(
    ("command", "j", "nodes", "processes"),
    [("train", "1x2", 1, 2), ("train", "2x8", 2, 8), ("profile", "1x2", 1, 2), ("profile", "4x3", 4, 3)],
)
def test_ranks_run_under_torchrun(command: str, j: str, nodes: int, processes: int) -> None:
    app = materialize(command, "--config", "a b.yaml", "--j", j, "--python", "/opt/my python", "--", "--set", "train.epochs=2")
    (role,) = app.roles
    assert (app.name, role.name) == (f"fae-{command}", command)
    assert (role.entrypoint, role.args[0], role.num_replicas) == ("bash", "-c", nodes)
    words = shlex.split(role.args[1])
    assert words[:3] == ["/opt/my python", "-m", "torch.distributed.run"]
    assert words[words.index("--nnodes") + 1] == str(nodes)
    assert words[words.index("--nproc_per_node") + 1] == str(processes)
    assert words[words.index("fae_torchrec.cli") - 1 :] == [
        "-m",
        "fae_torchrec.cli",
        command,
        "--config",
        "a b.yaml",
        "--set",
        "train.epochs=2",
    ]


def test_restarts_of_a_training() -> None:
    (role,) = materialize("train", "--config", "c.yaml", "--max_restarts", "3", "--max_retries", "2", "--", "--checkpoint", "d").roles
    words = shlex.split(role.args[1])
    assert words[words.index("--max-restarts") + 1] == "3" and role.max_retries == 2
    assert words[-4:] == ["--config", "c.yaml", "--checkpoint", "d"]
    (role,) = materialize("train", "--config", "c.yaml").roles
    words = shlex.split(role.args[1])
    assert words[words.index("--max-restarts") + 1] == "0" and role.max_retries == 0, "nothing is restarted unless it is wanted"


@pytest.mark.parametrize("component", ["compare", "report", "segregate", "profile", "train"])
def test_docstrings_are_the_help(component: str) -> None:
    found = get_component(f"{FILE}:{component}")
    assert found.validation_errors == []
    with pytest.raises(SystemExit), get_runner() as runner:
        runner.dryrun_component(f"{FILE}:{component}", [], scheduler="local_cwd")  # --config has no default


def test_command_line_of_a_checkout() -> None:
    torchx = Path(sys.executable).with_name("torchx")
    command = [
        str(torchx),
        "run",
        "--dryrun",
        "-s",
        "local_cwd",
        "torchx_components/fae.py:compare",
        "--config",
        "examples/configs/demo.yaml",
    ]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "fae_torchrec.cli" in shown.stdout and "examples/configs/demo.yaml" in shown.stdout
