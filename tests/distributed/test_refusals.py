"""What hot/cold tables refuse at planning time: each with the table's name and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import BoundsCheckMode
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec
from fae_torchrec.distributed import refusals
from fae_torchrec.distributed.input_error import input_error
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders

META = torch.device("meta")
REMEDY = r".*leave the table to stock sharding \(stock_tables\), or plan this model with EmbeddingShardingPlanner"


def topology(device: str = "cpu") -> Topology:
    return Topology(world_size=1, local_world_size=1, compute_device=device)


def placed(*names: str, hot: int = 20) -> RowPlacement:
    tables = TableSet(tuple(TableSpec(name, 40, 4, (f"f{name}",)) for name in names))
    hot_ids = {name: np.arange(hot) for name in names}
    return RowPlacement(tables=tables, hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


def pooled(*, weighted: bool = False, **config: Any) -> nn.Module:
    """A model of one pooled table "t" of 40 rows."""
    table = EmbeddingBagConfig(name="t", num_embeddings=40, embedding_dim=4, feature_names=["ft"], **config)
    return nn.ModuleDict({"ebc": EmbeddingBagCollection([table], is_weighted=weighted, device=META)})


def unpooled(**how: Any) -> nn.Module:
    """A model of one unpooled table "t" of 40 rows."""
    table = EmbeddingConfig(
        name="t", num_embeddings=40, embedding_dim=4, feature_names=["ft"], enable_embedding_update=how.pop("writes", False)
    )
    return nn.ModuleDict({"ec": EmbeddingCollection([table], device=META, **how)})


def refused(model: nn.Module, message: str, device: str = "cpu", fused_params: dict[str, Any] | None = None) -> None:
    with pytest.raises(PlannerError, match=message) as error:
        FAEShardingPlanner(placed("t"), topology(device)).plan(model, get_fae_sharders(fused_params))
    assert error.value.error_type is input_error("").error_type


def accepted(model: nn.Module, device: str = "cpu", fused_params: dict[str, Any] | None = None) -> None:
    plan = FAEShardingPlanner(placed("t"), topology(device)).plan(model, get_fae_sharders(fused_params))
    assert [type(part) for part in plan.plan.values()] == [FAEModuleShardingPlan]


def test_weighted_mean() -> None:
    mean = PoolingType.MEAN
    refused(pooled(weighted=True, pooling=mean), r"ebc: tables \['t'\] pool weighted ids by MEAN.*use SUM, or" + REMEDY)
    accepted(pooled(weighted=False, pooling=mean))
    accepted(pooled(weighted=True))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: pooled(data_type=DataType.INT8), r"table 't' has data type INT8; hot/cold tables may have \['FP32', 'FP16', 'BF16'\]"),
        (lambda: pooled(use_virtual_table=True), "table 't' is a virtual table"),
        (lambda: pooled(num_embeddings_post_pruning=0), "table 't' is pruned"),
        (lambda: pooled(stash_weights=True), "table 't' stashes its weights"),
        (lambda: unpooled(writes=True), "table 't' lets its rows be written between steps"),
        (lambda: unpooled(need_indices=True), r"ec: tables \['t'\] are of an EmbeddingCollection with need_indices=True"),
    ],
)
def test_configs(model: Callable[[], nn.Module], message: str) -> None:
    refused(model(), message + REMEDY)


def test_configs_that_change_no_result() -> None:
    for dtype in (DataType.FP32, DataType.FP16, DataType.BF16):
        accepted(pooled(data_type=dtype, weight_init_min=0.0, weight_init_max=1.0, init_fn=nn.init.zeros_, need_pos=True))
    accepted(unpooled(use_gather_select=True))


def test_the_same_table_left_to_stock() -> None:
    table = EmbeddingBagConfig(name="int8", num_embeddings=9, embedding_dim=4, feature_names=["f"], data_type=DataType.INT8)
    model = pooled()
    model["ebc"] = EmbeddingBagCollection([*model["ebc"].embedding_bag_configs(), table], device=META)
    refused(model, "table 'int8' has data type INT8" + REMEDY)
    plan = FAEShardingPlanner(placed("t"), topology(), stock_tables=["int8"]).plan(model, get_fae_sharders())
    assert list(plan.plan["ebc"]) == ["t", "int8"]


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"batch_sizes": [8]}, r"the constraints of table 't' declare a batch size per feature \(variable batch\): batch_sizes=\[8\]"),
        ({"num_poolings": [2.0]}, "the constraints of table 't' declare several poolings per sample"),
        ({"use_virtual_table": True}, "the constraints of table 't' make it a virtual table"),
        ({"output_dtype": DataType.FP16}, "the constraints of table 't' set output_dtype=.*would miss its hot rows; set it for all tables"),
        ({"stochastic_rounding": False}, "set stochastic_rounding=False, which would miss its hot rows"),
        ({"bounds_check_mode": BoundsCheckMode.FATAL}, "set bounds_check_mode="),
    ],
)
def test_constraints(constraint: dict[str, Any], message: str) -> None:
    with pytest.raises(PlannerError, match=message + REMEDY):
        FAEShardingPlanner(placed("t"), topology(), constraints={"t": ParameterConstraints(**constraint)})
    FAEShardingPlanner(placed("t"), topology(), constraints={"of stock": ParameterConstraints(**constraint)})
    if next(iter(constraint)) in ("output_dtype", "stochastic_rounding", "bounds_check_mode"):
        FAEShardingPlanner(placed("t", hot=0), topology(), constraints={"t": ParameterConstraints(**constraint)})


def _marked(optimizer: type[torch.optim.Optimizer]) -> nn.Module:
    model = pooled()
    apply_optimizer_in_backward(optimizer, model.parameters(), {"lr": 0.1})
    return model


def test_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    adam = r"table 't' is optimized by adam, .* no fused kernel on the CPU.* one of \['adagrad', 'rowwise_adagrad', 'sgd'\]"
    refused(_marked(torch.optim.Adam), adam)
    refused(pooled(), adam, fused_params={"optimizer": EmbOptimType.ADAM})
    lamb = r"tables \['t'\] carry no mark of apply_optimizer_in_backward and the sharder's fused_params name the optimizer 'lamb'"
    refused(pooled(), lamb + REMEDY, fused_params={"optimizer": EmbOptimType.LAMB})
    refused(_marked(torch.optim.RMSprop), r"table 't' is optimized by RMSprop .*; hot/cold tables may use .*'RowWiseAdagrad'" + REMEDY)

    accepted(_marked(torch.optim.Adam), device="cuda")
    accepted(_marked(torch.optim.Adagrad), fused_params={"optimizer": EmbOptimType.LAMB})
    accepted(pooled(), fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD})
    all_cold = FAEShardingPlanner(placed("t", hot=0), topology()).plan(_marked(torch.optim.Adam), get_fae_sharders())
    assert list(all_cold.plan["ebc"]) == ["t"], "what stock does with it is stock's"
    monkeypatch.setattr(refusals, "_cpu_kernel_lacks", lambda optimizer: False)
    accepted(_marked(torch.optim.Adam))


def test_fbgemm_has_the_cpu_kernels_that_we_say() -> None:
    """Every optimizer but Adam makes a fused kernel on the CPU; this fails when FBGEMM gets one for Adam too."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

    names = {Optimizer.SGD: "EXACT_SGD", Optimizer.ADAGRAD: "EXACT_ADAGRAD", Optimizer.ROWWISE_ADAGRAD: "EXACT_ROWWISE_ADAGRAD"}
    for optimizer in Optimizer:
        try:
            spec = (4, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)
            SplitTableBatchedEmbeddingBagsCodegen([spec], optimizer=EmbOptimType[names.get(optimizer, "ADAM")])
            lacks = False
        except AssertionError:
            lacks = True
        assert lacks == refusals._cpu_kernel_lacks(optimizer)


