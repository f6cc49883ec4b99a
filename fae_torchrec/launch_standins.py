"""What stands in for TorchRec while a script is run to see its first batches: nothing is sharded, nothing is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.partial_profile import PartialProfile, ProfileTally, Sampling, looked_up_features
from fae_torchrec.data.segregate import check_ids
from fae_torchrec.distributed.refusals import fused_optimizer
from fae_torchrec.modules.model_tables import COLLECTIONS, model_tables, sharded_modules, table_specs

_PLACE_BITS = 40  # of a sample's place: where it stands in its rank's batches


class Profiled(BaseException):
    """The script has shown enough; no `except Exception` of its own holds it up."""


@dataclass(frozen=True)
class Counted:
    """What one rank saw.

    Attributes:
        partial: the counts; None if no batch was seen.
        digests: of each batch that was counted: a batch that comes again says nothing new.
        used: names of TorchRec that the script used.
        ended: why it ended, for people.
    """

    partial: PartialProfile | None
    digests: tuple[str, ...]
    used: frozenset[str]
    ended: str


class BatchCounter:
    """Counts the first batches that a script feeds for training.

    Args:
        rank: this rank; its batches are shard `rank` of the profile.
        batches: how many are counted at most.
        sampling: which samples are counted.
        stock_tables: tables that are not counted.
        progress: called after each batch.
    """

    def __init__(
        self, rank: int, batches: int, sampling: Sampling, stock_tables: tuple[str, ...], progress: Callable[[], None] = lambda: None
    ) -> None:
        self._rank, self._batches, self._sampling, self._stock_tables, self._progress = rank, batches, sampling, stock_tables, progress
        self._tables: TableSet | None = None
        self._tally: ProfileTally | None = None
        self._digests: dict[str, None] = {}
        self._samples = 0
        self._used: set[str] = set()
        key = np.random.SeedSequence([sampling.seed, rank]).generate_state(2, np.uint64)
        self._rng = np.random.Generator(np.random.Philox(key=key))

    def see_model(self, name: str, module: nn.Module, sharders: list[ModuleSharder[nn.Module]] | None) -> None:
        """Takes the tables of the first model that has any.

        Raises:
            ConfigError: a table cannot be placed (its dtype, its optimizer); it may be left to stock sharding.
            PlannerError: as ConfigError, of an optimizer that a sharder's fused_params name.
        """
        self._used.add(name)
        parts = [part for _, part in sharded_modules(module) if type(part) in COLLECTIONS]
        if self._tables is not None or not parts:
            return
        model_tables(module, leave=self._stock_tables)  # checks the names
        self._tables = TableSet(tuple(self._specs(parts, sharders if sharders is not None else get_default_sharders())))

    def _specs(self, parts: list[nn.Module], sharders: list[ModuleSharder[nn.Module]]) -> Iterator[TableSpec]:
        by_type = {sharder.module_type: sharder for sharder in [*get_default_sharders(), *sharders]}
        for part in parts:
            yield from table_specs(part, fused_optimizer(part, by_type[type(part)], self._stock_tables), self._stock_tables)

    def feed(self, batches: Iterator[Any]) -> None:
        """Counts the batches of a pass; always raises.

        Raises:
            Profiled: there were enough, or they came again, or the pass is over.
            DataError: a batch has not the features of the tables, or an id is out of range.
        """
        self._used.add("TrainPipelineSparseDist")
        for batch in batches:
            if self._tables is None:
                raise Profiled("the script fed a batch to a model whose tables were not seen")
            if not self._add(batch, self._tables):
                raise Profiled(f"the script's batches come again after {len(self._digests)}")
            if len(self._digests) == self._batches:
                raise Profiled(f"{self._batches} batches (profile_batches) were counted")
        raise Profiled(f"the script's first pass was over after {len(self._digests)} batches")

    def counted(self, ended: str) -> Counted:
        """What was counted so far."""
        if self._tally is not None:
            self._tally.add_shard(self._rank)
        return Counted(None if self._tally is None else self._tally.partial(), tuple(self._digests), frozenset(self._used), ended)

    def _add(self, batch: Any, tables: TableSet) -> bool:
        kjt = ids_of(batch, looked_up_features(tables))
        digest = hashlib.blake2b(kjt.values().numpy().tobytes() + kjt.lengths().numpy().tobytes(), digest_size=16).hexdigest()
        if digest in self._digests:
            return False
        check_ids(kjt, tables)
        self._tally = self._tally or ProfileTally(tables, self._sampling)
        size = kjt.stride()
        self._tally.add_batch(kjt, self._rng.random(size), (self._rank << _PLACE_BITS) + self._samples + np.arange(size))
        self._samples += size
        self._digests[digest] = None
        self._progress()
        return True


def ids_of(batch: Any, features: tuple[str, ...]) -> KeyedJaggedTensor:
    """The ids of some features, as int64 on the CPU, of a batch of any type: from its KeyedJaggedTensors, which may be its fields or items.

    Raises:
        Profiled: a feature is in none of them.
    """
    found = [kjt.to("cpu") for kjt in _kjts(batch) if not set(kjt.keys()).isdisjoint(features)]
    keys = set().union(*(kjt.keys() for kjt in found))
    if missing := [feature for feature in features if feature not in keys]:
        raise Profiled(f"a batch of type {type(batch).__name__} has no KeyedJaggedTensor with the features {missing[:5]}")
    kjt = found[0] if len(found) == 1 else KeyedJaggedTensor.concat(found)
    return KeyedJaggedTensor(kjt.keys(), kjt.values().long(), lengths=kjt.lengths(), stride=kjt.stride())


def _kjts(value: Any) -> Iterator[KeyedJaggedTensor]:
    if isinstance(value, KeyedJaggedTensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _kjts(item)
    elif isinstance(value, Mapping):
        yield from _kjts(list(value.values()))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _kjts([getattr(value, item.name) for item in fields(value)])
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        yield from _kjts([part for part in vars(value).values() if isinstance(part, KeyedJaggedTensor)])


def stand_ins(counter: BatchCounter) -> dict[str, Any]:
    """Names of `launch_patches.HOMES` -> what stands in for them in the profiling pass."""

    def progress(self: Any, dataloader_iter: Iterator[Any]) -> Any:
        if self._model.training:
            counter.feed(dataloader_iter)
        raise StopIteration

    pipelines = (TrainPipelineSparseDist, PrefetchTrainPipelineSparseDist, TrainPipelineBase)
    own = {"_counter": counter, "__module__": __name__}
    return {
        "EmbeddingShardingPlanner": type("EmbeddingShardingPlanner", (_Planner,), own),
        "DistributedModelParallel": type("DistributedModelParallel", (_Model,), own),
        **{base.__name__: type(base.__name__, (base,), {"progress": progress, "__module__": __name__}) for base in pipelines},
    }


class _Planner(EmbeddingShardingPlanner):
    """Makes stock plans, on each rank by itself, of what will not be sharded."""

    _counter: BatchCounter

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """As EmbeddingShardingPlanner.plan, but what does not fit is planned as nothing."""
        self._counter.see_model("EmbeddingShardingPlanner", module, sharders)
        try:
            return super().plan(module, sharders)
        except PlannerError:  # the stock plan may need more memory than there is; ours is made later
            return ShardingPlan({})

    def collective_plan(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]] | None = None, pg: dist.ProcessGroup | None = None
    ) -> ShardingPlan:
        """As `plan`; no collective."""
        return self.plan(module, get_default_sharders() if sharders is None else sharders)


class _Model(DistributedModelParallel):
    """DistributedModelParallel's place: keeps the module as it is, unsharded, often on the meta device."""

    _counter: BatchCounter

    def __init__(
        self,
        module: nn.Module,
        env: ShardingEnv | None = None,
        device: Any = None,
        plan: ShardingPlan | None = None,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self._counter.see_model("DistributedModelParallel", module, sharders)
        # The attributes that the methods of TorchRec 1.8's class use.
        self.init_parameters, self._ddp_wrapped = False, False
        self._env, self.device = env, device
        self.sharders = get_default_sharders() if sharders is None else sharders
        self._sharder_map = {sharder.module_type: sharder for sharder in self.sharders}
        self._plan = ShardingPlan({}) if plan is None else plan
        self._dmp_wrapped_module = module
        self._optim = CombinedOptimizer([])
        self.model_trackers: dict[str, Any] = {}
