"""What sharded hot/cold collections share, pooled or not: tiers built from a plan, the way of a batch through them, the stock state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_sharding import KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import KJTList, ShardedEmbeddingModule
from torchrec.distributed.types import Awaitable, CommOp, LazyAwaitable, QuantizedCommCodecs, ShardingEnv
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.tables import TableKind
from fae_torchrec.data.batches import HotKeyedJaggedTensor
from fae_torchrec.distributed.all_hot_tables import all_hot_tables
from fae_torchrec.distributed.fused_optimizer import Entry, HotColdFusedOptimizer, HotTierOptimizer, entry
from fae_torchrec.distributed.homes import Homes
from fae_torchrec.distributed.host_tier import HostTier
from fae_torchrec.distributed.module_plan import FAEModuleShardingPlan
from fae_torchrec.distributed.rows_ahead import RowsAhead
from fae_torchrec.distributed.sharded_hot_tier import ShardedHotTier
from fae_torchrec.distributed.step_count import StepCount
from fae_torchrec.distributed.stock_state import StockState
from fae_torchrec.distributed.tier_builder import TierBuilder
from fae_torchrec.distributed.tier_tables import Collection, left_configs, optimizer_key
from fae_torchrec.distributed.tiers import FAEContext, StockTier
from fae_torchrec.modules.lookups import cold_configs, hot_groups
from fae_torchrec.modules.model_tables import table_configs, table_weights
from fae_torchrec.modules.tier_split import TieredIds, TierSplit


class ShardedHotColdModule(ShardedEmbeddingModule[KJTList, list[torch.Tensor], Any, FAEContext], FusedOptimizerModule):
    """Gives what the stock sharded collection gives, with its hot rows in a tier of their own.

    A raw batch goes through both tiers. A batch whose KeyedJaggedTensor is a `HotKeyedJaggedTensor` skips the cold tier whole: no cold
    input dist, no lookup, no output dist, forward or backward.

    Args:
        module: the stock collection, marked by `apply_optimizer_in_backward` if at all.
        plan: where every table's home and hot rows lie, and the placement.
        env: the ranks.
        fused_params: the sharder's fused parameters.
        device: device of the hot tier and of the stock tiers' kernels.
        qcomm_codecs_registry: quantized communication, of both tiers.
        module_fqn: name in traces.
    """

    stock_type: type[nn.Module]
    """The stock module this one stands for."""
    prefix: str
    """Where its state has the tables: "embedding_bags" or "embeddings"."""
    gradient_comm: CommOp
    """The communication whose codec the hot rows' gradients take."""

    def __init__(
        self,
        module: Collection,
        plan: FAEModuleShardingPlan,
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=qcomm_codecs_registry)
        self.placement = plan.placement
        self.module_sharding_plan = plan
        self._env = env
        self._fused_params = fused_params
        self._device = device or torch.device("cpu")
        self._module_fqn = module_fqn
        configs = table_configs(module)
        self._configs = {config.name: config for config in configs}
        self._kinds = {name: self.placement.kind(name) for name in self._configs if name in self.placement.tables.names}
        weights = table_weights(module)
        groups = hot_groups(configs, self.placement, lambda config: optimizer_key(weights[config.name]))
        mode = BoundsCheckMode((fused_params or {}).get("bounds_check_mode", BoundsCheckMode.WARNING))
        self._groups, self._bounds_check_mode = groups, mode
        self.tier_split = self._new_split(self._device)
        # The tiers stay out of nn.Module's registry (as stock keeps its lookups): names and state are the stock ones.
        build = TierBuilder(module, plan, env, fused_params, self._device, groups, self._new_stock_module)
        codecs = (self.qcomm_codecs_registry or {}).get(self.gradient_comm.name)
        self._hot = build.hot(configs, codecs.backward if codecs else None)
        cold_keys = [lookup.key for lookup in self.tier_split.cold_lookups]
        self._cold = build.cold(cold_configs(configs, self.placement), cold_keys)
        self._left = build.left(left_configs(module, self.placement.tables.names))
        cold_lookups = [lookup for tier in self._cold for lookup in tier.module._lookups]
        self._lookups = [*self._hot.lookups, *cold_lookups, *(lookup for tier in self._left for lookup in tier.module._lookups)]
        self._staging, self._staging_capacity = build.staging(self._hot, cold_lookups), build.staging_capacity
        self._steps = self._hot.step_count = StepCount([*self._hot.lookups, *cold_lookups])
        self._loads = 0  # times that rows came from outside: what was looked up before is void
        self._init_state(cold_lookups)
        if module.device.type not in ("meta", "cpu"):  # as stock: weights that already lie on the device are kept
            self.load_state_dict(module.state_dict(), strict=False)
        for tier in self._stock_tiers():
            tier.prime(self._device, weighted=bool(getattr(tier.module, "_is_weighted", False)))

    def _new_split(self, device: torch.device) -> TierSplit:
        raise NotImplementedError

    def _split_args(self, device: torch.device) -> tuple[Any, ...]:
        """Arguments of a TierSplit for ids on a device."""
        plan = self.module_sharding_plan
        by_group = plan.hot_tier == "replicated"
        configs = list(self._configs.values())
        return self._groups, configs, self.placement, device, self._bounds_check_mode, plan.compact_index_above_rows, by_group

    def _new_stock_module(
        self, collection: Collection, plan: dict[str, Any], env: ShardingEnv, device: torch.device, fused_params: dict[str, Any] | None
    ) -> nn.Module:
        raise NotImplementedError

    def _stock_tiers(self) -> list[StockTier]:
        return [*self._cold, *self._left]

    def _settle(self) -> None:
        if self._staging is not None:
            self._staging.settle()
        for tier in self._cold:
            tier.settle()

    def _init_state(self, cold_lookups: list[nn.Module]) -> None:
        """Prepares saving and loading, and starts the tiers alike: hot rows as their homes, replicas as their owner's."""
        group, configs = self._env.process_group, list(self._configs.values())
        hot_tables = {name: self._configs[name] for name, kind in self._kinds.items() if kind is TableKind.HOT}
        replicated = not isinstance(self._hot, ShardedHotTier)
        replicas = self._hot.tables() if replicated else ()
        self._all_hot = all_hot_tables(hot_tables, replicas, self.module_sharding_plan, self._env.rank, group)
        owned = {name: table for name, table in self._all_hot.items() if table.owned}
        split = [name for name, kind in self._kinds.items() if kind is TableKind.SPLIT]
        hot_ids = {name: torch.as_tensor(self.placement.hot_ids[name]).to(self._device) for name in split}
        self._homes = Homes(self._hot.tables, cold_lookups, hot_ids, owned, group, self._settle, replicated=replicated)
        stock = [(tier.module, tier.tables) for tier in self._stock_tiers()]
        if isinstance(self._hot, ShardedHotTier):
            stock.append((self._hot.module, list(hot_tables)))
        self._state = StockState(self.prefix, configs, stock, self._all_hot, self._homes, group)
        hot = [
            HotTierOptimizer(kernel.fused_optimizer, self._shown(kernel, hot_tables))
            for lookup in self._hot.lookups
            for kernel in lookup.modules()
            if isinstance(kernel, FusedOptimizerModule)
        ]
        stock_optimizers = [tier.module.fused_optimizer for tier in self._stock_tiers()]
        self._optim = HotColdFusedOptimizer(hot, stock_optimizers, self.write_back, self.promote)
        self._register_stock_parameters(stock)
        for name, table in owned.items():
            init = self._configs[name].init_fn
            assert init is not None  # TorchRec's config fills it in
            init(table.replica.weights)
        self.promote()

    def _shown(self, kernel: Any, all_hot: Iterable[str]) -> dict[str, Entry]:
        """What the fused optimizer shows of one of the hot tier's kernels: all-hot tables whose home lies there, by stock key."""
        if isinstance(self._hot, ShardedHotTier):
            keys = {self._state.key(name) for name in all_hot}
            return {key: entry(kernel.fused_optimizer, key) for key in kernel.fused_optimizer.params if key in keys}
        owned = {name: table for name, table in self._all_hot.items() if table.owned and table.replica.kernel is kernel}
        return {self._state.key(name): entry(table.optimizer(), f"{name}.weight") for name, table in owned.items()}

    def _register_stock_parameters(self, stock: list[tuple[Any, list[str]]]) -> None:
        """Registers `<prefix>.<table>.weight` as stock does: a rank's shard of the table's home, nothing where it holds none."""
        holders = {name: getattr(module, self.prefix)[name] for module, tables in stock for name in tables}
        tables = nn.ModuleDict()
        for name in self._configs:
            holder = nn.Module()
            holder.register_parameter("weight", self._all_hot[name].parameter() if name in self._all_hot else holders[name].weight)
            tables[name] = holder
        setattr(self, self.prefix, tables)

    def input_dist(self, ctx: FAEContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        """Splits the ids by tier and starts their exchange: the hot tier's first, then (not for a hot batch) the cold tier's.

        Args:
            ctx: filled for `compute_and_output_dist`.
            features: raw ids [F, B]; a HotKeyedJaggedTensor promises that all are hot.

        Raises:
            HotBatchError: on waiting, on every rank alike: a promise is broken or the ranks disagree about the kind.
        """
        promised_hot = isinstance(features, HotKeyedJaggedTensor)
        with torch.no_grad():
            ctx.ids = ids = self._by_tier(ctx, features, promised_hot=promised_hot)
            awaitables: list[Awaitable[Any]] = [self._hot.input_dist(ids, promised_hot=promised_hot)]
            ctx.sharding_contexts.append(None)
            for tier in self._cold if ids.cold is not None else []:
                ctx.cold, started = tier.input_dist(ctx, ids.cold)
                awaitables.extend(started)
            for tier in self._left:
                ctx.left, started = tier.input_dist(ctx, self._left_features(features, tier))
                awaitables.extend(started)
        return KJTListSplitsAwaitable(awaitables, ctx, self._module_fqn)

    def _by_tier(self, ctx: FAEContext, features: KeyedJaggedTensor, *, promised_hot: bool) -> TieredIds:
        """A batch's ids by tier; says in the context if its cold rows are staged."""
        ids: TieredIds = self.tier_split(features, promised_hot=promised_hot)
        return ids

    def _look_up(
        self, ctx: FAEContext, inputs: KJTList
    ) -> tuple[Awaitable[torch.Tensor], LazyAwaitable[Any] | None, LazyAwaitable[Any] | None]:
        """Looks all tiers up; the stock ones first, so that their output dists run while the hot tier is looked up.

        Returns:
            What to wait for: of the hot tier (its sums; see `wait_for_hot`), of the cold tier and of the tables left to stock; None where
            there is nothing.
        """
        step = self._steps.advance()
        hot_input, *rest = list(inputs)
        cold = left = None
        if self._staging is not None and ctx.staged is not None:
            self._staging.arrive(ctx.staged)
        elif self._staging is not None and ctx.cold is not None:
            self._staging.past()
        for tier in self._cold if ctx.cold is not None else []:
            assert ctx.cold is not None
            if ctx.ahead is not None and ctx.ahead.loads == self._loads:
                cold = ctx.ahead.take(step)
            else:
                cold = tier.look_up(ctx.cold, rest[: tier.num_inputs])
            rest = rest[tier.num_inputs :]
        for tier in self._left:
            assert ctx.left is not None
            left = tier.look_up(ctx.left, rest)
        hot = self._hot.forward(hot_input, step)
        if ctx.staged is not None:
            ctx.staged.looked_up(hot.wait())
        return hot, cold, left

    def wait_for_hot(self, sums: Awaitable[torch.Tensor]) -> torch.Tensor:
        """The hot tier's sums, which may be changed in place."""
        hot: torch.Tensor = sums.wait()
        if hot.requires_grad:
            # The fused update follows in backward.
            hot.register_hook(lambda _: self._homes.hot_rows_change())  # type: ignore[no-untyped-call]
        return hot

    @staticmethod
    def _left_features(features: KeyedJaggedTensor, tier: StockTier) -> KeyedJaggedTensor:
        """The features of tables left to stock, keyed by lookup."""
        keys = features.keys()
        permuted = features.permute([keys.index(key.rpartition("@")[0]) for key in tier.keys])
        return KeyedJaggedTensor(
            tier.keys,
            permuted.values(),
            permuted.weights_or_none(),
            lengths=permuted.lengths(),
            stride=permuted.stride(),
            length_per_key=permuted.length_per_key(),
        )

    def clip_gradient(self, values: torch.Tensor) -> torch.Tensor:
        """Clips the gradient of a lookup's result as stock's fused kernels do (`gradient_clipping`, `max_gradient` in fused_params).

        Stock clips the gradient of a whole bag, as it arrives at the kernel: divided by the ranks. A hot tier's kernel sees sums of them.
        """
        params = self._fused_params or {}
        if not params.get("gradient_clipping") or not values.requires_grad:
            return values
        bound = float(params.get("max_gradient", 1.0)) * (self._env.world_size if get_gradient_division() else 1)
        values.register_hook(lambda grad: grad.clamp(-bound, bound))  # type: ignore[no-untyped-call]
        return values

    def compute(self, ctx: FAEContext, dist_input: KJTList) -> list[torch.Tensor]:
        """Not a step of its own here: the tiers overlap in `compute_and_output_dist`."""
        raise TypeError("call compute_and_output_dist: compute and output dist of the two tiers overlap and are not separate steps")

    def output_dist(self, ctx: FAEContext, output: list[torch.Tensor]) -> LazyAwaitable[Any]:
        """Not a step of its own here: see `compute`."""
        raise TypeError("call compute_and_output_dist: compute and output dist of the two tiers overlap and are not separate steps")

    def prefetch(self, dist_input: KJTList, forward_stream: torch.Stream | None = None, ctx: FAEContext | None = None) -> None:
        """Prefetches the stock tiers' cached rows (UVM caching); a hot batch has none in the cold tier."""
        rest = list(dist_input)[1:]
        left_inputs = sum(tier.num_inputs for tier in self._left)
        for tier in self._stock_tiers():
            if tier in self._cold and len(rest) == left_inputs:
                continue  # a hot batch
            tier.prefetch(rest[: tier.num_inputs], forward_stream)
            rest = rest[tier.num_inputs :]

    @property
    def prefetches(self) -> bool:
        """Whether cold rows can be brought ahead right after a cold batch's forward too: to a cache (UVM caching) or a staging area."""
        return self._staging is not None or any(tier.cache.prefetches for tier in self._cold)

    def look_ahead(self, ctx: FAEContext, dist_input: KJTList, forward_stream: torch.Stream | None = None, *, hot: bool = True) -> None:
        """Brings a coming batch's cold rows before its turn, one coming batch at a time.

        To a staging area, or to the cache of UVM caching (the stock prefetch, on the current stream; taken back by `forget_prefetched`):
        local, and right after the forward of the cold batch before it, too. On the CPU, without a staging area: looks them up and starts
        their output dist, a collective; `compute_and_output_dist` takes what comes. Right as long as only hot batches are trained on until
        then; rows from before weights were loaded are looked up again.

        Args:
            ctx: of the coming batch.
            dist_input: what its input dist gave.
            forward_stream: where its forward will run; CUDA only.
            hot: whether only hot batches are trained on until then.
        """
        if self._staging is not None and ctx.staged is not None:
            self._staging.fetch(ctx.staged)
        for tier in self._cold if ctx.cold is not None else []:
            inputs = list(dist_input)[1 : 1 + tier.num_inputs]
            if self._device.type == "cpu" and hot:
                assert ctx.cold is not None
                ctx.ahead = RowsAhead(self._loads, self._steps.resume)
                tier.look_ahead(ctx.cold, inputs, ctx.ahead)
            elif self._device.type != "cpu":
                tier.prefetch(inputs, forward_stream)

    def forget_prefetched(self) -> None:
        """Takes back what was prefetched, before the stock tiers serve another batch; see `RowCache.forget`."""
        for tier in self._stock_tiers():
            tier.cache.forget()

    def create_context(self) -> FAEContext:
        """An empty context for one batch."""
        return FAEContext()

    @property
    def fused_optimizer(self) -> HotColdFusedOptimizer:
        """The stock-shaped optimizer of both tiers."""
        return self._optim

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        """The stock module this one stands for."""
        return self.stock_type

    @property
    def _input_dists(self) -> list[nn.Module]:
        """The stock tiers' input dists: TorchRec's pipelines fuse their splits exchange."""
        return [input_dist for tier in self._stock_tiers() for input_dist in tier.input_dists]

    @_input_dists.setter
    def _input_dists(self, value: list[nn.Module]) -> None:
        assert not value, "set by the base class to an empty list only"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Leaves everything where it is if some of it lies on the host: DistributedModelParallel moves a model to its device."""
        if any(isinstance(tier, HostTier) for tier in self._cold):
            return self
        return super()._apply(fn, recurse)

    def write_back(self) -> None:
        """Copies every hot row, weights and optimizer state, to its home, unless none has changed since.

        A collective where the hot tier is sharded, so all ranks must take part; local where it is replicated.
        """
        self._homes.write_back()

    def promote(self) -> None:
        """Copies every home to its hot row, and takes the step count from the kernels again. Collective: all ranks take part."""
        self._homes.promote()
        self._steps.restart()
        self._loads += 1

    def check_replicas(self) -> None:
        """Checks that the replicas of the hot rows are bit-identical, by checksums. Collective; nothing to check in a sharded hot tier.

        Raises:
            ReplicaError: they are not; on every rank alike.
        """
        self._hot.check_replicas()

    def state_dict(
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The stock state: `<prefix>.<table>.weight`, sharded as the plan of the homes (of a replicated all-hot table: on its owner).

        A collective where the hot tier is sharded, so all ranks must take part; see `write_back`.
        """
        return self._state.save({} if destination is None else destination, prefix, keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> _IncompatibleKeys:
        """Loads a stock state (whole tensors, or sharded in any way) and promotes the hot rows. Collective: all ranks take part.

        Optimizer state stays as it is, and so do tables that the state lacks (with `strict=False`).

        Raises:
            StateError: a key is missing or unexpected (with `strict`), or a tensor has another shape than its table.
        """
        loaded = self._state.load(state_dict, strict)
        self._loads += 1
        return loaded

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What a parent's `nn.Module.load_state_dict` would call, past `load_state_dict`: the hot rows would keep their old values."""
        raise RuntimeError(
            "the state of hot/cold tables was to be loaded by torch.nn.Module.load_state_dict of a parent module, which cannot promote hot "
            "rows; call DistributedModelParallel.load_state_dict, or load_state_dict of the sharded collection itself"
        )
