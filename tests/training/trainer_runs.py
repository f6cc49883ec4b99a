"""Runs of a trainer on one and on two ranks, whole, resumed and broken: what the trainer tests look at."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import ConfigError, FAEError
from fae_torchrec.core.schedule import Guard, Policy, ShuffleSchedule
from fae_torchrec.data.batches import HotColdBatch, is_hot_batch
from fae_torchrec.distributed.hot_cold_module import ShardedHotColdModule
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.training import trainer as trainer_module
from fae_torchrec.training.metrics import Scores
from fae_torchrec.training.run_checkpoints import CheckpointOptions
from fae_torchrec.training.trainer import Trainer, TrainOptions
from tests.distributed.small_model import whole_tensors
from tests.training.small_run import CPU, Samples, new_loader, new_model, numbers, placement_of, sharded

T = TypeVar("T")
SAMPLES = Samples(641)  # 40 batches and a sample on one rank; 20 batches on two ranks, and a sample that is dropped
TEST_SAMPLES = Samples(100, seed=1)
# name -> (policy, window_batches, epochs, steps)
RUNS: dict[str, tuple[Policy, int | None, int, int | None]] = {
    "fae": ("fae", None, 2, None),
    "fae in windows": ("fae", 3, 2, None),
    "fixed": ("fixed", None, 2, None),
    "proportional": ("proportional", None, 2, None),
    "proportional in windows": ("proportional", 7, 1, None),
    "stock": ("stock", None, 2, None),
    "one step": ("fae", None, 1, 1),
    "seven steps": ("fae", 4, 3, 7),
    "stock, seven steps": ("stock", None, 3, 7),
    "into the second epoch": ("fae", None, 3, 45),
}
RESUMED = ("fae in windows", "proportional")  # one is cut at phases, one flows


class SpiedSchedule(ShuffleSchedule):
    """Writes down what it is told and the rate afterwards."""

    def __init__(self, policy: Policy, rate: float = 50.0, guard: Guard | None = None) -> None:
        super().__init__(policy, rate, guard=guard)
        self.told: list[tuple[float, float]] = []

    def observe(self, test_loss: float, metrics: Any = None) -> None:
        super().observe(test_loss, metrics)
        self.told.append((test_loss, self.rate))


class Run:
    """One trained model and what was seen while it was trained."""

    def __init__(
        self,
        schedule: SpiedSchedule,
        options: TrainOptions,
        *,
        window_batches: int | None = None,
        source: Samples = SAMPLES,
        run: dict[str, Any] | None = None,
    ) -> None:
        model = new_model()
        self.placement = placement_of(model)
        self.model, self.optimizer = sharded(model, None if schedule.policy == "stock" else self.placement)
        self.loader = new_loader(source, self.placement, schedule, window_batches)
        self.trained: list[list[int]] = []
        self.kinds = ""
        self.phases = 0
        self.model.register_forward_pre_hook(self._see)
        self.trainer = Trainer(self.model, self.optimizer, self.loader, TEST_SAMPLES, options, CPU, dist.group.WORLD, run=run)

    def _see(self, module: torch.nn.Module, arguments: tuple[HotColdBatch, ...]) -> None:
        if module.training:
            batch = arguments[0]
            assert batch.position is not None
            self.trained.append(numbers(batch) if batch.num_samples else [])
            self.kinds += "H" if is_hot_batch(batch) else "."
            self.phases += batch.position.cursor.left == 0


def _train(name: str) -> dict[str, Any]:
    policy, window_batches, epochs, steps = RUNS[name]
    schedule = SpiedSchedule(policy)
    run = Run(schedule, TrainOptions(epochs=epochs, steps=steps, eval_batch_size=30, swap_eval_batches=2), window_batches=window_batches)
    result = run.trainer.run()
    return {
        "trained": run.trained,
        "kinds": run.kinds,
        "result": result,
        "told": schedule.told,
        "rate": schedule.rate,
        "phases": run.phases,
        "weights": whole_tensors(run.model.state_dict()),
        "training": run.model.training,
    }


def _plain_loop(policy: Policy) -> dict[str, Any]:
    """The same batches as RUNS[policy] without pipeline and trainer."""
    model = new_model()
    placement = placement_of(model)
    model, optimizer = sharded(model, None if policy == "stock" else placement)
    loader = new_loader(SAMPLES, placement, ShuffleSchedule(policy))
    for _ in range(2):
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            loss, _ = model(batch)
            (loss * batch.weight).backward()
            optimizer.step()
            losses.append((batch.num_samples, loss.item()))
    return {"weights": whole_tensors(model.state_dict()), "losses": losses}


def _resumed(name: str, folder: Path) -> dict[str, Any]:
    """RUNS[name] in two pieces, each a trainer of its own, in one folder; then once more, with nothing left to do."""
    policy, window_batches, epochs, _ = RUNS[name]
    checkpoint = CheckpointOptions(str(folder / name), every_steps=8, sample_audit=True)
    pieces = []
    for steps in (9, None, None):
        options = TrainOptions(epochs=epochs, steps=steps, eval_batch_size=30, swap_eval_batches=2, checkpoint=checkpoint)
        run = Run(SpiedSchedule(policy), options, window_batches=window_batches)
        result = run.trainer.run()
        pieces.append(len(run.trained))
    return {"pieces": pieces, "result": result, "weights": whole_tensors(run.model.state_dict())}


def _piece(folder: Path, steps: int | None) -> dict[str, Any]:
    """A run with feedback, or the rest of one, on however many ranks."""
    options = TrainOptions(
        epochs=2, steps=steps, eval_batch_size=30, swap_eval_batches=2, checkpoint=CheckpointOptions(str(folder), 100, sample_audit=True)
    )
    run = Run(SpiedSchedule("fae"), options)
    return {"result": run.trainer.run(), "trained": run.trained}


def _scripted(rank: int, losses: list[float], rate: float) -> dict[str, Any]:
    """A run whose test losses are given; every rank would say a slightly different one."""
    schedule = SpiedSchedule("fae", rate)
    run = Run(schedule, TrainOptions())
    script = iter([*losses, 0.0])
    run.trainer._score = lambda num_batches: Scores(0.5, next(script) + rank * 1e-12, 0.5, 1)  # type: ignore[method-assign]
    run.trainer.run()
    steps = run.loader.stats.batches
    return {"told": schedule.told, "kinds": run.kinds, "counts": (steps["cold"], steps["hot"])}


def _guarded() -> dict[str, Any]:
    """The AUC falls out of the guard's band at the third look, after which nobody may look any more, in both epochs."""
    schedule = SpiedSchedule("fae", 20.0, Guard("auc", 0.1))
    run = Run(schedule, TrainOptions(epochs=2))
    script = iter([0.8, 0.75, 0.69, 0.9])
    run.trainer._score = lambda num_batches: Scores(next(script), 0.5, 0.5, 1)  # type: ignore[method-assign]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        auc = run.trainer.run().test.auc
    return {"told": len(schedule.told), "auc": auc, "kinds": run.kinds, "said": said.getvalue()}


