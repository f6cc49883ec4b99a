"""TorchRec's DLRM, stock from end to end, built from sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import Optimizer

_OPTIMIZERS: Mapping[Optimizer, type[torch.optim.Optimizer]] = {
    Optimizer.SGD: torch.optim.SGD,
    Optimizer.ADAGRAD: torch.optim.Adagrad,
    Optimizer.ROWWISE_ADAGRAD: RowWiseAdagrad,
    Optimizer.ADAM: torch.optim.Adam,
}


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
    """Builds a DLRM with its training loss, one table `t_<feature>` per feature, fused optimizers marked.

    Args:
        rows: feature -> rows of its table, in the order of the features.
        num_dense: dense columns, at least 1.
        embedding_dim: columns of every table.
        dense_arch: widths of the dense MLP; the last is `embedding_dim`.
        over_arch: widths of the over MLP, at least two; the last is 1.
        optimizer: fused into the tables' backward.
        learning_rate: of the tables.
        seed: of all weights.
        device: where the unsharded tables lie; "meta" to plan without memory.

    Raises:
        ConfigError: the over MLP has fewer than two layers, which TorchRec's DLRM refuses.
    """
    if len(over_arch) < 2:
        raise ConfigError(f"over_arch: received {list(over_arch)}; DLRM needs at least two layers, such as [64, 1]")
    torch.manual_seed(seed)
    tables = [
        EmbeddingBagConfig(name=f"t_{feature}", num_embeddings=count, embedding_dim=embedding_dim, feature_names=[feature])
        for feature, count in rows.items()
    ]
    model = DLRM(
        embedding_bag_collection=EmbeddingBagCollection(tables=tables, device=device or torch.device("cpu")),
        dense_in_features=num_dense,
        dense_arch_layer_sizes=list(dense_arch),
        over_arch_layer_sizes=list(over_arch),
    )
    apply_optimizer_in_backward(_OPTIMIZERS[optimizer], model.sparse_arch.parameters(), {"lr": learning_rate})
    return DLRMTrain(model)
