"""What `fae report` says of a profile small enough to check by hand, and of an experiment on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fae_torchrec.core.hot_set import select_hot_set
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.doctor import Environment
from fae_torchrec.experiment import placed_tables
from fae_torchrec.experiment_data import open_data
from fae_torchrec.experiment_placement import make_hot_set, make_placement
from fae_torchrec.experiment_profile import make_profile
from fae_torchrec.popularity_report import popularity_report, popularity_values, write_popularity_report
from tests.core.small_profiles import profile_of_inputs, small_tables
from tests.small_config import new_config

FILES = ["popularity.html", "popularity.json", *(f"popularity_{name}.png" for name in ("budget", "hot_rows", "skew", "thresholds"))]


@pytest.fixture
def profile() -> PopularityProfile:
    """Table a has 2 rows of 4 bytes; of b's 10 rows of 8 bytes, four were counted 4, 2, 1 and 1 times."""
    tables = small_tables([2, 10])
    counted = [[[n % 2], [row]] for n, row in enumerate([0, 0, 0, 0, 1, 1, 2, 3])]
    return profile_of_inputs(tables, counted, fresh=[[[0], [row]] for row in (0, 1, 5, 0)])


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for it starts a process that imports torch."""
    found = Environment(python=(3, 11, 7), packages={"torch": "2.13.0"}, cores=2, ram_bytes=2**34, machine="Linux")
    monkeypatch.setattr("fae_torchrec.popularity_report.collect", lambda: found)


@pytest.mark.parametrize(("policy", "threshold"), [("threshold", 25.0), ("input_aware", None)])
def test_values_by_hand(profile: PopularityProfile, policy: Any, threshold: float | None) -> None:
    in_use = select_hot_set(profile, 30, policy=policy, pinned_max_rows=2)  # 8 bytes for a; 22 hold two rows of b
    values = popularity_values(profile, in_use, pinned_max_rows=2)
    assert values["profile"]["skew"][1] | {"row_share": 0, "access_share": 0} == {
        "table": "b", "rows": 10, "seen_rows": 4, "accesses": 8, "row_share": 0, "access_share": 0,
    }  # fmt: skip
    assert (values["profile"]["counted_inputs"], values["profile"]["fresh_inputs"]) == (8, 4)
    placement = values["placement"]
    assert (placement["policy"], placement["used_bytes"], placement["all_bytes"], placement["pinned"]) == (policy, 24, 88, ["a"])
    assert placement["byte_share"] == 24 / 88 and placement["threshold"] == threshold
    assert (placement["hot_inputs"], placement["coverage"]) == (3 / 4, 14 / 16), "fresh input 5 is cold; counted rows 2 and 3 are"
    assert placement["hot_inputs_interval"][0] < 3 / 4 < placement["hot_inputs_interval"][1]
    assert placement["selections"].keys() == {"threshold", "input_aware"}
    assert [(row["table"], row["hot_rows"][policy], row["seen_rows"], row["kind"]) for row in placement["per_table"]] == [
        ("a", 2, 2, "hot"), ("b", 2, 4, "split"),
    ]  # fmt: skip
    points = [(p["threshold_percent"], p["used_bytes"], p["hot_rows"], p["hot_inputs"], p["coverage"]) for p in values["thresholds"]]
    assert points == [(50, 16, 3, 0.5, 0.75), (25, 24, 4, 0.75, 0.875), (12.5, 40, 6, 0.75, 1.0)]
    assert [p["clamped"] for p in values["thresholds"]] == [False, False, True]
    for curve in values["curves"].values():
        assert [p["used_bytes"] for p in curve] == [8, 16, 24, 32, 40], "from the pinned table to all rows that were seen"
        assert [p["coverage"] for p in curve] == [8 / 16, 12 / 16, 14 / 16, 15 / 16, 1]


def test_nothing_but_small_tables(profile: PopularityProfile, tmp_path: Path) -> None:
    in_use = select_hot_set(profile, 88, pinned_max_rows=10)
    values = popularity_values(profile, in_use, pinned_max_rows=10)
    assert values["thresholds"] == [] and [len(curve) for curve in values["curves"].values()] == [1, 1]
    write_popularity_report(values, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in FILES if "thresholds" not in name]


def test_report_of_an_experiment(tmp_path: Path, environment: None) -> None:
    config = new_config(tmp_path)
    report = popularity_report(config, ["fae", "report"])
    paths = write_popularity_report(report, tmp_path / "report")
    assert sorted(path.name for path in paths) == FILES == sorted(path.name for path in (tmp_path / "report").iterdir())
    assert paths[0].name == "popularity.json" and paths[1].name == "popularity.html"
    read = json.loads(paths[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read == json.loads(json.dumps(report))
    assert (read["schema"], read["kind"], read["command"], read["hardware"]["cores"]) == (1, "popularity", ["fae", "report"], 2)
    data = open_data(config)
    profile = make_profile(config, data, placed_tables(config, data))
    hot_set = make_hot_set(config, profile)
    assert read["profile"]["fingerprint"] == profile.fingerprint
    assert (read["placement"]["used_bytes"], read["placement"]["hot_inputs"]) == (hot_set.used_bytes, hot_set.hot_inputs)

    # A saved placement brings its budget along.
    _, path = make_placement(config, profile.tables, hot_set)
    again = popularity_report(new_config(tmp_path, f"placement.path={path}", "placement.budget=90%"), [])
    assert again["placement"] == report["placement"]


def test_json_is_written_last(profile: PopularityProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = popularity_values(profile, select_hot_set(profile, 30, pinned_max_rows=2), pinned_max_rows=2)
    monkeypatch.setattr("fae_torchrec.popularity_report.popularity_page", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_popularity_report(values, tmp_path)
    assert list(tmp_path.iterdir()) == []
