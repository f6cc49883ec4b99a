"""The TorchX components as torchx sees them: parsed from the file, given command-line arguments, prepared for four schedulers."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torchx.components.component_test_base import ComponentTestCase
from torchx.runner import get_runner
from torchx.specs import AppDef
from torchx.specs.finder import get_component

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "torchx_components" / "fae.py"
ONE_PROCESS = ["compare", "plan", "report", "segregate"]
RANKS = ["profile", "train", "launch"]
# scheduler -> its options; the package without which torchx 0.7 cannot even dry-run it.
SCHEDULERS = {"slurm": ({}, None), "kubernetes": ({"queue": "default"}, "kubernetes"), "local_docker": ({}, "docker")}


def dry_run(component: str, arguments: list[str], scheduler: str = "local_cwd") -> Any:
    options, package = SCHEDULERS.get(scheduler, ({}, None))
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"torchx's scheduler {scheduler} needs the Python package {package}, which is not installed")
    with get_runner() as runner:
        return runner.dryrun_component(f"{FILE}:{component}", arguments, scheduler=scheduler, cfg=options)


def materialize(component: str, *arguments: str) -> AppDef:
    app: AppDef = dry_run(component, list(arguments))._app
    return app


@pytest.mark.parametrize("command", ONE_PROCESS)
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


def test_a_script_is_launched_under_torchrun() -> None:
    arguments = [
        "--script",
        "my train.py",
        "--config",
        "fae.json",
        "--j",
        "2x4",
        "--env",
        "GLOO_SOCKET_IFNAME=eth1",
        "--rdzv_port",
        "29511",
    ]
    (role,) = materialize("launch", *arguments, "--", "--epochs", "2", "--config", "of the script").roles
    words = shlex.split(role.args[1])
    assert words[words.index("fae_torchrec.cli") :] == [
        *("fae_torchrec.cli", "launch", "--config", "fae.json", "my train.py", "--epochs", "2", "--config", "of the script")
    ]
    assert (words[words.index("--nnodes") + 1], words[words.index("--nproc_per_node") + 1], role.num_replicas) == ("2", "4", 2)
    assert words[words.index("--rdzv_endpoint") + 1].endswith(":29511") and role.env["GLOO_SOCKET_IFNAME"] == "eth1"
    more = ["--output", "out", "--overrides", "hbm_budget=1GiB,fresh=true"]
    (role,) = materialize("launch", "--config", "fae.json", "--m", "my.train", *more, "--", "--epochs", "2").roles
    words = shlex.split(role.args[1])
    assert words[words.index("launch") :] == [
        *("launch", "--config", "fae.json", "--output", "out", "--set", "hbm_budget=1GiB", "--set", "fresh=true"),
        *("-m", "my.train", "--epochs", "2"),
    ]
    for neither_or_both in ([], ["--script", "train.py", "--m", "my.train"]):
        with pytest.raises(ValueError, match="give either a script or a module"):
            materialize("launch", "--config", "fae.json", *neither_or_both)


@pytest.mark.parametrize("component", [*ONE_PROCESS, *RANKS])
def test_torchx_validates_the_component(component: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("fae_components", FILE)
    assert spec is not None
    ComponentTestCase().validate(importlib.util.module_from_spec(spec), component)
    assert "(required)" in capsys.readouterr().out, "--help was printed"


def test_torchx_finds_what_is_wrong_with_a_component(tmp_path: Path) -> None:
    """The control of the test above."""
    (tmp_path / "fae.py").write_text(FILE.read_text().replace("    rdzv_port: int = 29500,", "    rdzv_port=29500,", 1))
    spec = importlib.util.spec_from_file_location("broken_components", tmp_path / "fae.py")
    assert spec is not None
    with pytest.raises(Exception, match="rdzv_port"):
        ComponentTestCase().validate(importlib.util.module_from_spec(spec), "profile")


def of(component: str) -> list[str]:
    """Arguments with resources, an image and a mount; two nodes where there are ranks."""
    common = ["--config", "c.yaml", "--image", "example/fae:1", "--python", "python3", "--cpu", "3", "--memMB", "5000"]
    common += ["--mounts", "type=bind,src=/data,dst=/data,readonly"]
    return common + {"launch": ["--script", "train.py"]}.get(component, []) + (["--j", "2x4"] if component in RANKS else [])


@pytest.mark.parametrize("component", [*ONE_PROCESS, *RANKS])
def test_dry_run_for_slurm(component: str) -> None:
    nodes = 2 if component in RANKS else 1
    script = str(dry_run(component, of(component), "slurm"))
    groups = re.findall(rf"^#SBATCH --job-name={component}-(\d) .*--ntasks-per-node=1 --cpus-per-task=3", script, re.MULTILINE)
    assert groups == [str(node) for node in range(nodes)] and script.count("#SBATCH hetjob") == nodes - 1
    assert script.count(f"fae_torchrec.cli {component} --config c.yaml") >= nodes
    assert script.count("--rdzv_endpoint ${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29500") == (2 if component in RANKS else 0)


@pytest.mark.parametrize("component", [*ONE_PROCESS, *RANKS])
def test_dry_run_for_kubernetes(component: str) -> None:
    nodes = 2 if component in RANKS else 1
    tasks = dry_run(component, of(component), "kubernetes").request.resource["spec"]["tasks"]
    assert [task["name"] for task in tasks] == [f"{component}-{node}" for node in range(nodes)]
    for task in tasks:
        (container,) = task["template"].spec.containers
        assert container.image == "example/fae:1" and f"fae_torchrec.cli {component} --config c.yaml" in " ".join(container.command)
        assert container.command[0] == ("bash" if component in RANKS else "python3")
        assert container.resources.limits == {"cpu": "3000m", "memory": "5000M"}
        assert ("/data", True) in [(mount.mount_path, mount.read_only) for mount in container.volume_mounts]


@pytest.mark.parametrize("component", [*ONE_PROCESS, *RANKS])
def test_dry_run_for_docker(component: str) -> None:
    containers = dry_run(component, of(component), "local_docker").request.containers
    assert len(containers) == (2 if component in RANKS else 1)
    for container in containers:
        assert container.image == "example/fae:1" and f"fae_torchrec.cli {component} --config c.yaml" in " ".join(container.command)
        assert (container.kwargs["mem_limit"], container.kwargs["nano_cpus"]) == ("5000m", 3_000_000_000)
        assert [(mount["Source"], mount["Target"], mount["ReadOnly"]) for mount in container.kwargs["mounts"]] == [("/data", "/data", True)]


@pytest.mark.parametrize(("component", "gpu"), [("train", 4), ("launch", 8), ("compare", 2)])
def test_gpus_are_asked_for(component: str, gpu: int) -> None:
    arguments = [*of(component), "--gpu", str(gpu)]
    assert f"--gpus-per-task={gpu}" in str(dry_run(component, arguments, "slurm"))
    tasks = dry_run(component, arguments, "kubernetes").request.resource["spec"]["tasks"]
    assert {task["template"].spec.containers[0].resources.limits["nvidia.com/gpu"] for task in tasks} == {str(gpu)}


def test_a_named_resource_wins() -> None:
    (role,) = materialize("train", "--config", "c.yaml", "--cpu", "3", "--h", "aws_p3.2xlarge").roles
    assert (role.resource.cpu, role.resource.gpu) == (8, 1)


@pytest.mark.parametrize("component", [*ONE_PROCESS, *RANKS])
def test_docstrings_are_the_help(component: str) -> None:
    found = get_component(f"{FILE}:{component}")
    assert found.validation_errors == []
    with pytest.raises(SystemExit), get_runner() as runner:
        runner.dryrun_component(f"{FILE}:{component}", [], scheduler="local_cwd")  # --config has no default


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["-s", "local_cwd"], "fae_torchrec.cli"),
        (["-s", "slurm"], "#SBATCH --job-name=train-1"),
        (["-s", "kubernetes", "-cfg", "queue=default", "--workspace", ""], "kind: Job"),
        (["-s", "local_docker", "--workspace", ""], "docker_scheduler.DockerContainer"),
    ],
)
def test_command_line_of_a_checkout(options: list[str], shown: str) -> None:
    package = SCHEDULERS.get(options[1], ({}, None))[1]
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"torchx's scheduler {options[1]} needs the Python package {package}, which is not installed")
    torchx = str(Path(sys.executable).with_name("torchx"))
    component = ["torchx_components/fae.py:train", "--config", "examples/configs/demo.yaml", "--image", "fae:1", "--j", "2x1"]
    done = subprocess.run([torchx, "run", "--dryrun", *options, *component], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout and "examples/configs/demo.yaml" in done.stdout
