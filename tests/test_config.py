"""The config file: what is read, and what every mistake is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.config import (
    CheckpointConfig,
    CompareConfig,
    GuardConfig,
    LoaderConfig,
    PlacementConfig,
    RunConfig,
    load_config,
    parse_bytes,
)
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.data_config import SyntheticConfig

SYNTHETIC = "data: {synthetic: {dataset: kaggle, scale: 0.5}}\n"


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def message(folder: Path, text: str, *overrides: str) -> str:
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def test_values_and_defaults(tmp_path: Path) -> None:
    text = SYNTHETIC + "train: {epochs: 3, learning_rate: 1e-3, optimizer: adam}\ncompare: {placements: [fae, stock], ranks: [2]}\n"
    config = load_config(write(tmp_path, text))
    assert config.data.synthetic == SyntheticConfig(dataset="kaggle", scale=0.5)
    assert config.data.parquet is None
    assert (config.train.epochs, config.train.learning_rate, config.train.optimizer) == (3, 0.001, Optimizer.ADAM)
    assert config.compare == CompareConfig(placements=("fae", "stock"), ranks=(2,), count_batches=16)
    assert (config.train.batch_size, config.train.steps, config.train.tensorboard) == (1024, None, None)
    assert (config.train.nan_check_steps, config.train.lookahead, config.train.log_every) == (100, 2, 50)
    assert (config.schedule.policy, config.schedule.rate, config.schedule.patience, config.schedule.guard) == ("fae", 50, 4, None)
    assert config.loader == LoaderConfig(store=None, window_batches=None, workers=0, prefetch=2, drop_last=False, shuffle=False, seed=0)
    assert config.loader.pin_memory and config.loader.buffer_bytes == 2**30
    assert config.checkpoint == CheckpointConfig(folder=None, every_steps=1000, keep=3, sample_audit=False)
    assert (config.profile.sample_rate, config.profile.seed, config.placement.pinned_max_rows) == (0.05, 7, 1024)
    assert (config.profile.keep_inputs, config.profile.fresh_inputs, config.profile.workers) == (131_072, 65_536, 1)
    assert (config.placement.policy, config.placement.sizes) == ("input_aware", "exact")
    assert (config.placement.hot_tier, config.placement.stock_tables, config.placement.check_replicas) == ("replicated", (), 0)
    assert config.output == "runs/fae"


def test_the_cache_of_cold_rows(tmp_path: Path) -> None:
    for text, expected in (("null", None), ("0", 0), ("'0'", 0), ("64MiB", 64 << 20), ("1000", 1000)):
        config = load_config(write(tmp_path, SYNTHETIC + f"placement: {{cold_cache: {text}}}\n"))
        assert config.placement.cold_cache_bytes == expected


def test_a_factory_is_relative_to_the_config_and_a_module_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, SYNTHETIC + "model: {factory: '../mine.py:build', options: {history: 3, widths: [4, 5]}, over_arch: [7]}\n")
    model = load_config(path, ["model.options.history=4"]).model
    assert model.factory == f"{tmp_path / '../mine.py'}:build" and model.options == {"history": 4, "widths": [4, 5]}
    assert load_config(path, ["model.factory=mine.models:build"]).model.factory == "mine.models:build"
    assert load_config(path, ["model.factory=mine.py:build"]).model.factory == f"{Path.cwd() / 'mine.py'}:build"
    config = load_config(path)
    assert RunConfig.from_dict(config.to_dict()) == config


def test_json_says_the_same(tmp_path: Path) -> None:
    values = {"data": {"synthetic": {"dataset": "kaggle", "scale": 0.5}}}
    assert load_config(write(tmp_path, json.dumps(values, indent="\t"), "run.json")) == load_config(write(tmp_path, SYNTHETIC))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SYNTHETIC + "train: {epoch: 3}\n", ["unknown key 'train.epoch'", "did you mean 'epochs'", "'batch_size'", "'device'"]),
        (SYNTHETIC + "trian: {}\n", ["unknown key 'trian'", "did you mean 'train'", "'placement'"]),
        ("data: {synthetic: {zzz: 1}}\n", ["unknown key 'data.synthetic.zzz'", "Allowed in 'data.synthetic'", "'train_samples'"]),
        (SYNTHETIC + "train: {epochs: two}\n", ["train.epochs", "'two'", "str", "a whole number"]),
        (SYNTHETIC + "train: {epochs: 2.0}\n", ["train.epochs", "2.0", "a whole number"]),
        (SYNTHETIC + "train: {epochs: true}\n", ["train.epochs", "True", "a whole number"]),
        (SYNTHETIC + "train: {learning_rate: fast}\n", ["train.learning_rate", "'fast'", "a finite number"]),
        (SYNTHETIC + "train: {learning_rate: .nan}\n", ["train.learning_rate", "nan", "a finite number"]),
        (SYNTHETIC + "train: {learning_rate: 0}\n", ["train.learning_rate", "more than 0"]),
        (SYNTHETIC + "train: {optimizer: adamw}\n", ["train.optimizer", "'adamw'", "rowwise_adagrad", "did you mean 'adam'"]),
        (SYNTHETIC + "train: 3\n", ["train: received 3", "a mapping", "'epochs'"]),
        (SYNTHETIC + "profile: {sample_rate: 1.5}\n", ["profile.sample_rate", "1.5", "more than 0", "at most 1"]),
        (SYNTHETIC + "schedule: {rate: 0.5}\n", ["schedule.rate", "0.5", "at least 1", "at most 100"]),
        (SYNTHETIC + "schedule: {policy: random}\n", ["schedule.policy", "'random'", "'proportional'"]),
        (SYNTHETIC + "schedule: {patience: 0}\n", ["schedule.patience", "0", "at least 1"]),
        (SYNTHETIC + "schedule: {guard: {metric: loss}}\n", ["schedule.guard.metric", "'loss'", "'auc', 'logloss', 'accuracy'"]),
        (SYNTHETIC + "schedule: {guard: {band: 0}}\n", ["schedule.guard.band", "0", "more than 0"]),
        (SYNTHETIC + "schedule: {guard: auc}\n", ["schedule.guard", "'auc'", "a mapping", "'metric'", "'band'"]),
        (SYNTHETIC + "schedule: {guard: {}}\ntrain: {swap_eval_batches: 0}\n", ["train.swap_eval_batches", "0", "schedule.guard"]),
        (SYNTHETIC + "schedule: {window_batches: 5}\n", ["unknown key 'schedule.window_batches'", "'loader.window_batches'"]),
        (SYNTHETIC + "loader: {window_batches: 0}\n", ["loader.window_batches", "0", "at least 1"]),
        (SYNTHETIC + "loader: {buffer: 1GB}\n", ["loader.buffer", "'1GB'", "GiB"]),
        (SYNTHETIC + "loader: {workers: -1}\n", ["loader.workers", "-1", "at least 0"]),
        (SYNTHETIC + "loader: {prefetch: -1}\n", ["loader.prefetch", "-1", "at least 0"]),
        (SYNTHETIC + "loader: {pin_memory: 1}\n", ["loader.pin_memory", "1", "true or false"]),
        (SYNTHETIC + "loader: {drop_last: 'yes'}\n", ["loader.drop_last", "'yes'", "true or false"]),
        (SYNTHETIC + "loader: {shuffle: true}\n", ["loader.shuffle", "true", "loader.store"]),
        (SYNTHETIC + "loader: {store: s, seed: -1}\n", ["loader.seed", "-1", "at least 0"]),
        (SYNTHETIC + "loader: {store: 3}\n", ["loader.store", "3", "text"]),
        (SYNTHETIC + "loader: {store: s}\nschedule: {policy: stock}\n", ["loader.store", "'stock'", "'proportional'"]),
        (SYNTHETIC + "train: {nan_check_steps: -1}\n", ["train.nan_check_steps", "-1", "at least 0"]),
        (SYNTHETIC + "train: {lookahead: 1}\n", ["train.lookahead", "1", "at least 2"]),
        (SYNTHETIC + "train: {log_every: 0}\n", ["train.log_every", "0", "at least 1"]),
        (SYNTHETIC + "train: {tensorboard: true}\n", ["train.tensorboard", "True", "text"]),
        (SYNTHETIC + "checkpoint: {folder: 1}\n", ["checkpoint.folder", "1", "text"]),
        (SYNTHETIC + "checkpoint: {every_steps: 0}\n", ["checkpoint.every_steps", "0", "at least 1"]),
        (SYNTHETIC + "checkpoint: {keep: 0}\n", ["checkpoint.keep", "0", "at least 1"]),
        (SYNTHETIC + "checkpoint: {sample_audit: 1}\n", ["checkpoint.sample_audit", "1", "true or false"]),
        (SYNTHETIC + "compare: {placements: [stock, fea]}\n", ["compare.placements[1]", "'fea'", "did you mean 'fae'"]),
        (SYNTHETIC + "compare: {placements: stock}\n", ["compare.placements", "a list, such as [stock]"]),
        (SYNTHETIC + "compare: {ranks: [1, 1]}\n", ["compare.ranks", "[1, 1]", "none twice"]),
        (SYNTHETIC + "compare: {ranks: []}\n", ["compare.ranks", "at least one"]),
        (SYNTHETIC + "compare: {ranks: [0]}\n", ["compare.ranks", "0", "at least 1"]),
        (SYNTHETIC + "placement: {budget: 64MB}\n", ["placement.budget", "'64MB'", "MiB", "64MiB"]),
        (SYNTHETIC + "placement: {budget: 0%}\n", ["placement.budget", "0%", "more than 0%"]),
        (SYNTHETIC + "placement: {budget: 101%}\n", ["placement.budget", "101%", "at most 100%"]),
        (SYNTHETIC + "placement: {budget: 1.5}\n", ["placement.budget", "1.5", "int or str"]),
        (
            SYNTHETIC + "placement: {hot_tier: column_wise}\n",
            ["placement.hot_tier", "'column_wise'", "'replicated', 'table_wise', 'row_wise'"],
        ),
        (SYNTHETIC + "placement: {cold_tier: ssd}\n", ["placement.cold_tier", "'ssd'", "'auto', 'host', 'uvm', 'uvm_caching'"]),
        (SYNTHETIC + "placement: {cold_cache: 5%}\n", ["placement.cold_cache", "'5%'", "MiB", "64MiB"]),
        (SYNTHETIC + "placement: {stock_tables: t_u}\n", ["placement.stock_tables", "a list, such as [t_u]"]),
        (SYNTHETIC + "placement: {check_replicas: -1}\n", ["placement.check_replicas", "-1", "at least 0"]),
        (SYNTHETIC + "model: {embedding_dim: 32}\n", ["model.dense_arch", "[512, 256, 64, 16]", "model.embedding_dim (32)"]),
        (SYNTHETIC + "model: {embedding_dim: 18, dense_arch: [18]}\n", ["model.embedding_dim", "18", "multiple of 4", "20"]),
        (SYNTHETIC + "model: {factory: mine.py}\n", ["model.factory", "'", "path/to/file.py:function"]),
        (SYNTHETIC + "model: {factory: 'mine.py:'}\n", ["model.factory", "path/to/file.py:function"]),
        (SYNTHETIC + "model: {options: {history: 3}}\n", ["model.options", "{'history': 3}", "model.factory"]),
        (SYNTHETIC + "model: {factory: 'a:b', options: {day: 2026-01-01}}\n", ["model.options", "JSON serializable"]),
        (SYNTHETIC + "model: {factory: 'a:b', options: 3}\n", ["model.options", "a mapping of names"]),
        (SYNTHETIC + "model: {over_arch: [8, 2]}\n", ["model.over_arch", "[8, 2]", "must be 1"]),
        (SYNTHETIC + "model: {dense_arch: [0, 16]}\n", ["model.dense_arch", "0", "at least 1"]),
        ("train: {epochs: 1}\n", ["missing key 'data'"]),
        ("data: {}\n", ["data: received no source", "exactly one of", "'synthetic'", "'parquet'"]),
        ("data: {parquet: {train: a, test: b}}\n", ["missing key 'data.parquet.sparse'"]),
        (SYNTHETIC + "placement: {policy: frequency}\n", ["placement.policy", "'frequency'", "'input_aware', 'threshold'"]),
        (SYNTHETIC + "placement: {sizes: 35}\n", ["placement.sizes", "35", "'exact', 'estimated'"]),
        (SYNTHETIC + "profile: {workers: 0}\n", ["profile.workers", "0", "at least 1"]),
        (SYNTHETIC + "profile: {keep_inputs: 0}\n", ["profile.keep_inputs", "0", "at least 1"]),
        (SYNTHETIC + "output: 3\n", ["output", "3", "text"]),
        ("[1, 2]\n", ["received list", "mapping"]),
        ("data: {synthetic: {\n", ["not readable as YAML", "line"]),
        (SYNTHETIC + "train: {epochs: 1, epochs: 2}\n", ["['epochs']", "more than once"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    told = message(tmp_path, text)
    assert [word for word in words if word not in told] == [], told
    assert "\n" not in told or "YAML" in told


def test_guard_and_buffer(tmp_path: Path) -> None:
    text = SYNTHETIC + "schedule: {guard: {metric: logloss, band: 1e-2}}\nloader: {buffer: 1.5MiB, store: s, shuffle: true}\n"
    config = load_config(write(tmp_path, text))
    assert config.schedule.guard == GuardConfig("logloss", 0.01) and config.loader.buffer_bytes == 1_572_864 and config.loader.shuffle
    unheard = ["schedule.policy=proportional", "train.swap_eval_batches=0"]
    assert load_config(tmp_path / "run.yaml", unheard).schedule.guard, "which has nothing to fall back from"
    assert RunConfig.from_dict(config.to_dict()) == config


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        load_config(tmp_path / "absent.yaml")


def test_json_repeated_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than once"):
        load_config(write(tmp_path, '{"data": {}, "data": {}}', "run.json"))


def test_yaml_merge_keys_are_no_repetition(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "data:\n  synthetic:\n    <<: &base {dataset: terabyte, scale: 0.5}\n    scale: 0.25\n"))
    assert config.data.synthetic == SyntheticConfig(dataset="terabyte", scale=0.25)


PARQUET = "data: {parquet: {train: a.parquet, test: %s, dense: [x], sparse: [u, v], label: y, cardinalities: %s}}\n"


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    write(tmp_path / "conf", '{"u": 3, "v": 4, "other": 5}', "rows.json")
    more = "profile: {path: 's3://bucket/p.npz'}\noutput: out\nloader: {store: s}\ntrain: {tensorboard: tb}\ncheckpoint: {folder: ck}\n"
    write(tmp_path / "conf", PARQUET % ("/abs/b.parquet", "rows.json") + more)
    monkeypatch.chdir(tmp_path)
    config = load_config("conf/run.yaml", ["placement.path=here.npz"])
    assert config.data.parquet is not None
    assert (config.data.parquet.train, config.data.parquet.test) == (("conf/a.parquet",), ("/abs/b.parquet",))
    assert config.data.parquet.cardinalities == {"u": 3, "v": 4, "other": 5}
    assert config.profile.path == "s3://bucket/p.npz"
    assert config.placement.path == str(tmp_path / "here.npz")  # an override's path is relative to the current folder
    assert (config.output, config.train.tensorboard, config.checkpoint.folder) == ("out", "tb", "ck"), "what is written"
    assert config.loader.store == "conf/s"
    assert load_config("conf/run.yaml", ["loader.store=s"]).loader.store == str(tmp_path / "s")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("absent.json", ["data.parquet.cardinalities", "absent.json", "not a readable JSON file"]),
        ("{u: 3}", ["no row count", "['v']", "['u']"]),
        ("{u: 3, v: 0}", ["{'v': 0}", "at least 1 row"]),
        ("{u: 3, v: many}", ["data.parquet.cardinalities.v", "'many'", "a whole number"]),
        ("[3, 4]", ["data.parquet.cardinalities", "a mapping of names"]),
    ],
)
def test_cardinalities_are_checked(tmp_path: Path, rows: str, words: list[str]) -> None:
    told = message(tmp_path, PARQUET % ("b.parquet", rows))
    assert [word for word in words if word not in told] == [], told


def test_both_sources_are_refused(tmp_path: Path) -> None:
    text = (PARQUET % ("b", "{u: 1, v: 1}")).replace("data: {", "data: {synthetic: {}, ")
    assert "data: received synthetic and parquet; give exactly one" in message(tmp_path, text)


def test_overrides(tmp_path: Path) -> None:
    assert "placement: received None" in message(tmp_path, SYNTHETIC + "placement:\n")
    path = write(tmp_path, SYNTHETIC + "train: {epochs: 3}\nplacement:\n")  # an empty section may be filled
    overrides = ["train.steps=20", "compare.ranks=[2, 1]", "placement.budget=15%", "data.synthetic.scale=1", "train.steps=30", "output=a=b"]
    config = load_config(path, overrides)
    assert (config.train.epochs, config.train.steps, config.compare.ranks) == (3, 30, (2, 1))
    assert (config.placement.budget, config.output) == ("15%", "a=b")
    assert config.data.synthetic is not None and config.data.synthetic.scale == 1.0
    switched = ["data.synthetic=null", "data.parquet={train: a, test: b, sparse: [u], label: y, cardinalities: {u: 2}}"]
    assert load_config(path, [*overrides, *switched]).data.synthetic is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs", ["'train.epochs'", "dotted.key=value"]),
        ("train..epochs=1", ["dotted.key=value"]),
        ("train.epochs=[", ["'['", "not a YAML value"]),
        ("train.epochz=1", ["unknown key 'train.epochz'", "'epochs'"]),
        ("data.synthetic.scale.x=1", ["data.synthetic.scale", "0.5", "no keys below it"]),
        ("nothing.at.all=1", ["unknown key 'nothing'"]),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, words: list[str]) -> None:
    told = message(tmp_path, SYNTHETIC, override)
    assert [word for word in words if word not in told] == [], told


@given(
    count=st.integers(1, 2**40), unit=st.sampled_from([("", 1), ("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40)])
)
def test_bytes_are_number_times_unit(count: int, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{count}{unit[0]}") == parse_bytes(f" {count} {unit[0]} ") == count * unit[1]


@pytest.mark.parametrize(("value", "expected"), [(7, 7), ("1.5GiB", 1_610_612_736), (".5 KiB", 512), ("0.5MiB", 524_288)])
def test_bytes_by_hand(value: int | str, expected: int) -> None:
    assert parse_bytes(value) == expected


@pytest.mark.parametrize("value", [True, 0, -1, "", "MiB", "1e6", "5 mib", "5 MB", "0.1B", "15%", "1MiB 2", "\u0663MiB"])
def test_bytes_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"memory: received .*give"):
        parse_bytes(value, "memory")


@pytest.mark.parametrize(
    ("budget", "total_bytes", "expected"),
    [("15%", 1000, 150), ("12.5 %", 80, 10), ("100%", 9, 9), ("1%", 99, 0), ("2KiB", 5, 2048), (64, 5, 64)],
)
def test_budget(budget: int | str, total_bytes: int, expected: int) -> None:
    assert PlacementConfig(budget=budget).budget_bytes(total_bytes) == expected


def test_round_trip_through_json(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            PARQUET % ("b", "{u: 1, v: 1}") + "train: {optimizer: sgd, steps: 5}\nplacement: {budget: 7KiB, stock_tables: [t_u]}\n",
        )
    )
    assert config.placement.stock_tables == ("t_u",)
    values = json.loads(json.dumps(config.to_dict()))
    assert values["train"]["optimizer"] == "sgd"
    assert values["compare"]["ranks"] == [1, 2]
    assert RunConfig.from_dict(values) == config
    values["train"]["steps"] = 6
    assert RunConfig.from_dict(values) != config
