"""The planted click model of the synthetic data: true click probabilities from hashed row effects, so that AUC means something."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LOGIT_DEVIATION = 1.35
"""Standard deviation of the true logit over samples; with 25 % clicks the true probabilities score an AUC of about 0.80."""

# Shares of the logit's variance: row effects (what embeddings must learn), products of two tables' row effects (what DLRM's dot
# interactions are for) and dense features.
_SHARES = (0.70, 0.10, 0.20)
# Effects of tables small enough to be always hot count half, so that most of the signal sits in tables that a placement may split.
_TINY_ROWS, _TINY_WEIGHT = 1_024, 0.5

_MIX_1, _MIX_2, _STEP = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)
_ONE, _UINT32 = np.uint64(1), np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, eq=False)
class LogitMix:
    """A logit as a weighted sum of parts that are each centred and scaled: bias + LOGIT_DEVIATION * sum of sqrt(share) * part.

    Attributes:
        shares: of the logit's variance, one for each part; they add up to 1.
        centre: means of the parts over the calibration sample, float64 [P].
        spread: standard deviations of the parts over the calibration sample, float64 [P].
        bias: the logit of an average sample.
    """

    shares: tuple[float, ...]
    centre: npt.NDArray[np.float64]
    spread: npt.NDArray[np.float64]
    bias: float

    @classmethod
    def calibrated(cls, shares: tuple[float, ...], parts: npt.NDArray[np.float64], click_rate: float) -> LogitMix:
        """A mix whose mean click probability over the sample with these parts, float64 [P, N], is `click_rate`, in (0, 1)."""
        scaled = cls(shares, parts.mean(axis=1), np.maximum(parts.std(axis=1), 1e-9), 0.0)
        logits = scaled.logits(parts)
        low, high = -30.0, 30.0
        for _ in range(60):  # bisection: the mean probability rises with the bias
            bias = (low + high) / 2
            low, high = (bias, high) if sigmoid(logits + bias).mean() < click_rate else (low, bias)
        return cls(shares, scaled.centre, scaled.spread, (low + high) / 2)

    def logits(self, parts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Logits, float64 [N], of parts float64 [P, N]."""
        scaled = (parts - self.centre[:, None]) / self.spread[:, None]
        return self.bias + LOGIT_DEVIATION * np.asarray(np.sqrt(np.array(self.shares)) @ scaled, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class PlantedModel:
    """True logits as a function of ids and dense features; row effects are hashed from the id, so no row is ever stored.

    Of the logit's three parts, `rows` adds one effect per looked-up row, `pairs` multiplies a second effect of neighbouring large tables,
    `dense` is linear with one product (of one column: its square). Each part is centred and scaled on a calibration sample, so that click
    rate and difficulty hold at every scale and seed.

    Attributes:
        rows: rows per table, int64 [F].
        seed: two seeds give two unrelated models.
        mix: how the parts make the logit.
    """

    rows: npt.NDArray[np.int64]
    seed: int
    mix: LogitMix

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
        return cls(rows, seed, LogitMix.calibrated(_SHARES, _parts(rows, seed, ids, dense), click_rate))

    def logits(self, ids: npt.NDArray[np.int64], dense: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """True logits, float64 [N], of ids int64 [F, N] and dense float32 [N, D]."""
        return self.mix.logits(_parts(self.rows, self.seed, ids, dense))


def _parts(rows: npt.NDArray[np.int64], seed: int, ids: npt.NDArray[np.int64], dense: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The three parts before centring and scaling, float64 [3, N]."""
    tables, samples = ids.shape
    first, second = row_effects(ids, np.arange(tables)[:, None], seed)
    large = np.flatnonzero(rows > _TINY_ROWS)
    weight = np.where(rows > _TINY_ROWS, 1.0, _TINY_WEIGHT)
    pairs = np.einsum("fn,fn->n", second[large[:-1]], second[large[1:]]) if len(large) > 1 else np.zeros(samples)
    return np.stack([weight @ first, pairs, dense_effects(dense, tables, seed)])


def row_effects(
    ids: npt.NDArray[np.int64], table: npt.NDArray[np.int64], seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Two hashed effects per looked-up row, uniform in (-1, 1) (splitmix64's finaliser over table and id).

    Args:
        ids: int64, of any shape.
        table: int64, the number of each id's table; of a shape that broadcasts to that of `ids`.
        seed: two seeds give unrelated effects.

    Returns:
        float64 each, of the shape of `ids`.
    """
    with np.errstate(over="ignore"):
        bits = (ids.astype(np.uint64) + (table.astype(np.uint64) + _ONE << np.uint64(40)) + (np.uint64(seed) << np.uint64(46))) * _STEP
        bits ^= bits >> np.uint64(30)
        bits *= _MIX_1
        bits ^= bits >> np.uint64(27)
        bits *= _MIX_2
        bits ^= bits >> np.uint64(31)
    high, low = (bits >> np.uint64(32)).astype(np.float64), (bits & _UINT32).astype(np.float64)
    return high * 2.0**-31 - 1.0, low * 2.0**-31 - 1.0


def dense_effects(dense: npt.NDArray[np.float32], tables: int, seed: int) -> npt.NDArray[np.float32]:
    """Linear in the dense features, with the product of the first two (of one column: its square): float32 [N] of float32 [N, D]."""
    random = np.random.Generator(np.random.Philox(key=[seed, tables]))
    linear = dense @ random.uniform(-1.0, 1.0, size=(dense.shape[1],)).astype(np.float32)
    effects: npt.NDArray[np.float32] = linear + dense[:, 0] * dense[:, min(1, dense.shape[1] - 1)]
    return effects


def sigmoid(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Click probabilities of logits; safe for the range that the planted model makes."""
    return np.asarray(1.0 / (1.0 + np.exp(-logits)), dtype=np.float64)
