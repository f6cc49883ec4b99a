"""The names of TorchRec that `fae launch` replaces while a script runs, in every module that exposes them, and puts back."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# TorchRec 1.8.0; tests/test_launch_patches.py looks for each name in all of torchrec and fails when one moves or is exposed elsewhere.
_PLANNER_HOMES = (
    "torchrec.distributed.planner",
    "torchrec.distributed.planner.planners",
    "torchrec.distributed.model_parallel",  # DistributedModelParallel plans for itself where it is given no plan
    "torchrec.distributed.shard",
)
_SHARDERS_HOMES = (
    "torchrec.distributed.sharding_plan",
    "torchrec.distributed.model_parallel",  # the default of DistributedModelParallel
    "torchrec.distributed.planner.planners",  # the default of collective_plan
    "torchrec.distributed.shard",
)
_PIPELINE_HOMES = (
    "torchrec.distributed",
    "torchrec.distributed.train_pipeline",
    "torchrec.distributed.train_pipeline.train_pipelines",
)
HOMES: Mapping[str, tuple[str, ...]] = {
    "EmbeddingShardingPlanner": _PLANNER_HOMES,
    "get_default_sharders": _SHARDERS_HOMES,
    "EmbeddingBagCollectionSharder": ("torchrec.distributed.embeddingbag", "torchrec.distributed.sharding_plan"),
    "EmbeddingCollectionSharder": ("torchrec.distributed.embedding", "torchrec.distributed.sharding_plan"),
    "TrainPipelineSparseDist": _PIPELINE_HOMES,
    "PrefetchTrainPipelineSparseDist": _PIPELINE_HOMES,
    "TrainPipelineBase": _PIPELINE_HOMES,
    "DistributedModelParallel": ("torchrec.distributed", "torchrec.distributed.model_parallel"),
}
"""Name -> the modules from which a script may import it, the one that defines it among them."""

LEFT_ALONE: Mapping[str, tuple[str, ...]] = {
    # Sharders of other modules make one of these inside.
    "EmbeddingBagCollectionSharder": (
        "torchrec.distributed.embedding_tower_sharding",
        "torchrec.distributed.fp_embeddingbag",
        "torchrec.distributed.itep_embeddingbag",
        "torchrec.distributed.mc_embedding_modules",
        "torchrec.distributed.mc_embeddingbag",
    ),
    "EmbeddingCollectionSharder": (
        "torchrec.distributed.embedding_tower_sharding",
        "torchrec.distributed.itep_embeddingbag",
        "torchrec.distributed.mc_embedding",
        "torchrec.distributed.mc_embedding_modules",
        "torchrec.distributed.pec_embedding",
    ),
    # Pipelines that are made of it call its methods by this name.
    "TrainPipelineSparseDist": ("torchrec.distributed.train_pipeline.experimental_pipelines",),
    # Asked whether a model is one, which the stand-in is too.
    "DistributedModelParallel": (
        "torchrec.distributed.train_pipeline.experimental_pipelines",
        "torchrec.distributed.train_pipeline.train_pipelines",
        "torchrec.distributed.train_pipeline.utils",
        "torchrec.quant.utils",
    ),
}
"""Name -> modules of TorchRec that have it for use of their own; these keep it."""


@contextmanager
def replaced(replacements: Mapping[str, Any]) -> Iterator[None]:
    """While it is open, every module of `HOMES` has these objects under these names.

    Not for several threads, and not one inside another for the same name.

    Args:
        replacements: names of `HOMES` -> what stands in for them.

    Raises:
        RuntimeError: a home does not have what the first home has: TorchRec has moved it. Nothing is replaced then.
    """
    changes: list[tuple[Any, str, Any, Any]] = []
    for name, instead in replacements.items():
        modules = [importlib.import_module(home) for home in HOMES[name]]
        original = getattr(modules[0], name)
        for module in modules:
            if getattr(module, name, None) is not original:
                raise RuntimeError(
                    f"{module.__name__} has another {name} than {modules[0].__name__}; this TorchRec is not known to fae launch"
                )
            changes.append((module, name, original, instead))
    for module, name, _, instead in changes:
        setattr(module, name, instead)
    try:
        yield
    finally:
        for module, name, original, _ in changes:
            setattr(module, name, original)
