"""What stands in for TorchRec's planner and pipeline while a script runs under `fae launch`, and what they tell of the run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.core.tables import TableKind
from fae_torchrec.data.dataloader import alone
from fae_torchrec.distributed.planner import FAEShardingPlanner
from fae_torchrec.distributed.process_group import gather_counts
from fae_torchrec.distributed.sharder import FAEEmbeddingBagCollectionSharder, FAEEmbeddingCollectionSharder, get_fae_sharders
from fae_torchrec.distributed.split_ahead import SplitAhead
from fae_torchrec.launch_config import LaunchConfig
from fae_torchrec.launch_rebundling import RebundlingOptions, ScriptRebundling
from fae_torchrec.modules.model_tables import COLLECTIONS, sharded_modules, table_configs
from fae_torchrec.training.cold_prefetch import kind_of
from fae_torchrec.training.train_pipeline import FAETrainPipeline

MOST_STEPS = 100_000
"""Steps whose seconds are kept."""


@dataclass
class Observed:
    """What happened in the script's pipelines on this rank.

    Attributes:
        hot: training steps that skipped the cold tier whole.
        other: training steps that went through both tiers (all of a stock run).
        evaluations: steps of a model in evaluation mode.
        samples: samples of the training steps.
        hot_lookups: rows of tables that are not all hot which hot steps looked up.
        hot_lookup_bytes: weights of these rows.
        step_seconds: wall time of each training step, from the end of the one before (of the first of a pass: from its own begin), so that
            what the script does in between counts; the first `MOST_STEPS`.
        step_hot: of the same steps, whether each was a hot one.
        seconds: wall time of all training steps.
        sentences: what the user should know, each once.
    """

    hot: int = 0
    other: int = 0
    evaluations: int = 0
    samples: int = 0
    hot_lookups: int = 0
    hot_lookup_bytes: int = 0
    step_seconds: list[float] = field(default_factory=list)
    step_hot: list[bool] = field(default_factory=list)
    seconds: float = 0.0
    sentences: list[str] = field(default_factory=list)

    def say(self, sentence: str) -> None:
        """Keeps a sentence for the report."""
        if sentence not in self.sentences:
            self.sentences.append(sentence)

    def batch_done(self, batch: Any, lookup_bytes: Mapping[str, tuple[int, int]], *, training: bool) -> None:
        """Counts a batch that a pipeline has finished.

        Args:
            batch: of any type.
            lookup_bytes: feature -> tables that are not all hot which look it up, and bytes of a row of theirs together.
            training: whether the model is in training mode.
        """
        if not training:
            self.evaluations += 1
            return
        hot = kind_of(batch) == "hot"
        self.hot, self.other = self.hot + hot, self.other + (not hot)
        if len(self.step_hot) < MOST_STEPS:
            self.step_hot.append(hot)
        kjt = getattr(batch, "sparse_features", batch)
        if isinstance(kjt, KeyedJaggedTensor):
            self.samples += getattr(batch, "num_samples", None) or kjt.stride()
            if hot:
                lengths = [kjt.stride()] * len(kjt.keys()) if getattr(kjt, "one_each", False) else kjt.length_per_key()
                for feature, ids in zip(kjt.keys(), lengths, strict=True):
                    tables, row_bytes = lookup_bytes.get(feature, (0, 0))
                    self.hot_lookups += ids * tables
                    self.hot_lookup_bytes += ids * row_bytes

    def step_done(self, seconds: float) -> None:
        """Keeps the time of a training step."""
        self.seconds += seconds
        if len(self.step_seconds) < MOST_STEPS:
            self.step_seconds.append(seconds)


@dataclass
class Session:
    """One run of a script: what it is given, and what it used of it.

    Attributes:
        config: how.
        placement: where rows lie; None runs TorchRec's own planner and pipeline.
        observed: what happens.
        used: names of TorchRec that the script used.
        planned: whether a model was planned by the placement.
    """

    config: LaunchConfig
    placement: RowPlacement | None
    observed: Observed = field(default_factory=Observed)
    used: set[str] = field(default_factory=set)
    planned: bool = False

    @cached_property
    def lookup_bytes(self) -> dict[str, tuple[int, int]]:
        """As `Observed.batch_done` takes it."""
        summed: dict[str, tuple[int, int]] = {}
        for name, feature in () if self.placement is None else self.placement.tables.lookups:
            if self.placement is not None and self.placement.kind(name) is not TableKind.HOT:
                tables, num_bytes = summed.get(feature, (0, 0))
                summed[feature] = (tables + 1, num_bytes + self.placement.tables[name].weight_bytes)
        return summed

    def replacements(self) -> dict[str, Any]:
        """Names of `launch_patches.HOMES` -> what stands in for them. Without a placement the pipeline is watched, nothing else."""
        if self.placement is None:
            return {"TrainPipelineSparseDist": _of(self, _WatchedPipeline)}
        return {
            "EmbeddingShardingPlanner": _of(self, _Planner),
            "get_default_sharders": get_fae_sharders,
            "EmbeddingBagCollectionSharder": FAEEmbeddingBagCollectionSharder,
            "EmbeddingCollectionSharder": FAEEmbeddingCollectionSharder,
            "TrainPipelineSparseDist": _of(self, _Pipeline),
        }


def _of(session: Session, base: type) -> type:
    """The class whose objects belong to a session; called as the one that it stands in for."""
    replaced = next(
        name for name in ("EmbeddingShardingPlanner", "TrainPipelineSparseDist") if any(c.__name__ == name for c in base.__mro__)
    )
    return type(replaced, (base,), {"_session": session, "__doc__": base.__doc__, "__module__": __name__})


class _Planner(EmbeddingShardingPlanner):
    """EmbeddingShardingPlanner's place: plans a model that has the placement's tables by FAEShardingPlanner, any other as ever."""

    _session: Session

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = signature(EmbeddingShardingPlanner.__init__).bind(self, *args, **kwargs).arguments
        self._given = {name: value for name, value in given.items() if name != "self" and value is not None}

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """As EmbeddingShardingPlanner.plan."""
        return self._ours().plan(module, sharders) if self._takes(module) else super().plan(module, sharders)

    def collective_plan(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]] | None = None, pg: dist.ProcessGroup | None = None
    ) -> ShardingPlan:
        """As EmbeddingShardingPlanner.collective_plan."""
        return self._ours().collective_plan(module, sharders, pg) if self._takes(module) else super().collective_plan(module, sharders, pg)

    def _takes(self, module: nn.Module) -> bool:
        placement = self._session.placement
        assert placement is not None
        names = {config.name for _, part in sharded_modules(module) if type(part) in COLLECTIONS for config in table_configs(part)}
        takes = not names.isdisjoint(placement.tables.names)
        if takes:
            self._session.planned = True
            self._session.used.add("EmbeddingShardingPlanner")
        else:
            self._session.observed.say(f"a model with the tables {sorted(names)[:5]} was left to TorchRec's own planner")
        return takes

    def _ours(self) -> FAEShardingPlanner:
        config, placement = self._session.config, self._session.placement
        assert placement is not None
        return FAEShardingPlanner(
            placement,
            **{"topology": self._topology, **self._given},
            cold_tier=config.cold_tier,
            hot_tier=config.hot_tier,
            stock_tables=config.stock_tables,
            cold_cache_bytes=config.cold_cache_bytes,
        )


class _Watched:
    """Mixed into a pipeline: counts and times its steps."""

    _session: Session
    batches: Any
    _model: Any
    _last_end: float | None = None
    _source: Any = None

    def progress(self, dataloader_iter: Iterator[Any]) -> Any:
        """As the pipeline's own."""
        self._session.used.add("TrainPipelineSparseDist")
        begin, training = time.perf_counter(), self._model.training
        if dataloader_iter is not self._source or not training:
            self._source, self._last_end = dataloader_iter, None
        output = super().progress(dataloader_iter)  # type: ignore[misc]
        end = time.perf_counter()
        if training:
            self._session.observed.step_done(end - (begin if self._last_end is None else self._last_end))
            self._last_end = end
        return output

    def dequeue_batch(self) -> None:
        """As the pipeline's own."""
        self._session.observed.batch_done(self.batches[0], self._session.lookup_bytes, training=self._model.training)
        super().dequeue_batch()  # type: ignore[misc]


class _WatchedPipeline(_Watched, TrainPipelineSparseDist[Any, Any]):
    """TrainPipelineSparseDist as it is, watched."""


class _Pipeline(_Watched, FAETrainPipeline[Any, Any]):
    """FAETrainPipeline in TrainPipelineSparseDist's place: sorts the script's own training batches, where its model was placed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        session = self._session
        if session.planned and session.placement is not None:
            self._rebundling = _rebundling(session, session.placement, self._model, self._device)  # type: ignore[assignment]


def _rebundling(session: Session, placement: RowPlacement, model: nn.Module, device: torch.device) -> ScriptRebundling:
    """A collective, where there are several ranks."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    on_gpu = device.type == "cuda"
    return ScriptRebundling(
        placement,
        ShuffleSchedule(session.config.schedule.policy, session.config.schedule.rate),
        model,
        gather_counts(dist.new_group(backend="gloo")) if several else alone,
        dist.get_rank() if several else 0,
        dist.get_world_size() if several else 1,
        RebundlingOptions(
            session.config.window_batches,
            session.config.buffer_bytes,
            pin_memory=on_gpu,
            split_ahead=SplitAhead(model) if on_gpu else None,
        ),
        session.observed.say,
    )
