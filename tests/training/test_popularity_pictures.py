"""Pictures of made-up popularity: what is drawn, in which colours, and what happens where values are missing."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fae_torchrec.training.picture import Picture
from fae_torchrec.training.popularity_page import popularity_pictures
from fae_torchrec.training.popularity_pictures import (
    MAX_BAR_TABLES,
    MAX_SKEW_TABLES,
    budget_picture,
    hot_rows_picture,
    skew_picture,
    threshold_picture,
)
from tests.training.small_popularity import popularity_values

PNG = b"\x89PNG\r\n\x1a\n"


def texts(picture: Picture | None) -> list[str]:
    """Every text of a picture, in the order drawn."""
    assert picture is not None
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.svg())


@pytest.fixture
def values() -> dict[str, Any]:
    return popularity_values(10)


def test_every_picture_in_both_formats(values: dict[str, Any]) -> None:
    pictures = popularity_pictures(values)
    assert list(pictures) == ["budget", "thresholds", "skew", "hot_rows"]
    for name, picture in pictures.items():
        svg, png = picture.svg(), picture.png()
        assert svg.startswith("<svg viewBox=") and svg.endswith("</svg>"), name
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000", "#ffffff"}, "a colour that does not follow the page"
        assert png.startswith(PNG) and len(png) > 10_000, name


def test_nothing_to_draw_is_no_picture() -> None:
    assert skew_picture({}) is threshold_picture([], {}) is hot_rows_picture({}) is budget_picture({}, {}) is None
    assert budget_picture({"threshold": []}, {"used_bytes": 1}) is None
    point = {"used_bytes": 0, "byte_share": 0.0, "hot_inputs": 0.0, "coverage": 0.0}
    assert budget_picture({"threshold": [point]}, {}) is None, "a logarithmic axis has no place for zero"
    assert popularity_pictures({}) == {}


@pytest.mark.parametrize(
    ("source", "title"), [("synthetic criteo kaggle, scale 1", "synthetic criteo kaggle, scale 1"), ("clicks.csv", "")]
)
def test_pictures_of_generated_data_say_so(values: dict[str, Any], source: str, title: str) -> None:
    pictures = popularity_pictures({**values, "profile": {**values["profile"], "source": source}})
    assert len(pictures) == 4
    assert {picture.title for picture in pictures.values()} == {title}


def test_skew_draws_the_largest_tables(values: dict[str, Any]) -> None:
    names = [text for text in texts(skew_picture(values["profile"])) if text.endswith("rows)")]
    assert names[0] == "t_cat_9 (12.1 k rows)"
    assert [name.partition(" ")[0] for name in names] == [f"t_cat_{k}" for k in range(9, 9 - MAX_SKEW_TABLES, -1)]


def test_budget_shows_both_selections_and_what_is_in_use(values: dict[str, Any]) -> None:
    shown = texts(budget_picture(values["curves"], values["placement"]))
    assert {"input_aware", "threshold", "99.9% interval of hot inputs"} <= set(shown)
    assert "hot inputs, 50.4% with what is in use" in shown and "coverage: accesses that are hot, 87.1% with what is in use" in shown
    used = values["placement"]["used_bytes"]
    assert f"in use: {used / 1024:.1f} KiB, 2% of all bytes" in shown
    without = texts(budget_picture(values["curves"], {}))
    assert "hot inputs" in without and not any("in use" in text for text in without)


def test_a_curve_without_intervals_has_no_band(values: dict[str, Any]) -> None:
    bare = [{key: point[key] for key in point.keys() - {"low", "high"}} for point in values["curves"]["threshold"]]
    assert not any("interval" in text for text in texts(budget_picture({"threshold": bare}, {})))


def test_thresholds_mark_the_resolution_of_the_sample(values: dict[str, Any]) -> None:
    shown = texts(threshold_picture(values["thresholds"], values["placement"]))
    assert "resolution of the sample" in shown and "in use: 2% of all bytes" in shown
    assert {"1%", "0.1%"} <= set(shown), "the thresholds are per cent already"
    unclamped = [{**point, "clamped": False} for point in values["thresholds"]]
    assert "resolution of the sample" not in texts(threshold_picture(unclamped, {}))


def test_a_curve_of_one_point_can_be_drawn(values: dict[str, Any]) -> None:
    one = {policy: points[:1] for policy, points in values["curves"].items()}
    for picture in (budget_picture(one, values["placement"]), threshold_picture(values["thresholds"][-1:], {})):
        assert any(text.endswith("%") for text in texts(picture))


def test_hot_rows_of_every_table(values: dict[str, Any]) -> None:
    shown = texts(hot_rows_picture(values["placement"]))
    assert [text for text in shown if text.startswith("t_cat")] == [f"t_cat_{k}" for k in range(9, -1, -1)], "the largest first"
    assert shown.count("always hot") == len(values["placement"]["pinned"]) == 3
    assert {"2.5%", "2%"} <= set(shown), "a fortieth and a fiftieth"
    small = values["placement"] | {"pinned": [], "per_table": [values["placement"]["per_table"][3] | {"hot_rows": {"threshold": 0}}]}
    assert "none" in texts(hot_rows_picture(small)) and "hot rows, input_aware" not in texts(hot_rows_picture(small))


def test_many_tables_and_long_names() -> None:
    values = popularity_values(4)
    template = values["placement"]["per_table"][3]
    tables = [template | {"table": f"a_long_name_of_a_table_number_{k:04}", "rows": 1000 + k} for k in range(MAX_BAR_TABLES + 6)]
    shown = [text for text in texts(hot_rows_picture({"per_table": tables})) if text.startswith("a_long")]
    assert len(shown) == MAX_BAR_TABLES and max(map(len, shown)) == 28
