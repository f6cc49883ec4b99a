"""What the event file says, read back by TensorBoard itself, and what the bar says."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.training import telemetry
from fae_torchrec.training.metrics import Scores
from fae_torchrec.training.telemetry import Telemetry
from tests.training.thread_ranks import run_on_threads


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def steps(shown: Telemetry, first: int, last: int, **more: Any) -> None:
    """Step n has loss n, takes half a second and 10 samples; every third is hot."""
    for n in range(first, last + 1):
        stages = {"loading": n * 0.1, "forward": n * 0.2}
        shown.step(n, "cold" if n % 3 else "hot", 10, torch.tensor(float(n), requires_grad=True), 0.5, stages, **more)


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: 0.0)


@pytest.mark.usefixtures("still_clock")
def test_scalars_by_hand_and_after_a_restart(tmp_path: Path) -> None:
    with Telemetry(tensorboard=str(tmp_path), log_every=4) as shown:
        steps(shown, 1, 9, rate=50.0)
        shown.evaluation(Scores(0.75, 0.5, 0.625, 100), 9)
        shown.text("the guard fell back", 9)
    assert scalars(tmp_path) == {
        "train/loss": [(4, 2.5), (8, 6.5)],
        "train/samples_per_s": [(4, 20.0), (8, 20.0)],
        "train/hot_share": [(4, 0.25), (8, 0.25)],
        "time/loading_ms": [(4, 100.0), (8, 100.0)],
        "time/forward_ms": [(4, 200.0), (8, 200.0)],
        "schedule/rate": [(4, 50.0), (8, 50.0)],
        "eval/auc": [(9, 0.75)],
        "eval/logloss": [(9, 0.5)],
        "eval/accuracy": [(9, 0.625)],
    }
    with Telemetry(tensorboard=str(tmp_path), log_every=2, first_step=6) as shown:  # 7..9 were lost, and are done again
        steps(shown, 7, 10)
    again = scalars(tmp_path)
    assert again["train/loss"] == [(4, 2.5), (8, 7.5), (10, 9.5)]
    assert again["eval/auc"] == [], "of a step that is still to come"


@pytest.mark.usefixtures("still_clock")
def test_fillers_and_unequal_ranks(tmp_path: Path) -> None:
    """Rank 0 of two has 6 samples (counted twice), then a filler whose loss is no number, then 4 of 8."""

    def run(group: dist.ProcessGroup) -> None:
        with Telemetry(group, log_every=3) as shown:  # no scalars asked for: no exchange, and tensorboard is not needed
            shown._writer = writer if group.rank() == 0 else None  # type: ignore[assignment]
            shown.step(1, "hot", 6, torch.tensor(1.0), 1.0, {})
            shown.step(2, "hot", 0, torch.tensor(math.nan), 1.0, {})
            shown.step(3, "cold", 4, torch.tensor(2.0), 2.0, {})

    written: dict[str, float] = {}

    class Writer:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            written[name] = value

        def close(self) -> None:
            pass

    writer = Writer()
    assert run_on_threads(run, 2) == [None, None]
    assert written == {"train/loss": pytest.approx(1.4), "train/samples_per_s": 5.0, "train/hot_share": pytest.approx(2 / 3)}


@pytest.mark.usefixtures("still_clock")
def test_the_bar_says_it_in_words() -> None:
    shown = Telemetry(log_every=2)
    said: list[str] = []

    class Bar:
        def update(self, samples: int) -> None:
            said.append(str(samples))

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            said.append(text)

        def close(self) -> None:
            said.append("closed")

    shown._bar = Bar()  # type: ignore[assignment]
    steps(shown, 2, 4)
    shown.close()
    # The first line has one step, whose stages took what they had taken since the process began.
    assert said[:2] == ["10", "20 samples/s, loss 2.0000, 0% hot, loading 200.0, forward 400.0 ms"]
    assert said[2:] == ["10", "10", "20 samples/s, loss 3.5000, 33% hot, loading 100.0, forward 200.0 ms", "closed"]


def test_losses_stay_on_the_device_until_they_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda losses: (fetched.append(len(losses)), stack(losses))[1])
    loss = torch.tensor(1.0)
    monkeypatch.setattr(torch.Tensor, "item", lambda _: pytest.fail("fetched"))
    with Telemetry(log_every=50) as shown:
        for n in range(1, 150):
            shown.step(n, "hot", 1, loss, 0.1, {})
    assert fetched == [50, 50]


def test_a_full_disk_ends_the_events_and_not_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Full:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            if step > 1:
                raise OSError(28, "No space left on device")

        add_text = close = add_scalar

    with Telemetry(log_every=1) as shown:
        shown._writer = Full()  # type: ignore[assignment]
        steps(shown, 1, 3)
        shown.text("still there", 4)
    stopped = "TensorBoard events are not written any more: [Errno 28] No space left on device; the run goes on without them\n"
    assert capsys.readouterr().err == stopped + "step 4: still there\n"


def test_what_is_missing_is_said_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path) -> list[Any]:
        return run_on_threads(lambda group: Telemetry(group, tensorboard=str(folder)).close(), 2)

    assert run(tmp_path / "good") == [None, None]
    assert len(os.listdir(tmp_path / "good")) == 1, "rank 0 alone writes"
    (tmp_path / "file").write_text("")
    first, second = run(tmp_path / "file" / "events")
    assert isinstance(first, ConfigError) and isinstance(second, ConfigError) and str(first) == str(second)
    assert "cannot write TensorBoard events" in str(first)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    first, second = run(tmp_path / "none")
    assert isinstance(first, ConfigError) and isinstance(second, ConfigError) and "pip install tensorboard" in str(second)
    with pytest.raises(ConfigError, match="log_every must be at least 1"):
        Telemetry(log_every=0)
