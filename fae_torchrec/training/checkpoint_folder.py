"""CheckpointFolder: the last few checkpoints of a run, each there whole or not at all, and what a run resumes from."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from fae_torchrec.core.errors import ConfigError, FAEError
from fae_torchrec.distributed.local_ranks import from_first_rank, merged_on_first_rank
from fae_torchrec.training.checkpoint import load_checkpoint, save_checkpoint
from fae_torchrec.training.rng_state import load_rng_state, rng_state, save_rng_state
from fae_torchrec.training.training_state import all_ranks

_FINISHED = re.compile(r"step_(\d{9,})")


class CheckpointFolder:
    """Checkpoints named by their step: `step_000001000` and so on.

    One is written under a name that begins with a dot and is renamed when all ranks are done; older ones go only after that. So whatever
    fails, the newest finished checkpoint is whole and stays.

    Args:
        path: a folder that all ranks see; made if it is missing. One run at a time writes to it.
        keep: how many finished checkpoints stay, at least 1.

    Raises:
        ConfigError: `keep` is below 1.
    """

    def __init__(self, path: str | os.PathLike[str], keep: int = 3) -> None:
        if keep < 1:
            raise ConfigError(f"a checkpoint folder keeps at least 1 checkpoint, received keep={keep}")
        self.path = Path(path)
        self._keep = keep

    def latest(self) -> Path | None:
        """The newest finished checkpoint, if there is one."""
        finished = self._finished()
        return finished[-1] if finished else None

    def open(self) -> Path | None:
        """Makes the folder and removes what an interrupted run left half-written. Collective.

        Returns:
            As `latest`; the same on every rank.

        Raises:
            FAEError: the folder cannot be made or written to; on every rank alike.
        """
        return from_first_rank(self._open, all_ranks())  # type: ignore[no-any-return]

    def save(
        self, step: int, model: DistributedModelParallel, optimizer: KeyedOptimizer, extra: Mapping[str, object], device: torch.device
    ) -> Path:
        """Saves a checkpoint, and then removes those that are too old. Collective.

        Args:
            step: that was trained last; names the checkpoint, which must be new.
            model: sharded.
            optimizer: its optimizers.
            extra: what else to remember, values that JSON can write; rank 0's counts.
            device: this rank's, whose random numbers are saved too.

        Returns:
            The checkpoint's folder.

        Raises:
            FAEError: it could not be written (a full disk); on every rank alike, and the checkpoints before it are as they were.
        """
        final = self.path / f"step_{step:09d}"
        draft = self.path / f".{final.name}.tmp"
        rank, random_numbers = all_ranks().rank(), rng_state(device)
        try:
            save_checkpoint(draft, model, optimizer, extra={**extra, "step": step, "ranks": all_ranks().size()})
            merged_on_first_rank(
                lambda: save_rng_state(random_numbers, draft, rank), lambda _: self._publish(draft, final), all_ranks()
            )  # fmt: skip
        except Exception as error:
            if rank == 0:
                shutil.rmtree(draft, ignore_errors=True)  # the disk may be full of it
            raise FAEError(
                f"the checkpoint of step {step} could not be written to {self.path}: {error}; the checkpoints before it are whole "
                f"(the newest: {self.latest() or 'there is none'}); make room or mend the folder, let no other run write to it, and "
                "start this one again: it goes on there"
            ) from error
        return final

    def load(self, path: Path, model: DistributedModelParallel, optimizer: KeyedOptimizer, device: torch.device) -> dict[str, Any]:
        """Loads one of the checkpoints: weights, optimizer and this rank's random numbers. Collective; on any number of ranks.

        Args:
            path: as `latest` gives it.
            model: sharded by any plan.
            optimizer: its optimizers.
            device: this rank's.

        Returns:
            What `save` was given as `extra`, and "step" and "ranks".

        Raises:
            DataError: it is damaged; on every rank alike.
            StateError: it is of another model; on every rank alike.
        """
        extra = load_checkpoint(path, model, optimizer)
        rank = all_ranks().rank()
        merged_on_first_rank(lambda: load_rng_state(path, rank, int(extra["ranks"]), device), lambda _: None, all_ranks())
        return extra

    def _finished(self) -> list[Path]:
        """Oldest first. The metadata are written last, also where somebody copied the folder file by file."""
        named = [(match, path) for path in self.path.glob("step_*") if (match := _FINISHED.fullmatch(path.name))]
        return [path for match, path in sorted(named, key=lambda pair: int(pair[0][1])) if (path / ".metadata").is_file()]

    def _open(self) -> Path | None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for draft in self.path.glob(".step_*.tmp"):
                shutil.rmtree(draft)
        except OSError as error:
            raise FAEError(f"checkpoint folder {self.path}: {error}; give a folder where you may write") from error
        return self.latest()

    def _publish(self, draft: Path, final: Path) -> None:
        os.rename(draft, final)
        for old in self._finished()[: -self._keep]:
            # Renamed first: nobody may take a checkpoint that is half gone. `open` removes what is left of it.
            os.rename(old, half_gone := old.with_name(f".{old.name}.tmp"))
            shutil.rmtree(half_gone)
