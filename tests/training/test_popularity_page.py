"""The page of a made-up popularity report: what it says, and that it stands alone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fae_torchrec.training.popularity_page import popularity_page
from tests.training.html_page import Page
from tests.training.small_popularity import popularity_values


@pytest.fixture
def values() -> dict[str, Any]:
    return popularity_values(10, points=5)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and these tests are about words."""
    monkeypatch.setattr("fae_torchrec.training.popularity_page.popularity_pictures", lambda report: {})


def test_page_says_what_both_selections_buy(values: dict[str, Any], no_pictures: None) -> None:
    html = popularity_page(values)
    assert Page(html).open == []
    first = "<b>input_aware</b> (in use): 50.4 % of inputs are all hot (between 47.8 % and 53.1 %) with"
    assert html.index(first) < html.index("<b>threshold</b>: 43.0 % of inputs")
    values["placement"]["policy"] = "threshold"
    html = popularity_page(values)
    assert html.index("<b>threshold</b> (in use)") < html.index("<b>input_aware</b>:")


def test_page_has_every_table_and_every_point(values: dict[str, Any], no_pictures: None) -> None:
    tables, *curves = Page(popularity_page(values)).tables
    # 10 * 2.2**9 rows, a third of them seen, a fortieth and a fiftieth hot; 68 bytes a row. The curve at a hundredth is 0.01 ** 0.69.
    assert tables[0][4:8] == ["accesses counted", "top 1 % of rows take", "hot rows, input_aware", "hot rows, threshold"]
    assert tables[10] == ["t_cat_9", "split", "12,072", "4,024", "3,276", "4.2 %", "301 (2.49 %)", "241 (2.00 %)", "20.0 KiB", "802 KiB"]
    assert tables[1][6:8] == ["10 (100.00 %)", "10 (100.00 %)"]
    assert [len(rows) for rows in (tables, *curves)] == [11, 6, 6, 6]
    assert curves[2][0] == ["threshold", "hot rows", "of all bytes", "hot inputs", "interval", "coverage"]
    assert curves[2][5][0] == "0.0305 % (one access)" and curves[2][1][0] == "1 %"


def test_page_stands_alone_and_escapes(values: dict[str, Any]) -> None:
    html = popularity_page(values)
    page = Page(html)
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert re.findall(r"https?:|url\((?!#)|@import|<script|<link|<img|<iframe", html) == []
    assert html.count("<svg ") == 4
    assert "made <up>" not in html and "<h1>Popularity of rows in made &lt;up&gt;</h1>" in html and "a &lt;b&gt; &amp; c.yaml" in html
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    assert "on 4,096 inputs that were not counted" in html
    for words in ("3f2a91bc0d11", "3,276 of 65,536 train samples counted", "3 malformed lines of day &lt;0&gt;.gz skipped", "cores 2"):
        assert words in html, words


def test_page_warns_of_what_the_figures_do_not_say(values: dict[str, Any], no_pictures: None) -> None:
    html = popularity_page(values)
    assert "3 malformed lines were skipped" in html
    assert "resolution of the sample is reached" not in html
    values["placement"]["resolution"] = {"reached": True, "resolving_rate": 0.2}
    values["profile"] |= {"fresh_inputs": 0, "skipped": {}}
    html = popularity_page(values)
    assert "The resolution of the sample is reached" in html and "A sample rate of 0.2 would resolve it." in html
    assert "All inputs were counted" in html and "malformed" not in html
    values["placement"]["resolution"]["resolving_rate"] = 3.0
    assert "would resolve it" not in popularity_page(values), "there is no such rate"


@pytest.mark.parametrize("missing", ["profile", "placement", "curves", "thresholds"])
def test_parts_may_be_missing(values: dict[str, Any], missing: str) -> None:
    page = Page(html := popularity_page({key: values[key] for key in ("profile", "placement", "curves", "thresholds") if key != missing}))
    assert page.open == []
    assert html.count("<svg ") == 3
    assert len(page.tables) == {"placement": 3, "curves": 2, "thresholds": 3}.get(missing, 4)


def test_a_page_of_nothing() -> None:
    assert Page(html := popularity_page({})).tables == [] and "<svg" not in html
