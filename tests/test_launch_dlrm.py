"""The reference script: facebookresearch/dlrm's dlrm_main.py, unmodified, on two ranks. It is fetched by whoever runs this, not kept here.

`FAE_DLRM_MAIN=/path/to/dlrm/torchrec_dlrm/dlrm_main.py python -m pytest tests/test_launch_dlrm.py`
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.criteo_npy_days import write_days

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = os.environ.get("FAE_DLRM_MAIN", "")
pytestmark = [
    pytest.mark.skipif(
        not Path(SCRIPT).is_file(), reason="FAE_DLRM_MAIN does not name a dlrm_main.py (facebookresearch/dlrm, torchrec_dlrm)"
    ),
    pytest.mark.timeout(900),
]
MODEL = ["--embedding_dim", "16", "--dense_arch_layer_sizes", "64,16", "--over_arch_layer_sizes", "64,1"]


def dlrm_main(folder: Path, launch: list[str], *arguments: str) -> str:
    """Runs the script on two ranks, by itself or under `fae launch`; what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *launch, SCRIPT, *MODEL, *arguments], capture_output=True, text=True, cwd=folder, env=environment, timeout=600
    )
    # By itself the script may abort at exit on a CPU, after its last line: it leaves its process group (torch 2.13).
    assert not launch or done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launched(folder: Path, *arguments: str, budget: str) -> tuple[str, dict[str, object]]:
    (folder / "fae.json").write_text(json.dumps({"hbm_budget": budget}))
    shown = dlrm_main(folder, ["-m", "fae_torchrec.cli", "launch", "--config", "fae.json", "--quiet"], *arguments)
    record: dict[str, object] = json.loads((folder / "runs" / "launch" / "launch.json").read_text())
    return shown, record


def auroc(shown: str, stage: str) -> float:
    found = re.search(rf"AUROC over {stage} set: ([0-9.]+)\.\n", shown)
    assert found is not None, shown[-2000:]
    return float(found[1])


def test_random_input_does_not_pay(tmp_path: Path) -> None:
    shown, record = launched(tmp_path, "--learning_rate", "0.1", budget="64MiB")
    assert "FAE does not pay here, because only 0.0 % of the samples" in shown
    assert (record["placement"], record["error"]) == ("stock", None)
    assert record["steps"] == {"hot": 0, "other": 10, "evaluation": 20}
    assert "Number of test samples: 640" in shown


def test_npy_input_has_hot_batches_and_the_stock_score(tmp_path: Path) -> None:
    rows = write_days(tmp_path / "npy", 1_200_000, 200_000, scale=0.01)
    data = ["--in_memory_binary_criteo_path", "npy", "--num_embeddings_per_feature", ",".join(map(str, rows)), "--seed", "1"]
    training = ["--adagrad", "--learning_rate", "0.05", "--batch_size", "1024", "--test_batch_size", "2048"]
    stock = dlrm_main(tmp_path, [], *data, *training)
    shown, record = launched(tmp_path, *data, *training, budget="3MiB")
    steps = record["steps"]
    assert isinstance(steps, dict)
    assert steps["hot"] + steps["other"] == 586, "1,200,000 samples in steps of 2 * 1024"
    assert steps["hot"] > steps["other"]
    for stage in ("val", "test"):
        assert f"Number of {stage} samples: 100000" in shown, "evaluation has every sample once"
        assert auroc(stock, stage) > 0.7, "the labels can be learned"
        assert abs(auroc(shown, stage) - auroc(stock, stage)) < 0.002
