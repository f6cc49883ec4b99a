"""Samples of whole inputs: what describes none is refused."""

from __future__ import annotations

import numpy as np
import pytest

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.input_sample import InputSample


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_the_input_of_each_id() -> None:
    sample = InputSample({"x": _ids(5, 6, 7)}, {"x": _ids(2, 0, 1)}, 3)
    assert sample.input_of_id("x").tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("values", "lengths", "inputs"),
    [
        (_ids(1, 2), _ids(1, 2), 2),  # sum
        (_ids(1, 2), _ids(1, 1), 3),  # number
        (_ids(1, 2), _ids(3, -1), 2),  # negative
    ],
)
def test_samples_that_contradict_themselves_are_refused(values: np.ndarray, lengths: np.ndarray, inputs: int) -> None:
    with pytest.raises(DataError, match="'x'"):
        InputSample({"x": values}, {"x": lengths}, inputs)


def test_arrays_of_another_type_are_refused() -> None:
    """They would come back from a file as int64, with another fingerprint: "it was altered"."""
    for values, lengths in ((_ids(1, 2), np.array([1, 1], dtype=np.int32)), (_ids(1, 2).astype(np.int32), _ids(1, 1))):
        with pytest.raises(DataError, match="must be int64, received int"):
            InputSample({"x": values}, {"x": lengths}, 2)


def test_no_inputs_or_other_features_are_refused() -> None:
    with pytest.raises(DataError, match="at least 1 input"):
        InputSample({}, {}, 0)
    with pytest.raises(DataError, match="different features"):
        InputSample({"x": _ids()}, {"y": _ids(0)}, 1)
