"""fae report --paper: which workload a report is of, ratios by hand, what is printed of the paper and what is not, and bad files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fae_torchrec import cli
from fae_torchrec.config import load_config
from fae_torchrec.paper_report import of_comparison, paper_report
from fae_torchrec.training.paper_page import paper_lines, paper_markdown, paper_page, ratio_picture
from fae_torchrec.training.paper_tables import GIB, NOT_AT_HAND, TABLES, WORKLOADS, readings, recognised, unlike_model
from fae_torchrec.training.step_shares import CATEGORIES
from tests.training.html_page import Page

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
OF_CONFIG = {
    "rmc1": "RMC1", "taobao": "RMC1", "kaggle": "RMC2", "criteo_kaggle": "RMC2", "terabyte": "RMC3", "criteo_terabyte_synthetic": "RMC3",
    "criteo_terabyte_npy": "RMC3", "avazu_synthetic": "RMC4", "avazu": "RMC4", "syn_m1": "SYN-M1", "syn_m2": "SYN-M2", "syn_m3": "SYN-M3",
    "syn_m4": "SYN-M4", "demo": None, "csv": None, "taobao_synthetic": None,
}  # fmt: skip
EPOCH = 1 << 20


def run(placement: str, ranks: int = 2, **values: Any) -> dict[str, Any]:
    return {
        "placement": placement, "ranks": ranks, "repeats": 1, "samples": EPOCH, "steps": 512, "samples_per_s": 2048.0, "hot_inputs": None,
        "cold_rows_per_sample": 26.0, "test_accuracy": 0.75, "test_auc": 0.7812345, "test_logloss": 0.5, "wall_s": 9.0, **values,
    }  # fmt: skip


def comparison(config: str = "kaggle", **parts: Any) -> dict[str, Any]:
    """A report of `fae compare` of an example config, as far as it is read; figures by hand."""
    shares = {**dict.fromkeys(CATEGORIES, 0.0), "forward": 0.25, "backward": 0.75}
    step = {"hot": {"steps": 8, "step_ms": 4.0, "shares": shares, "milliseconds": {name: 4 * share for name, share in shares.items()}}}
    less = {"auc": {"value": 0.001, "low": -0.002, "high": 0.004}}
    fae = {"samples_per_s": 4096.0, "hot_inputs": 0.8, "cold_rows_per_sample": 2.0, "less_baseline": less, "step_shares": step}
    return {
        "config": load_config(CONFIGS / f"{config}.yaml").to_dict(),
        "data": {"name": "synthetic criteo kaggle, scale 0.1", "train_samples": EPOCH, "test_samples": 1000, "rows": 3_376_259},
        "hardware": {"machine": "Linux", "cores": 2, "ram_bytes": 1 << 33, "gpus": []},
        "runs": [run("stock"), run("fae", **fae), run("fae", ranks=1)],
        **parts,
    }


def write(path: Path, values: Any) -> str:
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize("name", OF_CONFIG)
def test_workloads_of_the_example_configs(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml").to_dict()
    assert recognised(config) == OF_CONFIG[name]
    if (workload := OF_CONFIG[name]) is not None:
        assert unlike_model(WORKLOADS[workload], config) == []
        others = [other for key, other in WORKLOADS.items() if key != workload]
        assert all(unlike_model(other, config) for other in others), "each other workload differs in something"


def test_ratios_and_bytes_by_hand() -> None:
    found = of_comparison("r.json", comparison(), None)
    assert (found["workload"], found["synthetic"], found["scale"], found["unlike"]) == ("RMC2", True, 0.1, [])
    stock, fae, alone = found["runs"]
    assert (stock["baseline"], stock["time_ratio"], stock["bytes_ratio"]) == ("stock", None, None), "nothing is held against itself"
    assert (stock["sample_bytes"], stock["epoch_gib"], stock["train_s"]) == (26 * 64, 26 * 64 * EPOCH / GIB, 512.0)
    assert (fae["baseline"], fae["time_ratio"], fae["bytes_ratio"], fae["sample_bytes"]) == ("stock", 0.5, 2 / 26, 128.0)
    assert (alone["baseline"], alone["time_ratio"], alone["bytes_ratio"]) == (None, None, None), "no stock on one rank"


def test_spreads_that_overlap_show_no_difference() -> None:
    report = comparison(
        runs=[run("stock", samples_per_s_spread=[1500.0, 4000.0]), run("fae", samples_per_s=4096.0, samples_per_s_spread=[3900.0, 4200.0])]
    )
    note = of_comparison("r.json", report, None)["runs"][1]["time_note"]
    assert "no difference shown" in note
    report["runs"][0]["samples_per_s_spread"] = [1500.0, 3800.0]
    assert of_comparison("r.json", report, None)["runs"][1]["time_note"] == ""


def test_the_papers_numbers() -> None:
    """Table 7 as it was quoted to the project; the ratios to three digits; what the baseline equals."""
    ratios = {name: round(workload.ratio, 3) for name, workload in WORKLOADS.items() if workload.ratio is not None}
    assert ratios == {"RMC1": 0.313, "RMC2": 0.246, "RMC3": 0.186, "RMC4": 0.258}
    kaggle = WORKLOADS["RMC2"]
    assert kaggle.known_samples is not None and kaggle.known_samples[0] * 26 * 16 * 4 / 2**30 == pytest.approx(60.89, abs=0.005)
    assert [text.partition(":")[0] for text in readings()[1:]] == ["Taobao", "Criteo Kaggle", "Criteo Terabyte", "Avazu"]
    words = " ".join(readings())
    for number in ("0.52 million", "39.29 million", "60.50 million", "32.32 million", "1.94", "60.89", "40.48"):
        assert number in words
    assert "not the paper's words" in words


def report_of(tmp_path: Path, **parts: Any) -> dict[str, Any]:
    unlike = write(tmp_path / "demo.json", comparison("demo", not_comparable=["fae took another step"], **parts))
    return paper_report([write(tmp_path / "r.json", comparison())], {"RMC3": [unlike]}, ["fae", "report"])


def test_page_and_markdown(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    assert [each["workload"] for each in report["comparisons"]] == ["RMC2", "RMC3"]
    html, markdown = paper_page(report), paper_markdown(report)
    Page(html)
    assert "shape of Criteo Terabyte" not in markdown, "data are called what they are, whatever workload they stand for"
    for table in TABLES.values():
        assert f"{table.name}: {table.title}" in re.sub("&#x27;", "'", html) and f"## {table.name}: {table.title}" in markdown
    assert "| RMC2 | synthetic, shape of Criteo Kaggle | fae | 2 | 75.0 | 0.7812 | 0.5000 | +0.0010 (-0.0020 to +0.0040) |" in markdown
    assert f"| {NOT_AT_HAND} | {NOT_AT_HAND} |" in markdown, "Tables 4 and 5 have no number that nobody looked up"
    assert "| fae | 2 | 80.0 | 128 | 0.125 | 0.077 | 0.200 | 60.89 | 14.99 | 0.246 |" in markdown
    assert "| fae | 2 | hot | 4.00 | 0.0 | 25.0 | 75.0 |" in markdown
    for text in (
        "model.dense_arch is [128, 64, 16], the paper's is [512, 256, 64]", "the data are kaggle, the paper's are Criteo Terabyte",
        "the runs did not do the same work: fae took another step", "the tables have 10 % of the published rows", "87.5 %",
        "the samples are synthetic", "13 %",
    ):  # fmt: skip
        assert text in markdown and text in html.replace("&#x27;", "'"), text
    lines = paper_lines(report)
    assert lines[0].startswith(
        "RMC2 (synthetic, shape of Criteo Kaggle), fae, ranks 2: 0.500 times the training time of stock, 0.077 times its"
    )
    assert "(the paper: 0.246)" in lines[0] and "test AUC +0.0010" in lines[0] and len(lines) == 2
    picture = ratio_picture(report)
    assert picture is not None and [f"{value}<" in picture.svg() for value in ("0.246", "0.186", "0.077")] == [True] * 3


def test_figures_that_are_missing(tmp_path: Path) -> None:
    """SYN-M1 has no Table 7, a report of an older version no shares; nothing breaks, and nothing is made up."""
    runs = [{"placement": "stock", "ranks": 1, "samples_per_s": 5.0}, {"placement": "fae", "ranks": 1}]
    report = paper_report([write(tmp_path / "r.json", comparison("syn_m1", runs=runs))], {}, [])
    markdown = paper_markdown(report)
    Page(paper_page(report))
    assert ratio_picture(report) is None and "| SYN-M1 | synthetic, shape of Criteo Kaggle | stock | 1 | 5 | - | - |" in markdown
    assert report["comparisons"][0]["runs"][1]["bytes_ratio"] is None


def counts(pcie: float) -> dict[str, Any]:
    return {"paper_epoch": {"pcie": pcie * GIB, "tier": 2 * pcie * GIB}}


def test_counted_bytes(tmp_path: Path) -> None:
    shape = {"ours": {"1": {"host": counts(3), "uvm": counts(2)}}, "as_published": {"1": counts(5)}, "stock_host": {"1": counts(20)}}
    path = write(tmp_path / "b.json", {"command": ["paper_bytes.py", "--quick"], "shapes": {"kaggle": shape}})
    report = paper_report([write(tmp_path / "r.json", comparison())], {}, [], path)
    markdown = paper_markdown(report)
    assert "| synthetic, shape of kaggle | 1 | as published | 5.00 | 0.250 | 10.00 | 0.250 |" in markdown
    assert "| synthetic, shape of kaggle | 1 | ours uvm | 2.00 | 0.100 | 4.00 | 0.100 |" in markdown
    assert "its figures mean nothing" in markdown, "a quick run is not passed off as a measurement"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = write(tmp_path / "r.json", comparison()), tmp_path / "out"
    assert cli.main(["report", "--paper", given, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "0.077 times its bytes" in printed and sorted(path.name for path in out.iterdir()) == ["paper.html", "paper.json", "paper.md"]
    assert cli.main(["report", "--paper", "--workload", f"RMC2={given}", "--output", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "paper.json").read_text())


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        (None, ["--paper", "{path}"], "cannot be read: No such file"),
        ("{", ["--paper", "{path}"], "is not JSON"),
        ([1], ["--paper", "{path}"], "is no report of fae compare"),
        ({"runs": []}, ["--paper", "{path}"], "it lacks config, data, runs"),
        ({"kind": "popularity", "config": {}}, ["--paper", "{path}"], "is a report of kind 'popularity'"),
        ({"script": "train.py", "runs": [1]}, ["--paper", "{path}"], "compares a script"),
        (comparison("demo"), ["--paper", "{path}"], r"\[128, 64, 16\].* are none of the paper's workloads .* --workload NAME="),
        (comparison(), ["--paper", "--workload", "RMC9={path}"], "received 'RMC9'; allowed are RMC1, RMC2"),
        (comparison(), ["--paper", "--workload", "{path}"], "give NAME=REPORT"),
        (comparison(), ["--paper"], "received no report"),
        (comparison(), ["--paper", "{path}", "--bytes", "{path}"], "is not what benchmarks/paper_bytes.py writes"),
        (comparison(), ["--paper", "{path}", "--config", "c.yaml"], "--config: received with --paper"),
        (comparison(), ["--workload", "RMC2={path}"], "given without --paper"),
        (comparison(), [], "nothing to report; give --config"),
    ],
)
def test_bad_input(values: Any, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    if values is not None:
        path.write_text(values if isinstance(values, str) else json.dumps(values))
    given = [argument.replace("{path}", str(path)) for argument in arguments]
    assert cli.main(["report", *given, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("fae report: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
