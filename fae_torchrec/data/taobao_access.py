"""How `SyntheticTaobao` accesses its tables, from its law alone: no sample is drawn, whatever the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fae_torchrec.core.access_curve import AccessCurve, Floats
from fae_torchrec.core.access_model import AccessModel, Coupled, Independent
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.taobao_shape import BAG, HISTORY, TAOBAO


@dataclass(frozen=True)
class Sessions(Coupled):
    """Samples that are sessions, as `data.synthetic_taobao` draws them.

    At a given level of popularity the distinct items of a session are independent of each other and of the user; categories do not
    depend on the level at all.

    Attributes:
        features: of the tables, in their order: each of user, item or category.
    """

    features: tuple[str, ...]

    def hot_inputs(self, curves: Sequence[AccessCurve], hot: Sequence[Floats], density: float, partly: float) -> float:
        """See `Joint`."""
        return float(self._all_hot(self._one_hot(curves, hot)).mean())

    def mass_of_hot(self, curves: Sequence[AccessCurve], hot: Sequence[Floats], number: int, density: float) -> Floats:
        """See `Joint`."""
        curve = curves[number]
        if self.features[number] == "category":
            return Independent().mass_of_hot(curves, hot, number, density)
        chances = self._one_hot(curves, hot)
        # At each level a hot session's lookups go to the hot rows as all lookups at this level do.
        others = self._all_hot(chances) / np.maximum(chances[number], 1e-300)
        mass: Floats = self._of_bins(curve) @ others * hot[number]
        total = float(mass.sum())
        return mass / total if total else mass

    def _one_hot(self, curves: Sequence[AccessCurve], hot: Sequence[Floats]) -> Floats:
        """The chance that one lookup is hot, at each level: [tables, levels]."""
        chances: Floats = np.exp(self._log_hot(curves, hot))
        for number, feature in enumerate(self.features):
            if feature == "category":
                chances[number] = float(curves[number].mass @ hot[number])
        return chances

    def _all_hot(self, chances: Floats) -> Floats:
        """The chance that all lookups are hot, at each level: [levels]."""
        shape = TAOBAO
        new, leaves = 1 - shape.repeats, (1 - shape.repeats) * (1 - shape.stays)
        every: Floats = np.ones(chances.shape[1])
        for chance, feature in zip(chances, self.features, strict=True):
            if feature == "user":
                every *= chance
            elif feature == "item":
                follows = shape.follows * _kept(chance, new) + (1 - shape.follows) * chance
                every *= chance * _kept(chance, new) ** (HISTORY - 1) * follows
            else:
                every *= chance * _kept(chance, leaves) ** (HISTORY - 1) * _kept(chance, 1 - shape.follows)
        return every


def _kept(chance: Floats, draws: float) -> Floats:
    """The chance that an event leaves a sample hot that is hot so far, if it draws a row of its own with the probability `draws`."""
    return 1 - draws * (1 - chance)


def taobao_access(scale: float, tables: TableSet, *, coupled: bool = True) -> AccessModel:
    """The access model of the generated data.

    A sample looks up its user 21 times, and its items and categories partly more than once; the curves count all of these lookups, as a
    profile does, so that distinct rows of a batch are overestimated, those of users most.

    Args:
        scale: of the rows, as SyntheticTaobao has it.
        tables: one for each feature, of the generator's rows; tables may be missing.
        coupled: as SyntheticTaobao.

    Raises:
        ConfigError: a table is not of the generator's, or has other rows.
    """
    shape = TAOBAO
    rows, law = shape.rows(scale), shape.popularity(scale)
    curves, features = {}, []
    for table in tables:
        feature = table.feature_names[0] if len(table.feature_names) == 1 else "several features"
        number = shape.feature_names.index(feature) if feature in shape.feature_names else -1
        if number < 0 or rows[number] != table.rows:
            raise ConfigError(
                f"table {table.name!r} of {table.rows} rows and feature {feature!r} is none of synthetic {shape.title}'s at scale {scale}; "
                "measure a profile instead"
            )
        features.append(feature)
        if feature == "category":
            sizes = shape.category_sizes(scale)
            curves[table.name] = AccessCurve(np.ones(len(sizes)), sizes / sizes.sum(), BAG, len(sizes))
        else:
            curves[table.name] = AccessCurve.zipf(table.rows, float(law.exponent[number]), float(law.shift[number]), BAG)
    joint = Sessions(shape.coupling, tuple(features)) if coupled else Independent()
    return AccessModel(tables, curves, joint, f"the law of synthetic {shape.title}, scale {scale}")
