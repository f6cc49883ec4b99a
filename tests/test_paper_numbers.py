"""fae report --paper --numbers: a reader's numbers beside the runs. Every number of "the paper" in this file is made up."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from fae_torchrec import cli
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.paper_numbers import Shares, read_numbers
from fae_torchrec.paper_report import paper_report
from fae_torchrec.training.paper_given import shares_given
from fae_torchrec.training.paper_page import paper_lines, paper_markdown, paper_page
from fae_torchrec.training.paper_tables import NOT_AT_HAND
from fae_torchrec.training.step_shares import CATEGORIES
from tests.test_paper_report import comparison, write
from tests.training.html_page import Page

MADE_UP: dict[str, Any] = {
    "table4": {"RMC2": {"baseline": {"accuracy": 11.5, "auc": 0.25, "logloss": 3}, "fae": {"auc": 0.1234567}}},
    "table5": {
        "RMC2": {"baseline": {1: 8000, 2: 4000, 4: 1}, "fae": {1: 2000, 2: 3000}},
        "RMC4": {"baseline": 50, "fae": 20},
        "SYN-M1": {"baseline": 7, "fae": {1: 7}},
    },
    "fig14": {"RMC2": {"baseline": {"forward": 99, "embedding_sync": 0}, "fae_cold": {"transfer": "1e-3"}}, "RMC1": {"fae_hot": {}}},
}


def made_up(tmp_path: Path, values: Any = MADE_UP) -> str:
    path = tmp_path / "made-up.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


def page_of(tmp_path: Path, config: str = "kaggle", values: Any = MADE_UP) -> dict[str, Any]:
    return paper_report([write(tmp_path / "r.json", comparison(config))], {}, [], None, made_up(tmp_path, values))


def test_numbers_as_given(tmp_path: Path) -> None:
    """Only what is given has a key; the ratios by hand, for the GPUs that both have."""
    path = made_up(tmp_path)
    assert read_numbers(path) == {
        "path": path,
        "table4": MADE_UP["table4"],
        "table5": {
            "RMC2": {"baseline": {"1": 8000, "2": 4000, "4": 1}, "fae": {"1": 2000, "2": 3000}, "time_ratio": {"1": 0.25, "2": 0.75}},
            "RMC4": {"baseline": 50, "fae": 20, "time_ratio": 0.4},
            "SYN-M1": {"baseline": 7, "fae": {"1": 7}},
        },
        "fig14": {"RMC2": {"baseline": {"forward": 99, "embedding_sync": 0}, "fae_cold": {"transfer": 0.001}}},
    }
    as_json = write(tmp_path / "made-up.json", MADE_UP)
    assert {**read_numbers(as_json), "path": path} == read_numbers(path)


def test_page_with_numbers(tmp_path: Path) -> None:
    report = page_of(tmp_path)
    html, markdown = paper_page(report), paper_markdown(report)
    Page(html)
    for text in (
        "paper, baseline (from made-up.yaml) | paper, FAE (from made-up.yaml) |",
        "| 11.5 %, AUC 0.25, logloss 3 | AUC 0.1234567 |",
        "| paper, baseline, minutes (from made-up.yaml) | paper, FAE, minutes (from made-up.yaml) |",
        "| paper, FAE / baseline (from made-up.yaml) |\n",
        "| 1 GPU: 8000; 2 GPUs: 4000; 4 GPUs: 1 | 1 GPU: 2000; 2 GPUs: 3000 | 1 GPU: 0.250; 2 GPUs: 0.750 |",
        "| workload | the paper | time of | embedding sync % | CPU-GPU transfer % | forward % |",
        "| RMC2 | from made-up.yaml | baseline | 0 | - | 99 |",
        "| RMC2 | from made-up.yaml | FAE, cold | - | 0.001 | - |",
        "not checked against the paper here. Looked up by this project: Not at hand",
    ):
        assert text in markdown
        assert all(part.strip() in html for part in text.split("|"))
    assert NOT_AT_HAND not in markdown.partition("## Table 5")[2].partition("- Comparable")[0]
    assert "(from made-up.yaml)" not in markdown.partition("## Table 7")[2].partition("- Comparable")[0], "Table 7 is not the reader's"
    assert "numbers of the paper" in html and report["numbers"]["path"] in html
    assert "0.500 times the training time of stock (the paper, from made-up.yaml: 1 GPU: 0.250; 2 GPUs: 0.750)" in paper_lines(report)[0]


def test_what_the_file_lacks_is_not_at_hand(tmp_path: Path) -> None:
    """RMC4 has one number for all GPUs and no Table 4; without a file nothing is said of one."""
    report = page_of(tmp_path, "avazu_synthetic")
    markdown = paper_markdown(report)
    assert f"| {NOT_AT_HAND} | {NOT_AT_HAND} |\n" in markdown and "| 50 | 20 | 0.400 |" in markdown and shares_given(report) == ([], [])
    Page(paper_page(report))
    plain = paper_report([write(tmp_path / "r.json", comparison())], {}, [])
    assert plain["numbers"] is None and "made-up" not in paper_markdown(plain) + paper_page(plain)
    assert f"| {NOT_AT_HAND} | {NOT_AT_HAND} |" in paper_markdown(plain) and "from" not in paper_lines(plain)[0].partition("bytes")[0]
    scores = paper_markdown(page_of(tmp_path, values={"table4": MADE_UP["table4"]}))
    assert "paper, FAE (from made-up.yaml)" in scores and "minutes (from" not in scores, "a label only where numbers are given"


def test_categories_are_those_of_a_step() -> None:
    assert {field.name for field in fields(Shares)} < set(CATEGORIES)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = write(tmp_path / "r.json", comparison()), tmp_path / "out"
    assert cli.main(["report", "--paper", given, "--numbers", made_up(tmp_path), "--output", str(out)]) == 0
    assert "from made-up.yaml" in capsys.readouterr().out
    assert json.loads((out / "paper.json").read_text())["numbers"] == read_numbers(made_up(tmp_path))


def test_the_template_of_the_docs(tmp_path: Path) -> None:
    """Filled with made-up numbers it is read, all of it; unfilled it is refused, so that dots never stand for a number."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "paper.md").read_text()
    template = text.partition("```text\n")[2].partition("```")[0]
    assert template.count("...") == 27
    filled = read_numbers(made_up(tmp_path, template.replace("...", "0.5")))
    assert json.dumps(filled).count("0.5") == 27 and filled["table5"]["RMC2"]["time_ratio"] == {"1": 1, "2": 1, "4": 1}
    with pytest.raises(ConfigError, match=r"table4\.RMC2\.baseline\.accuracy: received '\.\.\.'"):
        read_numbers(made_up(tmp_path, template))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"table6": {}}, "unknown key 'table6'; did you mean 'table5'? Allowed here: ['table4', 'table5', 'fig14']"),
        ({"table4": {"RMC9": {}}}, "unknown workload 'table4.RMC9'; allowed are RMC1, RMC2, RMC3, RMC4, SYN-M1"),
        ({"fig14": {"Kaggle": {}}}, "unknown workload 'fig14.Kaggle'"),
        ({"table4": {"RMC2": {"ours": {}}}}, "unknown key 'table4.RMC2.ours'; Allowed in 'table4.RMC2': ['baseline', 'fae']"),
        ({"table4": {"RMC2": {"fae": {"acuracy": 1}}}}, "unknown key 'table4.RMC2.fae.acuracy'; did you mean 'accuracy'?"),
        ({"fig14": {"RMC2": {"fae_hot": {"idle": 1}}}}, "unknown key 'fig14.RMC2.fae_hot.idle'"),
        ({"table4": {"RMC2": {"fae": {"accuracy": 100.5}}}}, "table4.RMC2.fae.accuracy: received 100.5; it must be at least 0 and at most"),
        ({"table4": {"RMC2": {"fae": {"auc": 78.7}}}}, "table4.RMC2.fae.auc: received 78.7; it must be at least 0 and at most 1"),
        ({"table4": {"RMC2": {"fae": {"logloss": "low"}}}}, "table4.RMC2.fae.logloss: received 'low' (str); give a finite number"),
        ({"table4": {"RMC2": {"fae": {"logloss": True}}}}, "table4.RMC2.fae.logloss: received True (bool); give a finite number"),
        ({"table4": {"RMC2": 0.7}}, "table4.RMC2: received 0.7; give a mapping with the keys ['baseline', 'fae']"),
        ({"table4": 0.7}, "table4: received 0.7 (float); give a mapping of names, each to a mapping"),
        ({"table5": {"RMC2": {"fae": {"1": -3}}}}, "table5.RMC2.fae.1: received -3.0; it must be more than 0"),
        ({"table5": {"RMC2": {"fae": 0}}}, "table5.RMC2.fae: received 0.0; it must be more than 0"),
        ({"table5": {"RMC2": {"fae": {2: "x"}}}}, "table5.RMC2.fae.2: received 'x' (str); give a finite number"),
        ({"table5": {"RMC2": {"fae": {"two": 3}}}}, "table5.RMC2.fae: received 'two' for a number of GPUs; allowed are whole numbers"),
        ({"table5": {"RMC2": {"fae": [1, 2]}}}, "table5.RMC2.fae: received [1, 2] (list); give a finite number"),
        ("table5: {RMC2: {fae: {1: 5, 1: 6}}}", "the keys ['1'] are given more than once"),
        ({"fig14": {"RMC2": {"baseline": {"forward": -1}}}}, "fig14.RMC2.baseline.forward: received -1.0; it must be at least 0"),
        ({"table4": {"RMC2": {"fae": {}}}, "table5": None}, "holds no number"),
        ("- 1", "the file must hold a mapping"),
        (None, "no such file"),
    ],
)  # fmt: skip
def test_bad_numbers(values: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = write(tmp_path / "r.json", comparison())
    path = str(tmp_path / "made-up.yaml") if values is None else made_up(tmp_path, values)
    assert cli.main(["report", "--paper", given, "--numbers", path, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"fae report: --numbers: {path}"), error
    assert not (tmp_path / "out").exists()


def test_numbers_without_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--numbers", "made-up.yaml"]) == 2
    assert "--numbers: given without --paper" in capsys.readouterr().err
