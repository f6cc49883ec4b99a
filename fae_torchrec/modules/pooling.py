"""pooled = hot_pool + cold_pool: joins what the two tiers pooled into the stock output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from fbgemm_gpu.permute_pooled_embedding_modules import PermutePooledEmbeddings
from torchrec.sparse.jagged_tensor import KeyedTensor

from fae_torchrec.core.tables import TableKind
from fae_torchrec.modules.tier_split import Lookup


def combine_tiers(
    lookups: Sequence[Lookup], hot: torch.Tensor | None, cold: torch.Tensor | None, divisor: torch.Tensor | None
) -> KeyedTensor:
    """Adds the tiers where they overlap and divides means once.

    Args:
        lookups: the output's blocks: those of all-hot tables, then split, then all-cold.
        hot: [B, columns of all-hot and split lookups] sums, or None where no table has a hot row.
        cold: [B, columns of split and all-cold lookups] sums; None where no table has a cold row, or the batch is hot (cold columns are
            then zero).
        divisor: float32 [B, sum of dims] to divide by (bag lengths under MEAN columns), or None.

    Returns:
        KeyedTensor [B, sum of dims], keyed by the stock names.
    """
    width = {kind: sum(lookup.dim for lookup in lookups if lookup.kind is kind) for kind in TableKind}
    if hot is None:
        assert cold is not None
        values = cold
    elif cold is None:
        values = torch.nn.functional.pad(hot, (0, width[TableKind.COLD])) if width[TableKind.COLD] else hot
    else:
        split_hot, split_cold = hot[:, width[TableKind.HOT] :], cold[:, : width[TableKind.SPLIT]]
        values = torch.cat([hot[:, : width[TableKind.HOT]], split_hot + split_cold, cold[:, width[TableKind.SPLIT] :]], dim=1)
    dims = [lookup.dim for lookup in lookups]
    if divisor is not None:
        values = values / divisor
    return KeyedTensor(keys=[lookup.name for lookup in lookups], length_per_key=dims, values=values)


def block_permutation(
    have: Sequence[str], want: Sequence[str], dims: Mapping[str, int], device: torch.device
) -> PermutePooledEmbeddings | None:
    """A stock permutation of column blocks, or None where they are in order already.

    Args:
        have: keys of the blocks as they come.
        want: the same keys in the order asked for.
        dims: columns of each block.
        device: where it will run.
    """
    if list(have) == list(want):
        return None
    position = {key: i for i, key in enumerate(have)}
    return PermutePooledEmbeddings([dims[key] for key in have], [position[key] for key in want], device)
