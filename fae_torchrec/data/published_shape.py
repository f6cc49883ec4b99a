"""What every generated data set takes from what is published of the real one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

KEEP_ROWS = 2_048
"""Tables of at most this many published rows keep their size at every scale, and no larger table shrinks below it: real small tables
(weekday, country, ad format) do not shrink with the traffic."""


@dataclass(frozen=True, kw_only=True)
class PublishedShape:
    """What is published of a data set, as far as the generator knows it.

    Attributes:
        title: the data set's name, for texts that say "synthetic" before it.
        feature_names: the sparse features, as the source of the real files has them.
        num_dense: dense features.
        published_rows: rows per table at scale 1, in the order of the features.
        embedding_dim: weights per row in FAE's experiments (its byte shares assume it).
        published_points: FAE Fig. 5: (hot bytes as a share of all table bytes, share of inputs that are all hot).
        click_rate: share of positive labels.
    """

    title: str
    feature_names: tuple[str, ...]
    num_dense: int
    published_rows: tuple[int, ...]
    embedding_dim: int
    published_points: tuple[tuple[float, float], ...]
    click_rate: float

    def rows(self, scale: float) -> npt.NDArray[np.int64]:
        """Rows per table at `scale`, int64 [F]: published rows times scale, but see `KEEP_ROWS`; never above published."""
        published = np.asarray(self.published_rows, dtype=np.int64)
        scaled = np.maximum(np.rint(published * scale).astype(np.int64), KEEP_ROWS)
        rows: npt.NDArray[np.int64] = np.minimum(published, scaled)
        return rows
