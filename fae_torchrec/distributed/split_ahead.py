"""SplitAhead: batches are split by tier on the host, by the loader's threads, so that a step on a GPU has nothing of it to do."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import nn
from torchrec.datasets.utils import Batch

from fae_torchrec.data.batches import AheadKeyedJaggedTensor, HotKeyedJaggedTensor
from fae_torchrec.distributed.sharded_embedding_bag import ShardedFAEEmbeddingBagCollection
from fae_torchrec.modules.bag_split import BagSplit

B = TypeVar("B", bound=Batch)


class SplitAhead:
    """What a HotColdDataLoader takes as `split_ahead`: splits the ids of a batch for every hot/cold EmbeddingBagCollection of a model.

    On the device the split is some thirty small kernels and, for a batch with cold ids, a wait of the host for their number. Here it is a
    few milliseconds of another thread. The batch stays what it is: whoever does not know of the split uses the ids.

    Takes 4 bytes of host memory a row, for an index. Several threads may call it at a time.

    Args:
        model: sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [module for module in model.modules() if isinstance(module, ShardedFAEEmbeddingBagCollection)]
        self._collections = {module.split_key: (module.host_split(), module) for module in modules}

    def __call__(self, batch: B, step: int = 0) -> B:
        """The batch, with its ids split.

        Args:
            step: number among the batches of its kind: two that follow one another take turns with a staging area.
            batch: on the CPU; a HotKeyedJaggedTensor is split as a hot one, and what is cold in it counted as its broken promise.
        """
        kjt = batch.sparse_features
        hot = isinstance(kjt, HotKeyedJaggedTensor)
        keys = set(kjt.keys())
        ahead = {
            key: module.with_units(split.ahead(kjt, promised_hot=hot, half=step % 2))
            for key, (split, module) in self._collections.items()
            if _features(split) <= keys  # else it is fed from somewhere else
        }
        of = HotKeyedJaggedTensor.of if hot else AheadKeyedJaggedTensor.of
        return replace(batch, sparse_features=of(kjt, ahead))


def _features(split: BagSplit) -> set[str]:
    return {lookup.feature for lookup in split.lookups}
