"""Synthetic Taobao: a deterministic source of browsing sessions with published table sizes, fitted popularity and planted clicks.

**Popularity.** Users and items follow bounded Zipf-Mandelbrot laws (`popularity_law`) whose shifts grow with the rows, so that a share of
the bytes means the same at every scale. How many items a category has follows such a law too. An item's place in its category is its
rank's in the law of all items: so that law holds whatever the categories, and a category is drawn by its number of items.

**Sessions.** A sample has one level of popularity, which its user and its items share by a survival Clayton copula, as in `synthetic`. Half
of its events are of an item that the session has seen before; a new item is in the category of the event before it 17 times of 20. That
makes 11 items and 3 categories of 21 events, in the mean at scale 1. How sessions really are is not published; these figures are made up.

**Labels.** The true click probabilities (`planted_sequence`) score an AUC of 0.80. Of the logit's variance 40 % say whether the
candidate's category occurs in the history, 35 % is a sum over the rows of the bags, 15 % is of the candidate's rows alone, 10 % dense.
One epoch of 314,573 samples at scale 3/100 brings the DLRM of taobao_synthetic.yaml to a test AUC of 0.677, TBSM (rmc1.yaml) to 0.700.

**Fit.** The coupling and the laws of users and items were fitted by Nelder-Mead to FAE's three points (Fig. 5), by the closed form
(`taobao_access`) and by counts of 5, 10 and 20 samples a user at once. Residuals (`python benchmarks/synthetic_fit.py` for those that are
counted: threshold selection, hot inputs on other samples), in percentage points:

                                   Taobao 15 %    39 %    80 %
            law, scale 1/10               -0.4    +2.2    +0.7
            law, scales 3/10 and 1        -0.4    +2.6    +0.7
      2,000,000 counted at 1/10           -0.5    +1.4    -1.9
      1,000,000 counted at 1/10           -0.6    +1.1    -3.1
        500,000 counted at 1/10           -0.7    +1.4    -5.5
        200,000 counted at 1/10           -0.9    -1.4   -22.5
             drawn independently          -1.0   -26.4   -18.8

80 % of the bytes need 80 % of the rows: a row that was not seen cannot be hot. The counts saw 98, 94, 86 and 71 % of the rows, in this
order. What matters is samples per user: 1,000,000 at scale 1/10 are 10 a user, as TaobaoSource has at most 10 windows of one, and
10,000,000 at scale 1. The 519,000 samples that FAE's Table 7 allows an epoch are one for every second user: so few, here, see 43 % of the
rows and make 0.1, 15 and 19 % of other samples hot at its three points, and 0.8, 71 and 100 % of the samples that were counted. Below
scale 3/100 the categories and users, which never are fewer than 2,048, outgrow the byte shares: at 1/100 the law is 4 points below the
second point, at 1/1,000 18.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from fae_torchrec.data.generated_source import BLOCK_SAMPLES, Draw, GeneratedSource
from fae_torchrec.data.planted_sequence import PlantedSequenceModel
from fae_torchrec.data.popularity_law import PopularityLaw, coupled_survival
from fae_torchrec.data.taobao_shape import BAG, HISTORY, TAOBAO

_DATASET_WORD = 1_000  # of the random streams; those of the Criteo shapes are their places, 0 upwards


class SyntheticTaobao(GeneratedSource):
    """A ShardedSource shaped like Taobao's sequences: bags of 21 for user, item and category, one dense feature, planted labels.

    The samples are as `TaobaoSource` has them: the history's 20 events, then the candidate's; the user is repeated. Every user and item
    has its fixed popularity, every item its fixed category. A sample is a session, at one level of popularity. An event is either of an
    item seen before in the session, or of a new item: in the category of the event before it, or else in one drawn by its number of items.
    Half of the candidates go on in that way; the others are new items of any category. Unlike TaobaoSource's, samples do not come in
    pairs with the same history, and a user has as many as are drawn.

    Args:
        scale: rows as a share of the published rows, in (0, 1].
        num_samples: samples in one pass over all ranks.
        seed: names popularity, planted model and draws, 0 or more.
        split: "train" or "test".
        coupled: False draws every id by itself, from the same laws: no levels, no sessions. The negative control of the fit.

    Attributes:
        feature_names: user, item, category.
        num_dense: 1.
        num_samples: samples in one pass over all ranks.
        name: data set, scale, samples, seed and split.
        cardinalities: feature -> rows of its table.
        planted_model: the true click probabilities.

    Raises:
        ConfigError: an argument is outside its range.
    """

    def __init__(
        self,
        *,
        scale: float = 0.1,
        num_samples: int,
        seed: int = 0,
        split: Literal["train", "test"] = "train",
        coupled: bool = True,
    ) -> None:
        shape = TAOBAO
        super().__init__(shape, _DATASET_WORD, scale=scale, num_samples=num_samples, seed=seed, split=split, coupled=coupled)
        law = shape.popularity(scale)
        which = np.array([0] + [1] * BAG)  # a user and 21 items
        self._law = PopularityLaw(law.rows[which], law.exponent[which], law.shift[which])
        self._sizes = shape.category_sizes(scale)
        self._ends = self._sizes.cumsum()
        probes = self._probes()
        self.planted_model = PlantedSequenceModel.calibrated(seed, probes.ids, probes.dense, shape.click_rate)

    def category_of(self, items: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The category of each item, ids int64 of any shape."""
        back = pow(int(self._step[1]), -1, int(self._rows[1]))
        places = (items - self._offset[1]) * back % self._rows[1]
        return self._ids(2, np.searchsorted(self._ends, places, side="right"))

    def _draw(self, random: np.random.Generator) -> Draw:
        level = random.standard_gamma(1.0 / TAOBAO.coupling, size=BLOCK_SAMPLES)
        private = random.standard_exponential(size=(1 + BAG, BLOCK_SAMPLES))
        anywhere = random.integers(0, self._rows[1], size=(BAG, BLOCK_SAMPLES))
        session = random.random(size=(3, BAG, BLOCK_SAMPLES), dtype=np.float32)
        dense = random.standard_normal(size=(BLOCK_SAMPLES, self.num_dense), dtype=np.float32)
        uniform = random.random(size=BLOCK_SAMPLES)
        ranks = self._law.ranks(coupled_survival(private, level if self._coupled else None, TAOBAO.coupling))
        user, rank = ranks[0], ranks[1:]
        category = np.searchsorted(self._ends, anywhere, side="right")  # each event's own: large ones more often
        if self._coupled:
            of_item, of_category = _sessions(session)
            rank = np.take_along_axis(rank, of_item, axis=0)
            category = np.take_along_axis(category, of_category, axis=0)
        sizes = self._sizes[category]
        # An item's place in its category is its rank's in the law of all items, so that this law holds whatever the categories' sizes.
        item = self._ends[category] - sizes + rank * sizes // self._rows[1]
        ids = np.stack([np.broadcast_to(self._ids(0, user), item.shape), self._ids(1, item), self._ids(2, category)])
        return Draw(np.ascontiguousarray(ids.transpose(0, 2, 1)), dense, uniform)

    def _logits(self, draw: Draw) -> npt.NDArray[np.float64]:
        return self.planted_model.logits(draw.ids, draw.dense)

    def _ids(self, table: int, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Scatters a table's rows: hot ones lie all over it."""
        ids: npt.NDArray[np.int64] = (numbers * self._step[table] + self._offset[table]) % self._rows[table]
        return ids


def _sessions(uniform: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Which event each event of a session has its item from, and its category from.

    Args:
        uniform: float32 [3, 21, n]: whether an event repeats an item, which one, and whether a new item stays in its category.

    Returns:
        (item's, category's), [21, n] each: numbers of events, not after the event itself.
    """
    repeats, stays = uniform[0] < TAOBAO.repeats, uniform[2] < TAOBAO.stays
    # The candidate either goes on (and then surely in a category of the history) or is a new item of any category.
    goes_on = uniform[2, HISTORY] < TAOBAO.follows
    repeats[HISTORY] &= goes_on
    stays[HISTORY] = goes_on
    of_item = np.zeros(repeats.shape, dtype=np.intp)
    of_category = np.zeros_like(of_item)
    for event in range(1, BAG):
        earlier = (uniform[1, event] * np.float32(event)).astype(np.intp)[None]
        np.minimum(earlier, event - 1, out=earlier)
        again = repeats[event]
        of_item[event] = np.where(again, np.take_along_axis(of_item, earlier, axis=0)[0], event)
        new = np.where(stays[event], of_category[event - 1], event)
        of_category[event] = np.where(again, np.take_along_axis(of_category, earlier, axis=0)[0], new)
    return of_item, of_category
