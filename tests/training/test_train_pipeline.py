"""The pipeline on one rank: what begins when, that nothing it does ahead changes a weight, and what a stock training loop gets of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.training import stage_clock, train_pipeline
from fae_torchrec.training.cold_prefetch import coming_cold
from fae_torchrec.training.stage_clock import StageClock
from fae_torchrec.training.train_pipeline import STAGES, FAETrainPipeline
from tests.distributed.reference_adam import reference_adam
from tests.distributed.small_model import Case, dense_optimizer, new_batch, optimizer_state, placement_of, shard, train, whole_tensors
from tests.training.small_pipeline import CPU, SEQUENCE, new_batches, run_pipeline, traced
from tests.training.small_run import Samples, numbers

CASE = Case("rowwise_adagrad")


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state(model: Any) -> dict[str, torch.Tensor]:
    return {**whole_tensors(model.state_dict()), **optimizer_state(model)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_is_looked_ahead_at() -> None:
    letters = {"H": "hot", "C": "cold", "M": "mixed"}
    found = {kinds: coming_cold([letters[kind] for kind in kinds]) for kinds in ("HHC", "CHM", "CC", "HHH", "C", "M", "")}  # type: ignore[misc]
    assert found == {"HHC": 2, "CHM": 2, "CC": 1, "HHH": None, "C": None, "M": None, "": None}


# H0 H1 H2 C3 C4 H5 C6 M7 H8. Rows come early for batches 3 and 6, never for 4 and 7, before which there is always a cold batch that is not
# updated.
TRACES = {
    2: "start0 start1 forward0 update0 start2 forward1 update1 start3 forward2 update2 start4 forward3 update3 start5 forward4 update4 "
    "start6 forward5 update5 start7 forward6 update6 start8 forward7 update7 forward8 update8",
    3: "start0 start1 start2 forward0 update0 start3 forward1 update1 start4 forward2 update2 start5 forward3 update3 start6 forward4 "
    "update4 start7 forward5 update5 start8 forward6 update6 forward7 update7 forward8 update8",
    4: "start0 start1 start2 start3 forward0 update0 start4 forward1 update1 rows3 start5 forward2 update2 start6 forward3 update3 "
    "start7 forward4 update4 rows6 start8 forward5 update5 forward6 update6 forward7 update7 forward8 update8",
}


@pytest.mark.parametrize("lookahead", TRACES)
def test_what_begins_when(lookahead: int) -> None:
    with traced() as events:
        pipeline = run_pipeline(shard(CASE, placement_of(CASE)), new_batches(CASE, SEQUENCE, 0), lookahead=lookahead)
    assert events == TRACES[lookahead].split()
    for step in range(len(SEQUENCE) - 1):
        assert events.index(f"start{step + 1}") < events.index(f"forward{step}"), "overlap, across changes of kind"
    assert (pipeline.steps.hot, pipeline.steps.other) == (5, 4)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adam"])
def test_looking_ahead_changes_no_bit(optimizer: str) -> None:
    """With a learning rate that changes at every step: a cold batch is updated with the rate of its own step, and Adam's count."""
    case = Case(optimizer)
    batches = new_batches(case, "HHHHCCHCMHHCHHHM", 0)

    def lower_rate(step: int, pipeline: Any) -> None:
        for group in model.fused_optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        model.fused_optimizer.step()

    states = {}
    with reference_adam() if optimizer == "adam" else nullcontext():
        for lookahead in (2, 4, 6):
            model = shard(case, placement_of(case))
            run_pipeline(model, batches, lower_rate, lookahead=lookahead)
            states[lookahead] = state(model)
    assert same(states[4], states[2])
    assert same(states[6], states[2])


