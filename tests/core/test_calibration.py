"""Measured steps change the rates they tell something about, and leave the others."""

from __future__ import annotations

import pytest

from fae_torchrec.core.calibration import Point, calibrated
from fae_torchrec.core.cost_model import Work, step_seconds
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hardware import hardware_preset


def test_points_that_the_model_meets_change_nothing() -> None:
    cpu = hardware_preset("cpu")
    works = [Work(flops=1e9, fast_rows=1e5, fast_bytes=1e8), Work(flops=1e8, fast_rows=1e6, fast_bytes=1e9, split_ids=1e5)]
    better = calibrated(cpu, [Point(work, step_seconds(work, cpu)) for work in works])
    for key, value in cpu.to_json().items():
        if not isinstance(value, str):
            assert getattr(better, key) == pytest.approx(value), key
    assert better.source.endswith("; 2 measured steps")


def test_a_machine_whose_rows_cost_thrice_is_found() -> None:
    cpu = hardware_preset("cpu")
    slow = type(cpu).from_json({**cpu.to_json(), "fast_row_s": 3 * cpu.fast_row_s, "fast_bandwidth": cpu.fast_bandwidth / 3})
    works = [Work(flops=1e9 * a, fast_rows=1e5 * b, fast_bytes=1e8 * b) for a, b in ((1, 1), (1, 10), (10, 1), (1, 30), (0.1, 5))]
    points = [Point(work, step_seconds(work, slow)) for work in works]
    better = calibrated(cpu, points)
    before = [abs(step_seconds(work, cpu) / seconds - 1) for work, seconds in points]
    after = [abs(step_seconds(work, better) / seconds - 1) for work, seconds in points]
    assert max(before) > 0.4 and max(after) < 0.15
    assert better.host_link_bandwidth == pytest.approx(cpu.host_link_bandwidth)  # nothing was told about it


def test_on_cuda_only_the_longer_of_host_and_device_is_told_about() -> None:
    gpu = hardware_preset("h200")
    small, large = Work(flops=1e9), Work(flops=5e12)
    assert step_seconds(small, gpu) == gpu.step_s
    better = calibrated(gpu, [Point(small, 2 * gpu.step_s), Point(large, 2 * step_seconds(large, gpu))])
    assert better.step_s == pytest.approx(2 * gpu.step_s, rel=0.05)
    assert better.flops == pytest.approx(gpu.flops / 2, rel=0.05)


@pytest.mark.parametrize(("points", "told"), [([], "received none"), ([Point(Work(), 0.0)], "more than 0 seconds")])
def test_points_that_tell_nothing(points: list[Point], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        calibrated(hardware_preset("cpu"), points)
