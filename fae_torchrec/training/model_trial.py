"""A model tried on a few samples, with tables of one row: what it gives, on what it depends, and a sample's multiplications."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.modules.model_tables import COLLECTIONS
from fae_torchrec.training.model_spec import failed


def try_model(model: nn.Module, batch: Batch) -> float:
    """Runs a train module forward, and again with what its collections give in another order.

    Args:
        model: unsharded, on the CPU; a row of each table is enough.
        batch: samples; their ids are replaced by 0.

    Returns:
        Multiplications of one sample's forward, of matrix products and convolutions (those that torch's FlopCounterMode knows).

    Raises:
        ConfigError: it failed, or what it gives is not (loss, (loss, logits, labels)) as `evaluate` takes it, or depends on the order of a
            collection's features.
    """
    features = batch.sparse_features
    ids = KeyedJaggedTensor(features.keys(), torch.zeros_like(features.values()), features.weights_or_none(), lengths=features.lengths())
    samples = Batch(batch.dense_features, ids, batch.labels)
    counter = FlopCounterMode(display=False)
    with counter:
        given = _forward(model, samples)
    _check_output(given, batch.labels.numel())
    _check_order(model, samples, given[1][1])
    multiplications: float = counter.get_total_flops() / 2 / batch.labels.numel()
    return multiplications


def _forward(model: nn.Module, samples: Batch) -> Any:
    """What the model gives, with the same random numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return model(samples)
        except Exception as error:  # whatever somebody else's code may raise
            raise failed(error, f"its forward failed on {samples.labels.numel()} samples") from error


def _check_order(model: nn.Module, samples: Batch, logits: torch.Tensor) -> None:
    """Checks that the model takes what its collections give by name.

    The order of a KeyedTensor, and so its `values()`, is the plan's in TorchRec 1.8: table-wise, the features of rank 0's tables first.
    """
    with ExitStack() as turned:
        for module in model.modules():
            if type(module) in COLLECTIONS:
                turned.callback(module.register_forward_hook(_turned).remove)
        others = _forward(model, samples)[1][1]
    # A model that gives something else each time tells nothing.
    if not _alike(logits, others) and _alike(logits, _forward(model, samples)[1][1]):
        raise ConfigError(
            "its logits depend on the order in which a collection gives its features (as KeyedTensor.values() does), which TorchRec leaves "
            "to the sharding plan: with another placement or number of ranks the same weights are another model; take them by name, as in "
            "torch.cat([pooled[feature] for feature in features], dim=1)"
        )


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def _turned(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """A collection's output with its features in reverse."""
    if not isinstance(output, KeyedTensor):  # an EmbeddingCollection's
        return dict(reversed(output.items()))
    keys = output.keys()[::-1]
    return KeyedTensor(keys, output.length_per_key()[::-1], torch.cat([output[key] for key in keys], dim=1))


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
