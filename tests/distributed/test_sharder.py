"""get_fae_sharders: TorchRec's default sharders with ours in place of two."""

from __future__ import annotations

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from fae_torchrec.distributed.sharder import FAEEmbeddingBagCollectionSharder, FAEEmbeddingCollectionSharder, get_fae_sharders


def test_ours_stand_where_stock_has_its_own() -> None:
    fused_params = {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": 0.1}
    ours, stock = get_fae_sharders(fused_params), get_default_sharders()
    assert [sharder.module_type for sharder in ours] == [sharder.module_type for sharder in stock]
    replaced = {EmbeddingBagCollection: FAEEmbeddingBagCollectionSharder, EmbeddingCollection: FAEEmbeddingCollectionSharder}
    for mine, theirs in zip(ours, stock, strict=True):
        assert type(mine) is replaced.get(theirs.module_type, type(theirs))
        assert mine.fused_params == (fused_params if theirs.module_type in replaced else theirs.fused_params)
