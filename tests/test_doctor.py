"""The doctor's decisions on made-up version tables, and one look at the real environment."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from fae_torchrec import doctor
from fae_torchrec.doctor import Environment, collect, describe, diagnose, examine

OTHERS = {
    "torchx": "0.7.0", "tensordict": "0.15.3", "torchmetrics": "1.0.3", "numpy": "2.4.6", "scipy": "1.17.1",
    "pyarrow": "26.0.1", "iopath": "0.1.10", "matplotlib": "3.11.2", "PyYAML": "6.0.3", "tqdm": "4.70.1",
}  # fmt: skip
H200 = (("NVIDIA H200", 150 * 1024**3),)


def machine(torch: str | None, fbgemm: dict[str, str], torchrec: str | None, **values: Any) -> Environment:
    packages = {**OTHERS, "torch": torch, "torchrec": torchrec, "fbgemm-gpu": None, "fbgemm-gpu-cpu": None, **fbgemm}
    return Environment(**{"python": (3, 11, 7), "gloo": True, **values, "packages": packages})


CPU = machine("2.13.0+cpu", {"fbgemm-gpu-cpu": "1.8.0"}, "1.8.0")
CUDA = machine("2.13.0", {"fbgemm-gpu": "1.8.0"}, "1.8.0", cuda="13.0", devices=H200, nvidia_driver=True, nccl=True)


@pytest.mark.parametrize(
    "environment",
    [
        CPU,
        CUDA,
        machine("2.11.0+cpu", {"fbgemm-gpu-cpu": "1.6.0"}, "1.6.2"),
        machine("2.13.1", {"fbgemm-gpu-cpu": "1.8.0"}, "1.8.0", cuda="13.0", nccl=True),  # a CUDA build of torch on a machine without GPU
        replace(CPU, python=(3, 10, 0)),
        replace(CPU, python=(3, 12, 9)),
    ],
)
def test_healthy(environment: Environment) -> None:
    assert diagnose(environment) == ()
    assert describe(environment, ()).endswith("healthy: torch, fbgemm and torchrec pair up and load")


CPU_ROUTE = [
    "python -m pip install torch==2.13.0 fbgemm-gpu-cpu==1.8.0 tensordict torchmetrics==1.0.3 pyre-extensions tqdm",
    "python -m pip install --no-deps torchrec==1.8.0",
]
CUDA_ROUTE = ["python -m pip install torch==2.13.0 fbgemm-gpu==1.8.0 torchrec==1.8.0"]


@pytest.mark.parametrize(
    ("environment", "what", "remedy"),
    [
        (machine(None, {}, None), "not installed: torch, fbgemm-gpu-cpu (or fbgemm-gpu for CUDA), torchrec", CPU_ROUTE),
        (machine(None, {}, None, nvidia_driver=True), "not installed: torch", CUDA_ROUTE),
        (machine("2.13.0+cpu", {"fbgemm-gpu-cpu": "1.8.0"}, None), "not installed: torchrec", CPU_ROUTE),
        (machine("2.13.0+cpu", {"fbgemm-gpu-cpu": "1.6.0"}, "1.8.0"), "fbgemm-gpu-cpu 1.6.0 and torchrec 1.8.0 do not pair up", CPU_ROUTE),
        (machine("2.14.1", {"fbgemm-gpu-cpu": "1.8.0"}, "1.8.0"), "torch 2.11.x with fbgemm 1.6.x and torchrec 1.6.x", CPU_ROUTE),
        (
            machine("2.11.0+cpu", {"fbgemm-gpu-cpu": "1.6.0"}, "1.8.0"),
            "torch 2.11.0+cpu, fbgemm-gpu-cpu 1.6.0 and torchrec 1.8.0 do not pair up",
            [line.replace("2.13", "2.11").replace("1.8", "1.6") for line in CPU_ROUTE],  # the trio of the torch that is there
        ),
        (
            machine("2.13.0+cpu", {"fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": "1.8.0"}, "1.8.0"),
            "overwrites the other's files",
            ["python -m pip uninstall --yes fbgemm-gpu fbgemm-gpu-cpu", *CPU_ROUTE],
        ),
        (
            machine("2.13.0+cpu", {"fbgemm-gpu": "1.8.0"}, "1.8.0"),
            "fbgemm-gpu 1.8.0 needs a CUDA build of torch",
            ["python -m pip uninstall --yes fbgemm-gpu torch", *CPU_ROUTE],
        ),
        (
            machine("2.13.0", {"fbgemm-gpu-cpu": "1.8.0"}, "1.8.0", cuda="13.0", devices=H200, nccl=True),
            "fbgemm-gpu-cpu 1.8.0 has no CUDA kernels",
            ["python -m pip uninstall --yes fbgemm-gpu-cpu", *CUDA_ROUTE],
        ),
        (
            replace(CPU, failures={"fbgemm": "OSError: undefined symbol", "torchrec": "ImportError: x"}),
            "fbgemm does not load: OSError: undefined symbol",
            ["python -m pip install --force-reinstall --no-deps torch==2.13.0+cpu torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0"],
        ),
        (replace(CPU, gloo=False), "without gloo", []),
        (replace(CUDA, nccl=False), "without nccl", []),
        (
            replace(CPU, packages={**CPU.packages, "torchmetrics": "1.4.0"}),
            "torchmetrics 1.4.0",
            ["python -m pip install torchmetrics==1.0.3"],
        ),
        (
            replace(CPU, packages={**CPU.packages, "torchmetrics": None, "tqdm": None}),
            "not installed: torchmetrics, tqdm",
            ["python -m pip install torchmetrics==1.0.3 tqdm"],
        ),
        (replace(CPU, python=(3, 13, 0)), "Python 3.13.0 is not supported", []),
        (replace(CPU, python=(3, 9, 18)), "Python 3.9.18 is not supported", []),
    ],
)
def test_problems_and_what_to_install(environment: Environment, what: str, remedy: list[str]) -> None:
    problems = diagnose(environment)
    assert len(problems) == 1
    assert what in problems[0].what
    assert list(problems[0].remedy) == remedy
    text = describe(environment, problems)
    assert f"problem: {problems[0].what}" in text and text.endswith("not healthy: 1 problem(s)")
    assert all(f"    {command}" in text for command in remedy)


def test_a_driver_without_a_cuda_build_is_told() -> None:
    assert CUDA_ROUTE[0] in describe(replace(CPU, nvidia_driver=True), ())
    assert CUDA_ROUTE[0] not in describe(CPU, ())


def test_devices_are_shown() -> None:
    text = describe(CUDA, ())
    assert "cuda:0          NVIDIA H200, 150.0 GiB" in text and "(CUDA 13.0)" in text and "gloo, nccl" in text


@pytest.mark.parametrize(
    ("probe", "failed", "words"),
    [
        (
            "import os, sys; print('[\"torch\", {}, null]', flush=True); sys.stderr.write('bad symbol'); os._exit(7)",
            "fbgemm",
            "code 7: bad symbol",
        ),
        ("raise SystemExit(3)", "torch", "code 3"),
        ('import time; print(\'["torch", null, "ImportError: no"]\', flush=True); time.sleep(60)', "fbgemm", "no answer in 1 s"),
    ],
)
def test_a_probe_that_dies_names_the_package(monkeypatch: pytest.MonkeyPatch, probe: str, failed: str, words: str) -> None:
    monkeypatch.setattr(doctor, "_PROBE", probe)
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 1)
    failures = dict(collect().failures)
    assert words in failures.pop(failed)
    assert failures in ({}, {"torch": "ImportError: no"})


def test_the_environment_of_the_tests_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    code = examine(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (code, found["healthy"], found["problems"]) == (0, True, [])
    assert found["python"] == list(sys.version_info[:3])
    assert found["packages"]["torch"].startswith(("2.13", "2.11"))
    assert found["cores"] >= 1 and found["ram_bytes"] > 1024**3


def test_the_doctor_runs_without_any_package() -> None:
    """An interpreter that sees no site-packages: everything is missing, and the doctor still says what to install."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from fae_torchrec import doctor; raise SystemExit(doctor.examine())"
    folder = str(doctor.__file__).rsplit("/", 2)[0]
    shown = subprocess.run([sys.executable, "-I", "-S", "-c", code, folder], capture_output=True, text=True)
    assert shown.returncode == 1, shown.stderr
    assert "not installed: torch" in shown.stdout and "pip install" in shown.stdout
