"""What the JSON of every benchmark begins with, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any


def record_header(name: str, argv: list[str] | None) -> dict[str, Any]:
    """The schema, the command, the versions and the machine.

    Args:
        name: of the script, without its folder and ending.
        argv: the arguments `main` was given; None stands for the command line's.
    """
    return {
        "schema": 1,
        "name": name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{name}.py", *(sys.argv[1:] if argv is None else argv)]),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in ("numpy", "torch", "torchrec")}},
        "hardware": {"machine": platform.machine(), "processor": _processor(), "cpus": os.cpu_count()},
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes the JSON under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
