"""A tiny experiment on disk: two parquet files and the YAML that describes the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fae_torchrec.config import RunConfig, load_config
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.experiment import placed_tables
from fae_torchrec.experiment_data import open_data
from fae_torchrec.experiment_profile import make_profile

ROWS = {"u": 40, "v": 2000, "w": 500}
TRAIN_SAMPLES, TEST_SAMPLES = 701, 203


def write_parquet(path: Path, samples: int, *, seed: int = 0, changes: dict[str, tuple[int, Any]] | None = None) -> None:
    """Popular ids are small ones; `changes` puts a value into a column: name -> (row, value)."""
    rng = np.random.default_rng(seed)
    columns: dict[str, np.ndarray] = {"x": rng.random(samples), "y": rng.integers(0, 2, samples)}
    rare = rng.random(samples) < 0.4
    for name, rows in ROWS.items():
        columns[name] = (rng.random(samples) * np.where(rare, rows, max(rows // 20, 2))).astype(np.int64)
    for name, (row, value) in (changes or {}).items():
        columns[name][row] = value
    pq.write_table(pa.table(columns), path)


def write_run(folder: Path, data: dict[str, Any]) -> Path:
    """Writes run.yaml, a tiny run on some data; returns its path. Its output folder is `folder`/out."""
    values = {
        "model": {"embedding_dim": 4, "dense_arch": [8, 4], "over_arch": [8, 1]},
        "data": data,
        "profile": {"sample_rate": 0.5},
        "placement": {"budget": "20%", "pinned_max_rows": 100},
        "train": {"batch_size": 32, "eval_batch_size": 64, "swap_eval_batches": 1},
        "compare": {"placements": ["stock", "fae"], "ranks": [1], "count_batches": 4, "profile_steps": 2},
        "output": str(folder / "out"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_experiment(folder: Path) -> Path:
    """Writes train.parquet, test.parquet and run.yaml; returns the latter."""
    write_parquet(folder / "train.parquet", TRAIN_SAMPLES)
    write_parquet(folder / "test.parquet", TEST_SAMPLES, seed=1)
    files = {"train": "train.parquet", "test": "test.parquet"}
    return write_run(folder, {"parquet": {**files, "dense": ["x"], "sparse": list(ROWS), "label": "y", "cardinalities": ROWS}})


def new_config(folder: Path, *overrides: str) -> RunConfig:
    """The experiment's config with overrides; writes the experiment if it is not there yet."""
    path = folder / "run.yaml"
    return load_config(path if path.is_file() else write_experiment(folder), overrides)


def profile_of(config: RunConfig) -> PopularityProfile:
    """The profile of an experiment, which is left in its output folder."""
    data = open_data(config)
    return make_profile(config, data, placed_tables(config, data))
