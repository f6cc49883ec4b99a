"""A run's description: one YAML or JSON file read into frozen dataclasses, every mistake named by its dotted key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from fae_torchrec.core.byte_size import parse_budget
from fae_torchrec.core.byte_size import parse_bytes as parse_bytes
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.data_config import DATA_PATHS, DataConfig
from fae_torchrec.schema import merge, read_mapping, read_override, read_section, within

_PATHS = (*DATA_PATHS, "profile.path", "placement.path", "loader.store", "model.factory")
"""Keys whose relative paths are relative to the config file. What a run writes (`output`, `checkpoint.folder`, `train.tensorboard`) is
relative to the current folder."""


@dataclass(frozen=True)
class ModelConfig:
    """The model: TorchRec's DLRM, or what a function of your own makes.

    Attributes:
        arch: of the model that is built where no factory is named.
        factory: "path/to/file.py:function" or "package.module:function", which makes the train module from a ModelSpec; null builds `arch`.
        options: any values, handed to the factory.
        embedding_dim: columns of the tables.
        dense_arch: widths of the dense MLP; of DLRM the last is `embedding_dim`. A factory is given them as they are.
        over_arch: widths of the MLP over the interactions; of DLRM the last is 1. A factory is given them as they are.
    """

    arch: Literal["dlrm"] = "dlrm"
    factory: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    embedding_dim: int = within(16, 4)
    dense_arch: tuple[int, ...] = within((512, 256, 64, 16), 1)
    over_arch: tuple[int, ...] = within((512, 256, 1), 1)

    def __post_init__(self) -> None:
        if self.embedding_dim % 4:
            raise ConfigError(
                f"model.embedding_dim: received {self.embedding_dim}; FBGEMM's fused kernels need a multiple of 4, such as "
                f"{self.embedding_dim + -self.embedding_dim % 4}"
            )
        if self.factory is not None:
            where, _, function = self.factory.rpartition(":")
            if not where or not function.isidentifier():
                raise ConfigError(f"model.factory: received {self.factory!r}; give path/to/file.py:function or package.module:function")
            try:
                json.dumps(self.options)
            except TypeError as error:
                raise ConfigError(f"model.options: received {dict(self.options)}; {error}; take plain values") from None
            return
        if self.options:
            raise ConfigError(
                f"model.options: received {dict(self.options)} without a model.factory, which they are for; name one, or leave them out"
            )
        if not self.dense_arch or self.dense_arch[-1] != self.embedding_dim:
            raise ConfigError(
                f"model.dense_arch: received {list(self.dense_arch)}; its last width must be model.embedding_dim ({self.embedding_dim}), "
                "because DLRM multiplies the dense vector with the embeddings"
            )
        if not self.over_arch or self.over_arch[-1] != 1:
            raise ConfigError(f"model.over_arch: received {list(self.over_arch)}; its last width must be 1, the logit")


@dataclass(frozen=True)
class ProfileConfig:
    """How popularity is measured: a Bernoulli sample of the train inputs, or a saved profile (`path`).

    Attributes:
        sample_rate: the chance of an input to be counted; FAE found 5 % to be enough.
        seed: of the sampling.
        keep_inputs: counted inputs kept whole at most, for the selection.
        fresh_inputs: inputs not counted kept whole at most, for the estimate of hot inputs.
        workers: processes that read and count where there is one rank (under torchrun each rank is one); the profile is the same.
        path: a saved profile, instead of measuring one.
    """

    sample_rate: float = within(0.05, 0, 1, above=True)
    seed: int = within(7, 0)
    keep_inputs: int = within(131_072, 1)
    fresh_inputs: int = within(65_536, 1)
    workers: int = within(1, 1)
    path: str | None = None


@dataclass(frozen=True)
class PlacementConfig:
    """Which rows are hot, where they lie, and what is left to stock sharding.

    Attributes:
        budget: bytes of the hot rows, weights and optimizer state: what a rank holds of a replicated hot tier, what all ranks hold
            together of a sharded one. A percentage is of all placed tables; "auto" is what the dense part, inputs, activations, stock
            tables and the cold tier leave of a rank's device, or on a CPU a tenth of the placed tables.
        policy: rows that together make the most inputs all hot, or FAE's access threshold.
        sizes: whether `threshold` tallies all counts or estimates sizes from chunks of the tables, as FAE does.
        pinned_max_rows: tables of at most so many rows are always hot.
        path: a saved placement, instead of selecting one.
        hot_tier: every rank holds every hot row, or the stock planner spreads them by table or (on CUDA) by row; auto chooses where the
            budget is auto too, and replicates otherwise.
        cold_tier: where the cold rows lie with `train.device: cuda`: in host memory that the GPU reads (uvm), behind a cache of the GPU
            (uvm_caching), or looked up by the host; auto is uvm on one rank, uvm_caching on several. On a CPU there is host alone.
        cold_cache: bytes of fast memory per rank for cold rows on their way: the cache of uvm_caching, or on one rank with uvm a staging
            area (0: none). None: a fifth of all rows, or room for the cold rows of two batches.
        stock_tables: names of tables (`t_<feature>`) left to stock sharding: not profiled and not placed.
        check_replicas: compares the ranks' hot rows bit for bit every so many steps; 0 never.
    """

    budget: int | str = "10%"
    policy: Literal["input_aware", "threshold"] = "input_aware"
    sizes: Literal["exact", "estimated"] = "exact"
    pinned_max_rows: int = within(1024, 0)
    path: str | None = None
    hot_tier: Literal["auto", "replicated", "table_wise", "row_wise"] = "replicated"
    cold_tier: Literal["auto", "host", "uvm", "uvm_caching"] = "auto"
    cold_cache: int | str | None = None
    stock_tables: tuple[str, ...] = ()
    check_replicas: int = within(0, 0)

    def __post_init__(self) -> None:
        self.budget_bytes(1)  # an unreadable budget fails here, before any work
        _ = self.cold_cache_bytes

    @property
    def cold_cache_bytes(self) -> int | None:
        """`cold_cache` in bytes."""
        if self.cold_cache is None or str(self.cold_cache).strip() == "0":
            return None if self.cold_cache is None else 0
        return parse_bytes(self.cold_cache, "placement.cold_cache")

    def budget_bytes(self, total_bytes: int) -> int | None:
        """The budget in bytes, rounded down; None for "auto".

        Args:
            total_bytes: bytes of all rows of all placed tables, weights and optimizer state; what a percentage is of.
        """
        return parse_budget(self.budget, total_bytes, "placement.budget")


@dataclass(frozen=True)
class GuardConfig:
    """When the schedule stops reordering: a test metric falls behind its best value by more than `band`."""

    metric: Literal["auc", "logloss", "accuracy"] = "auc"
    band: float = within(0.01, 0, above=True)


@dataclass(frozen=True)
class ScheduleConfig:
    """In which order hot and cold batches come (FAE's Shuffle Scheduler).

    Attributes:
        policy: "fae" adapts the rate to the test loss, "fixed" does not, "proportional" interleaves as finely as the data allow, "stock"
            leaves the order of the data.
        rate: per cent of an epoch's batches of a kind that one phase takes.
        patience: falls of the test loss in a row after which the rate doubles.
        guard: falls back to "proportional" for the rest of the run; null never does.
    """

    policy: Literal["fae", "fixed", "proportional", "stock"] = "fae"
    rate: float = within(50.0, 1, 100)
    patience: int = within(4, 1)
    guard: GuardConfig | None = None


@dataclass(frozen=True)
class LoaderConfig:
    """Where the hot and the cold batches come from, and what makes them ready.

    Attributes:
        store: folder that `fae segregate` wrote: batches are read from it, already segregated; null segregates the data while training.
            Placements without segregation ("stock", "fae-unsegregated") read the data themselves.
        window_batches: batches that are segregated at a time; null: as many as the buffer holds, at best the whole epoch.
        buffer: bytes of samples that a rank holds to segregate them.
        workers: processes of each rank that read and parse the data; 0: the rank itself. `fae segregate` takes as many.
        prefetch: batches of each kind made ready ahead by threads; 0: none, everything happens when it is asked for.
        pin_memory: with train.device cuda, batches are copied to pinned memory.
        drop_last: leaves out the samples that make no full batch at the end of an epoch.
        shuffle: each epoch of a store takes its batches in another order.
        seed: of `shuffle`.
    """

    store: str | None = None
    window_batches: int | None = within(None, 1)
    buffer: int | str = "1GiB"
    workers: int = within(0, 0)
    prefetch: int = within(2, 0)
    pin_memory: bool = True
    drop_last: bool = False
    shuffle: bool = False
    seed: int = within(0, 0)

    def __post_init__(self) -> None:
        parse_bytes(self.buffer, "loader.buffer")
        if self.shuffle and self.store is None:
            raise ConfigError(
                "loader.shuffle: received true without loader.store; samples that are segregated while training keep the order of the "
                "data: name a store in loader.store, or leave it out"
            )

    @property
    def buffer_bytes(self) -> int:
        """The buffer in bytes."""
        return parse_bytes(self.buffer, "loader.buffer")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
        batch_size: samples per rank and step.
        epochs: passes over the train data.
        learning_rate: of the embeddings.
        dense_learning_rate: of all other weights, by Adagrad, whose first steps move every weight by about as much: 0.01 leaves most units
            of a deep MLP dead.
        optimizer: of the embeddings.
        seed: of the start weights.
        device: where to train.
        eval_batch_size: samples per rank and test batch.
        swap_eval_batches: test batches looked at after each phase, for the schedule; 0 tells it nothing.
        steps: ends the run after so many steps; null trains whole epochs.
        nan_check_steps: looks for a loss that is no finite number every so many steps; 0 never.
        lookahead: batches that the pipeline takes ahead; more than 2 bring the cold rows of the coming steps early.
        log_every: steps between two lines of the progress bar and of TensorBoard.
        tensorboard: folder for TensorBoard's events; null writes none. `fae compare` makes a folder in it for each run.
    """

    batch_size: int = within(1024, 1)
    epochs: int = within(1, 1)
    learning_rate: float = within(0.05, 0, above=True)
    dense_learning_rate: float = within(0.003, 0, above=True)
    optimizer: Optimizer = Optimizer.ROWWISE_ADAGRAD
    seed: int = within(0, 0)
    device: Literal["cpu", "cuda"] = "cpu"
    eval_batch_size: int = within(4096, 1)
    swap_eval_batches: int = within(4, 0)
    steps: int | None = within(None, 1)
    nan_check_steps: int = within(100, 0)
    lookahead: int = within(2, 2)
    log_every: int = within(50, 1)
    tensorboard: str | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of `fae train`, which goes on from the newest of the folder (`fae compare` keeps none).

    Attributes:
        folder: of one run; null keeps no checkpoints.
        every_steps: steps between two.
        keep: how many of the newest stay.
        sample_audit: also writes which samples every step trained on.
    """

    folder: str | None = None
    every_steps: int = within(1000, 1)
    keep: int = within(3, 1)
    sample_audit: bool = False


@dataclass(frozen=True)
class CompareConfig:
    """What `fae compare` runs: every placement at every number of ranks.

    Attributes:
        placements: "fae" and "fae-unsegregated" have hot and cold rows, the others are TorchRec's own; those with more to their name than
            "stock" put all tables in one place, on CUDA ("stock-host": on a CPU).
        ranks: numbers of ranks.
        count_batches: batches that are counted for bytes and rows.
        profile_steps: steps of every kind whose time is sorted into categories, after everything that is timed or scored; 0: none.
        repeats: how often each is run, in turns, in another order each time; figures are medians.
        vary_seed: each repeat starts from other weights (`train.seed`, one more, ...), all of its placements from the same.
        allow_unequal: reports runs that did not do the same work, marked as not comparable, instead of ending in an error.
        cache: bytes of fast memory per rank for cached rows of "stock-uvm-caching" and "stock-prefetch"; null: as many as the hot rows may
            take (`placement.budget`).
    """

    placements: tuple[
        Literal["stock", "fae", "fae-unsegregated", "stock-hbm", "stock-uvm", "stock-uvm-caching", "stock-prefetch", "stock-host"], ...
    ] = ("stock", "fae", "fae-unsegregated")
    ranks: tuple[int, ...] = within((1, 2), 1)
    count_batches: int = within(16, 1)
    profile_steps: int = within(8, 0)
    repeats: int = within(1, 1)
    vary_seed: bool = False
    allow_unequal: bool = False
    cache: int | str | None = None

    def cache_bytes(self, budget_bytes: int) -> int:
        """`cache` in bytes.

        Args:
            budget_bytes: what the hot rows may take, for the default.
        """
        return budget_bytes if self.cache is None else parse_bytes(self.cache, "compare.cache")

    def __post_init__(self) -> None:
        self.cache_bytes(1)  # unreadable bytes fail here, before any work
        for name in ("placements", "ranks"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"compare.{name}: received {list(values)}; give at least one value and none twice")


@dataclass(frozen=True)
class RunConfig:
    """One run, as its config file describes it."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    output: str = "runs/fae"

    def __post_init__(self) -> None:
        if self.loader.store is not None and self.schedule.policy == "stock":
            raise ConfigError(
                f"loader.store: received {self.loader.store!r} with schedule.policy 'stock'; a store does not have the order of the data: "
                "take the policy 'proportional', the least reordering, or leave loader.store out"
            )
        if self.schedule.guard is not None and self.schedule.policy in ("fae", "fixed") and not self.train.swap_eval_batches:
            raise ConfigError(
                "train.swap_eval_batches: received 0 with a schedule.guard, which would never hear of a test metric; give at least 1, or "
                "leave schedule.guard out"
            )

    def to_dict(self) -> dict[str, Any]:
        """The run as plain values that JSON can write; `from_dict` reads them back to an equal RunConfig."""
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Reads plain values, with relative paths taken as they are.

        Raises:
            ConfigError: an unknown or missing key, a wrong type, a value outside its range; the message has the dotted key.
        """
        schedule = values.get("schedule")
        if isinstance(schedule, Mapping) and "window_batches" in schedule:
            raise ConfigError("unknown key 'schedule.window_batches'; it is now 'loader.window_batches'")
        return read_section(cls, values)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a run's description.

    Args:
        path: a YAML file, or JSON if it ends in .json. Relative paths in it are relative to its folder, but for what is written: `output`,
            `checkpoint.folder` and `train.tensorboard` are relative to the current folder.
        overrides: "dotted.key=value" with a YAML value, such as "train.epochs=2"; relative paths here are relative to the current folder.

    Returns:
        The run.

    Raises:
        ConfigError: the file is missing or unreadable, or what it says is wrong; the message starts with the file's name.
    """
    path = Path(path)
    try:
        values = _resolve(read_mapping(path), path.parent)
        for override in overrides:
            values = merge(values, _resolve(read_override(override), Path.cwd()))
        return RunConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _resolve(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Makes the relative paths of a nested mapping relative to `folder`; addresses such as s3://bucket stay as they are."""
    for key in _PATHS:
        *sections, name = key.split(".")
        section: Any = values
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section and not (key == "model.factory" and ".py:" not in str(section[name])):
            section[name] = _absolute(section[name], folder)
    return values


def _absolute(value: Any, folder: Path) -> Any:
    """A path, or each of a list of paths, relative to `folder`; anything else as it is."""
    if isinstance(value, list):
        return [_absolute(item, folder) for item in value]
    return str(folder / Path(value).expanduser()) if isinstance(value, str) and "://" not in value else value
