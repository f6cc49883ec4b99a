"""The report of a made-up run: what the table says, and a page that stands alone."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fae_torchrec.training.page import listed
from fae_torchrec.training.report import html_report, markdown_report, text_table, write_report
from fae_torchrec.training.report_pictures import breakdown_picture, loss_picture, throughput_picture
from fae_torchrec.training.report_shares import shares_lines, shares_picture, shares_table
from fae_torchrec.training.report_table import bytes_text, count_text
from fae_torchrec.training.step_shares import CATEGORIES
from tests.training.html_page import Page

TITLES = [
    "ranks", "placement", "samples/s", "hot inputs %", "hot batches %", "fast-memory bytes", "bytes crossed ranks / sample",
    "cold rows / sample", "cold bytes / sample", "train loss", "test AUC", "test logloss",
]  # fmt: skip


def run(placement: str, ranks: int, **values: Any) -> dict[str, Any]:
    kinds = {"stock": ["mixed"], "fae": ["hot", "cold"], "fae-unsegregated": ["mixed"]}[placement]
    return {
        "placement": placement,
        "ranks": ranks,
        "samples_per_s": 12345.6,
        "samples_per_s_spread": [12000.0, 12900.4],
        "hot_inputs": 0.5044,
        "hot_batches": 0.4,
        "fast_memory_bytes": 1_610_612,
        "bytes_crossed_per_sample": 2890.5,
        "cold_rows_per_sample": 2.306,
        "cold_bytes_per_sample": 147.6,
        "train_loss": 0.46125,
        "test_auc": 0.78114,
        "test_logloss": 0.45554,
        "steps": 64,
        "samples": 65536,
        "wall_s": 5.3,
        "breakdown": {kind: {"input_dist": 1.5, "forward": 9.0, "backward": 12.0, "optimizer": 2.0} for kind in kinds},
        "loss_curve": [[1024, 0.69], [2048, 0.61], [4096, 0.55]],
        **values,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    stock = {
        "hot_inputs": None,
        "hot_batches": None,
        "cold_rows_per_sample": 26.0,
        "samples_per_s": 11000.0,
        "samples_per_s_spread": [10000, 12100],
    }
    tables = [(f"cat_{index}", 10 * 4**index) for index in range(10)]
    return {
        "schema": 1,
        "created": "2026-11-20T18:00:00+00:00",
        "command": ["fae", "compare", "--config", "a <b> & c.yaml"],
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
        "hardware": {"cores": 2, "ram_bytes": 25276510208, "gpus": [], "gpu": None},
        "config": {"train": {"batch_size": 1024}},
        "data": {"name": "made <up>", "train_samples": 65536, "test_samples": 8192, "tables": 10, "rows": 3495250, "bytes": 237677000},
        "profile": {
            "fingerprint": "3f2a91bc0d11",
            "num_samples": 3276,
            "total_samples": 65536,
            "sample_rate": 0.05,
            "skew": [{"table": n, "rows": r, "row_share": [0.0, 0.01, 0.1, 1.0], "access_share": [0.0, 0.4, 0.8, 1.0]} for n, r in tables],
        },
        "placement": {
            "fingerprint": "91bc3f2a0d12",
            "budget_bytes": 1_700_000,
            "used_bytes": 1_610_612,
            "hot_rows": 23685,
            "pinned": ["cat_0", "cat_1"],
            "threshold": 3,
            "coverage": 0.8714,
            "hot_inputs": 0.5044,
            "per_table": [
                {"table": "cat_0", "rows": 10, "hot_rows": 10, "kind": "hot", "bytes_hot": 680, "bytes_all": 680},
                {"table": "cat_9", "rows": 2621440, "hot_rows": 20000, "kind": "split", "bytes_hot": 1360000, "bytes_all": 178257920},
            ],
            "curve": [
                {"used_bytes": 237677 * 10**k, "byte_share": 10**k / 1000, "hot_inputs": 0.3 + k / 10, "coverage": 0.6 + k / 10}
                for k in range(4)
            ],
        },
        "runs": [
            run("stock", 1, bytes_crossed_per_sample=0.0, **stock),
            run("fae", 1, bytes_crossed_per_sample=0.0),
            run("stock", 2, **stock),
            run("fae", 2, samples_per_s=22000.0, samples_per_s_spread=[21000.0, 23000.0], test_auc=0.77814),
            run("fae-unsegregated", 2, test_auc=math.nan),
        ],
    }


def test_table_by_hand(report: dict[str, Any]) -> None:
    report["runs"] = report["runs"][2:4]
    expected = """
                                                            bytes
                             hot      hot                 crossed                 cold
                          inputs  batches  fast-memory      ranks  cold rows     bytes   train               test
