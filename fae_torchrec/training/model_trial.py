"""A model tried on a few samples, with tables of one row: what it gives, and how many multiplications a sample takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.training.model_spec import failed


def try_model(model: nn.Module, batch: Batch) -> float:
    """Runs a train module forward once.

    Args:
        model: unsharded, on the CPU; a row of each table is enough.
        batch: samples; their ids are replaced by 0.

    Returns:
        Multiplications of one sample's forward, of matrix products and convolutions (those that torch's FlopCounterMode knows).

    Raises:
        ConfigError: it failed, or what it gives is not (loss, (loss, logits, labels)) as `evaluate` takes it.
    """
    features = batch.sparse_features
    ids = KeyedJaggedTensor(features.keys(), torch.zeros_like(features.values()), features.weights_or_none(), lengths=features.lengths())
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            given = model(Batch(batch.dense_features, ids, batch.labels))
    except Exception as error:  # whatever somebody else's code may raise
        raise failed(error, f"its forward failed on {batch.labels.numel()} samples") from error
    _check_output(given, batch.labels.numel())
    multiplications: float = counter.get_total_flops() / 2 / batch.labels.numel()
    return multiplications


def _check_output(given: Any, samples: int) -> None:
    wanted = (
        f"it must give (loss, (loss, logits, labels)), a scalar loss with a gradient, and logits and labels of shape [{samples}] for "
        f"{samples} samples, as TorchRec's DLRMTrain does"
    )
    pair = isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], (tuple, list)) and len(given[1]) == 3
    if not pair or not all(isinstance(part, torch.Tensor) for part in (given[0], *given[1])):
        raise ConfigError(f"its forward gave {_described(given)}; {wanted}")
    loss, (_, logits, labels) = given
    if loss.dim() or not loss.requires_grad or logits.shape != (samples,) or labels.shape != (samples,):
        raise ConfigError(f"its forward gave {_described(given)}; {wanted}")


def _described(given: Any) -> str:
    """Types and shapes of nested tuples."""
    if isinstance(given, (tuple, list)):
        return f"({', '.join(map(_described, given))})"
    if isinstance(given, torch.Tensor):
        return f"a tensor {list(given.shape)}{'' if given.requires_grad or not given.is_floating_point() else ' without gradient'}"
    return type(given).__name__
