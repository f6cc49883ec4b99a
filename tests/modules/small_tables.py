"""Tables, placements and batches that the tests of this floor share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import TableSet
from fae_torchrec.modules.model_tables import model_tables

ROWS = {"tiny": 4, "big": 12, "other": 9, "frozen": 7}
DIMS = {"tiny": 2, "big": 3, "other": 2, "frozen": 3}
# `c` feeds two tables, `big` has two features.
FEATURES = {"tiny": ["a"], "big": ["b", "c"], "other": ["c"], "frozen": ["d"]}
KEYS = ["a", "b", "c", "d"]
HOT: Mapping[str, list[int]] = {"tiny": [0, 1, 2, 3], "big": [0, 5, 11], "other": [3, 8], "frozen": []}
ALL_HOT = {name: list(range(rows)) for name, rows in ROWS.items()}
ALL_COLD: Mapping[str, list[int]] = {name: [] for name in ROWS}


def configs(
    pooling: PoolingType = PoolingType.SUM, order: tuple[str, ...] = ("big", "tiny", "frozen", "other")
) -> list[EmbeddingBagConfig]:
    """The tables, deliberately not in the order all hot, split, all cold."""
    return [
        EmbeddingBagConfig(name=name, num_embeddings=ROWS[name], embedding_dim=DIMS[name], feature_names=FEATURES[name], pooling=pooling)
        for name in order
    ]


def collection(tables: list[EmbeddingBagConfig], *, weighted: bool = False, device: str = "cpu") -> EmbeddingBagCollection:
    """A stock collection of these tables."""
    return EmbeddingBagCollection(tables=tables, is_weighted=weighted, device=torch.device(device))


def placed(tables: TableSet, hot: Mapping[str, list[int]] = HOT) -> RowPlacement:
    """A placement by hand."""
    hot_ids = {table.name: np.array(hot[table.name], dtype=np.int64) for table in tables}
    return RowPlacement(tables=tables, hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


def placement_of(tables: list[EmbeddingBagConfig], hot: Mapping[str, list[int]] = HOT) -> RowPlacement:
    """A placement by hand of the tables of a collection."""
    return placed(model_tables(collection(tables, device="meta")), hot)


def batch(
    bags: Mapping[str, list[list[int]]], *, keys: list[str] = KEYS, dtype: torch.dtype = torch.int64, weights: torch.Tensor | None = None
) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor from bags by feature."""
    values = [i for key in keys for bag in bags[key] for i in bag]
    lengths = [len(bag) for key in keys for bag in bags[key]]
    return KeyedJaggedTensor(
        list(keys), torch.tensor(values, dtype=dtype), weights, lengths=torch.tensor(lengths, dtype=torch.int32), stride=len(bags[keys[0]])
    )


def random_bags(rng: np.random.Generator, size: int, longest: int = 4) -> dict[str, list[list[int]]]:
    """Valid ids for every feature, with empty bags among them."""
    rows = {feature: min(ROWS[table] for table, features in FEATURES.items() if feature in features) for feature in KEYS}
    return {key: [rng.integers(0, rows[key], rng.integers(0, longest)).tolist() for _ in range(size)] for key in KEYS}
