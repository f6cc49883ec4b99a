"""An experiment as its config describes it: data, tables, profile, hot set and placement, and one training run on one rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fae_torchrec.config import RunConfig
from fae_torchrec.core.errors import ConfigError, FAEError
from fae_torchrec.core.hot_set import HotSet, select_hot_set
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.batches import BatchSource
from fae_torchrec.data.calibrator import Calibrator
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.parquet import ParquetSource
from fae_torchrec.data.synthetic import SyntheticCriteo
from fae_torchrec.distributed.process_group import gather_counts
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.audit import KindAudit, audit
from fae_torchrec.training.dlrm import build_dlrm
from fae_torchrec.training.shard import build_optimizer, shard_model
from fae_torchrec.training.trainer import Trainer, TrainOptions, TrainResult

_PROFILE_BATCH = 8192


@dataclass(frozen=True)
class ExperimentData:
    """The samples of an experiment.

    Attributes:
        name: what the data are, with everything that decides them.
        train: training samples.
        test: test samples.
        rows: feature -> rows of its table, in the order of the features.
    """

    name: str
    train: BatchSource
    test: BatchSource
    rows: Mapping[str, int]


def open_data(config: RunConfig) -> ExperimentData:
    """Opens the configured data; reads no sample yet.

    Raises:
        ConfigError: a file or column is missing, or the model has no dense column to work on.
    """
    parquet, synthetic = config.data.parquet, config.data.synthetic
    if synthetic is not None:
        given = {"scale": synthetic.scale, "seed": synthetic.seed}
        train = SyntheticCriteo(synthetic.dataset, num_samples=synthetic.train_samples, split="train", **given)
        test = SyntheticCriteo(synthetic.dataset, num_samples=synthetic.test_samples, split="test", **given)
        name = f"synthetic {synthetic.dataset} x {synthetic.scale:g}, seed {synthetic.seed}, {synthetic.train_samples} samples"
        return ExperimentData(name, train, test, train.cardinalities)
    assert parquet is not None  # DataConfig has exactly one source
    if not parquet.dense:
        raise ConfigError("data.parquet.dense: received no columns; the dlrm model needs at least one dense column")
    rows = {feature: parquet.cardinalities[feature] for feature in parquet.sparse}
    columns = {"dense": parquet.dense, "sparse": parquet.sparse, "label": parquet.label, "tables_rows": rows}
    sources = [ParquetSource(path, **columns) for path in (parquet.train, parquet.test)]
    return ExperimentData(f"parquet {os.path.abspath(parquet.train)}", sources[0], sources[1], rows)


def experiment_tables(config: RunConfig, data: ExperimentData) -> TableSet:
    """The model's tables, from a model on the meta device."""
    return model_tables(_model(config, data, torch.device("meta")))


def make_profile(config: RunConfig, data: ExperimentData, tables: TableSet, *, show_progress: bool = False) -> PopularityProfile:
    """Loads the profile that the config names, or the one in the output folder if it is of the same data and sampling, or measures it.

    Raises:
        FingerprintError: the named profile is of other tables.
        DataError: an id is out of its table's range.
    """
    wanted = (data.name, config.profile.sample_rate, config.profile.seed)
    kept = Path(config.output, "profile.npz")
    if config.profile.path is not None:
        return PopularityProfile.load(config.profile.path).for_tables(tables)
    if kept.is_file():
        try:
            profile = PopularityProfile.load(kept).for_tables(tables)
        except FAEError:
            profile = None  # of an earlier experiment in the same folder: measured anew
        if profile is not None and (profile.source, profile.sample_rate, profile.seed) == wanted:
            return profile
    calibrator = Calibrator(tables, sample_rate=config.profile.sample_rate, seed=config.profile.seed)
    batches = data.train.batches(_PROFILE_BATCH)
    profile = calibrator.run(batches, source=data.name, progress=show_progress, total=data.train.num_samples)
    _folder(config)
    profile.save(kept)
    return profile


def make_hot_set(config: RunConfig, profile: PopularityProfile) -> HotSet:
    """Selects the hot set under the configured budget.

    Raises:
        BudgetError: the budget cannot hold the tables that are always hot.
    """
    budget = config.placement.budget_bytes(profile.tables.total_bytes)
    return select_hot_set(profile, budget, pinned_max_rows=config.placement.pinned_max_rows)


def make_placement(config: RunConfig, tables: TableSet, hot_set: HotSet | None) -> tuple[RowPlacement, Path]:
    """Loads the placement that the config names, or makes it from a hot set; either way it lies in the output folder afterwards.

    Raises:
        FingerprintError: the named placement is of other tables.
    """
    if config.placement.path is not None:
        placement = RowPlacement.load(config.placement.path)
        placement.check_tables(tables)
    else:
        assert hot_set is not None
        placement = RowPlacement.from_hot_set(hot_set)
    path = _folder(config) / "placement.npz"
    placement.save(path)
    return placement, path


