"""The planted click model of the synthetic data: true click probabilities from hashed row effects, so that AUC means something."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LOGIT_DEVIATION = 1.35
"""Standard deviation of the true logit over samples; with 25 % clicks the true probabilities score an AUC of about 0.80."""

# Shares of the logit's variance: row effects (what embeddings must learn), products of two tables' row effects (what DLRM's dot
# interactions are for) and dense features.
_ROW_SHARE, _PAIR_SHARE, _DENSE_SHARE = 0.70, 0.10, 0.20
# Effects of tables small enough to be always hot count half, so that most of the signal sits in tables that a placement may split.
_TINY_ROWS, _TINY_WEIGHT = 1_024, 0.5

_MIX_1, _MIX_2, _STEP = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)
_UINT32 = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, eq=False)
class PlantedModel:
    """True logits as a function of ids and dense features; row effects are hashed from the id, so no row is ever stored.

    logit = bias + LOGIT_DEVIATION * (rows + pairs + dense), where `rows` adds one effect per looked-up row, `pairs` multiplies a second
    effect of neighbouring large tables, `dense` is linear with one product (of one column: its square). Each part is centred and scaled on
    a calibration sample, so that click rate and difficulty hold at every scale and seed.

    Attributes:
        rows: rows per table, int64 [F].
        seed: two seeds give two unrelated models.
        centre: means of the three parts over the calibration sample.
        spread: standard deviations of the three parts over the calibration sample.
        bias: the logit of an average sample.
    """

    rows: npt.NDArray[np.int64]
    seed: int
    centre: npt.NDArray[np.float64]
    spread: npt.NDArray[np.float64]
    bias: float

    @classmethod
    def calibrated(
        cls, rows: npt.NDArray[np.int64], seed: int, ids: npt.NDArray[np.int64], dense: npt.NDArray[np.float32], click_rate: float
    ) -> PlantedModel:
        """A model whose mean click probability is `click_rate` over the given sample.

        Args:
            rows: rows per table, int64 [F].
            seed: names the model.
            ids: int64 [F, N].
            dense: float32 [N, D].
            click_rate: mean click probability, in (0, 1).
        """
        raw = cls(rows, seed, np.zeros(3), np.ones(3), 0.0)
        parts = raw._parts(ids, dense)
        scaled = cls(rows, seed, parts.mean(axis=1), np.maximum(parts.std(axis=1), 1e-9), 0.0)
        logits = scaled.logits(ids, dense)
        low, high = -30.0, 30.0
        for _ in range(60):  # bisection: the mean probability rises with the bias
            bias = (low + high) / 2
            low, high = (bias, high) if sigmoid(logits + bias).mean() < click_rate else (low, bias)
        return cls(rows, seed, scaled.centre, scaled.spread, (low + high) / 2)

    def logits(self, ids: npt.NDArray[np.int64], dense: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """True logits, float64 [N], of ids int64 [F, N] and dense float32 [N, D]."""
        parts = (self._parts(ids, dense) - self.centre[:, None]) / self.spread[:, None]
        shares = np.sqrt(np.array([_ROW_SHARE, _PAIR_SHARE, _DENSE_SHARE]))
        return self.bias + LOGIT_DEVIATION * np.asarray(shares @ parts, dtype=np.float64)

    def _parts(self, ids: npt.NDArray[np.int64], dense: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """The three parts before centring and scaling, float64 [3, N]."""
        tables, samples = ids.shape
        first, second = self._effects(ids)
        large = np.flatnonzero(self.rows > _TINY_ROWS)
        weight = np.where(self.rows > _TINY_ROWS, 1.0, _TINY_WEIGHT)
        pairs = np.einsum("fn,fn->n", second[large[:-1]], second[large[1:]]) if len(large) > 1 else np.zeros(samples)
        random = np.random.Generator(np.random.Philox(key=[self.seed, tables]))
        linear = dense @ random.uniform(-1.0, 1.0, size=(dense.shape[1],)).astype(np.float32)
        return np.stack([weight @ first, pairs, linear + dense[:, 0] * dense[:, min(1, dense.shape[1] - 1)]])

    def _effects(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Two hashed effects per looked-up row, uniform with mean 0, each float64 [F, N] (splitmix64's finaliser over table and id)."""
        table = np.arange(1, ids.shape[0] + 1, dtype=np.uint64)[:, None] << np.uint64(40)
        with np.errstate(over="ignore"):
            bits = (ids.astype(np.uint64) + table + (np.uint64(self.seed) << np.uint64(46))) * _STEP
            bits ^= bits >> np.uint64(30)
            bits *= _MIX_1
            bits ^= bits >> np.uint64(27)
            bits *= _MIX_2
            bits ^= bits >> np.uint64(31)
        high, low = (bits >> np.uint64(32)).astype(np.float64), (bits & _UINT32).astype(np.float64)
        return high * 2.0**-31 - 1.0, low * 2.0**-31 - 1.0


def sigmoid(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Click probabilities of logits; safe for the range that the planted model makes."""
    return np.asarray(1.0 / (1.0 + np.exp(-logits)), dtype=np.float64)
