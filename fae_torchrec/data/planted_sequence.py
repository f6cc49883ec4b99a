"""The planted click model of sequences: does the candidate fit the history, and what do the rows of the bags say?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fae_torchrec.data.planted_model import LogitMix, dense_effects, row_effects

# Shares of the logit's variance. The first is what attention over the history is for. Rows of pooled bags say the second, so that a DLRM,
# which sums a bag, learns it too. The third is of the candidate alone: a sum hides it among the history's. The last is dense.
_SHARES = (0.40, 0.35, 0.15, 0.10)
# Of the rows' part, by table: users are seen too seldom to learn much of them from one epoch.
_ROW_WEIGHTS = {"user": 0.5, "item": 1.0, "category": 1.5}


@dataclass(frozen=True)
class PlantedSequenceModel:
    """True logits of (user, item, category) sequences whose last event is the candidate's.

    logit = bias + LOGIT_DEVIATION * (fit + rows + candidate + dense): `fit` is whether the candidate's category occurs in the history;
    `rows` adds one effect per looked-up row of the three bags, a row looked up twice counting twice; `candidate` adds a second effect of
    the candidate's item and category; `dense` is as in `PlantedModel`. Each part is centred and scaled on a calibration sample.

    Attributes:
        seed: two seeds give two unrelated models.
        mix: how the parts make the logit.
    """

    seed: int
    mix: LogitMix

    @classmethod
    def calibrated(cls, seed: int, ids: npt.NDArray[np.int64], dense: npt.NDArray[np.float32], click_rate: float) -> PlantedSequenceModel:
        """A model whose mean click probability is `click_rate` over the given sample.

        Args:
            seed: names the model.
            ids: int64 [3, N, L] of user, item, category; the user is the same in all L events.
            dense: float32 [N, D].
            click_rate: mean click probability, in (0, 1).
        """
        return cls(seed, LogitMix.calibrated(_SHARES, _parts(seed, ids, dense), click_rate))

    def logits(self, ids: npt.NDArray[np.int64], dense: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """True logits, float64 [N], of ids int64 [3, N, L] and dense float32 [N, D]."""
        return self.mix.logits(_parts(self.seed, ids, dense))


def fits(categories: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether the last of each row's categories occurs before it too: bool [N] of int64 [N, L]."""
    found: npt.NDArray[np.bool_] = (categories[:, :-1] == categories[:, -1:]).any(axis=1)
    return found


def _parts(seed: int, ids: npt.NDArray[np.int64], dense: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The four parts before centring and scaling, float64 [4, N]."""
    user, _ = row_effects(ids[0, :, 0], np.array([0]), seed)
    first, second = row_effects(ids[1:], np.array([1, 2])[:, None, None], seed)
    weight = _ROW_WEIGHTS
    sums = first.sum(axis=2)
    rows = ids.shape[2] ** 0.5 * weight["user"] * user + weight["item"] * sums[0] + weight["category"] * sums[1]
    return np.stack([fits(ids[2]), rows, second[:, :, -1].sum(axis=0), dense_effects(dense, ids.shape[0], seed)])
