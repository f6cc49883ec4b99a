"""A stock DLRM from sizes: the same seed, the same weights; tables marked for their fused optimizer."""

from __future__ import annotations

import pytest
import torch
from torchrec.models.dlrm import DLRMTrain

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.dlrm import build_dlrm
from tests.training.small_run import ROWS, Samples, new_model


def test_seed_names_all_weights() -> None:
    torch.manual_seed(99)
    first = new_model(seed=3).state_dict()
    torch.manual_seed(100)
    torch.rand(5)
    again, other = new_model(seed=3).state_dict(), new_model(seed=4).state_dict()
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("optimizer", Optimizer)
def test_tables(optimizer: Optimizer) -> None:
    model = build_dlrm(ROWS, 3, 8, [16, 8], [4, 1], optimizer, 0.25, 0, torch.device("meta"))
    assert isinstance(model, DLRMTrain)
    tables = model_tables(model)
    assert [(t.name, t.rows, t.dim, t.feature_names, t.optimizer) for t in tables] == [
        (f"t_{feature}", rows, 8, (feature,), optimizer) for feature, rows in ROWS.items()
    ]
    for table in model.model.sparse_arch.parameters():
        assert table.device.type == "meta"
        assert table._optimizer_kwargs == [{"lr": 0.25}]
    assert not any(hasattr(p, "_optimizer_classes") for name, p in model.named_parameters() if "embedding_bags" not in name)


def test_forward_and_layers() -> None:
    model = new_model()
    batch = next(Samples(5).batches(5))
    loss, (detached, logits, labels) = model(batch)
    assert loss == detached and logits.shape == labels.shape == (5,)
    assert [tuple(p.shape) for n, p in model.named_parameters() if "dense_arch" in n and "weight" in n] == [(8, 3), (4, 8)]
    assert [p.shape[0] for n, p in model.named_parameters() if "over_arch" in n and "weight" in n] == [8, 1]


@pytest.mark.parametrize("over_arch", [[], [1]])
def test_too_few_layers(over_arch: list[int]) -> None:
    with pytest.raises(ConfigError, match="at least two layers"):
        build_dlrm(ROWS, 3, 4, [8, 4], over_arch, Optimizer.SGD, 0.1, 0)
