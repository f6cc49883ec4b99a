"""An experiment's popularity profile: a saved one where it fits, else measured by this process, by workers or by all ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch.distributed as dist

from fae_torchrec.config import RunConfig
from fae_torchrec.core.errors import ConfigError, FAEError
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.cache_statistics import MeasuredCacheStatistics, measure_cache_statistics
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.partial_profile import PartialProfile
from fae_torchrec.distributed.local_ranks import from_first_rank, merged_on_first_rank
from fae_torchrec.experiment_data import ExperimentData
from fae_torchrec.training.report import write_json


def make_profile(
    config: RunConfig, data: ExperimentData, tables: TableSet, *, show_progress: bool = False, group: dist.ProcessGroup | None = None
) -> PopularityProfile:
    """Loads the profile that the config names, or the one in the output folder if it is of the same data and sampling, or measures it.

    Args:
        config: the experiment.
        data: its samples.
        tables: the tables that are profiled.
        show_progress: a progress bar on standard error.
        group: ranks that share the work, one process each (`profile.workers` is for a single process); every rank must call this, and
            all get the profile.

    Raises:
        FingerprintError: the named profile is of other tables.
        DataError: an id is out of its table's range, or more lines are malformed than allowed.
    """
    if group is None or group.size() == 1:
        profile = _known_profile(config, data, tables) or _measured(config, data, tables, show_progress)
    else:
        profile = from_first_rank(lambda: _known_profile(config, data, tables), group) or _measured_by(
            group, config, data, tables, show_progress
        )
    if config.profile.path is None and (group is None or group.rank() == 0):
        save_profile(config, profile)
    return profile


def _known_profile(config: RunConfig, data: ExperimentData, tables: TableSet) -> PopularityProfile | None:
    options, kept = config.profile, Path(config.output, "profile.npz")
    if options.path is not None:
        return PopularityProfile.load(options.path).for_tables(tables)
    if not kept.is_file():
        return None
    try:
        profile = PopularityProfile.load(kept).for_tables(tables)
    except FAEError:
        return None  # of an earlier experiment in the same folder: measured anew
    fresh = 0 if profile.fresh_inputs is None else profile.fresh_inputs.num_samples
    measured = (profile.source, profile.sample_rate, profile.seed, profile.counted_inputs.num_samples, fresh)
    kept_counted = min(options.keep_inputs, profile.num_samples)
    kept_fresh = min(options.fresh_inputs, profile.total_samples - profile.num_samples)
    wanted = (data.name, options.sample_rate, options.seed, kept_counted, kept_fresh)
    return profile if measured == wanted and sum(profile.skipped.values()) <= config.data.max_bad_lines else None


def _calibrator(config: RunConfig, tables: TableSet) -> Calibrator:
    options = config.profile
    return Calibrator(
        tables, sample_rate=options.sample_rate, seed=options.seed, keep_inputs=options.keep_inputs, fresh_inputs=options.fresh_inputs
    )


def _measured(config: RunConfig, data: ExperimentData, tables: TableSet, show_progress: bool) -> PopularityProfile:
    profile = _calibrator(config, tables).run_source(data.train, workers=config.profile.workers, progress=show_progress)
    return replace(profile, source=data.name)  # the data's own name says how categories are coded, too


def _measured_by(
    group: dist.ProcessGroup, config: RunConfig, data: ExperimentData, tables: TableSet, show_progress: bool
) -> PopularityProfile:
    """The profile, each rank having counted its share of the shards; an error of one rank is raised on all."""
    shards = range(group.rank(), data.train.num_shards, group.size())

    def count() -> PartialProfile:
        return _calibrator(config, tables).count(data.train, shards, progress=show_progress and group.rank() == 0)

    def merge(parts: list[PartialProfile]) -> PopularityProfile:
        return PartialProfile.merged(parts).profile(data.name)

    return cast(PopularityProfile, merged_on_first_rank(count, merge, group))


def save_profile(config: RunConfig, profile: PopularityProfile) -> Path:
    """Writes the profile to the output folder; returns its path.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    path = output_folder(config) / "profile.npz"
    profile.save(path)
    return path


def make_cache_statistics(
    config: RunConfig, data: ExperimentData, tables: TableSet, global_batch_size: int | None = None, *, show_progress: bool = False
) -> tuple[MeasuredCacheStatistics, Path]:
    """Measures what TorchRec's planner asks about caches on the train data; writes cache_statistics.npz and .json to the output folder.

    Args:
        config: the experiment.
        data: its samples.
        tables: the tables that are measured.
        global_batch_size: samples of a step over all ranks; default `train.batch_size`.
        show_progress: a progress bar on standard error.

    Returns:
        The statistics and the path of the .npz.

    Raises:
        ConfigError: the batch size is below 1.
        DataError: an id is out of its table's range, or there are fewer than two batches.
    """
    size = config.train.batch_size if global_batch_size is None else global_batch_size
    source = data.train
    statistics = measure_cache_statistics(
        source.batches(size), tables, global_batch_size=size, source=data.name, progress=show_progress, total=source.num_samples
    )
    path = output_folder(config) / "cache_statistics.npz"
    statistics.save(path)
    write_json(statistics.to_json(), path.with_suffix(".json"))
    return statistics, path


def output_folder(config: RunConfig) -> Path:
    """The output folder, made if it is missing.

    Raises:
        ConfigError: it cannot be made.
    """
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: cannot make the folder {folder} ({error}); give one that can be written to") from error
    return folder
