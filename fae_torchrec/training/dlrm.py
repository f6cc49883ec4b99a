"""TorchRec's DLRM, stock from end to end, built from sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.training.model_spec import ModelSpec, build_model


def dlrm(spec: ModelSpec) -> DLRMTrain:
    """The model factory of a DLRM with its training loss, one table `t_<feature>` per feature.

    Args:
        spec: num_dense at least 1; `dense_arch` ends in `embedding_dim`, `over_arch` has at least two widths and ends in 1.

    Raises:
        ConfigError: the over MLP has fewer than two layers, which TorchRec's DLRM refuses.
    """
    if len(spec.over_arch) < 2:
        raise ConfigError(f"over_arch: received {list(spec.over_arch)}; DLRM needs at least two layers, such as [64, 1]")
    tables = [
        EmbeddingBagConfig(name=f"t_{feature}", num_embeddings=count, embedding_dim=spec.embedding_dim, feature_names=[feature])
        for feature, count in spec.rows.items()
    ]
    model = DLRM(
        embedding_bag_collection=EmbeddingBagCollection(tables=tables, device=spec.device),
        dense_in_features=spec.num_dense,
        dense_arch_layer_sizes=list(spec.dense_arch),
        over_arch_layer_sizes=list(spec.over_arch),
    )
    return DLRMTrain(model)


def build_dlrm(
    rows: Mapping[str, int],
    num_dense: int,
    embedding_dim: int,
    dense_arch: Sequence[int],
    over_arch: Sequence[int],
    optimizer: Optimizer,
    learning_rate: float,
    seed: int,
    device: torch.device | None = None,
) -> DLRMTrain:
    """Builds that DLRM with its tables marked; arguments and errors as of `ModelSpec` and `build_model`."""
    spec = ModelSpec(rows, num_dense, embedding_dim, tuple(dense_arch), tuple(over_arch), device=device or torch.device("cpu"))
    return cast(DLRMTrain, build_model(dlrm, spec, optimizer, learning_rate, seed))
