"""The examples run and show what they promise."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ["--rows", "20000", "--batch-size", "1024", "--steps", "100"]


@pytest.fixture
def stock_planner_statistics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return import_module("stock_planner_statistics")


def test_stock_plan_before_and_after_statistics(stock_planner_statistics: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    stock_planner_statistics.main([*SMALL, "--json"])
    skewed, uniform = json.loads(capsys.readouterr().out).values()
    assert skewed["load_factor"]["before"] == uniform["load_factor"]["before"] == 0.1, "no statistics: as given, whatever the table"
    # The uniform table is asked for three times as many distinct rows a step and finds few of them in a small cache: it gets the memory.
    assert uniform["load_factor"]["after"] > 0.5 > 0.25 > skewed["load_factor"]["after"] > 0.1
    for table in (skewed, uniform):
        assert table["misses_per_step"]["after"] < table["misses_per_step"]["before"]
    assert skewed["cacheability"] < 0.3 < uniform["cacheability"]


def test_stock_plan_as_text(stock_planner_statistics: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    stock_planner_statistics.main(SMALL)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["skewed", "uniform"]
    assert all(line.split()[4] == "0.100" for line in lines[2:4])
    with pytest.raises(SystemExit, match="0"):
        stock_planner_statistics.main(["--help"])
    assert "cacheability * expected lookups" in capsys.readouterr().out
