"""FAE hot and cold embeddings for TorchRec: samples -> profile -> hot set -> placement -> sharding plan -> training.

The public names are imported when they are first used, so `fae doctor` runs where torch or torchrec is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fae_torchrec.core.errors import FAEError
    from fae_torchrec.core.hot_set import HotSet, select_hot_set
    from fae_torchrec.core.placement import RowPlacement
    from fae_torchrec.core.popularity import PopularityProfile
    from fae_torchrec.core.schedule import Guard, ShuffleSchedule
    from fae_torchrec.core.tables import TableSet, TableSpec
    from fae_torchrec.data.cache_statistics import measure_cache_statistics
    from fae_torchrec.data.calibrator import Calibrator
    from fae_torchrec.data.dataloader import HotColdDataLoader
    from fae_torchrec.data.store import SegregatedStore
    from fae_torchrec.data.store_writer import write_store
    from fae_torchrec.distributed.cache_statistics import cache_constraints, torchrec_cache_statistics
    from fae_torchrec.distributed.planner import FAEShardingPlanner
    from fae_torchrec.distributed.process_group import gather_counts
    from fae_torchrec.distributed.sharder import get_fae_sharders
    from fae_torchrec.modules.embedding import FAEEmbeddingCollection
    from fae_torchrec.modules.embedding_bag import FAEEmbeddingBagCollection
    from fae_torchrec.modules.model_tables import model_tables
    from fae_torchrec.training.checkpoint import load_checkpoint, save_checkpoint
    from fae_torchrec.training.train_pipeline import FAETrainPipeline

__version__ = "0.1.0"

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_HOMES = {
    "Calibrator": "fae_torchrec.data.calibrator",
    "FAEEmbeddingBagCollection": "fae_torchrec.modules.embedding_bag",
    "FAEEmbeddingCollection": "fae_torchrec.modules.embedding",
    "FAEError": "fae_torchrec.core.errors",
    "FAEShardingPlanner": "fae_torchrec.distributed.planner",
    "FAETrainPipeline": "fae_torchrec.training.train_pipeline",
    "Guard": "fae_torchrec.core.schedule",
    "HotColdDataLoader": "fae_torchrec.data.dataloader",
    "HotSet": "fae_torchrec.core.hot_set",
    "PopularityProfile": "fae_torchrec.core.popularity",
    "RowPlacement": "fae_torchrec.core.placement",
    "SegregatedStore": "fae_torchrec.data.store",
    "ShuffleSchedule": "fae_torchrec.core.schedule",
    "TableSet": "fae_torchrec.core.tables",
    "TableSpec": "fae_torchrec.core.tables",
    "cache_constraints": "fae_torchrec.distributed.cache_statistics",
    "gather_counts": "fae_torchrec.distributed.process_group",
    "get_fae_sharders": "fae_torchrec.distributed.sharder",
    "load_checkpoint": "fae_torchrec.training.checkpoint",
    "measure_cache_statistics": "fae_torchrec.data.cache_statistics",
    "model_tables": "fae_torchrec.modules.model_tables",
    "save_checkpoint": "fae_torchrec.training.checkpoint",
    "select_hot_set": "fae_torchrec.core.hot_set",
    "torchrec_cache_statistics": "fae_torchrec.distributed.cache_statistics",
    "write_store": "fae_torchrec.data.store_writer",
}
"""Which module each public name comes from."""

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "Calibrator",
    "FAEEmbeddingBagCollection",
    "FAEEmbeddingCollection",
    "FAEError",
    "FAEShardingPlanner",
    "FAETrainPipeline",
    "Guard",
    "HotColdDataLoader",
    "HotSet",
    "PopularityProfile",
    "RowPlacement",
    "SegregatedStore",
    "ShuffleSchedule",
    "TableSet",
    "TableSpec",
    "__version__",
    "cache_constraints",
    "gather_counts",
    "get_fae_sharders",
    "load_checkpoint",
    "measure_cache_statistics",
    "model_tables",
    "save_checkpoint",
    "select_hot_set",
    "torchrec_cache_statistics",
    "write_store",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
