"""Batches made of arrays: what TorchRec sees in them."""

from __future__ import annotations

import numpy as np

from fae_torchrec.data.feature_batch import bag_batch, one_hot_batch

DENSE, LABELS = np.ones((2, 3), np.float32), np.array([0, 1], np.float32)


def test_one_id_per_bag() -> None:
    batch = one_hot_batch(["a", "b"], DENSE, np.array([[1, 2], [3, 4]]), LABELS)
    assert batch.sparse_features.to_dict()["b"].to_dense()[1].tolist() == [4]
    assert batch.sparse_features.stride() == 2 and batch.dense_features.shape == (2, 3) and batch.labels.tolist() == [0, 1]
    same = bag_batch(["a", "b"], DENSE, [(np.array([1, 2]), np.ones(2, np.int32)), (np.array([3, 4]), np.ones(2, np.int32))], LABELS)
    assert same.sparse_features.values().tolist() == batch.sparse_features.values().tolist()
    assert same.sparse_features.offsets().tolist() == batch.sparse_features.offsets().tolist()


def test_bags_of_any_length() -> None:
    bags = [(np.array([5, 6, 7]), np.array([0, 3], np.int32)), (np.zeros(0, np.int64), np.zeros(2, np.int32))]
    kjt = bag_batch(["a", "b"], DENSE, bags, LABELS).sparse_features
    assert [bag.tolist() for bag in kjt["a"].to_dense()] == [[], [5, 6, 7]] and kjt["b"].values().numel() == 0


def test_no_samples() -> None:
    batch = one_hot_batch(["a"], np.zeros((0, 1), np.float32), np.zeros((1, 0), np.int64), np.zeros(0, np.float32))
    assert batch.sparse_features.values().numel() == 0 and batch.sparse_features.stride() == 0
