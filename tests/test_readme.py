"""The README tells the truth: its code runs, and its commands are run by .ci/run or a test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$ (.+)$", README, flags=re.MULTILINE)


CHECKS = """
trained = sum(batch.num_samples for batch in loader)
while True:
    try:
        pipeline.progress(plain_batches)
    except StopIteration:
        break
print(f"of the store {trained}, of plain batches {pipeline.steps.hot + pipeline.steps.other} steps")
"""
"""What is done with the second block's loader and pipeline."""


def test_quickstart_runs(tmp_path: Path) -> None:
    """Its first block as it stands; the second one in the same process, before the first one's last line."""
    first, second = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    end = "dist.destroy_process_group()\n"
    assert first.endswith(end)
    code = first.removesuffix(end) + "pipeline.detach()\n" + second + CHECKS + end
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": "1", "GOMP_SPINCOUNT": "1000"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    hot, other = map(int, re.search(r"(\d+) hot and (\d+) other steps", done.stdout).groups())
    assert hot > other > 0, done.stdout
    assert hot + other >= 65_536 // 1024
    assert done.stdout.endswith("of the store 65536, of plain batches 65 steps\n"), done.stdout


def test_readme_has_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_run_by_ci(command: str) -> None:
    if command == "make test":
        return  # this very suite
    assert command in (ROOT / ".ci" / "run").read_text(), "add the line to .ci/run as it stands in the README"


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
