"""RunCheckpoints: when a run is saved, what goes into its checkpoints beside the weights, and how it resumes from the newest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.data.batches import HotColdBatch, Position
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.distributed.local_ranks import from_first_rank, merged_on_first_rank
from fae_torchrec.training.checkpoint import read_extra
from fae_torchrec.training.checkpoint_folder import CheckpointFolder
from fae_torchrec.training.progress import RunLog
from fae_torchrec.training.sample_audit import SampleAudit, discard
from fae_torchrec.training.training_state import all_ranks


@dataclass(frozen=True)
class CheckpointOptions:
    """Where and how often a run is saved. A run whose folder holds a finished checkpoint goes on from the newest.

    Attributes:
        folder: that all ranks see; of this run alone.
        every_steps: steps between checkpoints, at least 1; one more follows the last step.
        keep: checkpoints that stay, at least 1.
        sample_audit: whether the numbers of all trained samples are written down too, in `samples` in the folder.

    Raises:
        ConfigError: `every_steps` or `keep` is below 1.
    """

    folder: str
    every_steps: int = 1000
    keep: int = 3
    sample_audit: bool = False

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"checkpoint.{name} must be at least 1, received {getattr(self, name)}")


class RunCheckpoints:
    """The checkpoints of one run. A checkpoint holds weights, optimizer, loader position, schedule, run log and random numbers.

    Args:
        options: where and how often.
        model: sharded.
        optimizer: its optimizers.
        device: this rank's.
        run: what identifies the run, values that JSON can write.
    """

    def __init__(
        self,
        options: CheckpointOptions,
        model: DistributedModelParallel,
        optimizer: KeyedOptimizer,
        device: torch.device,
        run: Mapping[str, Any],
    ) -> None:
        self._options = options
        self._folder = CheckpointFolder(options.folder, options.keep)
        self._audit_folder = os.path.join(options.folder, "samples")
        self._audit: SampleAudit | None = None
        self._model = model
        self._optimizer = optimizer
        self._device = device
        self._run: dict[str, Any] = json.loads(json.dumps(run))
        self._saved_step = 0

    def resume(self, loader: HotColdDataLoader, log: RunLog) -> None:
        """Brings everything to where the newest checkpoint was made, on as many ranks as there are now; if there is none, to the start.

        Collective. What is wrong with the checkpoint is found before the model is changed.

        Args:
            loader: goes on after the last batch that was trained; its schedule goes on too.
            log: of the run.

        Raises:
            ConfigError: it is of another run, or of another loader.
            DataError: it is damaged.
            StateError: it is of another model.
            FAEError: the folder cannot be used. All of them on every rank alike.
        """
        newest = self._folder.open()
        if newest is not None:
            try:
                extra = read_extra(newest)
                self._check_run(newest, extra["run"])
                loader.load_state_dict(extra["loader"])
                log.load_state_dict(extra["log"])
                self._folder.load(newest, self._model, self._optimizer, self._device)
            except DataError as error:
                raise DataError(f"{error}; without the folder {newest} the run would go on from the checkpoint before it") from error
            self._saved_step = int(extra["step"])
        # An audit of steps that are done again, or for the first time now, would count them twice.
        from_first_rank(lambda: discard(self._audit_folder, self._saved_step), all_ranks())
        if self._options.sample_audit:
            self._audit = SampleAudit(self._audit_folder, all_ranks().rank(), first_step=self._saved_step)

    def note(self, epoch: int, step: int, batch: HotColdBatch) -> None:
        """Writes down (with the next checkpoint) which samples a step trained on, if that is wanted."""
        if self._audit is not None:
            self._audit.record(epoch, step, batch.kind, batch.sample_numbers)

    def steps_to_next(self, step: int) -> int:
        """Steps from this one to the next that is saved, at least 1."""
        return self._options.every_steps - step % self._options.every_steps

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint belongs after this step."""
        return step % self._options.every_steps == 0

    def save(self, step: int, loader: HotColdDataLoader, position: Position, log: RunLog) -> None:
        """Saves after a step, unless that was done. Collective, while no batch is in the pipeline.

        Args:
            step: that was trained last.
            loader: of the run.
            position: of that step's batch.
            log: of the run.

        Raises:
            FAEError: it could not be written; on every rank alike, and the checkpoints before it are whole.
        """
        if step == self._saved_step:
            return
        audit = self._audit
        if audit is not None:
            merged_on_first_rank(lambda: audit.flush(step), lambda _: None, all_ranks())
        extra = {"run": self._run, "loader": loader.state_dict(position), "log": log.state_dict()}
        self._folder.save(step, self._model, self._optimizer, extra, self._device)
        self._saved_step = step

    def _check_run(self, path: os.PathLike[str], saved: Mapping[str, Any]) -> None:
        was, now = dict(_flat(saved)), dict(_flat(self._run))
        differing = [f"{key} was {was.get(key)!r}, is {now.get(key)!r}" for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
        if differing:
            raise ConfigError(
                f"checkpoint {path} is of another run: {'; '.join(differing)}; go on with what it was saved with, or give a new folder "
                "(and load this checkpoint into the new run, if it is to begin with these weights)"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings by their path."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
