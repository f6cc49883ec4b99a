"""An experiment's segregated store: written once for its placement, and checked before anything is trained from it."""

from __future__ import annotations

from pathlib import Path

from fae_torchrec.config import RunConfig
from fae_torchrec.core.errors import ConfigError, DataError, FingerprintError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.data.store import SegregatedStore
from fae_torchrec.data.store_writer import write_store
from fae_torchrec.experiment_data import ExperimentData
from fae_torchrec.experiment_profile import output_folder


def make_store(
    config: RunConfig, data: ExperimentData, placement: RowPlacement, *, show_progress: bool = False
) -> tuple[SegregatedStore, bool]:
    """Writes the train data as hot and cold samples to `loader.store`, or to OUTPUT/store if the config names none.

    Args:
        config: the experiment; `loader.workers` processes share the work.
        data: its samples.
        placement: which rows are hot.
        show_progress: a progress bar on standard error.

    Returns:
        The store, and whether it was written now: one of the same placement and data that is there already stays as it is.

    Raises:
        FingerprintError: there is a store of another placement or of other data.
        ConfigError: there is something else, or the folder cannot be written.
        DataError: the data are malformed, or the disk is full.
    """
    path = config.loader.store or str(output_folder(config) / "store")
    if not Path(path).exists():
        return write_store(path, data.train, placement, workers=max(config.loader.workers, 1), show_progress=show_progress), True
    remedy = f"a store is never overwritten: remove {path}, or name another folder in loader.store (--store)"
    try:
        store = SegregatedStore.open(path)
        store.check(placement, data.name)
    except FingerprintError as error:
        raise FingerprintError(f"{error}; {remedy}") from error
    except DataError as error:
        raise ConfigError(f"{error}; {remedy}") from error
    return store, False


def open_store(config: RunConfig, data: ExperimentData, placement: RowPlacement) -> SegregatedStore | None:
    """The store that `loader.store` names; None if it names none.

    Raises:
        ConfigError: there is none.
        DataError: it is not whole.
        FingerprintError: it was written for another placement or of other data.
    """
    if config.loader.store is None:
        return None
    store = SegregatedStore.open(config.loader.store)
    store.check(placement, data.name)
    return store
