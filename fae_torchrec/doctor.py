"""Whether this machine can run the package: versions that must pair up, operators that must load, devices, and what to install.

Nothing here imports torch: what a broken installation does when imported (an error, or the end of the process) is seen from outside.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

TRIOS = (("2.13", "1.8", "1.8"), ("2.11", "1.6", "1.6"))
"""torch, fbgemm and torchrec releases that pair up, best first; fbgemm's binaries load into exactly one torch release."""

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "tensordict", "torchmetrics", "numpy", "scipy", "pyarrow",
            "iopath", "matplotlib", "PyYAML", "tqdm")  # fmt: skip
_TRIO_PACKAGES = PACKAGES[:4]
_PINS = {"torchmetrics": "torchmetrics==1.0.3"}
"""Versions that TorchRec asks for."""
_PYTHONS = ((3, 10), (3, 13))
_PROBE_SECONDS = 180

# Prints one JSON line per finding, so that a process that dies has said how far it came.
_PROBE = """
import json
def tell(name, look):
    try:
        value, error = look(), None
    except BaseException as problem:
        value, error = None, f"{type(problem).__name__}: {problem}"
    print(json.dumps([name, value, error]), flush=True)
def torch_():
    import torch
    import torch.distributed as dist
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if cuda else 0)]
    return {
        "cuda": torch.version.cuda,
        "devices": [[device.name, device.total_memory] for device in devices],
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
    }
def fbgemm():
    import torch, fbgemm_gpu
    assert torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 3])).tolist() == [0, 2, 5]
    torch.ops.fbgemm.split_embedding_codegen_lookup_rowwise_adagrad_function_cpu
    return True
def torchrec():
    import torchrec.distributed
    return True
tell("torch", torch_)
tell("fbgemm", fbgemm)
tell("torchrec", torchrec)
"""


