"""model_tables: the tables of a model, their dtypes and optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import Optimizer, TableSpec
from fae_torchrec.modules.model_tables import model_tables


def _ebc(*names: str, dtype: DataType = DataType.FP32) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=3 + i, embedding_dim=4, feature_names=[f"f{name}", "shared"], data_type=dtype)
        for i, name in enumerate(names)
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


def test_every_collection_in_order() -> None:
    model = nn.ModuleDict({"z": _ebc("b", "a"), "dense": nn.Linear(1, 1), "y": nn.Sequential(_ebc("c", dtype=DataType.FP16))})
    tables = model_tables(model, Optimizer.ROWWISE_ADAGRAD)
    assert tables.names == ("b", "a", "c")
    assert tables["a"] == TableSpec("a", 4, 4, ("fa", "shared"), "fp32", Optimizer.ROWWISE_ADAGRAD)
    assert tables["c"].dtype == "fp16"


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.SGD, Optimizer.SGD),
        (torch.optim.Adagrad, Optimizer.ADAGRAD),
        (RowWiseAdagrad, Optimizer.ROWWISE_ADAGRAD),
        (torch.optim.Adam, Optimizer.ADAM),
    ],
)
def test_marks_of_apply_optimizer_in_backward(optimizer: type[torch.optim.Optimizer], expected: Optimizer) -> None:
    ebc = _ebc("a", "b")
    assert {table.optimizer for table in model_tables(ebc)} == {Optimizer.SGD}, "TorchRec's default"
    apply_optimizer_in_backward(optimizer, ebc.embedding_bags["a"].parameters(), {"lr": 0.1})
    assert [table.optimizer for table in model_tables(ebc, Optimizer.SGD)] == [expected, Optimizer.SGD]


def test_what_is_not_supported_is_named() -> None:
    with pytest.raises(ConfigError, match="Linear has no EmbeddingBagCollection"):
        model_tables(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"table 'a' has data type INT8; hot/cold tables may have \['FP32', 'FP16', 'BF16'\]"):
        model_tables(_ebc("a", dtype=DataType.INT8))
    with pytest.raises(ConfigError, match=r"unique.*\['a'\]"):
        model_tables(nn.ModuleList([_ebc("a"), _ebc("a")]))
    ebc = _ebc("a")
    apply_optimizer_in_backward(torch.optim.RMSprop, ebc.parameters(), {"lr": 0.1})
    with pytest.raises(ConfigError, match=r"table 'a' is optimized by RMSprop.* may use .*'RowWiseAdagrad'"):
        model_tables(ebc)
