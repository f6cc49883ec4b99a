"""The order of hot and cold batches: exactly once, alternating, by hand and over grids."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.schedule import Cursor, Guard, Phase, Policy, ShuffleSchedule

COUNT = st.integers(0, 60)
RATE = st.floats(1, 100)


def _letters(schedule: ShuffleSchedule, n_cold: int, n_hot: int) -> str:
    return " ".join(f"{phase.kind[0].upper()}{phase.count}" for phase in schedule.phases(n_cold, n_hot))


@pytest.mark.parametrize(
    ("rate", "n_cold", "n_hot", "expected"),
    [
        (50, 4, 4, "C2 H2 C2 H2"),
        (50, 5, 3, "C3 H2 C2 H1"),
        (100, 5, 3, "C5 H3"),
        (1, 3, 2, "C1 H1 C1 H1 C1"),
        (50, 10, 1, "C5 H1 C5"),
        (25, 1, 8, "C1 H8"),  # cold is used up: the rest of the hot batches follows in one phase
        (25, 2, 8, "C1 H2 C1 H6"),
        (50, 0, 7, "H7"),
        (50, 7, 0, "C7"),
        (50, 0, 0, ""),
        (7, 100, 100, " ".join(["C7 H7"] * 14 + ["C2 H2"])),  # 7 % of 100 is 7, not ceil(7.000000000000001)
    ],
)
@pytest.mark.parametrize("policy", ["fae", "fixed"])
def test_phases_by_hand(policy: Policy, rate: float, n_cold: int, n_hot: int, expected: str) -> None:
    assert _letters(ShuffleSchedule(policy, rate=rate), n_cold, n_hot) == expected


def test_the_table_in_the_comment() -> None:
    schedule = ShuffleSchedule(rate=30)
    phases = schedule.phases(10, 4)
    first = [next(phases), next(phases)]
    schedule.rate = 60
    assert [*first, *phases] == [Phase("cold", 3), Phase("hot", 2), Phase("cold", 6), Phase("hot", 2), Phase("cold", 1)]


@pytest.mark.parametrize(
    ("n_cold", "n_hot", "expected"),
    [
        (2, 3, "C1 H1 C1 H2"),
        (3, 1, "C3 H1"),
        (1, 3, "C1 H3"),
        (3, 3, "C1 H1 C1 H1 C1 H1"),
        (5, 2, "C3 H1 C2 H1"),
        (0, 4, "H4"),
        (4, 0, "C4"),
        (0, 0, ""),
    ],
)
def test_proportional_by_hand(n_cold: int, n_hot: int, expected: str) -> None:
    assert _letters(ShuffleSchedule("proportional"), n_cold, n_hot) == expected


@given(COUNT, COUNT)
def test_proportional_is_never_a_batch_ahead(n_cold: int, n_hot: int) -> None:
    kinds = [phase.kind for phase in ShuffleSchedule("proportional").phases(n_cold, n_hot) for _ in range(phase.count)]
    for i in range(len(kinds) + 1):
        assert kinds[:i].count("cold") == math.ceil(i * n_cold / max(n_cold + n_hot, 1))


@given(st.sampled_from(["fae", "fixed", "proportional"]), COUNT, COUNT, RATE, st.lists(st.floats(0, 3, width=16), max_size=12))
def test_every_batch_once_in_turns_whatever_the_feedback(policy: Policy, n_cold: int, n_hot: int, rate: float, losses: list[float]) -> None:
    schedule = ShuffleSchedule(policy, rate=rate, patience=2)
    phases = []
    feedback = iter(losses)
    for phase in schedule.phases(n_cold, n_hot):
        phases.append(phase)
        schedule.observe(next(feedback, 1.0))
        assert 1 <= schedule.rate <= 100
    assert sum(p.count for p in phases if p.kind == "cold") == n_cold
    assert sum(p.count for p in phases if p.kind == "hot") == n_hot
    assert all(p.count >= 1 for p in phases)
    assert all(a.kind != b.kind for a, b in pairwise(phases))
    assert not phases or phases[0].kind == ("cold" if n_cold else "hot")


def test_a_phase_takes_its_rate_of_the_epoch() -> None:
    for rate in (1, 12.5, 33, 50, 99):
        phases = list(ShuffleSchedule(rate=rate).phases(80, 48))
        assert phases[:2] == [Phase("cold", math.ceil(80 * rate / 100)), Phase("hot", math.ceil(48 * rate / 100))]


def _rates(losses: list[float], rate: float = 40, patience: int = 4, policy: Policy = "fae") -> list[float]:
    schedule = ShuffleSchedule(policy, rate=rate, patience=patience)
    seen = []
    for loss in losses:
        schedule.observe(loss)
        seen.append(schedule.rate)
    return seen


def test_feedback_by_hand() -> None:
    assert _rates([0.5, 0.6, 0.7]) == [40, 20, 10]
    assert _rates([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]) == [40, 40, 40, 40, 80, 80]
    assert _rates([9, 8, 7, 6, 5, 4, 3, 2, 1]) == [40] * 4 + [80] * 4 + [100]  # the run restarts after a doubling
    assert _rates([5, 4, 3, 2, 2, 1, 0]) == [40] * 7  # an equal loss changes nothing and ends the run
    assert _rates([5, 4, 3, 2, 3, 2, 1, 0]) == [40, 40, 40, 40, 20, 20, 20, 20]  # a rise ends it too
    assert _rates([1, 2, 3], rate=1.5) == [1.5, 1, 1]
    assert _rates([3, 2, 1], rate=70, patience=1) == [70, 100, 100]


def test_a_diverged_loss_is_a_rise_and_can_be_recovered_from() -> None:
    nan = float("nan")
    assert _rates([1, nan, nan, 1], patience=1) == [40, 20, 20, 40]


@pytest.mark.parametrize("policy", ["fixed", "proportional", "stock"])
def test_only_fae_listens(policy: Policy) -> None:
    assert _rates([1, 2, 3, 2, 1, 0, -1, -2], policy=policy, patience=1) == [40] * 8


def test_feedback_shapes_the_phase_that_is_asked_for_next() -> None:
    schedule = ShuffleSchedule(rate=50)
    phases = schedule.phases(8, 8)
    assert next(phases) == Phase("cold", 4)
    schedule.observe(1.0)
    schedule.observe(2.0)
    assert next(phases) == Phase("hot", 2)


def test_stock_does_not_segregate() -> None:
    assert not ShuffleSchedule("stock").segregates
    assert all(ShuffleSchedule(policy).segregates for policy in ("fae", "fixed", "proportional"))
    assert _letters(ShuffleSchedule("stock"), 5, 0) == "M5"


# The schedule's table: start R(50), two rises, five falls, an equal loss, a rise. The epoch has 40 cold and 20 hot batches; the loss is
# looked at after each phase. Columns: phase, loss seen after it, rate that the next phase is opened with.
TABLE = [
    (Phase("cold", 20), 0.70, 50.0),
    (Phase("hot", 10), 0.72, 25.0),  # a rise
    (Phase("cold", 10), 0.74, 12.5),  # a rise
    (Phase("hot", 3), 0.73, 12.5),  # ceil(2.5); the first fall
    (Phase("cold", 5), 0.72, 12.5),
    (Phase("hot", 3), 0.71, 12.5),
    (Phase("cold", 5), 0.70, 25.0),  # the fourth fall in a row; cold is used up
    (Phase("hot", 4), 0.69, 25.0),  # the fifth fall is the first of a new run; what is left of the hot batches
]
SECOND_EPOCH = [
    (Phase("cold", 10), 0.69, 25.0),  # an equal loss ends the run
    (Phase("hot", 5), 0.68, 25.0),
    (Phase("cold", 10), 0.70, 12.5),
    (Phase("hot", 3), 0.70, 12.5),
]


def test_the_table_of_the_schedule() -> None:
    schedule = ShuffleSchedule("fae", rate=50)
    for table in (TABLE, SECOND_EPOCH):
        phases = schedule.phases(40, 20)
        for phase, loss, rate in table:
            assert next(phases) == phase
            schedule.observe(loss)
            assert schedule.rate == rate


@given(st.sampled_from(["fae", "fixed", "proportional", "stock"]), COUNT, COUNT, RATE, st.data())
def test_a_cursor_saved_at_any_step_goes_on(policy: Policy, n_cold: int, n_hot: int, rate: float, data: st.DataObject) -> None:
    losses = data.draw(st.lists(st.floats(0, 1, width=16), max_size=10))
    stop = data.draw(st.integers(0, n_cold + n_hot))

    def run(saved: tuple[dict[str, object], list[object], int] | None, until: int) -> tuple[list[str | None], object]:
        schedule, feedback = ShuffleSchedule(policy, rate=rate, patience=2), losses
        cursor, seen = schedule.start(n_cold, n_hot), 0
        if saved is not None:
            state, place, seen = json.loads(json.dumps(saved))
            schedule.load_state_dict(state)
            cursor = Cursor(*place)
        kinds: list[str | None] = []
        while not cursor.done and len(kinds) < until:
            if not cursor.left:
                if seen < len(feedback):
                    schedule.observe(feedback[seen])
                    seen += 1
                cursor = schedule.next_phase(cursor)
            kinds.append(cursor.kind)
            cursor = cursor.step()
        return kinds, (schedule.state_dict(), list(cursor), seen)

    whole, _ = run(None, 1000)
    first, saved = run(None, stop)
    assert first + run(saved, 1000)[0] == whole  # type: ignore[arg-type]


def test_the_guard_spreads_what_is_left_and_says_so() -> None:
    schedule = ShuffleSchedule("fixed", rate=50, guard=Guard("auc", band=0.02))
    phases = schedule.phases(4, 4)
    seen = [next(phases)]
    schedule.observe(0.6, {"auc": 0.70})
    seen.append(next(phases))
    schedule.observe(0.5, {"auc": 0.685})  # inside the band
    assert not schedule.fell_back
    seen.append(next(phases))
    assert seen == [Phase("cold", 2), Phase("hot", 2), Phase("cold", 2)]
    phases = schedule.phases(4, 4)
    next(phases)
    schedule.observe(0.5, {"auc": 0.67})
    assert schedule.fell_back
    assert "".join(phase.kind[0] * phase.count for phase in phases) == "chhchh"  # 2 cold and 4 hot are left
    schedule.observe(0.1, {"auc": 0.99})
    assert schedule.fell_back  # for good
    with pytest.raises(ConfigError, match="watches 'auc'; received only"):
        schedule.observe(0.1)


def test_the_guard_of_a_loss_looks_upwards() -> None:
    schedule = ShuffleSchedule("fae", guard=Guard("logloss", band=0.1))
    for loss, fell_back in ((float("nan"), False), (0.5, False), (0.3, False), (0.39, False), (0.41, True)):
        schedule.observe(loss)
        assert schedule.fell_back == fell_back


@pytest.mark.parametrize("guard", [{"metric": "recall"}, {"band": 0.0}, {"band": float("nan")}])
def test_bad_guards_are_refused(guard: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="schedule guard: received metric"):
        Guard(**guard)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "random"}, "'random' is unknown; allowed: fae, fixed, proportional, stock"),
        ({"rate": 0.5}, r"1\.\.100 per cent, received 0\.5"),
        ({"rate": 101}, "received 101"),
        ({"rate": float("nan")}, "received nan"),
        ({"patience": 0}, "at least 1, received 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShuffleSchedule(**arguments)


def test_negative_counts_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="n_cold=-1"):
        ShuffleSchedule().phases(-1, 2)


@given(st.lists(st.floats(0, 2, width=16), max_size=20), st.integers(0, 20))
def test_resuming_is_going_on(losses: list[float], at: int) -> None:
    straight, before, after = (ShuffleSchedule(patience=2) for _ in range(3))
    for loss in losses:
        straight.observe(loss)
    for loss in losses[:at]:
        before.observe(loss)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for loss in losses[at:]:
        after.observe(loss)
    assert after.state_dict() == straight.state_dict()


def test_the_state_of_another_schedule_is_refused() -> None:
    state = ShuffleSchedule("fae").state_dict()
    with pytest.raises(ConfigError, match=r"policy 'fae'.*'fixed'"):
        ShuffleSchedule("fixed").load_state_dict(state)
    with pytest.raises(ConfigError, match=r"patience 4.* has 2"):
        ShuffleSchedule(patience=2).load_state_dict(state)
    with pytest.raises(ConfigError, match="allowed are exactly"):
        ShuffleSchedule().load_state_dict({"rate": 3})
