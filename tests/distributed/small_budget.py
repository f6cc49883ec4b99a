"""A model, a profile of it and a topology that are small enough to add up by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation, HeuristicalStorageReservation
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from fae_torchrec.core.input_sample import InputSample
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.row_counts import RowCounts
from fae_torchrec.core.tables import TableSet
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.modules.model_tables import model_tables

ROWS = {"tiny": 50, "middle": 4000, "large": 20_000}
ROW_BYTES = 36  # 8 weights of 4 bytes and one row-wise state
KIB = 1024


def new_model(dense: int = 8, rows: dict[str, int] = ROWS) -> nn.Module:
    """One collection, and a linear layer with `dense` columns and one row without bias: 4 * dense bytes."""
    configs = [EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=8, feature_names=[f"f_{n}"]) for n, r in rows.items()]
    collection = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.1})
    return nn.ModuleDict({"ebc": collection, "over": nn.Linear(dense, 1, bias=False)})


def new_profile(model: nn.Module, samples: int = 2000, seed: int = 3, leave: tuple[str, ...] = ()) -> PopularityProfile:
    """One id a sample and table; small ids are popular."""
    rng = np.random.default_rng(seed)
    tables, ones = model_tables(model, leave=leave), np.ones(samples, dtype=np.int64)

    def draw() -> InputSample:
        values = {t.feature_names[0]: np.minimum(t.rows ** rng.random(samples) - 1, t.rows - 1).astype(np.int64) for t in tables}
        return InputSample(values, dict.fromkeys(values, ones), samples)

    counted, fresh = draw(), draw()
    return PopularityProfile(tables, _counts(tables, counted), counted, fresh, samples, 2 * samples, 0.5, seed, "generated")


def _counts(tables: TableSet, inputs: InputSample) -> dict[str, RowCounts]:
    return {t.name: RowCounts.from_dense(np.bincount(inputs.values[t.feature_names[0]], minlength=t.rows)) for t in tables}


def gpus(ranks: int = 1, hbm: int = 1024 * KIB, **more: Any) -> Topology:
    return Topology(world_size=ranks, local_world_size=ranks, compute_device="cuda", hbm_cap=hbm, **more)


def planned(
    model: nn.Module, profile: PopularityProfile | None = None, topology: Topology | None = None, **options: Any
) -> FAEShardingPlanner:
    """A planner that has planned the model; nothing is reserved beside the dense part and KJTs unless said."""
    options = {"batch_size": 16, "storage_reservation": HeuristicalStorageReservation(percentage=0.0), "stats": [], **options}
    planner = FAEShardingPlanner.from_profile(profile or new_profile(model), topology=topology or gpus(), **options)
    planner.plan(model, get_fae_sharders())
    return planner


def no_reservation() -> FixedPercentageStorageReservation:
    return FixedPercentageStorageReservation(0.0)
