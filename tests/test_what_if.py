"""fae plan --what-if: predictions for ranks that are not there, as text, JSON, picture and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fae_torchrec.cli import main
from fae_torchrec.config import RunConfig, load_config
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hardware import hardware_preset
from fae_torchrec.core.outlook import Outlook
from fae_torchrec.what_if import what_if
from tests.training.html_page import Page

TERABYTE = Path(__file__).resolve().parents[1] / "examples" / "configs" / "criteo_terabyte_synthetic.yaml"


def _outlook(config: RunConfig, hardware: str = "v100", ranks: int = 1, **options: Any) -> Outlook:
    (found,) = what_if(config, machines=[(hardware_preset(hardware), [ranks])], **options)
    return found


def test_criteo_terabyte_on_a_v100() -> None:
    """266 M rows of which nothing is drawn; FAE's published point: 0.13 % of the bytes make 73.1 % of the inputs hot."""
    config = load_config(TERABYTE, ["train.batch_size=16384"])
    found = _outlook(config, shares=[0.0013, 0.01, 0.1])
    options = {(option.placement, round(option.budget_bytes / found.model.job.tables.total_bytes, 4)): option for option in found.options}
    assert options["fae", 0.0013].hot_inputs == pytest.approx(0.731, abs=0.03)
    assert "64" in options["hbm", 0.0].refused and not options["fae", 0.1].refused
    assert found.pays and found.best(fae=True) is found.best() and "times as fast as" in found.advice
    assert options["fae", 0.1].work.link_bytes < 0.1 * options["uvm", 0.0].work.link_bytes


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_uniform_accesses_are_advised_against(ranks: int) -> None:
    found = _outlook(load_config(TERABYTE, ["train.batch_size=16384"]), ranks=ranks, access="uniform")
    assert not found.pays and found.advice.startswith("FAE does not pay here, because ")


def test_a_profile_says_what_the_law_says(tmp_path: Path) -> None:
    """The same data by both ways: hot inputs, coverage and rows over the link alike."""
    overrides = ["data.synthetic.scale=0.005", "data.synthetic.dataset=kaggle", "profile.sample_rate=0.5", f"output={tmp_path}"]
    config = load_config(TERABYTE, ["data.synthetic.train_samples=262144", *overrides])
    law, profile = (_outlook(config, shares=[0.05, 0.2], access=access) for access in ("law", "profile"))
    for one, other in zip(law.options, profile.options, strict=True):
        assert (one.placement, one.budget_bytes) == (other.placement, other.budget_bytes)
        assert other.work.link_bytes == pytest.approx(one.work.link_bytes, rel=0.12, abs=2000)
        if one.hot_inputs is not None:
            assert other.hot_inputs == pytest.approx(one.hot_inputs, abs=0.05)


def test_the_law_of_sessions_is_known_too() -> None:
    """Taobao's bags of 21; FAE's published point: 39 % of the bytes make 27.1 % of the inputs hot."""
    found = _outlook(load_config(TERABYTE.with_name("taobao_synthetic.yaml")), shares=[0.39])
    assert found.model.access.source == "the law of synthetic Taobao, scale 1.0"
    (fae,) = (option for option in found.options if option.placement == "fae")
    assert fae.hot_inputs == pytest.approx(0.271, abs=0.03)


def test_measured_steps_are_fed_back(tmp_path: Path) -> None:
    """Steps that took twice as long as predicted, all of them: so does every step that is predicted after."""
    config = load_config(TERABYTE, ["train.batch_size=4096"])
    plain = _outlook(config, "cpu", shares=[0.01, 0.1])
    points = [
        {"placement": option.placement, "budget_bytes": option.budget_bytes, "ranks": 1, "batch_size": 4096, "step_s": 2 * option.step_s}
        for option in plain.options
    ]
    better = _outlook(config, "cpu", shares=[0.01, 0.1], calibration=points)
    for one, other in zip(plain.options, better.options, strict=True):
        assert other.step_s == pytest.approx(2 * one.step_s, rel=0.1)
    with pytest.raises(ConfigError, match=r"\['step_s'\] are missing"):
        _outlook(config, "cpu", calibration=[{key: value for key, value in points[0].items() if key != "step_s"}])
    with pytest.raises(ConfigError, match="placement 'ours' is not one of"):
        _outlook(config, "cpu", calibration=[{**points[0], "placement": "ours"}])


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--what-if", "--config", str(TERABYTE), "--output", str(tmp_path), "--hardware", "v100:1,8", "h200", "--quiet"]
    assert main([*arguments, "--budgets", "0.1%", "1%", "10%"]) == 0
    text = capsys.readouterr().out
    assert "\n8 x v100\n" in text and "does not fit: takes" in text and "FAE does not pay here, because" in text
    values = json.loads((tmp_path / "what_if.json").read_text())
    assert [(o["hardware"]["name"], o["ranks"]) for o in values["outlooks"]] == [("v100", 1), ("v100", 8), ("h200", 1)]
    assert {option["placement"] for option in values["outlooks"][1]["options"]} >= {"hbm", "uvm", "host", "fae", "fae_sharded", "prefetch"}
    assert (tmp_path / "what_if.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "what_if.html").read_text()
    page = Page(html)
    assert all(address.startswith("#") for address in page.addresses) and not page.open and len(page.tables) == 3 and "8 x v100" in html
    assert len(page.tables[0]) == 1 + len(values["outlooks"][0]["options"])
    assert main([*arguments, "--budgets", "1%", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "what-if"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--hardware", "v1000"], "hardware 'v1000' is not one of"),
        (["--hardware", "v100:0"], "v100:0"),
        (["--hardware", "v100", "--budgets", "64MiB"], "--budgets: received '64MiB'"),
        (["--hardware", "v100", "--calibration", "nowhere.json"], "nowhere.json: cannot be read"),
    ],
)
def test_bad_input(given: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "--what-if", "--config", str(TERABYTE), "--output", str(tmp_path), "--quiet", *given]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