def prepare(config: RunConfig, *, show_progress: bool = False) -> RowPlacement:
    """Everything that comes before training: opens the data, measures popularity and places the rows.

    Raises:
        FAEError: bad input.
    """
    data = open_data(config)
    tables = experiment_tables(config, data)
    hot_set = None if config.placement.path else make_hot_set(config, make_profile(config, data, tables, show_progress=show_progress))
    return make_placement(config, tables, hot_set)[0]


def run_placement(rank: int, config: RunConfig, name: str, placement: RowPlacement, show_progress: bool) -> dict[str, Any]:
    """Trains, scores and audits one placement on this rank of the default process group.

    Args:
        rank: this rank.
        config: the experiment.
        name: "stock", "fae" or "fae-unsegregated".
        placement: the rows' tiers; "stock" does not look at it.
        show_progress: a progress bar on rank 0.

    Returns:
        One entry of the report's `runs`; the same on every rank but for its clock.
    """
    group = dist.group.WORLD
    assert group is not None
    device = torch.device("cuda", rank) if config.train.device == "cuda" else torch.device("cpu")
    data = open_data(config)
    tables = experiment_tables(config, data)
    hot_rows = None if name == "stock" else placement
    model = shard_model(_model(config, data, torch.device("cpu")), hot_rows, config.train.batch_size, device, group)
    optimizer = build_optimizer(model, config.train.dense_learning_rate)
    schedule = ShuffleSchedule(config.schedule.policy if name == "fae" else "stock", config.schedule.rate)

    def loader(num_batches: int | None) -> HotColdDataLoader:
        return HotColdDataLoader(
            lambda: islice(data.train.batches(config.train.batch_size, rank=rank, world_size=group.size()), num_batches),
            placement,
            schedule=schedule if num_batches is None else ShuffleSchedule("fixed" if schedule.segregates else "stock"),
            batch_size=config.train.batch_size,
            window_batches=config.schedule.window_batches,
            agree=gather_counts(group, device),
        )

    options = TrainOptions(
        batch_size=config.train.batch_size,
        epochs=config.train.epochs,
        steps=config.train.steps,
        eval_batch_size=config.train.eval_batch_size,
        swap_eval_batches=config.train.swap_eval_batches,
    )
    result = Trainer(model, optimizer, loader(None), data.test, options, device, group, show_progress=show_progress).run()
    audited = loader(config.compare.count_batches)
    kinds = audit(model, optimizer, audited, tables, hot_rows, device, group, segregated=schedule.segregates)
    return _report_entry(name, group.size(), hot_rows, result, kinds)


def _report_entry(
    name: str, ranks: int, placement: RowPlacement | None, result: TrainResult, kinds: Mapping[str, KindAudit]
) -> dict[str, Any]:
    samples = sum(result.samples_by_kind.values())
    audited = sum(kind.samples for kind in kinds.values())

    def per_sample(quantity: str) -> float:
        """The audit's quantity per sample, kinds weighted as the run had them."""
        total = 0.0
        for kind, count in result.samples_by_kind.items():
            of_kind = kinds.get(kind)
            everything = sum(getattr(each, quantity) for each in kinds.values())
            total += count * (getattr(of_kind, quantity) / of_kind.samples if of_kind is not None else everything / audited)
        return total / samples

    return {
        "placement": name,
        "ranks": ranks,
        "samples_per_s": result.samples_per_s,
        "samples_per_s_spread": list(result.samples_per_s_spread),
        "hot_inputs": None if placement is None else per_sample("hot_samples"),
        "hot_batches": None if placement is None else result.steps_by_kind.get("hot", 0) / sum(result.steps_by_kind.values()),
        "fast_memory_bytes": 0 if placement is None else placement.hot_bytes,
        "bytes_crossed_per_sample": per_sample("crossed_bytes"),
        "cold_rows_per_sample": per_sample("cold_rows"),
        "cold_bytes_per_sample": per_sample("cold_bytes"),
        "train_loss": result.train_loss,
        "test_auc": result.test.auc,
        "test_logloss": result.test.logloss,
        "test_accuracy": result.test.accuracy,
        "steps": sum(result.steps_by_kind.values()),
        "steps_by_kind": result.steps_by_kind,
        "samples": samples,
        "samples_by_kind": result.samples_by_kind,
        "wall_s": result.wall_s,
        "swap_losses": result.swap_losses,
        "breakdown": {
            kind: {part: getattr(sums, f"{part}_ms") / sums.steps for part in ("input_dist", "forward", "backward", "optimizer")}
            for kind, sums in kinds.items()
        },
        "audit": {kind: asdict(sums) for kind, sums in kinds.items()},
        "loss_curve": [list(point) for point in result.loss_curve],
    }


def _model(config: RunConfig, data: ExperimentData, device: torch.device) -> Any:
    return build_dlrm(
        data.rows,
        data.train.num_dense,
        config.model.embedding_dim,
        config.model.dense_arch,
        config.model.over_arch,
        config.train.optimizer,
        config.train.learning_rate,
        config.train.seed,
        device,
    )


def _folder(config: RunConfig) -> Path:
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
