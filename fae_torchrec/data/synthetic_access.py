"""How generated samples access their tables, by the name of the data set."""

from __future__ import annotations

from fae_torchrec.core.access_model import AccessModel
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.criteo_access import criteo_access
from fae_torchrec.data.taobao_access import taobao_access


def synthetic_access(dataset: str, scale: float, tables: TableSet) -> AccessModel:
    """The access model of a generated data set: "kaggle", "terabyte", "avazu" or "taobao".

    Raises:
        ConfigError: the data set is none of these; a table is not of the generator's, or has other rows.
    """
    return taobao_access(scale, tables) if dataset == "taobao" else criteo_access(dataset, scale, tables)
