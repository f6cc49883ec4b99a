"""What a sample resolves: by hand, and the rate it proposes put to the test on a Zipf stream."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fae_torchrec.core.resolution import Resolution, resolution
from tests.core.small_profiles import profile_of_counts

# Rows of 4 bytes in a, of 8 in b: 12 + 24 bytes seen, 4 + 8 of them once, 4 + 8 twice.
COUNTS = ([0, 5, 2, 1, 0], [1, 2, 0, 0, 3])


def test_the_resolution_by_hand() -> None:
    told = resolution(profile_of_counts(*COUNTS), ["a", "b"], 36)
    growth = 2 * 12 / 24
    expected = Resolution(True, 6, 2, 36, 24, growth, 0.05, told.resolving_rate)
    assert told == expected and told.resolving_rate == pytest.approx(0.05 * (36 / 24) ** (1 / growth))
    # Of a alone: 8 bytes seen twice or more, 4 of them twice.
    assert resolution(profile_of_counts(*COUNTS), ["a"], 16).resolving_rate == pytest.approx(0.05 * 2)
    assert resolution(profile_of_counts(*COUNTS), [], 16) == Resolution(False, 0, 0, 0, 0, 0.0, 0.05, 0.05)


@pytest.mark.parametrize(
    ("budget", "reached"),
    [(0, False), (24, False), (25, True), (59, True), (60, False)],  # 24 bytes were seen at least twice, the tables have 60
)
def test_the_limit_is_reached_below_the_rows_seen_twice(budget: int, reached: bool) -> None:
    told = resolution(profile_of_counts(*COUNTS), ["a", "b"], budget)
    assert told.reached is reached
    assert (told.resolving_rate > told.sampling_rate) is reached


def test_counts_that_do_not_tell_how_they_grow_ask_for_all_inputs() -> None:
    for counts in ([0, 0, 0], [1, 1, 0], [9, 1, 0]):
        assert resolution(profile_of_counts(counts), ["a"], 8).resolving_rate == 1
    everything = replace(profile_of_counts(*COUNTS), sample_rate=1.0)
    assert resolution(everything, ["a", "b"], 36).resolving_rate == 1
    barely = resolution(profile_of_counts([2] + [3] * 5000 + [0] * 5000), ["a"], 4 * 10_000)
    assert barely.resolving_rate == 1, "a growth of nearly nothing"


@pytest.mark.parametrize(("exponent", "times"), [(0.8, 2), (0.8, 6), (1.05, 2), (1.05, 6), (1.3, 6)])
def test_the_rate_proposed_roughly_fills_the_budget(exponent: float, times: float) -> None:
    rows, rate = 200_000, 0.02
    rng = np.random.default_rng(int(100 * exponent + times))
    share = 1 / np.arange(1, rows + 1) ** exponent
    accesses = rng.poisson(4_000_000 * share / share.sum())  # of all inputs
    profile = replace(profile_of_counts(rng.binomial(accesses, rate).tolist()), sample_rate=rate)
    budget = int(times * resolution(profile, ["a"], 0).repeated_bytes)
    told = resolution(profile, ["a"], budget)
    assert told.reached and rate < told.resolving_rate < 1
    filled = 4 * np.count_nonzero(rng.binomial(accesses, told.resolving_rate) >= 2) / budget
    assert 0.75 < filled < 1.2
