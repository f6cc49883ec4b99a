"""An experiment as its config describes it: what comes before training, and one training run on one rank."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import DistributedModelParallel

from fae_torchrec.config import RunConfig
from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.data.segregate import check_ids
from fae_torchrec.distributed.hardware_topology import machine_topology
from fae_torchrec.distributed.local_ranks import from_first_rank
from fae_torchrec.distributed.sharder import get_fae_sharders
from fae_torchrec.distributed.split_ahead import SplitAhead
from fae_torchrec.experiment_data import ExperimentData, open_data
from fae_torchrec.experiment_loader import agreement, audit_loader, train_loader
from fae_torchrec.experiment_measures import memory_entry, start_logloss, work_entry, write_scores
from fae_torchrec.experiment_model import check_model
from fae_torchrec.experiment_model import experiment_model as experiment_model
from fae_torchrec.experiment_model import experiment_tables as experiment_tables
from fae_torchrec.experiment_model import placed_tables as placed_tables
from fae_torchrec.experiment_placement import settle_rows
from fae_torchrec.experiment_store import open_store
from fae_torchrec.training.audit import audit
from fae_torchrec.training.baselines import BASELINES, stock_baseline
from fae_torchrec.training.checkpoint import load_checkpoint, read_extra, save_checkpoint
from fae_torchrec.training.checkpoint_folder import CheckpointFolder
from fae_torchrec.training.metrics import check_labels, evaluate
from fae_torchrec.training.peak_memory import PeakMemory
from fae_torchrec.training.run_checkpoints import CheckpointOptions
from fae_torchrec.training.run_entry import run_entry
from fae_torchrec.training.shard import build_optimizer, fae_planner, shard_model
from fae_torchrec.training.step_profile import profile_steps
from fae_torchrec.training.trainer import Trainer, TrainOptions
from fae_torchrec.training.work import weights_fingerprint

_PROFILE_BATCH = 8192
_MAY_CHANGE = ("epochs", "steps", "nan_check_steps", "lookahead", "log_every", "tensorboard")
"""Keys of `train` that may be others when a run is resumed."""


def check_run(config: RunConfig, data: ExperimentData, placement: RowPlacement, names: Iterable[str], ranks: int) -> None:
    """Finds before any training what would end it later: too few devices or samples, a plan that cannot be, a wrong store or test data.

    Args:
        config: the experiment.
        data: its samples; the test data are read once.
        placement: the rows' tiers.
        names: the placements that will be trained; "stock" is planned by TorchRec alone and not looked at.
        ranks: the largest number of ranks.

    Raises:
        ConfigError: there is no such device, or fewer than ranks, or no store where the config names one.
        DataError: fewer samples than ranks, an id out of range or a label that is not 0 or 1 in the test data, or a store is not whole.
        FingerprintError: the store is of another placement or of other data.
        PlannerError: a table cannot be placed so.
    """
    names = set(names)
    if "fae" in names:
        open_store(config, data, placement)
    device, local_ranks = config.train.device, get_local_size(ranks)
    if device == "cuda" and torch.cuda.device_count() < local_ranks:
        raise ConfigError(
            f"train.device: received cuda for {local_ranks} rank(s) on this machine, which has {torch.cuda.device_count()} CUDA device(s); "
            "take fewer ranks or cpu"
        )
    for split, source in (("train", data.train), ("test", data.test)):
        if source.num_samples < ranks:
            raise DataError(f"the {split} data hold {source.num_samples} sample(s), {ranks} ranks need at least one each; take fewer ranks")
    if names - BASELINES.keys():
        planner = fae_planner(placement, machine_topology(ranks, device), config.train.batch_size, **_tiers(config))
        planner.plan(experiment_model(config, data, torch.device("meta")), get_fae_sharders())
    tables = experiment_tables(config, data)
    for batch in data.test.batches(_PROFILE_BATCH):
        check_ids(batch.sparse_features, tables)
        check_labels(batch.labels)


def prepare(
    config: RunConfig, name: str, ranks: int, load: str | None = None, save: str | None = None, *, show_progress: bool = False
) -> tuple[RunConfig, RowPlacement]:
    """Everything that comes before training one placement: opens the data, measures popularity, places the rows, checks the run.

    Args:
        config: the experiment.
        name: the placement that will be trained: "stock", "fae" or "fae-unsegregated".
        ranks: number of ranks.
        load: folder of the checkpoint that training starts from.
        save: folder for the checkpoint of the trained model.
        show_progress: a progress bar while popularity is measured.

    Returns:
        The config to train with, in which "auto" is replaced by what it stands for, and the placement.

    Raises:
        FAEError: bad input.
        PlannerError: a table cannot be placed so.
    """
    _check_folders(config, load, save)
    data = open_data(config)
    check_model(config, data)
    config, placement = settle_rows(config, data, [ranks], show_progress=show_progress)
    check_run(config, data, placement, [name], ranks)
    return config, placement


def run_placement(
    rank: int,
    config: RunConfig,
    name: str,
    placement: RowPlacement,
    show_progress: bool,
    load: str | None = None,
    save: str | None = None,
    scores_path: str | None = None,
) -> dict[str, Any]:
    """Trains, scores and audits one placement on this rank of the default process group.

    Args:
        rank: this rank.
        config: the experiment.
        name: "fae", "fae-unsegregated" or one of TorchRec's own (`BASELINES`).
        placement: the rows' tiers; TorchRec's own do not look at it.
        show_progress: a progress bar on rank 0.
        load: folder of a checkpoint to start from, saved under any placement and number of ranks; not looked at if the run is resumed.
        save: folder for a checkpoint of the trained model.
        scores_path: for a comparison: .npz to which rank 0 writes all test scores; the entry then has "work", see `unequal_work`.

    Returns:
        One entry of the report's `runs`, the same on every rank but for its clock; with `load`, its "loaded" has the scores before
        training; its "resumed_from" is the checkpoint in `checkpoint.folder` that the run went on from, if there was one.

    Raises:
        ConfigError: there is no checkpoint to load, or one where to save, or those in `checkpoint.folder` are of another run.
        DataError: the checkpoint is damaged.
        StateError: it is of another model or optimizer.
        FAEError: whatever ends the training, see Trainer.run.
    """
    group = dist.group.WORLD
    assert group is not None
    # The launcher chose this process's device: on several hosts it is not the rank's number.
    device = torch.device("cuda", torch.cuda.current_device()) if config.train.device == "cuda" else torch.device("cpu")
    data = open_data(config)
    tables = experiment_tables(config, data)
    baseline = stock_baseline(name, device.type)
    hot_rows = placement if baseline is None else None
    model = experiment_model(config, data, torch.device("cpu"))
    start: dict[str, Any] = {} if scores_path is None else {"start_weights": weights_fingerprint(model)}
    model = shard_model(
        model,
        hot_rows,
        config.train.batch_size,
        device,
        group,
        baseline=baseline,
        cache_bytes=config.compare.cache_bytes(placement.budget_bytes),
        **_tiers(config),
    )
    optimizer = build_optimizer(model, config.train.dense_learning_rate)
    resumed = from_first_rank(lambda: _newest_checkpoint(config), group)
    more: dict[str, Any] = {} if resumed is None else {"resumed_from": resumed}
    if load is not None and resumed is None:
        load_checkpoint(load, model, optimizer)
        more["loaded"] = {"path": load, **_scores(config, data, model, device, group)}
    if scores_path is not None:
        start["start_logloss"] = start_logloss(config, data, model, device, group)
    with agreement(group) as agree:
        loader = train_loader(config, name, data, placement, group, agree)
        if device.type == "cuda" and hot_rows is not None:
            loader.split_ahead = SplitAhead(model)
        run = _identity(config, name, data, hot_rows)
        options, peak = replace(_train_options(config), prefetch=baseline is not None and baseline.prefetches), PeakMemory(device)
        trainer = Trainer(model, optimizer, loader, data.test, options, device, group, show_progress=show_progress, run=run)
        result = trainer.run()
        more |= memory_entry(model, tables, peak, device, group)
        if scores_path is not None:
            more["work"] = work_entry(config, model, optimizer, trainer, result.test, start, device, group)
            if rank == 0:
                write_scores(scores_path, result.test)
        if save is not None:  # before the audit, which trains on
            about = {"placement": name, "steps": trainer.steps, "config": config.to_dict()}
            if resumed is None or not _is_saved(save, about):
                save_checkpoint(save, model, optimizer, extra=about)
        audited = audit_loader(config, data, placement, group, agree, segregates=loader.schedule.segregates)
        kinds = audit(model, optimizer, audited, tables, hot_rows, device, group)
        if scores_path is not None and config.compare.profile_steps:
            profiled = audit_loader(config, data, placement, group, agree, segregates=loader.schedule.segregates)
            profiled.split_ahead = loader.split_ahead
            more["step_shares"] = profile_steps(trainer.new_pipeline, profiled, config.compare.profile_steps, device, group)
    return {**run_entry(name, group.size(), more["fast_memory"], result, kinds), **more}


def _tiers(config: RunConfig) -> dict[str, Any]:
    """Where the tiers lie, as the planner takes it."""
    options = config.placement
    return {
        "hot_tier": options.hot_tier,
        "cold_tier": options.cold_tier,
        "cold_cache_bytes": options.cold_cache_bytes,
        "stock_tables": options.stock_tables,
    }


def _train_options(config: RunConfig) -> TrainOptions:
    train, checkpoint = config.train, config.checkpoint
    return TrainOptions(
        epochs=train.epochs,
        steps=train.steps,
        eval_batch_size=train.eval_batch_size,
        swap_eval_batches=train.swap_eval_batches,
        check_replicas=config.placement.check_replicas,
        nan_check_steps=train.nan_check_steps,
        lookahead=train.lookahead,
        log_every=train.log_every,
        tensorboard=train.tensorboard,
        checkpoint=None if checkpoint.folder is None else CheckpointOptions(**asdict(checkpoint)),
    )


def _identity(config: RunConfig, name: str, data: ExperimentData, placement: RowPlacement | None) -> dict[str, Any]:
    """What must be equal when a run is resumed; the loader says by itself what must be equal for its order."""
    values = config.to_dict()
    return {
        "placement": name,
        "placement_fingerprint": None if placement is None else placement.fingerprint,
        "data": data.name,
        "model": values["model"],
        "schedule": values["schedule"],
        "train": {key: value for key, value in values["train"].items() if key not in _MAY_CHANGE},
    }


def _newest_checkpoint(config: RunConfig) -> str | None:
    """Of the folder that the run keeps its checkpoints in."""
    newest = None if config.checkpoint.folder is None else CheckpointFolder(config.checkpoint.folder).latest()
    return None if newest is None else str(newest)


def _is_saved(path: str, about: Mapping[str, Any]) -> bool:
    """Whether an earlier attempt at this run, which was interrupted after its training, has saved the model. Collective."""
    try:
        saved = read_extra(path)
    except ConfigError:  # no checkpoint, or half of one
        return False
    return all(saved.get(key) == value for key, value in about.items())


def _check_folders(config: RunConfig, load: str | None, save: str | None) -> None:
    """Finds a checkpoint folder that cannot be before any work; what is in one to load or to go on from is checked when it is."""
    if load is not None and not Path(load).is_dir():
        raise ConfigError(f"--load: there is no folder {load}; give the folder of a finished checkpoint")
    # A run that goes on may have been interrupted while it saved.
    if save is not None and Path(save).exists() and _newest_checkpoint(config) is None:
        raise ConfigError(f"--save: the folder {save} exists already; give a new folder, checkpoints are not overwritten")
    for key, name in (("--save", save), ("checkpoint.folder", config.checkpoint.folder)):
        if name is not None:
            folder = Path(name).absolute()
            there = next(path for path in (folder, *folder.parents) if path.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                why = "may not be written to" if there.is_dir() else "is no folder"
                raise ConfigError(f"{key}: nothing can be written to {name}, because {there} {why}; give a folder where you may write")


def _scores(
    config: RunConfig, data: ExperimentData, model: DistributedModelParallel, device: torch.device, group: dist.ProcessGroup
) -> dict[str, float]:
    batches = data.test.batches(config.train.eval_batch_size, rank=group.rank(), world_size=group.size())
    scores = evaluate(model, batches, device, group)
    return {"test_auc": scores.auc, "test_logloss": scores.logloss, "test_accuracy": scores.accuracy}
