"""fae measure times this machine and writes hardware that can be read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fae_torchrec.cli import main
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hardware import hardware_preset, load_hardware
from fae_torchrec.measure import measure


def test_what_is_measured_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks: everything that a CPU has is measured; the network between hosts is not, and says so."""
    path = tmp_path / "here.json"
    assert main(["measure", "--ranks", "2", "--output", str(path), "--quiet", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text()) and printed["kind"] == "hardware" and printed["versions"]
    found, preset = load_hardware(path), hardware_preset("cpu")
    assert found.to_json() == printed["hardware"] and found.ranks_per_host == 2 and found.device == "cpu"
    assert 1e9 < found.flops < 1e14 and 1e8 < found.fast_bandwidth < 1e12 and 1e7 < found.intra_host_bandwidth < 1e12
    assert 0 < found.collective_s < 0.1 and 0 < found.step_s < 1 and 0 < found.tier_s < 1
    assert found.inter_host_bandwidth == preset.inter_host_bandwidth and "the preset's" in found.source
    assert found.flops != preset.flops and found.intra_host_bandwidth != preset.intra_host_bandwidth


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--ranks: received 0"):
        measure("cpu", 0, [])
    with pytest.raises(ConfigError, match="CUDA devices"):
        measure("cuda", 99, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="starts its own ranks"):
        measure("cpu", 1, [])
