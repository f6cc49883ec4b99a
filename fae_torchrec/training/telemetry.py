"""Makes the speed of a run visible while it runs: a progress bar, and TensorBoard scalars when asked."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.training.metrics import Scores

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_S = 10  # what a killed run may lack at most


class Telemetry:
    """Shows how a run goes; on rank 0 alone. A context manager.

    A disk that fills up ends the TensorBoard events, with a message, and not the run.

    Every `log_every` steps, of the steps since the last time: samples/s, the mean loss, and the time per stage and step. Between two such
    steps nothing is fetched from the device; the one that fetches waits for it, so count the time of `step` as training time.

    Scalars: train/loss (of this rank), train/samples_per_s, train/hot_share, time/<stage>_ms, schedule/rate, eval/auc, eval/logloss,
    eval/accuracy, and test/... at the end. The share of hot batches is that of all steps of this process; samples are rank 0's times the
    ranks, so exact where ranks have equally many (the run's result is exact).

    Args:
        group: the ranks, or None for one process.
        show_progress: a progress bar, if the standard error is a terminal.
        tensorboard: folder of the event files; None writes none. Later steps of an earlier attempt in this folder are hidden.
        log_every: steps, at least 1.
        first_step: steps done before, when a run is resumed.

    Raises:
        ConfigError: tensorboard is not installed or its folder cannot be written; on every rank alike. `log_every` is below 1.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        show_progress: bool = False,
        tensorboard: str | None = None,
        log_every: int = 50,
        first_step: int = 0,
    ) -> None:
        if log_every < 1:
            raise ConfigError(f"log_every must be at least 1 step, received {log_every}")
        rank, self._world_size = (0, 1) if group is None else (group.rank(), group.size())
        self._shows = rank == 0
        self._log_every = log_every
        self._writer: SummaryWriter | None = None
        self._steps = self._hot = 0  # of this process
        self._bar: tqdm[Any] | None = None
        self._samples, self._seconds = 0, 0.0  # since the last line, as the following
        self._losses: list[torch.Tensor] = []
        self._weights: list[int] = []
        self._stage_seconds: dict[str, float] = {}
        if tensorboard is not None:
            self._open(tensorboard, group, first_step)
        if self._shows:
            # Without tqdm's own rate: evaluations are in it.
            looks: dict[str, Any] = {"unit_scale": True, "bar_format": "{desc}: {n_fmt} samples [{elapsed}{postfix}]"}
            self._bar = tqdm(desc="train", disable=None if show_progress else True, **looks)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar and the event file."""
        if self._bar is not None:
            self._bar.close()
        self._with_events(lambda events: events.close())

    def step(
        self,
        step: int,
        kind: str,
        num_samples: int,
        loss: torch.Tensor,
        seconds: float,
        stage_seconds: Mapping[str, float],
        *,
        rate: float | None = None,
    ) -> None:
        """Tells of a step.

        Args:
            step: steps of the run so far, this one included.
            kind: of the batch.
            num_samples: of this rank; 0 for a filler.
            loss: scalar, mean over these samples; detached here.
            seconds: host seconds of the step, loading included.
            stage_seconds: host seconds since the process began, by stage ("loading", "input_dist", "forward", ...); read every `log_every`
                steps only, so a live view will do.
            rate: of the schedule, in per cent.
        """
        if not self._shows:
            return
        samples = num_samples * self._world_size
        self._steps += 1
        self._hot += kind == "hot"
        self._samples += samples
        self._seconds += seconds
        self._losses.append(loss.detach())
        self._weights.append(num_samples)
        if self._bar is not None:
            self._bar.update(samples)
        if step % self._log_every == 0:
            self._log(step, stage_seconds, rate)

    def evaluation(self, scores: Scores, step: int, *, tag: str = "eval") -> None:
        """Tells of scores after a step: "eval" on the few test batches that the schedule hears of, "test" on all of them at the end."""
        self._write({f"{tag}/auc": scores.auc, f"{tag}/logloss": scores.logloss, f"{tag}/accuracy": scores.accuracy}, step)

    def text(self, message: str, step: int) -> None:
        """Says something that happened after a step: above the bar (or where it would be), and as TensorBoard text."""
        if self._shows:
            tqdm.write(f"step {step}: {message}", file=sys.stderr)
        self._with_events(lambda events: events.add_text("events", message, step))

    def _log(self, step: int, stage_seconds: Mapping[str, float], rate: float | None) -> None:
        start = time.perf_counter()
        steps, samples = len(self._losses), sum(self._weights)
        losses = torch.stack(self._losses).to("cpu", torch.float64)  # waits for the device
        weights = torch.tensor(self._weights, dtype=torch.float64)
        seconds = self._seconds + time.perf_counter() - start
        now = dict(stage_seconds)
        stage_ms = {stage: (value - self._stage_seconds.get(stage, 0.0)) / steps * 1000 for stage, value in now.items()}
        figures = {"train/hot_share": self._hot / self._steps}
        if samples:
            figures["train/loss"] = float(torch.where(weights > 0, losses, 0) @ weights) / samples
        if seconds > 0:
            figures["train/samples_per_s"] = self._samples / seconds
        figures |= {f"time/{stage}_ms": value for stage, value in stage_ms.items()}
        if rate is not None:
            figures["schedule/rate"] = rate
        self._write(figures, step)
        if self._bar is not None:
            self._bar.set_postfix_str(_postfix(figures, stage_ms), refresh=False)
        self._samples, self._seconds, self._stage_seconds = 0, 0.0, now
        self._losses.clear()
        self._weights.clear()

    def _write(self, figures: Mapping[str, float], step: int) -> None:
        def add(events: SummaryWriter) -> None:
            for name, value in figures.items():
                events.add_scalar(name, value, step)

        self._with_events(add)

    def _with_events(self, write: Callable[[SummaryWriter], None]) -> None:
        """Writes to the event file, if there is one. A run does not end because of it: on a full disk it goes on without."""
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:
            self._writer = None
            tqdm.write(f"TensorBoard events are not written any more: {error}; the run goes on without them", file=sys.stderr)

    def _open(self, folder: str, group: dist.ProcessGroup | None, first_step: int) -> None:
        """Opens the event file on rank 0; where that fails, every rank says why."""
        problem: list[str | None] = [None]
        if self._shows and importlib.util.find_spec("tensorboard") is None:
            problem[0] = "TensorBoard scalars were asked for, but tensorboard is not installed: pip install tensorboard, or ask for none"
        elif self._shows:
            try:
                from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

                self._writer = SummaryWriter(folder, purge_step=first_step + 1, flush_secs=_FLUSH_S)
            except OSError as error:
                problem[0] = f"cannot write TensorBoard events to {folder}: {error}; give a folder that can be written"
        if group is not None and group.size() > 1:
            dist.broadcast_object_list(problem, group=group, group_src=0)
        if problem[0] is not None:
            raise ConfigError(problem[0])


def _postfix(figures: Mapping[str, float], stage_ms: Mapping[str, float]) -> str:
    parts = [f"{figures['train/samples_per_s']:,.0f} samples/s"] if "train/samples_per_s" in figures else []
    parts += [f"loss {figures['train/loss']:.4f}"] if "train/loss" in figures else []
    parts += [f"{figures['train/hot_share']:.0%} hot", *(f"{stage} {ms:.1f}" for stage, ms in stage_ms.items())]
    return ", ".join(parts) + (" ms" if stage_ms else "")