def test_looking_past_a_cold_batch_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the rows of the second cold batch, brought in before the first has been trained, are stale."""
    batches, states = new_batches(CASE, "HHHHCCH", 0), []
    for _ in range(2):
        model = shard(CASE, placement_of(CASE))
        run_pipeline(model, batches, lookahead=6)
        states.append(state(model))
        monkeypatch.setattr(
            train_pipeline, "coming_cold", lambda kinds: ([i for i, kind in enumerate(kinds) if kind != "hot"] + [None] * 2)[1]
        )
    assert not same(*states)


@pytest.mark.parametrize("lookahead", [2, 6])
def test_detached_evaluated_saved_and_loaded_with_batches_in_flight(lookahead: int) -> None:
    """After every step; after step 6 the state of step 1 is loaded while the rows of a coming cold batch are there already."""
    batches, other = new_batches(CASE, "HCHHHHHC", 0), new_batch(CASE, 77, 0)
    in_flight: list[int] = []

    def disturbed(model: Any, step: int, saved: dict[int, Any]) -> None:
        model.eval()
        with torch.no_grad():
            model(other)
        model.train()
        saved[step] = {key: value.clone() for key, value in whole_tensors(model.state_dict()).items()}
        if step == 6:
            model.load_state_dict(saved[1])

    def after_step(step: int, pipeline: Any) -> None:
        in_flight.append(len(pipeline.batches))
        disturbed(pipeline.detach(), step, ours)

    ours: dict[int, Any] = {}
    plain: dict[int, Any] = {}
    model = shard(CASE, placement_of(CASE))
    with traced() as events:
        run_pipeline(model, batches, after_step, lookahead=lookahead)
    assert max(in_flight) == lookahead
    assert ("rows7" in events) == (lookahead == 6) and events.count("start7") == 1
    assert lookahead == 2 or events.index("rows7") < events.index("update5"), "before the state is loaded"

    model = shard(CASE, placement_of(CASE))
    for step, batch in enumerate(batches, start=1):
        train(model, [batch])
        disturbed(model, step, plain)
    assert all(same(ours[step], plain[step]) for step in plain)
    assert not same(ours[7], ours[6])


def test_drop_in_for_the_stock_pipeline() -> None:
    """Positional and keyword arguments, outputs, the end, and the weight of a batch."""
    batches = new_batches(CASE, "HCMH", 0)
    results = []
    for pipeline_type in (TrainPipelineSparseDist, FAETrainPipeline):
        model = shard(CASE, placement_of(CASE))
        pipeline: Any = pipeline_type(model, dense_optimizer(model), CPU, True, apply_jit=False, custom_model_fwd=model)
        stream = iter(batches)
        outputs = [pipeline.progress(stream) for _ in batches]
        for _ in range(2):
            with pytest.raises(StopIteration):
                pipeline.progress(stream)
        pipeline.progress(iter(batches[:1]))
        pipeline.reset()
        results.append((outputs, state(model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert same(results[0][1], results[1][1])
    assert (pipeline.steps.hot, pipeline.steps.other) == (3, 2)
    assert set(pipeline.stage_seconds) == set(STAGES)
    of_none = {"prefetch"} if hasattr(TrainPipelineSparseDist, "_optimizer_step") else {"prefetch", "optimizer"}  # TorchRec 1.6 has none
    assert all(seconds > 0 for stage, seconds in pipeline.stage_seconds.items() if stage not in of_none)

    light, heavy = (shard(CASE, placement_of(CASE)) for _ in range(2))
    batch = batches[1]
    train(heavy, [Batch(batch.dense_features, batch.sparse_features, batch.labels)])
    batch.weight = 0.0
    run_pipeline(light, [batch])
    assert same(whole_tensors(light.state_dict()), whole_tensors(shard(CASE, placement_of(CASE)).state_dict()))
    assert not same(state(light), state(heavy))


def test_plain_batches_are_rebundled() -> None:
    """A stock loop, its pipeline's class changed: what a HotColdDataLoader would give, each sample once, and the stock end; twice."""
    from tests.training.small_run import new_model, placement_of, sharded

    placement, samples = placement_of(new_model()), Samples(203)
    schedule = ShuffleSchedule("fixed", 30.0)
    seen: list[list[int]] = [[], []]
    for epoch in range(2):
        for batch in HotColdDataLoader(samples.batches(17), placement, batch_size=16, schedule=schedule, window_batches=5, prefetch=0):
            seen[epoch].extend(numbers(batch))
    assert sorted(seen[0]) == list(range(203)) != seen[0]

    model, optimizer = sharded(new_model(), placement)
    trained: list[int] = []

    def forward(batch: Batch) -> Any:
        trained.extend(numbers(batch))
        return model(batch)

    pipeline: Any = FAETrainPipeline(
        model,
        optimizer,
        CPU,
        custom_model_fwd=forward,
        placement=placement,
        batch_size=16,
        schedule=schedule,
        loader_options={"window_batches": 5},
        lookahead=4,
    )
    for epoch in range(2):
        trained.clear()
        stream = iter(list(samples.batches(17)))
        with pytest.raises(StopIteration):
            while True:
                pipeline.progress(stream)
        assert trained == seen[epoch]
    assert pipeline.steps.hot > 5 and pipeline.steps.other > 5
    pipeline.progress(samples.batches(17))
    pipeline.reset()  # in the middle of a pass; its threads end


def test_arguments_are_checked() -> None:
    model = shard(CASE, None)
    for message, arguments in {
        "lookahead must be at least 2.*received 1": {"lookahead": 1},
        "batch_size, schedule: only for batches that are re-bundled": {"batch_size": 4, "schedule": ShuffleSchedule()},
        "a placement was given without batch_size": {"placement": placement_of(CASE)},
        "batch_size must be at least 1": {"placement": placement_of(CASE), "batch_size": 0},
        "prefetch must be at least 0": {"placement": placement_of(CASE), "batch_size": 4, "loader_options": {"prefetch": -1}},
    }.items():
        with pytest.raises(ConfigError, match=message):
            FAETrainPipeline(model, dense_optimizer(model), CPU, **arguments)  # type: ignore[arg-type]


def test_clock_gives_time_to_the_innermost_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 7.0, 10.0, 20.0])
    monkeypatch.setattr(stage_clock.time, "perf_counter", lambda: next(ticks))
    clock = StageClock(["outer", "inner", "never"])
    with clock("outer"):  # from 0
        with clock("inner"):  # 1 to 3
            pass
        with clock(None):  # 7 to 10, nobody's
            pass
    assert clock.seconds == {"outer": 1.0 + 4.0 + 10.0, "inner": 2.0, "never": 0.0}
