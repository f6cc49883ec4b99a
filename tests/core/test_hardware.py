"""Hardware: presets, files with and without a base, and what wrong ones say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hardware import GB, PRESETS, Hardware, hardware_preset, load_hardware


def _write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_presets_are_named_by_their_keys_and_survive_json() -> None:
    assert {"v100", "a100", "h100", "h200", "gh200", "t4", "a10", "cpu"} <= PRESETS.keys()
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert Hardware.from_json(json.loads(json.dumps(preset.to_json()))) == preset
        assert load_hardware(name) == hardware_preset(name) == preset
        assert preset.device == ("cpu" if name == "cpu" else "cuda")


def test_a_preset_is_published_rates_times_what_training_reaches() -> None:
    v100 = hardware_preset("v100")
    assert (v100.fast_bytes, v100.host_bytes, v100.ranks_per_host) == (16 * 2**30, 128 * 2**30, 8)
    assert v100.fast_bandwidth == pytest.approx(0.3 * 900 * GB)
    assert v100.host_link_bandwidth == pytest.approx(0.6 * 15.75 * GB)
    assert v100.intra_host_bandwidth == pytest.approx(0.8 * 150 * GB)
    assert v100.inter_host_bandwidth == pytest.approx(0.8 * 6.25 * GB)
    assert v100.flops == 8e12
    # FBGEMM's cache takes 5 ns per id on the H200 that was measured, and more where memory is slower.
    assert hardware_preset("h200").cache_id_s == pytest.approx(5e-9)
    assert v100.cache_id_s == pytest.approx(5e-9 * 4800 / 900)


def test_other_ranks_per_host_change_nothing_else() -> None:
    v100 = hardware_preset("v100")
    assert v100.on_hosts_of(4) == replace(v100, ranks_per_host=4)


def test_a_base_stands_for_what_is_not_given() -> None:
    changed = Hardware.from_json({"base": "v100", "flops": 1e12})
    assert changed == replace(hardware_preset("v100"), flops=1e12, name="v100, changed")
    assert Hardware.from_json({"base": "v100", "name": "mine"}).name == "mine"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base": "v100", "flopz": 1}, ["unknown keys ['flopz']", "'flops'", "'base'"]),
        ({"base": "v1000"}, ["'v1000' is not one of", "'v100'", "fae measure"]),
        ({"base": ["v100"]}, ["is not one of", "'v100'"]),
        ({"name": "mine"}, ["are missing", "'flops'", "'base', one of", "'v100'"]),
        ({"base": "v100", "device": "tpu"}, ["device 'tpu' is not one of ['cuda', 'cpu']"]),
        ({"base": "v100", "flops": 0}, ["flops must be above 0, received 0"]),
        ({"base": "v100", "host_bytes": -1}, ["host_bytes must be above 0, received -1"]),
        ({"base": "v100", "fast_bandwidth": float("nan")}, ["fast_bandwidth must be above 0, received nan"]),
        ({"base": "v100", "step_s": -1e-3}, ["step_s must be at least 0, received -0.001"]),
        ({"base": "v100", "step_s": float("nan")}, ["step_s must be at least 0, received nan"]),
        ({"base": "v100", "flops": "8e12"}, ["flops must be a number, received '8e12'"]),
        ({"base": "v100", "tier_s": None}, ["tier_s must be a number, received None"]),
        ({"base": "v100", "tier_s": True}, ["tier_s must be a number, received True"]),
        ({"base": "v100", "ranks_per_host": 2.5}, ["ranks_per_host must be a whole number, received 2.5"]),
        ({"base": "v100", "ranks_per_host": float("inf")}, ["ranks_per_host must be a whole number, received inf"]),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        Hardware.from_json(values)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_costs_besides_bytes_may_be_nothing() -> None:
    free = dict.fromkeys(("collective_s", "fast_row_s", "host_row_s", "split_id_s", "cache_id_s", "tier_s", "step_s"), 0)
    assert Hardware.from_json({"base": "v100", **free}).step_s == 0


def test_files_hold_hardware_or_what_measure_wrote(tmp_path: Path) -> None:
    plain = _write(tmp_path / "plain.json", {"base": "a100", "step_s": 0.001})
    measured = _write(tmp_path / "measured.json", {"schema": 1, "kind": "hardware", "hardware": hardware_preset("cpu").to_json()})
    assert load_hardware(plain) == replace(hardware_preset("a100"), step_s=0.001, name="a100, changed")
    assert load_hardware(str(measured)) == hardware_preset("cpu")


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    missing, broken, folder = tmp_path / "missing.json", tmp_path / "broken.json", tmp_path / "folder.json"
    broken.write_text('{"base": "v100"')
    folder.mkdir()
    for path in (missing, broken, folder):
        with pytest.raises(ConfigError, match=f"{path.name}: cannot be read as hardware .*`fae measure --output {path}`"):
            load_hardware(path)
    for name, value, kind in (("list", [1], "list"), ("inner", {"hardware": "v100"}, "str"), ("null", None, "NoneType")):
        with pytest.raises(ConfigError, match=rf"{name}\.json: received a {kind}, a JSON object is needed"):
            load_hardware(_write(tmp_path / f"{name}.json", value))
    with pytest.raises(ConfigError, match=r"wrong\.json: hardware 'v100, changed': flops must be above 0, received -1"):
        load_hardware(_write(tmp_path / "wrong.json", {"base": "v100", "flops": -1}))


def test_a_name_that_is_neither_preset_nor_file() -> None:
    with pytest.raises(ConfigError, match=r"hardware 'v10' is not one of \['a10'.*'v100'\].*JSON file"):
        load_hardware("v10")
