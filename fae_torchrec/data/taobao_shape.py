"""The shape of Taobao's UserBehavior as FAE trains on it: published table sizes, popularity and sessions fitted to its hot inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fae_torchrec.data.popularity_law import PopularityLaw
from fae_torchrec.data.published_shape import PublishedShape
from fae_torchrec.data.taobao import FEATURES

HISTORY = 20
"""Events before the candidate."""
BAG = HISTORY + 1
"""Ids of each feature: the history's, then the candidate's."""


@dataclass(frozen=True, kw_only=True)
class TaobaoShape(PublishedShape):
    """What the generator knows about Taobao; the tables are of users, items and categories.

    Attributes:
        coupling: how strongly the popularity of a sample's user and of its items move together (theta of a survival Clayton copula).
        exponent: Zipf exponents of users and items.
        shift: Zipf-Mandelbrot shifts of users and items, as shares of their rows: so the law is the same at every scale.
        repeats: chance that an event is of an item that the session has seen before.
        stays: chance that a new item is of the category of the event before it.
        follows: share of samples whose candidate goes on with the session; the others' is a new item of any category.
        category_exponent: items per category follow a Zipf-Mandelbrot law of this exponent.
        category_shift: its shift, in categories.
    """

    coupling: float
    exponent: tuple[float, float]
    shift: tuple[float, float]
    repeats: float
    stays: float
    follows: float
    category_exponent: float
    category_shift: float

    def popularity(self, scale: float) -> PopularityLaw:
        """The laws of users and items at `scale`."""
        rows = self.rows(scale)[:2]
        return PopularityLaw(rows, np.array(self.exponent), np.array(self.shift) * rows)

    def category_sizes(self, scale: float) -> npt.NDArray[np.int64]:
        """Items of each category, the largest first, int64 [categories]; at least 1 each, and all items together."""
        _, items, categories = self.rows(scale).tolist()
        weights = (np.arange(categories) + self.category_shift) ** -self.category_exponent
        # What is left after one item for each is cut at the rounded running sums, so that the sizes add up.
        cuts = np.rint((items - categories) * weights.cumsum() / weights.sum()).astype(np.int64)
        sizes: npt.NDArray[np.int64] = -np.sort(-(1 + np.diff(cuts, prepend=0)))
        return sizes


TAOBAO = TaobaoShape(
    title="Taobao",
    feature_names=FEATURES,
    num_dense=1,
    published_rows=(987_994, 4_162_024, 9_439),
    embedding_dim=16,
    published_points=((0.15, 0.01), (0.39, 0.271), (0.80, 0.925)),
    coupling=0.407,
    exponent=(0.771, 7.499),
    shift=(0.29, 0.919),
    repeats=0.5,
    stays=0.85,
    follows=0.5,
    category_exponent=1.2,
    category_shift=30.0,
    click_rate=0.5,
)
