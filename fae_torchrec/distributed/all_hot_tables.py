"""All-hot tables of a replicated hot tier in stock's clothes: one rank owns what the state shows, as in stock table-wise sharding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.types import ParameterSharding, ShardMetadata
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.fused import EmptyFusedOptimizer

from fae_torchrec.distributed.homes import LocalTable
from fae_torchrec.modules.lookups import TableConfig


class AllHotTable:
    """One all-hot table: every rank holds it, its owner's replica is the home.

    Args:
        config: the stock table.
        replica: this rank's hot rows of it.
        sharding: TABLE_WISE on the owner rank.
        rank: this rank.
        group: the ranks.
    """

    def __init__(
        self, config: TableConfig, replica: LocalTable, sharding: ParameterSharding, rank: int, group: dist.ProcessGroup | None
    ) -> None:
        assert sharding.sharding_spec is not None and sharding.ranks is not None
        self.config = config
        self.replica = replica
        self.owned = sharding.ranks == [rank]
        self._group = group
        self._shard: ShardMetadata = sharding.sharding_spec.shards[0]
        properties = TensorProperties(dtype=replica.weights.dtype, requires_grad=False)
        self._metadata = ShardedTensorMetadata([self._shard], torch.Size(replica.weights.shape), properties)

    def sharded_weight(self) -> ShardedTensor:
        """The weights as stock's state dict shows them: sharded, with one shard on the owner."""
        shards = [Shard(self.replica.weights, self._shard)] if self.owned else []
        # Private, and how TorchRec 1.8 itself builds a state's tensors: without a collective.
        return ShardedTensor._init_from_local_shards_and_global_metadata(shards, self._metadata, process_group=self._group)

    def parameter(self) -> nn.Parameter:
        """The parameter as stock registers it: the weights on the owner, nothing elsewhere; no dense optimizer takes it."""
        weight = nn.Parameter(self.replica.weights if self.owned else torch.empty(0))
        weight._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
        return weight

    def optimizer(self) -> EmbeddingFusedOptimizer:
        """Stock's fused optimizer of this table alone; on the owner."""
        rows, dim = self.replica.weights.shape
        table = ShardedEmbeddingTable(
            name=self.config.name,
            num_embeddings=rows,
            embedding_dim=dim,
            local_rows=rows,
            local_cols=dim,
            compute_kernel=EmbeddingComputeKernel.FUSED,
            local_metadata=self._shard,
            global_metadata=self._metadata,
        )
        group = GroupedEmbeddingConfig(
            data_type=self.config.data_type,
            pooling=PoolingType.SUM,
            is_weighted=False,
            has_feature_processor=False,
            compute_kernel=EmbeddingComputeKernel.FUSED,
            embedding_tables=[table],
        )
        states = [dict(self.replica.state)]
        return EmbeddingFusedOptimizer(
            group,
            self.replica.kernel.emb_module,
            self._group,
            embedding_weights_by_table=[self.replica.weights],
            all_optimizer_states=states,
        )


def all_hot_tables(
    configs: Mapping[str, TableConfig],
    replicas: Iterable[LocalTable],
    plan: Mapping[str, ParameterSharding],
    rank: int,
    group: dist.ProcessGroup | None,
) -> dict[str, AllHotTable]:
    """The all-hot tables of a collection.

    Args:
        configs: the all-hot tables.
        replicas: this rank's hot rows, of these tables and of others.
        plan: sharding of every table's home.
        rank: this rank.
        group: the ranks.
    """
    return {
        replica.table: AllHotTable(configs[replica.table], replica, plan[replica.table], rank, group)
        for replica in replicas
        if replica.table in configs
    }