@dataclass(frozen=True)
class Environment:
    """What was found.

    Attributes:
        python: version of the interpreter, such as (3, 11, 7).
        packages: version by distribution name; None if it is not installed.
        failures: what importing "torch", "fbgemm" (and calling its operators) or "torchrec" said, if it failed.
        cuda: the CUDA version torch was built for; None for a CPU build.
        devices: (name, bytes of memory) of every CUDA device that torch sees.
        nvidia_driver: whether the system has NVIDIA's driver, whatever torch sees.
        gloo: whether torch has the CPU collectives.
        nccl: whether torch has the CUDA collectives.
        cores: CPU cores this process may use.
        ram_bytes: physical memory.
        machine: operating system and processor.
    """

    python: tuple[int, ...]
    packages: Mapping[str, str | None]
    failures: Mapping[str, str] = field(default_factory=dict)
    cuda: str | None = None
    devices: tuple[tuple[str, int], ...] = ()
    nvidia_driver: bool = False
    gloo: bool = False
    nccl: bool = False
    cores: int = 0
    ram_bytes: int = 0
    machine: str = ""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the commands that repair it (run with this Python, in this order)."""

    what: str
    remedy: tuple[str, ...] = ()


def examine(as_json: bool = False) -> int:
    """Prints what was found and what is wrong.

    Args:
        as_json: one JSON object instead of text.

    Returns:
        The exit code: 0 if the package can run here, 1 if something is wrong.
    """
    environment = collect()
    problems = diagnose(environment)
    if as_json:
        print(json.dumps({"healthy": not problems, **asdict(environment), "problems": [asdict(p) for p in problems]}, indent=2))
    else:
        print(describe(environment, problems))
    return 1 if problems else 0


def collect() -> Environment:
    """Looks at this interpreter, its packages and this machine; imports of heavy packages happen in a process of their own."""
    findings, failures = _probe()
    torch: dict[str, Any] = findings.get("torch") or {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Environment(
        python=tuple(sys.version_info[:3]),
        packages={name: _version(name) for name in PACKAGES},
        failures=failures,
        cuda=torch.get("cuda"),
        devices=tuple((name, memory) for name, memory in torch.get("devices", ())),
        nvidia_driver=os.path.exists("/proc/driver/nvidia/version"),
        gloo=bool(torch.get("gloo")),
        nccl=bool(torch.get("nccl")),
        cores=cores,
        ram_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        machine=f"{platform.system()} {platform.machine()}",
    )


def diagnose(environment: Environment) -> tuple[Problem, ...]:
    """What is wrong, most fundamental first; empty if the package can run. A pure function of what was found."""
    if not _PYTHONS[0] <= environment.python[:2] < _PYTHONS[1]:
        return (Problem(f"Python {_dotted(environment.python)} is not supported: TorchRec's wheels are for 3.10, 3.11 and 3.12"),)
    trio_problem = _trio_problem(environment)
    problems = [trio_problem] if trio_problem else _load_problems(environment)
    missing = [name for name in PACKAGES if name not in _TRIO_PACKAGES and environment.packages.get(name) is None]
    if missing:
        problems.append(
            Problem(
                f"not installed: {', '.join(missing)}", (f"python -m pip install {' '.join(_PINS.get(name, name) for name in missing)}",)
            )
        )
    for name, pin in _PINS.items():
        version = environment.packages.get(name)
        if version is not None and f"{name}=={version}" != pin:
            problems.append(Problem(f"{name} {version} is installed; TorchRec needs {pin}", (f"python -m pip install {pin}",)))
    return tuple(problems)


def install_commands(trio: tuple[str, str, str], cuda: bool) -> tuple[str, ...]:
    """The pip commands that install one trio of `TRIOS`, in order."""
    torch, fbgemm, torchrec = (f"{version}.0" for version in trio)
    if cuda:
        return (f"python -m pip install torch=={torch} fbgemm-gpu=={fbgemm} torchrec=={torchrec}",)
    return (
        f"python -m pip install torch=={torch} fbgemm-gpu-cpu=={fbgemm} tensordict {_PINS['torchmetrics']} pyre-extensions tqdm",
        f"python -m pip install --no-deps torchrec=={torchrec}",  # its metadata would bring the CUDA build of fbgemm
    )


def describe(environment: Environment, problems: tuple[Problem, ...]) -> str:
    """The findings as text for people."""
    torch = f"CUDA {environment.cuda}" if environment.cuda else "CPU build"
    lines = [f"python          {_dotted(environment.python)}"]
    for name in PACKAGES:
        version = environment.packages.get(name)
        note = f"  ({torch})" if name == "torch" and version and "torch" not in environment.failures else ""
        if version is not None or name not in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
            lines.append(f"{name:<15} {version or 'not installed'}{note}")
    ram = f"{environment.ram_bytes / 1024**3:.1f} GiB of memory"
    lines.append(f"machine         {environment.machine}, {environment.cores} cores, {ram}")
    for index, (name, memory) in enumerate(environment.devices):
        lines.append(f"cuda:{index}          {name}, {memory / 1024**3:.1f} GiB")
    if not environment.devices:
        lines.append("devices         no CUDA device: hot rows live in ordinary memory, figures on the CPU show the method, not its speed;")
        lines.append("                no Adam: FBGEMM has no fused kernel of it on the CPU, neither for stock TorchRec nor here")
    if environment.nvidia_driver and environment.packages.get("torch") and environment.cuda is None:
        lines.append("                NVIDIA's driver is here, but this torch is a CPU build; for the GPU use an environment with:")
        lines += [f"    {command}" for command in install_commands(TRIOS[0], cuda=True)]
    backends = [name for name, there in (("gloo", environment.gloo), ("nccl", environment.nccl)) if there]
    lines.append(f"collectives     {', '.join(backends) or 'none'}")
    for problem in problems:
        lines += ["", f"problem: {problem.what}", *(f"    {command}" for command in problem.remedy)]
    lines += ["", "healthy: torch, fbgemm and torchrec pair up and load" if not problems else f"not healthy: {len(problems)} problem(s)"]
    return "\n".join(lines)


def _trio_problem(environment: Environment) -> Problem | None:
    """Whether torch, fbgemm and torchrec are there, once each, of one trio, and built for the same kind of device."""
    versions = {name: environment.packages.get(name) for name in _TRIO_PACKAGES}
    torch, torchrec = versions["torch"], versions["torchrec"]
    wants_cuda = environment.nvidia_driver or bool(environment.devices)
    trio = next((trio for trio in TRIOS if torch and _release(torch) == trio[0]), TRIOS[0])
    remedy = install_commands(trio, wants_cuda)
    if versions["fbgemm-gpu"] and versions["fbgemm-gpu-cpu"]:
        undo = "python -m pip uninstall --yes fbgemm-gpu fbgemm-gpu-cpu"
        return Problem("fbgemm-gpu and fbgemm-gpu-cpu are both installed, and each overwrites the other's files", (undo, *remedy))
    fbgemm_name = "fbgemm-gpu" if versions["fbgemm-gpu"] else "fbgemm-gpu-cpu"
    fbgemm = versions[fbgemm_name]
    absent = [name for name, version in (("torch", torch), ("fbgemm-gpu-cpu", fbgemm), ("torchrec", torchrec)) if not version]
    if torch is None or fbgemm is None or torchrec is None:
        return Problem(f"not installed: {', '.join(absent)}".replace("fbgemm-gpu-cpu", "fbgemm-gpu-cpu (or fbgemm-gpu for CUDA)"), remedy)
    if (_release(torch), _release(fbgemm), _release(torchrec)) not in TRIOS:
        pairs = "; ".join(f"torch {t}.x with fbgemm {f}.x and torchrec {r}.x" for t, f, r in TRIOS)
        return Problem(f"torch {torch}, {fbgemm_name} {fbgemm} and torchrec {torchrec} do not pair up; these do: {pairs}", remedy)
    if fbgemm_name == "fbgemm-gpu" and environment.cuda is None and "torch" not in environment.failures:
        undo = "python -m pip uninstall --yes fbgemm-gpu torch"  # pip would take the CPU build for the same version
        return Problem(f"fbgemm-gpu {fbgemm} needs a CUDA build of torch, and torch {torch} is a CPU build", (undo, *remedy))
    if fbgemm_name == "fbgemm-gpu-cpu" and environment.devices:
        undo = "python -m pip uninstall --yes fbgemm-gpu-cpu"
        return Problem(f"a CUDA device is here, but fbgemm-gpu-cpu {fbgemm} has no CUDA kernels", (undo, *remedy))
    return None


def _load_problems(environment: Environment) -> list[Problem]:
    """Installed versions that pair up on paper may still not load."""
    pins = " ".join(f"{name}=={version}" for name in _TRIO_PACKAGES if (version := environment.packages.get(name)))
    again = (f"python -m pip install --force-reinstall --no-deps {pins}",)
    for name in ("torch", "fbgemm", "torchrec"):  # the later ones fail because the first does
        if name in environment.failures:
            return [Problem(f"{name} does not load: {environment.failures[name]}", again)]
    if environment.devices and not environment.nccl:
        return [Problem("torch sees CUDA devices but was built without nccl, so ranks cannot exchange embeddings; install another build")]
    if not environment.gloo:
        return [Problem("torch was built without gloo (torch.distributed on the CPU); install another build of torch")]
    return []


def _probe() -> tuple[dict[str, Any], dict[str, str]]:
    """What importing the heavy packages gave, and how each one failed if it did."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_SECONDS)
        output, end = done.stdout, f"the process ended with code {done.returncode}: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired as slow:
        output, end = slow.stdout.decode() if isinstance(slow.stdout, bytes) else "", f"no answer in {_PROBE_SECONDS} s"
    findings: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for line in output.splitlines():
        if line.startswith("["):
            name, value, error = json.loads(line)
            findings[name] = value
            if error is not None:
                failures[name] = error
    silent = [name for name in ("torch", "fbgemm", "torchrec") if name not in findings]
    return findings, {**failures, **({silent[0]: end} if silent else {})}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> str:
    """Major and minor: "2.13" of "2.13.0+cpu"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
