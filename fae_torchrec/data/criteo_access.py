"""How `SyntheticCriteo` accesses its tables, of any shape, from its law alone: no sample is drawn, whatever the rows."""

from __future__ import annotations

from fae_torchrec.core.access_curve import AccessCurve
from fae_torchrec.core.access_model import AccessModel, Coupled, Independent
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.criteo_shape import criteo_shape


def criteo_access(dataset: str, scale: float, tables: TableSet, *, coupled: bool = True) -> AccessModel:
    """The access model of a generated data set.

    Args:
        dataset: "kaggle", "terabyte" or "avazu".
        scale: of its rows, as SyntheticCriteo has it.
        tables: one for each feature, of the generator's rows; tables may be missing.
        coupled: as SyntheticCriteo.

    Raises:
        ConfigError: a table is not of the generator's, or has other rows.
    """
    shape = criteo_shape(dataset)
    law = shape.popularity(scale)
    curves = {}
    for table in tables:
        (feature,) = table.feature_names if len(table.feature_names) == 1 else ("several features",)
        number = shape.feature_names.index(feature) if feature in shape.feature_names else -1
        if number < 0 or law.rows[number] != table.rows:
            raise ConfigError(
                f"table {table.name!r} of {table.rows} rows and feature {feature!r} is none of synthetic {shape.title}'s at scale "
                f"{scale}; measure a profile instead"
            )
        curves[table.name] = AccessCurve.zipf(table.rows, float(law.exponent[number]), float(law.shift[number]))
    joint = Coupled(shape.coupling) if coupled else Independent()
    return AccessModel(tables, curves, joint, f"the law of synthetic {shape.title}, scale {scale}")
