"""The trainer on one and on two ranks: what it trains, when it asks for feedback, and that a pipeline changes nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fae_torchrec.core.tables import Optimizer
from tests.training.small_run import BATCH_SIZE, new_model
from tests.training.trainer_runs import RUNS, SAMPLES, TEST_SAMPLES, SpiedSchedule, everything

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
    assert all(other == result for other in results)
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
        assert result.steps_by_kind.keys() == {"hot", "cold"}
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
        assert len(losses) == (run["phases"] if RUNS[name][0] == "fae" else 0)
        assert run["told"] == everything(ranks)[0][name]["told"], "bit-identical on every rank"
    if name == "fae":
        assert len(everything(ranks)[0][name]["told"]) >= 6, "two epochs, cold hot cold hot each"


def simulated(counts: tuple[int, int], losses: list[float], rate: float) -> tuple[str, list[tuple[float, float]]]:
    """The kinds of an epoch and what the schedule is told: after each phase, before the next is opened."""
    schedule, kinds = SpiedSchedule("fae", rate), ""
    for phase, loss in zip(schedule.phases(*counts), losses, strict=False):
        kinds += ("H" if phase.kind == "hot" else ".") * phase.count
        schedule.observe(loss)
    return kinds, schedule.told


@both
@pytest.mark.parametrize(("name", "rate"), [("rising", 20.0), ("falling", 5.0)])
def test_feedback_changes_the_phases(name: str, rate: float, ranks: int) -> None:
    script = [0.1 * n for n in range(1, 60)] if name == "rising" else [9 - 0.1 * n for n in range(1, 60)]
    first = everything(ranks)[0][name]
    kinds, told = simulated(first["counts"], script, rate)
    for rank in everything(ranks):
        assert rank[name]["told"] == told, "rank 0's loss on every rank, to the last bit"
        assert rank[name]["kinds"] == kinds
    rates = [rate for _, rate in told]
    if name == "rising":  # the first loss is only remembered; then halves, not below 1
        assert rates[:6] == [20.0, 10.0, 5.0, 2.5, 1.25, 1.0]
    else:  # four falls in a row double it
        assert rates[:9] == [5.0] * 4 + [10.0] * 4 + [20.0]


@both
def test_guard_falls_back_and_says_so_once(ranks: int) -> None:
    for number, rank in enumerate(everything(ranks)):
        seen = rank["guarded"]
        assert (seen["told"], seen["auc"]) == (3, 0.9), "three looks, and the score at the end"
        assert seen["said"].count("fell behind its best by more than 0.1") == (number == 0), "rank 0 speaks"
        second_epoch = seen["kinds"][len(seen["kinds"]) // 2 :]
        assert second_epoch.count(".H") >= second_epoch.count("H") * 0.8, "spread out: nearly every hot batch stands alone"


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
        assert error == "no error" if ranks == 1 else "replicas of hot rows differ" in error


@both
def test_no_samples_is_an_error_on_every_rank(ranks: int) -> None:
    for rank in everything(ranks):
        assert "no samples to train on" in rank["nothing"]
