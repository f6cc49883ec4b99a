"""Whole inputs kept as ids: only they can tell which share of inputs a hot set makes all hot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fae_torchrec.core.errors import DataError


@dataclass(frozen=True, eq=False)
class InputSample:
    """A uniform sample of inputs, each with all its ids (counts of single rows cannot tell which inputs are all hot).

    Attributes:
        values: feature name -> int64 [ids of all inputs], input after input.
        lengths: feature name -> int64 [num_samples], ids per input; 0 is an empty bag.
        num_samples: inputs kept, at least 1.

    Raises:
        DataError: no inputs, lengths that do not fit the inputs or the values, or arrays of another type.
    """

    values: Mapping[str, np.ndarray]
    lengths: Mapping[str, np.ndarray]
    num_samples: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(f"a sample of inputs needs at least 1 input, received {self.num_samples}")
        if self.values.keys() != self.lengths.keys():
            raise DataError(f"a sample's values and lengths name different features: {sorted(self.values)} and {sorted(self.lengths)}")
        for feature, lengths in self.lengths.items():
            if lengths.dtype != np.int64 or self.values[feature].dtype != np.int64:
                raise DataError(
                    f"sample of feature {feature!r}: values and lengths must be int64, received {self.values[feature].dtype} and "
                    f"{lengths.dtype}; convert them with astype(np.int64)"
                )
            if lengths.shape != (self.num_samples,) or self.values[feature].shape != (int(lengths.sum()),) or bool((lengths < 0).any()):
                raise DataError(
                    f"sample of feature {feature!r}: lengths of shape {lengths.shape} with sum {int(lengths.sum())} and values of shape "
                    f"{self.values[feature].shape} do not describe {self.num_samples} inputs"
                )

    def input_of_id(self, feature: str) -> np.ndarray:
        """Which input each id of a feature belongs to: int64 [ids of the feature], ascending."""
        return np.repeat(np.arange(self.num_samples), self.lengths[feature])
