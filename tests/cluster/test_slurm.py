"""Jobs that torchx submits to a real Slurm of two nodes (`slurm.py`): one that trains to its end, and one that fails.

Left out of the ordinary suite, for it takes Debian's packages slurm-wlm and munge: `pytest -m cluster`, which .ci/run calls.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import NODES, PROGRAMS, Cluster, ClusterError, cluster
from tests.small_config import TRAIN_SAMPLES, write_experiment

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "torchx_components" / "fae.py"
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not found: apt-get install -y slurm-wlm munge"),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as up:
        yield up


def submit(slurm: Cluster, folder: Path, component: str, *arguments: str) -> str:
    """Submits a job with torchx's command line in `folder`; returns its id."""
    torchx = str(Path(sys.executable).with_name("torchx"))
    done = subprocess.run(
        [torchx, "run", "-s", "slurm", f"{FILE}:{component}", *arguments],
        cwd=folder,
        env={**os.environ, **slurm.environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    handle = re.search(r"^slurm://torchx/(\d+)$", done.stdout, re.MULTILINE)
    assert handle, done.stderr
    # torchx 0.7 asks for the state at once, of sacct alone, which takes a database that this cluster has not.
    assert done.returncode == 0 or "Slurm accounting storage is disabled" in done.stderr, done.stderr
    return handle[1]


def log_of(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(folder.glob("slurm-*")))


def test_a_training_on_two_nodes_reaches_its_end(slurm: Cluster, tmp_path: Path) -> None:
    config = write_experiment(tmp_path)
    options = ["--j", "2x1", "--cpu", "1", "--memMB", "2000", "--env", "GLOO_SOCKET_IFNAME=lo", "--overrides", "train.epochs=2"]
    job = submit(slurm, tmp_path, "train", "--config", config.name, *options)
    assert slurm.wait_for(job, 120) == {"train-0": "COMPLETED", "train-1": "COMPLETED"}, log_of(tmp_path)
    train = json.loads((tmp_path / "out" / "train.json").read_text())
    assert train["ranks"] == 2, "one on each node"
    assert train["samples"] == 2 * 2 * (TRAIN_SAMPLES // 2), "two epochs, as many samples on each rank"
    assert set(train["steps_by_kind"]) == {"hot", "cold"} and train["test_auc"] > 0
    assert "fae on 2 rank(s)" in log_of(tmp_path), "on one of the nodes: torchrun says which has rank 0"


def test_an_unmodified_script_is_launched_on_two_nodes(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "fae.json").write_text('{"hbm_budget": "200KiB", "profile_batches": 8, "window_batches": 8}')
    (tmp_path / "told").mkdir()
    script = str(ROOT / "tests" / "launch_scripts" / "train_bags.py")
    options = ["--config", "fae.json", "--script", script, "--j", "2x1", "--cpu", "1", "--memMB", "2000", "--env", "GLOO_SOCKET_IFNAME=lo"]
    job = submit(slurm, tmp_path, "launch", *options, "--", "--told", "told", "--steps", "8")
    assert slurm.wait_for(job, 120) == {"launch-0": "COMPLETED", "launch-1": "COMPLETED"}, log_of(tmp_path)
    assert {path.name for path in (tmp_path / "told").iterdir()} == {"rank0.json", "rank1.json"}, "the script's own ends, on both nodes"
    launched = json.loads((tmp_path / "runs" / "launch" / "launch.json").read_text())
    assert (launched["world_size"], launched["placement"]) == (2, "fae") and launched["steps"]["hot"] > 0


def test_the_parts_of_a_job_are_on_two_nodes(slurm: Cluster) -> None:
    shown = subprocess.run(
        ["srun", "-N2", "-n2", "printenv", "SLURMD_NODENAME"],
        env={**os.environ, **slurm.environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert sorted(shown.stdout.split()) == sorted(NODES), shown.stderr


def test_a_job_that_fails_is_seen_to_fail(slurm: Cluster, tmp_path: Path) -> None:
    """The control: a config that is not there, which `fae train` refuses with exit code 2."""
    job = submit(slurm, tmp_path, "train", "--config", "absent.yaml", "--j", "1x1", "--cpu", "1", "--memMB", "2000")
    assert slurm.wait_for(job, 120) == {"train-0": "FAILED"}
    assert "absent.yaml" in log_of(tmp_path) and not (tmp_path / "out").exists()


def test_up_twice_is_one_cluster(slurm: Cluster) -> None:
    before = (slurm.folder / "slurmctld.pid").read_text()
    slurm.up()
    assert (slurm.folder / "slurmctld.pid").read_text() == before


def test_down_leaves_nothing(tmp_path: Path) -> None:
    with cluster() as other:
        job = subprocess.run(
            ["sbatch", "--parsable", "--wrap", "exec sleep 600"],
            cwd=tmp_path,
            env={**os.environ, **other.environment},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout.strip()
        with pytest.raises(TimeoutError, match=f"job {job} had not ended after 2 s"):
            other.wait_for(job, 2)
        assert set(other.job_states(job).values()) == {"RUNNING"} and other._left()
    assert not other.folder.exists() and other._left() == []
    other.down()  # again: does nothing
    with pytest.raises(ClusterError, match="not up"):
        other.job_states(job)
