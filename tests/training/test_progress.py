"""A run's figures by hand, and the same ones after the run was saved and went on with other ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import StateError
from fae_torchrec.training import progress
from fae_torchrec.training.metrics import Scores
from fae_torchrec.training.progress import RunLog, TrainResult
from tests.training.thread_ranks import run_on_threads

SCORES = Scores(0.7, 0.5, 0.8, 10)


class Step(NamedTuple):
    """A step of one rank."""

    kind: str
    samples: int
    loss: float
    epoch: int = 0
    busy_s: float = 1.0
    loading_s: float = 0.0


def note(log: RunLog, steps: Sequence[Step]) -> None:
    for kind, samples, loss, epoch, busy_s, loading_s in steps:
        log.step(kind, samples, torch.tensor(loss), epoch=epoch, busy_s=busy_s, loading_s=loading_s)


def results(ranks: list[list[Step]]) -> list[TrainResult]:
    """What every rank gets for its steps."""

    def run(group: dist.ProcessGroup) -> TrainResult:
        log = RunLog(group, torch.device("cpu"))
        note(log, ranks[group.rank()])
        return log.result(SCORES)

    return run_on_threads(run, len(ranks))  # type: ignore[return-value]


def test_by_hand_on_two_ranks() -> None:
    """Five steps of warm-up and three that are timed: 20 samples in 2 s, 10 (one rank has a filler) in 3 s, 40 in 4 s."""
    warm_up = [Step("cold", 10, 0.5, busy_s=100.0)] * 5
    first = [*warm_up, Step("hot", 10, 0.1, 1, 2.0, 5.0), Step("hot", 10, 0.2, 1, 4.0), Step("mixed", 30, 1.0, 1, 4.0)]
    second = [*warm_up, Step("hot", 10, 0.3, 1, 2.0, 12.0), Step("hot", 0, math.nan, 1, 2.0), Step("mixed", 10, 3.0, 1, 4.0)]
    one, other = results([first, second])
    assert one == other, "the same on every rank"
    loading_s = (5 + 12) / 2 / 170  # a sample's share of all loading
    assert one.samples_per_s == pytest.approx(70 / (2 + 3 + 4 + 70 * loading_s))
    slowest, fastest = 10 / (3 + 10 * loading_s), 20 / (2 + 20 * loading_s)
    assert one.samples_per_s_spread == pytest.approx((slowest, max(fastest, 40 / (4 + 40 * loading_s))))
    assert one.train_loss == pytest.approx((0.1 * 10 + 0.3 * 10 + 0.2 * 10 + 1.0 * 30 + 3.0 * 10) / 70)
    assert one.loss_curve == [
        *[(20 * n, pytest.approx(0.5)) for n in range(1, 6)],
        (120, pytest.approx(0.2)),
        (130, pytest.approx(0.2)),
        (170, pytest.approx(1.5)),
    ]
    assert one.samples_by_kind == {"cold": 100, "hot": 30, "mixed": 40}
    assert one.steps_by_kind == {"cold": 5, "hot": 2, "mixed": 1}
    assert one.hot_share == 0.25
    assert (one.test, one.swap_losses) == (SCORES, [])


def test_a_run_as_short_as_the_warm_up_is_judged_by_its_last_step() -> None:
    (result,) = results([[Step("hot", 8, 0.5, busy_s=9.0), Step("hot", 6, 0.25, busy_s=2.0)]])
    assert result.samples_per_s == 3.0
    assert result.samples_per_s_spread == (3.0, 3.0)


def test_waiting_for_the_device_belongs_to_the_last_step() -> None:
    log = RunLog()
    note(log, [Step("hot", 6, 0.5, busy_s=1.0)])
    log.add_busy(1.0)
    assert log.result(SCORES).samples_per_s == 3.0
    log.add_busy(2.0)  # the step is summed already
    note(log, [Step("hot", 6, 0.5, busy_s=1.0)])
    assert log.result(SCORES).samples_per_s == 2.0


def test_wall_clock_covers_what_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    log = RunLog()
    note(log, [Step("hot", 1, 0.5)])
    now = 107.0
    state = log.state_dict()
    now = 1000.0  # lost: the process was killed after the checkpoint
    again = RunLog()
    again.load_state_dict(state)
    now = 1003.0
    note(again, [Step("hot", 1, 0.5)])
    assert (log.steps, again.steps, again.result(SCORES).wall_s) == (1, 2, 10.0)


def test_many_steps_keep_their_sums_and_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_MAX_LOSSES", 64)  # fetched several times
    count = 2345
    steps = [Step("hot" if n % 3 else "cold", n % 7 + 1, n / count, n * 2 // count, 1 + n / count, 0.01) for n in range(count)]
    whole, parts = RunLog(), RunLog()
    note(whole, steps)
    for n in range(0, count, 400):
        note(parts, steps[n : n + 400])
        state = json.loads(json.dumps(parts.state_dict()))
        assert len(state["spans"]) <= 500
    once, often = whole.result(SCORES), parts.result(SCORES)
    assert len(once.loss_curve) == 100 and 80 <= len(often.loss_curve) <= 100
    trained = sum(step.samples for step in steps)
    for result in (once, often):
        assert result.loss_curve[-1][0] == trained == sum(result.samples_by_kind.values())
        assert sum(result.steps_by_kind.values()) == count
        rising = [loss for _, loss in result.loss_curve]
        assert rising == sorted(rising), "points follow each other"
        assert result.samples_per_s == pytest.approx(once.samples_per_s)
        assert result.samples_per_s_spread == pytest.approx(once.samples_per_s_spread, rel=0.02)
    last = [step for step in steps if step.epoch == 1]
    assert often.train_loss == pytest.approx(sum(s.loss * s.samples for s in last) / sum(s.samples for s in last))


steps_of_ranks = st.integers(1, 12).flatmap(
    lambda count: st.tuples(
        st.lists(st.sampled_from(["hot", "cold"]), min_size=count, max_size=count),
        st.lists(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 2)), min_size=6, max_size=6), min_size=count, max_size=count),
    )
)


@settings(max_examples=25, deadline=None)
@given(run=steps_of_ranks, before=st.sampled_from([1, 2, 3]), after=st.sampled_from([1, 2, 3]), data=st.data())
def test_a_run_goes_on_with_another_number_of_ranks(run: tuple[list[str], list[Any]], before: int, after: int, data: st.DataObject) -> None:
    """Against sums over the steps of those ranks that took part in each part of the run."""
    kinds, figures = run
    cut = data.draw(st.integers(0, len(kinds)))
    figures = [[(max(samples, 1), loss), *others] for (samples, loss), *others in figures]  # not every rank may have a filler
    epochs = [n // 4 for n in range(len(kinds))]

    def steps(rank: int, start: int, stop: int) -> list[Step]:
        return [Step(kinds[n], *figures[n][rank], epochs[n]) for n in range(start, stop)]

    def save(group: dist.ProcessGroup) -> dict[str, Any]:
        log = RunLog(group, torch.device("cpu"))
        note(log, steps(group.rank(), 0, cut))
        log.swap_losses.append(0.25)
        return log.state_dict()

    def go_on(group: dist.ProcessGroup) -> TrainResult:
        log = RunLog(group, torch.device("cpu"))
        log.load_state_dict(json.loads(json.dumps(state)))
        assert log.steps == cut
        note(log, steps(group.rank(), cut, len(kinds)))
        return log.result(SCORES)

    state, *others = run_on_threads(save, before)
    assert all(other == state for other in others)
    result, *more = run_on_threads(go_on, after)
    assert isinstance(result, TrainResult) and all(other == result for other in more)
    taken = [(n, *figures[n][rank]) for n in range(len(kinds)) for rank in range(before if n < cut else after)]
    for kind in set(kinds):
        assert result.samples_by_kind[kind] == sum(samples for n, samples, _ in taken if kinds[n] == kind)
        assert result.steps_by_kind[kind] == kinds.count(kind)
    last = [(samples, np.float32(loss)) for n, samples, loss in taken if epochs[n] == epochs[-1]]
    assert result.train_loss == pytest.approx(sum(s * x for s, x in last) / sum(s for s, _ in last), abs=1e-6)
    assert len(result.loss_curve) == len(kinds)
    assert result.loss_curve[-1][0] == sum(samples for _, samples, _ in taken)
    assert result.swap_losses == [0.25]


def test_a_state_of_something_else_is_refused() -> None:
    state = RunLog().state_dict()
    del state["spans"]
    with pytest.raises(StateError, match="allowed are exactly"):
        RunLog().load_state_dict(state)
