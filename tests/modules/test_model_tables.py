"""model_tables: the tables of a model, their dtypes and optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import Optimizer, TableSpec
from fae_torchrec.modules.model_tables import COLLECTIONS, SHARDED_WHOLE, model_tables, sharded_modules

META = torch.device("meta")


def _ebc(*names: str, dtype: DataType = DataType.FP32, weighted: bool = False) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=3 + i, embedding_dim=4, feature_names=[f"f{name}", "shared"], data_type=dtype)
        for i, name in enumerate(names)
    ]
    return EmbeddingBagCollection(tables=tables, is_weighted=weighted, device=META)


def _ec(*names: str) -> EmbeddingCollection:
    tables = [EmbeddingConfig(name=name, num_embeddings=5, embedding_dim=4, feature_names=[f"f{name}"]) for name in names]
    return EmbeddingCollection(tables=tables, device=META)


def _with_feature_processors(name: str) -> FeatureProcessedEmbeddingBagCollection:
    processors = PositionWeightedModuleCollection({f"f{name}": 3, "shared": 3}, device=META)
    return FeatureProcessedEmbeddingBagCollection(_ebc(name, weighted=True), processors)


def test_every_collection_in_order() -> None:
    parts = {"z": _ebc("b", "a"), "dense": nn.Linear(1, 1), "y": nn.Sequential(_ec("d")), "x": _ebc("c", dtype=DataType.FP16)}
    tables = model_tables(nn.ModuleDict(parts), Optimizer.ROWWISE_ADAGRAD)
    assert tables.names == ("b", "a", "d", "c")
    assert tables["a"] == TableSpec("a", 4, 4, ("fa", "shared"), "fp32", Optimizer.ROWWISE_ADAGRAD)
    assert tables["d"] == TableSpec("d", 5, 4, ("fd",), "fp32", Optimizer.ROWWISE_ADAGRAD, pooled=False)
    assert tables["c"].dtype == "fp16"


def test_modules_that_other_sharders_take_whole_are_not_looked_into() -> None:
    model = nn.ModuleDict({"a": _ebc("a"), "fp": _with_feature_processors("b"), "c": nn.ModuleList([_ec("c")])})
    assert model_tables(model).names == ("a", "c")
    assert [(path, type(module)) for path, module in sharded_modules(model)] == [
        ("a", EmbeddingBagCollection),
        ("fp", FeatureProcessedEmbeddingBagCollection),
        ("c.0", EmbeddingCollection),
    ]
    taken = {sharder.module_type for sharder in get_default_sharders()}
    assert {*COLLECTIONS, *SHARDED_WHOLE} == taken, "as TorchRec has them"


def test_tables_left_to_stock() -> None:
    model = nn.ModuleList([_ebc("a", "b", dtype=DataType.INT8), _ec("c", "d")])
    assert model_tables(model, leave=("a", "b", "d")).names == ("c",), "nor does their dtype matter"
    with pytest.raises(ConfigError, match=r"leave out: \['e'\] are not tables of ModuleList, which has \['a', 'b', 'c', 'd'\]"):
        model_tables(model, leave=["a", "e"])
    with pytest.raises(ConfigError, match=r"no EmbeddingBagCollection or EmbeddingCollection with a table to place \(left out: \['c'\]\)"):
        model_tables(_ec("c"), leave=["c"])


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
        model_tables(nn.ModuleList([_ebc("a"), _ec("a")]))
    ebc = _ebc("a")
    apply_optimizer_in_backward(torch.optim.RMSprop, ebc.parameters(), {"lr": 0.1})
    with pytest.raises(ConfigError, match=r"table 'a' is optimized by RMSprop.* may use .*'RowWiseAdagrad'"):
        model_tables(ebc)