ranks  placement  samples/s       %        %        bytes  / sample   / sample  / sample    loss  test AUC  logloss
-----  ---------  ---------  ------  -------  -----------  --------  ---------  --------  ------  --------  -------
    2  stock         11,000       -        -     1.54 MiB     2,890      26.00       148  0.4612    0.7811   0.4555
    2  fae           22,000    50.4     40.0     1.54 MiB     2,890       2.31       148  0.4612    0.7781   0.4555
"""
    lines = text_table(report).splitlines()
    assert [line.split() for line in lines] == [line.split() for line in expected.strip("\n").splitlines()]
    assert len({len(line) for line in lines[-3:]}) == 1, "right-aligned figures end in one column"
    assert all(line == line.rstrip() for line in lines)


def test_a_figure_that_is_missing_or_not_finite_is_a_dash() -> None:
    line = text_table({"runs": [{"ranks": 1, "placement": "fae", "samples_per_s": math.inf, "test_auc": math.nan}]}).splitlines()[-1]
    assert line.split() == ["1", "fae", *["-"] * 10]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (64 * 1024**2, "64.0 MiB"), (250 * 1024**3, "250 GiB"), (5 * 1024**5, "5120 TiB")],
)
def test_bytes_text(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_count_text() -> None:
    assert [count_text(value) for value in (0, 0.0, 3, 3.26, 99.96, 12345.6)] == ["0", "0", "3", "3.3", "100.0", "12,346"]


def test_page_has_every_column_and_value(report: dict[str, Any]) -> None:
    page = Page(html_report(report))
    assert page.open == []
    comparison, placement = page.tables
    assert comparison[0] == TITLES
    assert comparison[4] == ["2", "fae", "22,000", "50.4", "40.0", "1.54 MiB", "2,890", "2.31", "148", "0.4612", "0.7781", "0.4555"]
    assert comparison[5][10] == "-"
    assert len(comparison) == 1 + 5
    assert placement[2] == ["cat_9", "split", "2,621,440", "20,000", "0.76", "1.30 MiB", "170 MiB"]


def test_page_says_what_the_spreads_say(report: dict[str, Any]) -> None:
    html = html_report(report)
    assert (
        "<b>fae</b>, 1 rank: 1.12 times the speed of stock (the spreads overlap: no difference shown), 1.00 times its fast memory" in html
    )
    assert "<b>fae</b>, 2 ranks: 2.00 times the speed of stock, 1.00 times its fast memory" in html
    assert "test AUC -0.0030." in html
    assert "12,000 to 12,900" in html


def test_page_stands_alone_and_escapes(report: dict[str, Any]) -> None:
    html = html_report(report)
    page = Page(html)
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert re.findall(r"https?:|url\((?!#)|@import|<script|<link|<img|<iframe", html) == []
    assert html.count("<svg ") == 5
    assert "made <up>" not in html and "made &lt;up&gt;" in html and "a &lt;b&gt; &amp; c.yaml" in html
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    for words in (
        "3f2a91bc0d11",
        "91bc3f2a0d12",
        "2.13.0+cpu",
        "3,276 of 65,536",
        "1,700,000 bytes",
        "always hot: cat_0, cat_1",
        "cores 2",
    ):
        assert words in html, words
    assert "gpu" not in html.split("cores 2")[1].split("</dd>")[0]


def test_pictures_take_their_colours_from_the_page(report: dict[str, Any]) -> None:
    for draw in (throughput_picture, breakdown_picture, loss_picture):
        picture = draw(report)
        assert picture is not None
        svg = picture.svg()
        assert svg.startswith("<svg viewBox=") and svg.endswith("</svg>")
        assert picture.svg() == svg, "the same report gives the same bytes"
        assert "var(--ink)" in svg or "var(--soft)" in svg
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000", "#ffffff"}, "a colour that does not follow the page"
        assert "DejaVu" not in svg


def test_the_popularity_of_a_run_is_on_its_page(report: dict[str, Any]) -> None:
    html = html_report(report)
    assert "The 2 smaller tables are not drawn" in html
    assert "in use: 1.54 MiB, 0.68% of all bytes" in html and "hot inputs, 50.4% with what is in use" in html  # of 237,677,000 bytes


def test_page_says_on_which_inputs_hot_inputs_are_estimated(report: dict[str, Any]) -> None:
    assert "on the very inputs that were counted, so too high" in html_report(report)
    report["profile"].update(counted_inputs=3276, fresh_inputs=4096)
    assert "Hot inputs: on 4,096 inputs that were not counted." in html_report(report)


def test_breakdown_has_a_bar_for_every_kind(report: dict[str, Any]) -> None:
    picture = breakdown_picture(report)
    assert picture is not None
    svg = picture.svg()
    for label in (
        "stock, 1 rank, mixed",
        "fae, 2 ranks, hot",
        "fae, 2 ranks, cold",
        "fae-unsegregated, 2 ranks, mixed",
        "24.5 ms",
        "input dist",
    ):
        assert f">{label}<" in svg, label


def test_an_unknown_figure_is_not_drawn_as_zero(report: dict[str, Any]) -> None:
    assert "not known" not in html_report(report)
    report["runs"][1]["bytes_crossed_per_sample"] = None
    assert "not known" in html_report(report)


@pytest.mark.parametrize("missing", ["data", "profile", "placement", "versions", "hardware", "config", "command", "created"])
def test_parts_may_be_missing(report: dict[str, Any], missing: str) -> None:
    values = {key: value for key, value in report.items() if key != missing}
    assert len(Page(html_report(values)).tables) == (1 if missing == "placement" else 2)


def test_a_report_of_runs_alone(report: dict[str, Any]) -> None:
    optional = {"breakdown", "loss_curve", "samples_per_s_spread", "hot_inputs", "hot_batches", "test_auc", "fast_memory_bytes"}
    runs = [{key: value for key, value in run.items() if key not in optional} for run in copy.deepcopy(report["runs"])]
    page = Page(html := html_report({"runs": runs}))
    assert len(page.tables) == 1 and html.count("<svg ") == 1
    assert Page(html_report({**dict.fromkeys(report), "runs": []})).tables == []
    assert "ranks" in text_table({"runs": []})


def test_written_whole_with_json_last(report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "demo"
    values_path, html_path, markdown_path = write_report(report, folder)
    assert (values_path, html_path, markdown_path) == tuple(folder / f"report.{kind}" for kind in ("json", "html", "md"))
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    values = json.loads(values_path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values["runs"][4]["test_auc"] is None
    report["runs"][4]["test_auc"] = None
    assert values == report
    assert html_path.read_text() == html_report(report) and markdown_path.read_text() == markdown_report(report)

    monkeypatch.setattr("fae_torchrec.training.report.html_report", lambda values: 1 / 0)
    other = tmp_path / "other"
    with pytest.raises(ZeroDivisionError):
        write_report(report, other)
    assert not other.exists() or list(other.iterdir()) == []


def with_shares(report: dict[str, Any]) -> dict[str, Any]:
    """The same, its fae runs and stock's first profiled; shares by hand."""
    for run in report["runs"]:
        if run["placement"] in ("stock", "fae"):
            parts = {"mixed": (10.0, 0.0)} if run["placement"] == "stock" else {"hot": (4.0, 0.04), "cold": (8.0, 0.25)}
            run["step_shares"] = {
                kind: {"steps": 8, "step_ms": ms, "shares": shares, "milliseconds": {name: share * ms for name, share in shares.items()}}
                for kind, (ms, exchange) in parts.items()
                for shares in [
                    {**dict.fromkeys(CATEGORIES, 0.0), "forward": 0.4, "backward": 0.6 - exchange, "embedding_exchange": exchange}
                ]
            }
    return report


