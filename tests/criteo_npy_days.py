"""Writes SyntheticCriteo samples (skewed ids, planted labels) as the npy files of Criteo Terabyte's days that TorchRec reads.

As a program: `python -m tests.criteo_npy_days FOLDER TRAIN_SAMPLES TEST_SAMPLES SCALE` prints the tables' rows, separated by commas.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from torchrec.datasets.criteo import DAYS

from fae_torchrec.data.synthetic import SyntheticCriteo


def write_days(folder: Path, train_samples: int, test_samples: int, scale: float, days: int = DAYS) -> list[int]:
    """Writes day_0 .. day_<days - 1>: the last one holds the test samples, the others share the train samples.

    Args:
        folder: where to; made if it is missing.
        train_samples: over all days but the last.
        test_samples: of the last day, whose first half TorchRec takes for validation and whose second half for testing.
        scale: of the large tables, as SyntheticCriteo's.
        days: files of each part.

    Returns:
        The rows of the 26 tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = SyntheticCriteo("kaggle", scale=scale, num_samples=train_samples, split="train")
    test = SyntheticCriteo("kaggle", scale=scale, num_samples=test_samples, split="test")
    for source, numbers in ((train, range(days - 1)), (test, range(days - 1, days))):
        cuts = np.linspace(0, source.num_samples, len(numbers) + 1).astype(int)
        batch = next(iter(source.batches(source.num_samples)))
        sparse = batch.sparse_features.values().numpy().reshape(26, -1).T.astype(np.int32)
        parts = {"dense": batch.dense_features.numpy(), "sparse": sparse, "labels": batch.labels.numpy().astype(np.int32)[:, None]}
        for number, (begin, end) in zip(numbers, pairwise(cuts), strict=True):
            for part, rows in parts.items():
                np.save(folder / f"day_{number}_{part}.npy", np.ascontiguousarray(rows[begin:end]))
    return list(train.cardinalities.values())


if __name__ == "__main__":
    print(",".join(map(str, write_days(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))))
