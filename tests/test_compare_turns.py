"""The order of the runs of a comparison, and what repeats come to."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from fae_torchrec.compare_turns import summary, turns


def test_turns_by_hand() -> None:
    assert turns("ab", 4) == [["a", "b"], ["b", "a"], ["b", "a"], ["a", "b"]]
    assert turns("abc", 6) == [list("abc"), list("bca"), list("cab"), list("cba"), list("acb"), list("bac")]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_name_is_as_often_early_as_late(count: int) -> None:
    names = list(range(count))
    orders = turns(names, 2 * count)
    assert all(sorted(order) == names for order in orders)
    places = Counter((name, place) for order in orders for place, name in enumerate(order))
    assert set(places.values()) == {2} and len(places) == count**2
    if count > 2:
        followed = Counter((first, second) for order in orders for first, second in pairwise(order))
        assert all(followed[second, first] == times for (first, second), times in followed.items()), "not always behind the same one"


def test_summary_by_hand() -> None:
    entries = [
        {"placement": "fae", "rate": 10.0, "rate_spread": [9.0, 11.0], "auc": 0.7, "gpu": None, "steps": 5},
        {"placement": "fae", "rate": 30.0, "rate_spread": [29.0, 31.0], "auc": 0.7, "gpu": 3, "steps": 5},
        {"placement": "fae", "rate": 11.0, "rate_spread": [10.0, 12.0], "auc": 0.7, "gpu": 4, "steps": 5},
    ]
    assert summary(entries, ["rate", "auc", "gpu", "missing"]) == {
        "placement": "fae", "rate": 11.0, "rate_spread": [10.0, 30.0], "auc": 0.7, "gpu": None, "steps": 5, "repeats": 3,
    }  # fmt: skip
    once = summary(entries[:1], ["rate"])
    assert (once["rate"], once["rate_spread"], once["repeats"]) == (10.0, [9.0, 11.0], 1), "of one run, the range over its parts"