def _error(train: Callable[[], Any]) -> str:
    try:
        train()
    except FAEError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _diverged(rank: int, folder: Path) -> dict[str, Any]:
    """The last rank has a missing value in its tenth batch; a checkpoint follows each fourth step."""
    options = TrainOptions(checkpoint=CheckpointOptions(str(folder), every_steps=4))
    run = Run(SpiedSchedule("fae", 100.0), options)

    def spoil(module: torch.nn.Module, arguments: tuple[HotColdBatch, ...]) -> None:
        if len(run.trained) == 10 and rank == dist.get_world_size() - 1:
            arguments[0].dense_features[0, 1] = float("nan")

    run.model.register_forward_pre_hook(spoil)
    error = _error(run.trainer.run)
    return {"error": error, "left": sorted(path.name for path in folder.iterdir()), "kind": run.kinds[9], "steps": len(run.trained)}


def _diverged_at_the_end(policy: Policy, nan_check_steps: int) -> str:
    """The model makes no finite number of the test data; its training losses were fine."""

    def spoil(module: torch.nn.Module, arguments: tuple[Batch, ...]) -> None:
        if not module.training:
            arguments[0].dense_features.fill_(float("nan"))

    run = Run(SpiedSchedule(policy, 10.0), TrainOptions(steps=9, swap_eval_batches=1, nan_check_steps=nan_check_steps))
    run.model.register_forward_pre_hook(spoil)
    return _error(run.trainer.run)


def _broken_source(rank: int) -> str:
    """Its last rank's data end in an error."""

    class Broken(Samples):
        def batches(self, *args: Any, **kwargs: Any) -> Iterator[Batch]:
            for number, batch in enumerate(super().batches(*args, **kwargs)):
                if number == 9 and rank == dist.get_world_size() - 1:
                    raise ConfigError("the disk is gone")
                yield batch

    run = Run(SpiedSchedule("fae"), TrainOptions(), source=Broken(640), window_batches=3)
    return f"{_error(run.trainer.run)} after {len(run.trained)} steps"


