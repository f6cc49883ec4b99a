"""Popularity laws of generated tables: Zipf-Mandelbrot ranks in closed form, tails that move together, ids scattered over a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PopularityLaw:
    """A bounded Zipf-Mandelbrot law per table: the row of rank r (0 = most popular) has probability ~ (r + shift) ** -exponent.

    Attributes:
        rows: rows per table, int64 [F].
        exponent: float64 [F], none exactly 1.
        shift: ranks, float64 [F].
    """

    rows: npt.NDArray[np.int64]
    exponent: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]

    def ranks(self, survival: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Inverse CDF in closed form: no table of rows is ever built.

        Args:
            survival: one minus the quantile, in [0, 1]; float64 [F, B]. Overwritten.

        Returns:
            Popularity ranks, int64 [F, B], each in 0..rows-1. Uniform `survival` gives exactly the law (its density integrated over
            [r, r + 1), so that probabilities are differences of the closed-form CDF).
        """
        power = (1.0 - self.exponent)[:, None]
        end = (self.rows + self.shift)[:, None] ** power
        survival *= self.shift[:, None] ** power - end
        survival += end
        np.log(survival, out=survival)
        survival /= power
        np.exp(survival, out=survival)
        survival -= self.shift[:, None]
        ranks = survival.astype(np.int64)
        return np.clip(ranks, 0, self.rows[:, None] - 1, out=ranks)

    def tail_mass(self, table: int, rank: float) -> float:
        """Probability that an access of `table` goes to `rank` or a less popular row (the survival function)."""
        power = 1.0 - self.exponent[table]
        end = (self.rows[table] + self.shift[table]) ** power
        return float(((rank + self.shift[table]) ** power - end) / (self.shift[table] ** power - end))


def coupled_survival(private: npt.NDArray[np.float64], level: npt.NDArray[np.float64] | None, coupling: float) -> npt.NDArray[np.float64]:
    """Uniform survivals of a survival Clayton copula, (1 + E / V) ** (-1 / coupling); overwrites `private`.

    Args:
        private: standard exponentials E, float64 [F, N].
        level: the samples' levels V ~ Gamma(1 / coupling), float64 [N]; None: independent survivals.
        coupling: theta of the copula.
    """
    if level is not None:
        with np.errstate(over="ignore"):  # an overflow means the least popular row, which is right
            private /= np.maximum(level, np.finfo(np.float64).tiny)
        np.log1p(private, out=private)
        private /= coupling
    np.negative(private, out=private)
    return np.exp(private, out=private)


def affine_permutations(rows: npt.NDArray[np.int64], words: np.random.SeedSequence) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(step, offset), int64 [F] each, of the bijections rank -> (rank * step + offset) mod rows: the step is coprime to the rows.

    A step is below rows <= 2**26, so a product stays far below 2**63.
    """
    random = np.random.Generator(np.random.Philox(words))
    step, offset = random.integers(0, rows), random.integers(0, rows)
    for table in range(len(rows)):
        while np.gcd(step[table], rows[table]) != 1:  # a few tries: most numbers are coprime to a given one
            step[table] = (step[table] + 1) % rows[table] if rows[table] > 1 else 1
    return step, offset
