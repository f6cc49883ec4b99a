"""The shape of the Criteo data sets and of Avazu: published table sizes, and popularity laws fitted to FAE's published hot inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.data.avazu import FEATURES as AVAZU_FEATURES
from fae_torchrec.data.popularity_law import PopularityLaw
from fae_torchrec.data.published_shape import PublishedShape

NUM_DENSE = 13
NUM_SPARSE = 26
SPARSE_NAMES = tuple(f"cat_{i}" for i in range(NUM_SPARSE))
"""The features of all Criteo sources, as in torchrec.datasets.criteo (DEFAULT_CAT_NAMES)."""

# Distinct values of C1..C26 in the Criteo Display Advertising Challenge (Kaggle) data as facebookresearch/dlrm counts them in
# bench/dlrm_s_criteo_kaggle.sh's preprocessing (with the value for "missing"); 33,762,577 in all, as TorchRec's own DLRM example has it.
_KAGGLE_ROWS = (
    *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
    *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)

# Distinct values in days 0-23 of the Criteo Terabyte click logs without any cap, 882,774,559 in all: the counts behind MLPerf DLRM
# (its 40M cap undone) as published with NVIDIA's DeepLearningExamples DLRM ("criteo_t0") and OneFlow's and HugeCTR's DLRM examples.
_TERABYTE_UNCAPPED_ROWS = (
    *(227_605_432, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 130_229_467, 3_067_956, 405_282, 10),
    *(2_209, 11_938, 155, 4, 976, 14, 292_775_614, 40_790_948, 187_188_510, 590_152, 12_973, 108, 36),
)

# FAE trains on 266 M rows in all and does not print its per-table counts; none of the published sets adds up to that (178 M with
# NVTabular's frequency threshold of 3, 204 M with MLPerf's 40M cap, 883 M uncapped). So the cap of dlrm's --max-ind-range is placed where
# the sum is 266,000,000; it touches the four largest tables only.
_TERABYTE_MAX_ROWS = 55_256_116

# Distinct values of Avazu's 21 categorical columns over all 40,428,967 lines of train.csv, in the order of the file, 9,449,205 in all: the
# table sizes of hpcaitech/CachedEmbedding (avazu.py); public analyses of the competition's data count the same.
_AVAZU_ROWS = (
    *(7, 7, 4_737, 7_745, 26, 8_552, 559, 36, 2_686_408, 6_729_486, 8_251, 5, 4),
    *(2_626, 8, 9, 435, 4, 68, 172, 60),
)

# FAE has 9.3 M rows in all and does not print its per-table counts. As for Terabyte, a cap is placed where the sum is 9,300,000; it
# touches the largest table (device_ip) only.
_AVAZU_MAX_ROWS = 6_580_281


@dataclass(frozen=True, kw_only=True)
class CriteoShape(PublishedShape):
    """What the generator knows about one data set of one-hot samples.

    Attributes:
        coupling: how strongly the tables' tails move together (theta of a survival Clayton copula; 0 = independent).
        exponent_small: Zipf exponent of a table of 2,000 rows.
        exponent_large: Zipf exponent of a table of 2,000,000 rows; log-linear in between and a little beyond.
        least_excess: least (exponent - 1), before the spread over tables; below 0, large tables may be flatter than 1 / rank.
        shift: Zipf-Mandelbrot shift of a table of 100,000 rows, in ranks.
        shift_growth: the shift grows with rows ** shift_growth, which keeps the fit near its points from scale 1/10 to 1.
    """

    coupling: float
    exponent_small: float
    exponent_large: float
    least_excess: float
    shift: float
    shift_growth: float

    def popularity(self, scale: float) -> PopularityLaw:
        """The law of every table at `scale`: a table's exponent follows from its rows, spread over +-15 % of (exponent - 1)."""
        rows = self.rows(scale)
        size = np.clip((np.log10(rows) - 3.3) / 3.0, 0.0, 1.35)
        smooth = self.exponent_small + (self.exponent_large - self.exponent_small) * size
        # Fractions of the golden ratio: a fixed, even spread over tables without another number for each to fit.
        spread = np.arange(1, len(rows) + 1) * 0.6180339887 % 1.0 - 0.5
        exponent = 1.0 + np.maximum(smooth - 1.0, self.least_excess) * (1.0 + 0.3 * spread)
        return PopularityLaw(rows, exponent, self.shift * (rows / 1e5) ** self.shift_growth)


# Their order is part of the generated samples: a shape's place is a word of its random streams' seeds. New ones go to the end.
SHAPES: Mapping[str, CriteoShape] = {
    "kaggle": CriteoShape(
        title="Criteo kaggle",
        feature_names=SPARSE_NAMES,
        num_dense=NUM_DENSE,
        published_rows=_KAGGLE_ROWS,
        embedding_dim=16,
        published_points=((0.0020, 0.504), (0.0095, 0.651), (0.068, 0.758)),
        coupling=10.0,
        exponent_small=1.335,
        exponent_large=1.025,
        least_excess=0.02,
        shift=0.82,
        shift_growth=0.25,
        click_rate=0.25,
    ),
    "terabyte": CriteoShape(
        title="Criteo terabyte",
        feature_names=SPARSE_NAMES,
        num_dense=NUM_DENSE,
        published_rows=tuple(min(rows, _TERABYTE_MAX_ROWS) for rows in _TERABYTE_UNCAPPED_ROWS),
        embedding_dim=64,
        published_points=((0.0003, 0.526), (0.0013, 0.731), (0.0066, 0.817)),
        coupling=5.8,
        exponent_small=1.776,
        exponent_large=1.366,
        least_excess=0.02,
        shift=7.6,
        shift_growth=0.43,
        click_rate=0.25,
    ),
    "avazu": CriteoShape(
        title="Avazu",
        feature_names=AVAZU_FEATURES,
        num_dense=1,
        published_rows=tuple(min(rows, _AVAZU_MAX_ROWS) for rows in _AVAZU_ROWS),
        embedding_dim=16,
        published_points=((0.002, 0.214), (0.014, 0.442), (0.18, 0.746)),
        coupling=8.6,
        exponent_small=1.051,
        exponent_large=0.8895,
        least_excess=-0.5,  # no bound: FAE's points need large tables flatter than 1 / rank
        shift=0.155,
        shift_growth=0.71,
        click_rate=0.17,
    ),
}


def criteo_shape(dataset: str) -> CriteoShape:
    """The shape of a data set by name.

    Raises:
        ConfigError: `dataset` is not one of the known names.
    """
    if dataset not in SHAPES:
        raise ConfigError(f"synthetic dataset {dataset!r} is not one of {sorted(SHAPES)}; name one of those")
    return SHAPES[dataset]
