"""Ranks killed in mid-epoch under torchrun's restarts: the run ends as if nothing had been, and no sample is lost or repeated."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from fae_torchrec.training.sample_audit import check_audit
from tests.training import crash_job

ROOT = Path(__file__).resolve().parents[2]


def test_three_kills(tmp_path: Path) -> None:
    draw = random.Random(7)
    kills = [(step, draw.randrange(2)) for step in sorted(draw.sample(range(6, 42), 3))]
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    job = subprocess.run(
        [*launch, crash_job.__file__, str(tmp_path), json.dumps(kills)], env=environment, capture_output=True, text=True, timeout=180
    )
    assert job.returncode == 0, job.stderr

    seen = torch.load(tmp_path / "seen.pt")
    killed, whole = seen["killed"], seen["whole"]
    assert seen["death signal"] == signal.SIGKILL, "no rank outlives its torchrun"
    trained = [int((tmp_path / "killed" / f"kill_{number}").read_text()) for number in range(3)]
    assert all(steps > 0 for steps in trained), "each killed process had trained"
    assert killed["trained"] < killed["steps"] == whole["steps"] == whole["trained"], "the control: the last process trained the rest alone"
    assert len(whole["swap_losses"]) > 6 and whole["rate"] != 30.0, "feedback was at work"
    start = crash_job.new_model().state_dict()
    for part in ("weights", "state"):
        assert whole[part].keys() == killed[part].keys() and whole[part]
        for key, value in whole[part].items():
            assert torch.equal(killed[part][key], value), key
    assert all(not torch.equal(value, start[key]) for key, value in whole["weights"].items()), "the control: training changes every tensor"
    for figure in ("swap_losses", "steps_by_kind", "train_loss", "rate"):
        assert killed[figure] == whole[figure]

    trained_samples = np.arange(crash_job.SAMPLES.num_samples // 2 * 2)
    for name in ("killed", "whole"):
        audits = check_audit(str(tmp_path / name / "checkpoints" / "samples"), trained_samples)
        assert audits.keys() == set(range(crash_job.EPOCHS))
        assert all(audit.exact for audit in audits.values()), audits