def _other_runs(folder: Path) -> list[str]:
    """A folder of a run is no folder for another."""

    def train(policy: Policy, run: dict[str, Any]) -> Any:
        return Run(SpiedSchedule(policy), TrainOptions(steps=2, checkpoint=CheckpointOptions(str(folder))), run=run).trainer.run()

    train("fixed", {"model": {"dim": 4}, "seed": 1})
    return [
        _error(lambda: train("fixed", {"model": {"dim": 8}, "lr": 0.5, "seed": 1})),
        _error(lambda: train("proportional", {"model": {"dim": 4}, "seed": 1})),
        _error(lambda: train("fixed", {"model": {"dim": 4}, "seed": 1})),
    ]


def _clocked(policy: Policy) -> float:
    """Samples per second by a clock that only moves, a second at a time, when the source gives a batch of 16 samples."""
    now = 0.0

    class Slow(Samples):
        def batches(self, *args: Any, **kwargs: Any) -> Iterator[Batch]:
            nonlocal now
            for batch in super().batches(*args, **kwargs):
                now += 1.0
                yield batch

    run = Run(SpiedSchedule(policy), TrainOptions(epochs=2), source=Slow(640))
    trainer_module.time = SimpleNamespace(perf_counter=lambda: now)  # type: ignore[assignment]
    try:
        return run.trainer.run().samples_per_s
    finally:
        import time

        trainer_module.time = time  # type: ignore[assignment]


def _nothing() -> str:
    class Empty(Samples):
        def batches(self, *args: Any, **kwargs: Any) -> Iterator[Batch]:
            return iter(())

    return _error(Run(SpiedSchedule("fae"), TrainOptions(), source=Empty(16)).trainer.run)


def _checked(rank: int) -> dict[str, Any]:
    """A run that compares replicas every third step; before the seventh, rank 1's hot rows are changed."""
    run = Run(SpiedSchedule("fixed"), TrainOptions(check_replicas=3))
    (module,) = (module for module in run.model.modules() if isinstance(module, ShardedHotColdModule))
    checks: list[int] = []
    check = module.check_replicas
    module.check_replicas = lambda: (checks.append(len(run.trained)), check())[1]  # type: ignore[method-assign]

    def spoil(*_: Any) -> None:
        if len(run.trained) == 7 and rank == 1:
            next(iter(module._hot.tables())).weights.add_(1e-3)

    run.model.register_forward_pre_hook(spoil)
    return {"checks": checks, "error": _error(run.trainer.run)}


def _everything(rank: int, folder: Path) -> dict[str, Any]:
    here = folder / f"{dist.get_world_size()} ranks"
    seen = {
        **{name: _train(name) for name in RUNS},
        "resumed": {name: _resumed(name, here) for name in RESUMED},
        "plain fixed": _plain_loop("fixed"),
        "plain stock": _plain_loop("stock"),
        "rising": _scripted(rank, [0.1 * n for n in range(1, 60)], 20.0),
        "falling": _scripted(rank, [9 - 0.1 * n for n in range(1, 60)], 5.0),
        "guarded": _guarded(),
        "clock": {policy: _clocked(policy) for policy in ("fae", "fixed", "stock")},
        "nothing": _nothing(),
        "checked": _checked(rank),
        "diverged": _diverged(rank, here / "diverged"),
        "diverged at the end": [_diverged_at_the_end(*how) for how in (("fixed", 100), ("fae", 1), ("fixed", 0))],
        "broken source": _broken_source(rank),
        "other runs": _other_runs(here / "other runs"),
    }
    if dist.get_world_size() == 1:
        seen["begun"] = _piece(folder / "1 to 2", 13)
    else:
        seen["ended"] = _piece(folder / "1 to 2", None)
        seen["begun"] = _piece(folder / "2 to 1", 13)
    return seen


def alone(function: Callable[..., T], *args: Any) -> T:
    """What `function(0, *args)` returns where this process is the only rank: starting another takes seconds."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as the ranks that are started
            return function(0, *args)
    finally:
        dist.destroy_process_group()


FOLDER = tempfile.TemporaryDirectory()


@cache
def everything(ranks: int) -> list[dict[str, Any]]:
    """What each rank saw of all runs, in one start of ranks."""
    if ranks == 1:
        return [alone(_everything, Path(FOLDER.name))]
    everything(1)  # begins what is ended here
    return run_on_local_ranks(_everything, ranks, Path(FOLDER.name), timeout_s=240)


def end_alone(rank: int, folder: Path) -> dict[str, Any]:
    """Ends on one rank what two began."""
    return _piece(folder / "2 to 1", None)


def dies(rank: int, folder: Path) -> None:
    """A run of which rank 1 goes in the seventh step."""
    run = Run(SpiedSchedule("fae"), TrainOptions(checkpoint=CheckpointOptions(str(folder), every_steps=4)))

    def die(*_: Any) -> None:
        if len(run.trained) == 7 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    run.model.register_forward_pre_hook(die)
    run.trainer.run()