def test_shares_of_a_step(report: dict[str, Any]) -> None:
    """In the terminal what is worth a word, in the tables every category that occurs and the one that never does, in the picture bars."""
    assert shares_lines(report) == [] and shares_table(report)[1] == [] and shares_picture(report) is None, "nothing was profiled"
    assert "profiled step" not in markdown_report(report) and "Where a step's time goes" not in html_report(report)
    report = with_shares(report)
    lines = shares_lines(report)
    assert lines[0] == "stock, 1 rank, a mixed step of 10.0 ms: backward 60.0 %, forward 40.0 %"
    assert lines[1] == "fae, 1 rank, a hot step of 4.0 ms: backward 56.0 %, forward 40.0 %", "4 % are not worth a word"
    assert lines[2] == "fae, 1 rank, a cold step of 8.0 ms: forward 40.0 %, backward 35.0 %, embedding exchange 25.0 %"
    head, rows = shares_table(report)
    assert head[3:] == ["ms / step", "embedding sync at swaps %", "embedding exchange %", "forward %", "backward %"]
    assert rows[2] == ["fae", "1", "cold", "8.00", "0.0", "25.0", "40.0", "35.0"]
    markdown, html = markdown_report(report), html_report(report)
    assert "| fae | 1 | cold | 8.00 | 0.0 | 25.0 | 40.0 | 35.0 |" in markdown
    for text in ("Where a step's time goes", "fused update of the rows", "embedding sync at swaps"):
        assert text.replace("'", "&#x27;") in html
    picture = shares_picture(report)
    assert picture is not None
    bars, legend = picture.svg().count("ms<"), [name for name in ("embedding exchange", "forward", "idle") if f">{name}<" in picture.svg()]
    assert bars == len(rows) and legend == ["embedding exchange", "forward"]


def test_gpus_are_named_with_their_memory() -> None:
    assert listed({"cores": 16, "gpus": [["H200", 140 << 30], ["H200", 140 << 30]]}) == "cores 16, gpus H200 (140 GiB) + H200 (140 GiB)"
