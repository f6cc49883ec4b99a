"""Fillers have nothing in them, in exactly the form of the batches that they stand in for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.schedule import Cursor, Kind
from fae_torchrec.data.batches import HotColdBatch, HotKeyedJaggedTensor, Position, is_hot_batch
from fae_torchrec.data.filler import filler_like


def make_batch(weighted: bool = False, hot: bool = False) -> Batch:
    """Two keys, three samples: a = [1] [] [2 3], b = [4] [5] [6]; labels in float64, to see that dtypes are kept."""
    kjt = KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.tensor([1, 2, 3, 4, 5, 6]),
        lengths=torch.tensor([1, 0, 2, 1, 1, 1], dtype=torch.int32),
        weights=torch.ones(6, dtype=torch.float64) if weighted else None,
        stride=3,
    )
    return Batch(torch.ones(3, 2), HotKeyedJaggedTensor.promise(kjt) if hot else kjt, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_in_the_form_of_the_batch(weighted: bool) -> None:
    filler = filler_like(make_batch(weighted))
    kjt = filler.sparse_features
    assert (filler.num_samples, filler.weight, filler.kind, filler.position) == (0, 0.0, "mixed", None)
    assert filler.sample_numbers.shape == (0,) and filler.sample_numbers.dtype == np.int64
    assert torch.equal(filler.dense_features, torch.zeros(1, 2))
    assert filler.labels.tolist() == [0.0] and filler.labels.dtype == torch.float64
    assert (kjt.keys(), kjt.stride(), kjt.lengths().tolist(), kjt.offsets().tolist()) == (["a", "b"], 1, [0, 0], [0, 0, 0])
    assert (kjt.values().dtype, kjt.values().numel(), kjt.lengths().dtype) == (torch.int64, 0, torch.int32)
    weights = kjt.weights_or_none()
    assert (weights is not None) == weighted
    assert weights is None or (weights.numel() == 0 and weights.dtype == torch.float64)


@pytest.mark.parametrize("like_hot", [False, True])
@pytest.mark.parametrize("kind", ["hot", "cold", "mixed"])
def test_only_a_hot_filler_is_promised_to_be_hot(kind: Kind, like_hot: bool) -> None:
    position = Position(1, 2, 3, 4, Cursor(5, 6, 0, 0))
    filler = filler_like(make_batch(hot=like_hot), kind=kind, position=position)
    assert (filler.kind, filler.position, is_hot_batch(filler)) == (kind, position, kind == "hot")
    again = filler_like(filler)  # the kind is taken from what it is made like
    assert (again.kind, is_hot_batch(again)) == (kind, kind == "hot")
    moved = filler.to(torch.device("cpu"))
    assert isinstance(moved, HotColdBatch) and (moved.kind, moved.num_samples, moved.weight) == (kind, 0, 0.0)


def test_a_plain_promised_batch_has_a_hot_filler() -> None:
    assert filler_like(make_batch(hot=True)).kind == "hot"


def test_an_embedding_bag_collection_takes_it() -> None:
    tables = [EmbeddingBagConfig(name=f"t_{key}", num_embeddings=9, embedding_dim=4, feature_names=[key]) for key in ("a", "b")]
    pooled = EmbeddingBagCollection(tables=tables)(filler_like(make_batch()).sparse_features)
    assert torch.equal(pooled.values(), torch.zeros(1, 8))
