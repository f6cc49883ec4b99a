"""What else an EmbeddingBagCollection user has: each feature trained on mixed and promised-hot batches equals stock sharding."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.datasets.utils import Batch
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from tests.distributed.feature_model import HOT_ROWS, TABLES, Feature, Trained, reordered, train, with_ids
from tests.distributed.reference_adam import reference_adam
from tests.distributed.small_model import ROWS_OF_FEATURE

KEYS = list(ROWS_OF_FEATURE)
BOUND = 1e-3  # about a tenth of a bag's largest gradient


def _tables(pooling: PoolingType = PoolingType.SUM, **dtypes: DataType) -> tuple[EmbeddingBagConfig, ...]:
    return tuple(replace(config, pooling=pooling, data_type=dtypes.get(config.name, config.data_type)) for config in TABLES)


def _more(name: str, rows: int, dim: int, key: str) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[key])


def _with_a_feature_of_no_table(batch: Batch, step: int, ours: bool) -> Batch:
    features = batch.sparse_features
    size = features.stride()
    extra = KeyedJaggedTensor(["x"], torch.full((size,), 10**9), lengths=torch.ones(size, dtype=torch.int32))
    return Batch(batch.dense_features, KeyedJaggedTensor.concat([extra, features]), batch.labels)


def _in_another_order(batch: Batch, step: int, ours: bool) -> Batch:
    """For us alone: stock remembers the order of its first batch."""
    return reordered(batch, KEYS[step % 5 :] + KEYS[: step % 5]) if ours else batch


def _scheduled(optimizer: KeyedOptimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.5 if step % 2 else 1.5


def _warmed_up(optimizer: KeyedOptimizer) -> KeyedOptimizer:
    return WarmupOptimizer(optimizer, [WarmupStage(WarmupPolicy.LINEAR, max_iters=4, value=0.1)], lr=0.3)


def _only_looked_at(model: DistributedModelParallel, batches: list[Batch]) -> Any:
    """The first batches, of the sizes that training will have, in ways that train nothing."""
    model.eval()
    with torch.no_grad():
        seen = [model(batch) for batch in batches[:2]]
    model.train()
    seen += [model(batch) for batch in batches[:2]]  # no backward
    return [(loss.detach().clone(), outputs) for loss, outputs in seen]


def _looked_at_in_inference_mode(model: DistributedModelParallel, batches: list[Batch]) -> Any:
    """FBGEMM 1.8's own training kernels have no operator there, in stock as in ours: the reference Adam's has."""
    model.eval()
    with torch.inference_mode():
        seen = [(loss.clone(), outputs) for loss, outputs in map(model, batches[:2])]
    model.train()
    return seen


def _rows_of_rank(placement: RowPlacement, rank: int) -> RowPlacement:
    """Every third row, others on each rank."""
    return replace(placement, hot_ids={table.name: np.arange(table.rows)[rank % 3 :: 3] for table in placement.tables})


ALL_FP16, ALL_BF16 = ({config.name: dtype for config in TABLES} for dtype in (DataType.FP16, DataType.BF16))
MIXED = {"big": DataType.FP16, "wide": DataType.FP16, "frozen": DataType.FP16}
ADAM = (("", torch.optim.Adam, {"lr": 0.1}),)  # the plain torch reference in FBGEMM's place, for stock and for us
SGD = (("", torch.optim.SGD, {"lr": 1.0}),)
CLIPPED = {"gradient_clipping": True, "max_gradient": BOUND}
PER_TABLE = (
    ("tiny", torch.optim.SGD, {"lr": 0.1}),
    ("big", RowWiseAdagrad, {"lr": 0.1}),
    ("wide", torch.optim.Adagrad, {"lr": 0.1}),
    ("frozen", torch.optim.Adagrad, {"lr": 0.2}),
    ("other", torch.optim.Adagrad, {"lr": 0.05}),
)
COLUMNS = {"other": ParameterConstraints(sharding_types=["column_wise"], min_partition=4)}
SECOND = (_more("second_e", 120, 8, "e"), _more("second_b", 200, 4, "b"))

FEATURES: dict[str, Feature] = {
    "plain": Feature(),
    "plain sgd": Feature(marks=SGD),
    "fp16": Feature(tables=_tables(**ALL_FP16)),
    "bf16": Feature(tables=_tables(**ALL_BF16), marks=ADAM),  # FBGEMM 1.8 has no bf16 kernel on the CPU; the reference takes any
    "mixed dtypes": Feature(tables=_tables(PoolingType.MEAN, **MIXED)),
    "clipped": Feature(marks=SGD, fused_params=CLIPPED),
    "clipped means": Feature(tables=_tables(PoolingType.MEAN), marks=SGD, fused_params=CLIPPED),
    "means": Feature(tables=_tables(PoolingType.MEAN), marks=SGD),
    "clipped weighted": Feature(weighted=True, fused_params=CLIPPED),
    "fp16 messages": Feature(qcomms=QCommsConfig(CommType.FP16, CommType.FP16)),
    "scaled fp16 messages": Feature(marks=SGD, qcomms=QCommsConfig(CommType.FP16, CommType.FP16, backward_loss_scale=64.0)),
    "bf16 messages": Feature(qcomms=QCommsConfig(CommType.BF16, CommType.BF16)),  # TorchRec makes them fp16 on the CPU
    "left, feature shared": Feature(left=("wide",)),
    "left, column-wise": Feature(left=("other",), constraints=COLUMNS),
    "left, means": Feature(tables=_tables(PoolingType.MEAN), left=("big", "frozen")),
    "left, weighted and clipped": Feature(left=("big",), weighted=True, marks=SGD, fused_params=CLIPPED),
    "two collections": Feature(more=SECOND, hot_rows={**HOT_ROWS, "second_e": 40, "second_b": 90}),
    "two collections, one stock": Feature(more=SECOND),
    "int32 ids": Feature(change_batch=lambda batch, step, ours: with_ids(batch, torch.int32)),
    "int64 lengths": Feature(change_batch=lambda batch, step, ours: with_ids(batch, torch.int64)),
    "a feature of no table": Feature(change_batch=_with_a_feature_of_no_table),
    "any order": Feature(left=("other",), change_batch=_in_another_order),
    "changing sizes": Feature(sizes=(16, 3, 1, 7)),
    "weighted": Feature(weighted=True),
    "fused_params alone": Feature(
        marks=(),
        fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1, "eps": 1e-4, "weight_decay": 0.05},
        default=Optimizer.ROWWISE_ADAGRAD,
    ),
    "an optimizer per table": Feature(marks=PER_TABLE),
    "schedule": Feature(marks=PER_TABLE, schedule=_scheduled),
    "warm-up": Feature(wrap=_warmed_up),
    "only looked at": Feature(before=_only_looked_at),
    "looked at in inference mode": Feature(marks=ADAM, before=_looked_at_in_inference_mode),
    "ranks share their rows": Feature(one_seed=True),
    "ranks share no row": Feature(allowed=_rows_of_rank),
}
ON_THREE = ["plain", "ranks share their rows", "ranks share no row"]
QUANTIZED = [name for name in FEATURES if "messages" in name]


def _train_all(rank: int, names: list[str]) -> dict[str, tuple[Trained, Trained]]:
    with reference_adam():
        return {name: (train(FEATURES[name], rank, ours=False), train(FEATURES[name], rank, ours=True)) for name in names}


@cache
def _trained(ranks: int) -> list[dict[str, tuple[Trained, Trained]]]:
    """By rank and feature: stock's run and ours, in one start of the ranks."""
    return run_on_local_ranks(_train_all, ranks, ON_THREE if ranks == 3 else list(FEATURES), timeout_s=200)
