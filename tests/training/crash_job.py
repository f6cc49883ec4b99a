"""What `torch.distributed.run` starts in test_crash.py: a run with feedback and checkpoints whose ranks kill themselves at given steps.

Usage: python crash_job.py FOLDER KILLS, where KILLS is a JSON list of [step, rank], by step.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.data.batches import HotColdBatch
from fae_torchrec.distributed.local_ranks import launched_group, quiet_host
from fae_torchrec.training.run_checkpoints import CheckpointOptions
from fae_torchrec.training.trainer import Trainer, TrainOptions
from tests.distributed.death_signal import death_signal
from tests.training.small_checkpoints import see
from tests.training.small_run import CPU, Samples, new_loader, new_model, placement_of, sharded

SAMPLES = Samples(641)  # 20 batches or more per epoch on two ranks, and a sample that is dropped
EPOCHS = 2


def train(folder: Path, kills: list[tuple[int, int]]) -> dict[str, Any]:
    """Trains on this rank; every draw of a random number goes into the batches.

    Args:
        folder: of the checkpoints; beside it lies a file for each kill that has happened.
        kills: (step, rank), by step.
    """
    rank = dist.get_rank()
    torch.manual_seed(rank)
    np.random.seed(rank)  # noqa: NPY002
    random.seed(rank)
    trained = 0

    def before_step(module: torch.nn.Module, arguments: tuple[HotColdBatch, ...]) -> None:
        nonlocal trained
        if not module.training:
            return
        trained += 1
        for number, (step, killed) in enumerate(kills):
            mark = folder / f"kill_{number}"
            if (trainer.steps + 1, rank) == (step, killed) and not mark.exists():
                mark.write_text(str(trained - 1))
                os.kill(os.getpid(), signal.SIGKILL)
        noise = float(torch.rand(1)) + float(np.random.random()) + random.random()  # noqa: NPY002
        arguments[0].dense_features[:, 1].mul_(1 + 0.1 * noise)

    model = new_model(Optimizer.ROWWISE_ADAGRAD)
    placement = placement_of(model)
    sharded_model, optimizer = sharded(model, placement)
    sharded_model.register_forward_pre_hook(before_step)
    loader = new_loader(SAMPLES, placement, ShuffleSchedule("fae", rate=30.0, patience=1), window_batches=7, prefetch=2)
    options = TrainOptions(
        epochs=EPOCHS,
        eval_batch_size=30,
        swap_eval_batches=2,
        checkpoint=CheckpointOptions(str(folder / "checkpoints"), every_steps=4, keep=2, sample_audit=True),
    )
    trainer = Trainer(sharded_model, optimizer, loader, Samples(100, seed=1), options, CPU, dist.group.WORLD, run={"optimizer": "rowwise"})
    result = trainer.run()
    return {
        **see(sharded_model, optimizer),
        "swap_losses": result.swap_losses,
        "steps": trainer.steps,
        "steps_by_kind": result.steps_by_kind,
        "train_loss": result.train_loss,
        "trained": trained,
        "rate": loader.schedule.rate,
    }


def main() -> None:
    """Trains with kills; the last of the restarted processes trains once more, without."""
    folder, kills = Path(sys.argv[1]), json.loads(sys.argv[2])
    quiet_host()
    torch.set_num_threads(1)
    with launched_group("cpu"):
        seen = {name: train(folder / name, of) for name, of in (("killed", kills), ("whole", []))}
        if dist.get_rank() == 0:
            torch.save({**seen, "death signal": death_signal()}, folder / "seen.pt")


if __name__ == "__main__":
    main()
