"""The trainer on one and on two ranks: what it trains, when it asks for feedback, and that a pipeline changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import DataError, ReplicaError
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.data.batches import is_hot_batch
from fae_torchrec.distributed.hot_cold_module import ShardedHotColdModule
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.training import trainer as trainer_module
from fae_torchrec.training.metrics import Scores
from fae_torchrec.training.trainer import Trainer, TrainOptions
from tests.distributed.small_model import whole_tensors
from tests.training.small_run import BATCH_SIZE, CPU, Samples, new_loader, new_model, numbers, placement_of, sharded

SAMPLES = Samples(641)  # 40 batches and a sample on one rank; 20 batches on two ranks, and a sample that is dropped
TEST_SAMPLES = Samples(100, seed=1)
# name -> (policy, window_batches, epochs, steps)
RUNS = {
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


class SpiedSchedule(ShuffleSchedule):
    """Writes down what it is told and the rate afterwards."""

    def __init__(self, policy: str, rate: float = 50.0) -> None:
        super().__init__(policy, rate)
        self.told: list[tuple[float, float]] = []

    def observe(self, test_loss: float) -> None:
        super().observe(test_loss)
        self.told.append((test_loss, self.rate))


class Run:
    """One trained model and what was seen while it was trained."""

    def __init__(
        self, schedule: SpiedSchedule, options: TrainOptions, *, window_batches: int | None = None, source: Samples = SAMPLES
    ) -> None:
        model = new_model()
        self.placement = placement_of(model)
        self.model, self.optimizer = sharded(model, None if schedule.policy == "stock" else self.placement)
        self.loader = new_loader(source, self.placement, schedule, window_batches)
        self.trained: list[list[int]] = []
        self.kinds = ""
        self.model.register_forward_pre_hook(self._see)
        self.trainer = Trainer(self.model, self.optimizer, self.loader, TEST_SAMPLES, options, CPU, dist.group.WORLD)

    def _see(self, module: torch.nn.Module, arguments: tuple[Batch, ...]) -> None:
        if module.training:
            self.trained.append(numbers(arguments[0]))
            self.kinds += "H" if is_hot_batch(arguments[0]) else "."


def _train(name: str) -> dict[str, Any]:
    policy, window_batches, epochs, steps = RUNS[name]
    schedule = SpiedSchedule(policy)
    run = Run(schedule, TrainOptions(epochs=epochs, steps=steps, eval_batch_size=30, swap_eval_batches=2), window_batches=window_batches)
    swaps: list[Any] = []
    on_swap = run.loader.on_swap
    assert on_swap is not None
    run.loader.on_swap = lambda phase: (swaps.append(phase), on_swap(phase))[0]
    result = run.trainer.run()
    return {
        "trained": run.trained,
        "kinds": run.kinds,
        "result": result,
        "told": schedule.told,
        "rate": schedule.rate,
        "swaps": len(swaps),
        "weights": whole_tensors(run.model.state_dict()),
        "training": run.model.training,
    }


def _plain_loop(policy: str) -> dict[str, Any]:
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
            loss.backward()
            optimizer.step()
            losses.append((batch.labels.numel(), loss.item()))
    return {"weights": whole_tensors(model.state_dict()), "losses": losses}


def _scripted(rank: int, losses: list[float], rate: float) -> dict[str, Any]:
    """A run whose test losses are given; every rank would say a slightly different one."""
    schedule = SpiedSchedule("fae", rate)
    run = Run(schedule, TrainOptions())
    script = iter([*losses, 0.0])
    run.trainer._score = lambda num_batches: Scores(0.5, next(script) + rank * 1e-12, 0.5, 1)  # type: ignore[method-assign]
    run.trainer.run()
    stats = run.loader.stats
    return {"told": schedule.told, "kinds": run.kinds, "counts": (stats.cold_batches, stats.hot_batches)}


def _clocked(policy: str) -> float:
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

    try:
        Run(SpiedSchedule("fae"), TrainOptions(), source=Empty(16)).trainer.run()
    except DataError as error:
        return str(error)
    return "trained nothing"


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
    try:
        run.trainer.run()
    except ReplicaError as error:
        return {"checks": checks, "error": str(error)}
    return {"checks": checks, "error": ""}


def _everything(rank: int) -> dict[str, Any]:
    return {
        **{name: _train(name) for name in RUNS},
        "plain fixed": _plain_loop("fixed"),
        "plain stock": _plain_loop("stock"),
        "rising": _scripted(rank, [0.1 * n for n in range(1, 60)], 20.0),
        "falling": _scripted(rank, [9 - 0.1 * n for n in range(1, 60)], 5.0),
        "clock": {policy: _clocked(policy) for policy in ("fae", "fixed", "stock")},
        "nothing": _nothing(),
        "checked": _checked(rank),
    }


@cache
def everything(ranks: int) -> list[dict[str, Any]]:
    return run_on_local_ranks(_everything, ranks, timeout_s=240)


both = pytest.mark.parametrize("ranks", [1, 2])


@both
@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run[3] is None])
def test_every_sample_once_per_epoch(name: str, ranks: int) -> None:
    epochs, share = RUNS[name][2], SAMPLES.num_samples // ranks
    for epoch in range(epochs):
        seen: Counter[int] = Counter()
        for rank in everything(ranks):
            samples = [number for step in rank[name]["trained"] for number in step]
            assert len(samples) == epochs * share
            seen.update(samples[epoch * share : (epoch + 1) * share])
        assert seen == Counter(range(share * ranks))


@both
@pytest.mark.parametrize("name", RUNS)
def test_what_the_result_says(name: str, ranks: int) -> None:
    """Counts against what went through the model; the same on every rank."""
    results = [rank[name]["result"] for rank in everything(ranks)]
    run = everything(ranks)[0][name]
    result = run["result"]
    for other in results:
        assert {**vars(other), "wall_s": 0} == {**vars(result), "wall_s": 0}
    trained = sum(len(step) for rank in everything(ranks) for step in rank[name]["trained"])
    assert sum(result.samples_by_kind.values()) == trained
    assert sum(result.steps_by_kind.values()) == len(run["trained"])
    assert result.steps_by_kind.get("hot", 0) == run["kinds"].count("H")
    assert result.loss_curve[-1][0] == trained
    assert [point[0] for point in result.loss_curve] == sorted({point[0] for point in result.loss_curve})
    assert result.samples_per_s_spread[0] <= result.samples_per_s <= result.samples_per_s_spread[1]
    assert result.test.samples == TEST_SAMPLES.num_samples // ranks * ranks
    assert run["training"], "left in training mode"
    if RUNS[name][0] == "stock":
        assert result.steps_by_kind.keys() == {"mixed"}
    elif RUNS[name][3] is None:
        assert result.steps_by_kind.keys() == {"hot", "cold", "mixed"}
    assert len({rank[name]["kinds"] for rank in everything(ranks)}) == 1, "every rank takes the same steps"


@both
@pytest.mark.parametrize(("name", "steps"), [("one step", 1), ("seven steps", 7), ("stock, seven steps", 7), ("into the second epoch", 45)])
def test_steps_end_the_run(name: str, steps: int, ranks: int) -> None:
    for rank in everything(ranks):
        assert len(rank[name]["trained"]) == steps


@both
@pytest.mark.parametrize("name", RUNS)
def test_feedback_after_each_swap(name: str, ranks: int) -> None:
    for rank in everything(ranks):
        run = rank[name]
        losses = [loss for loss, _ in run["told"]]
        assert losses == run["result"].swap_losses
        assert len(losses) == (run["swaps"] if RUNS[name][0] == "fae" else 0)
        assert run["told"] == everything(ranks)[0][name]["told"], "bit-identical on every rank"
    if name == "fae":
        assert len(everything(ranks)[0][name]["told"]) >= 6, "two epochs, cold hot cold hot each"


def simulated(counts: tuple[int, int], losses: list[float], rate: float) -> tuple[str, list[tuple[float, float]]]:
    """The kinds of an epoch and what the schedule is told: a phase's size is decided before the swap to it is looked at."""
    schedule, kinds, told = SpiedSchedule("fae", rate), "", []
    script = iter(losses)
    for phase in schedule.phases(*counts):
        if kinds:
            schedule.observe(next(script))
        kinds += ("H" if phase.kind == "hot" else ".") * phase.count
        told = schedule.told
    return kinds, told