def test_tables_with_feature_processors() -> None:
    table = EmbeddingBagConfig(name="t", num_embeddings=40, embedding_dim=4, feature_names=["ft"])
    processed = FeatureProcessedEmbeddingBagCollection(
        EmbeddingBagCollection([table], is_weighted=True, device=META), PositionWeightedModuleCollection({"ft": 3}, device=META)
    )
    refused(
        nn.ModuleDict({"fp": processed}), r"tables \['t'\] of the placement belong to fp, a FeatureProcessedEmbeddingBagCollection, which"
    )

    other = EmbeddingBagConfig(name="u", num_embeddings=40, embedding_dim=4, feature_names=["fu"])
    both = nn.ModuleDict({"fp": processed, "ebc": EmbeddingBagCollection([other], device=META)})
    plan = FAEShardingPlanner(placed("u"), topology(), stock_tables=["t"]).plan(both, get_fae_sharders())
    assert {path: (type(part).__name__, list(part)) for path, part in plan.plan.items()} == {
        "fp": ("EmbeddingModuleShardingPlan", ["t"]),
        "ebc": ("FAEModuleShardingPlan", ["u"]),
    }


def test_sharders_without_ours() -> None:
    for model, name in ((pooled(), "EmbeddingBagCollection"), (unpooled(), "EmbeddingCollection")):
        others = [sharder for sharder in get_fae_sharders() if type(sharder).__name__ != f"FAE{name}Sharder"]
        with pytest.raises(PlannerError, match=rf"hold no FAE{name}Sharder.* hot tier of \['t'\] in e.*c; pass get_fae_sharders\(\)"):
            FAEShardingPlanner(placed("t"), topology()).plan(model, others)


def test_two_collections_with_a_table_of_the_same_name() -> None:
    with pytest.raises(ConfigError, match=r"table names must be unique, received more than one of \['t'\]"):
        FAEShardingPlanner(placed("t"), topology()).plan(nn.ModuleList([pooled(), unpooled()]), get_fae_sharders())