@both
@pytest.mark.parametrize(("name", "rate"), [("rising", 20.0), ("falling", 5.0)])
def test_feedback_changes_the_phases(name: str, rate: float, ranks: int) -> None:
    script = [0.1 * n for n in range(1, 60)] if name == "rising" else [9 - 0.1 * n for n in range(1, 60)]
    first = everything(ranks)[0][name]
    kinds, told = simulated(first["counts"], script, rate)
    for rank in everything(ranks):
        run = rank[name]
        assert run["told"] == told, "rank 0's loss on every rank, to the last bit"
        assert run["kinds"].startswith(kinds)
        assert set(run["kinds"][len(kinds) :]) <= {"."}, "then leftovers"
    rates = [rate for _, rate in told]
    if name == "rising":  # the first loss is only remembered; then halves, not below 1
        assert rates[:6] == [20.0, 10.0, 5.0, 2.5, 1.25, 1.0]
    else:  # four falls in a row double it
        assert rates[:9] == [5.0] * 4 + [10.0] * 4 + [20.0]


@both
@pytest.mark.parametrize("policy", ["fixed", "stock"])
def test_pipeline_equals_plain_loop(policy: str, ranks: int) -> None:
    run, plain = everything(ranks)[0][policy], everything(ranks)[0][f"plain {policy}"]
    torch.testing.assert_close(run["weights"], plain["weights"], rtol=1e-6, atol=1e-7)
    start = new_model(Optimizer.SGD).state_dict()
    assert all(not torch.equal(run["weights"][key], start[key]) for key in start), "the control: training changes every tensor"
    losses = [pair for rank in everything(ranks) for pair in rank[f"plain {policy}"]["losses"]]
    mean = sum(count * loss for count, loss in losses) / sum(count for count, _ in losses)
    assert run["result"].train_loss == pytest.approx(mean, rel=1e-6)


@both
def test_all_loading_is_on_the_clock(ranks: int) -> None:
    """Also that of the first batch, for which a whole epoch is segregated: each rank gets 16 samples a second; nothing else takes time."""
    for rank in everything(ranks):
        assert rank["clock"] == {policy: pytest.approx(BATCH_SIZE * ranks) for policy in ("fae", "fixed", "stock")}


@both
def test_replicas_are_checked(ranks: int) -> None:
    for rank in everything(ranks):
        checks, error = rank["checked"]["checks"], rank["checked"]["error"]
        assert checks == (list(range(3, 41, 3)) if ranks == 1 else [3, 6, 9])
        assert bool(error) == (ranks == 2) and (not error or "replicas of hot rows differ" in error)


@both
def test_no_samples_is_an_error_on_every_rank(ranks: int) -> None:
    for rank in everything(ranks):
        assert "no samples to train on" in rank["nothing"]
