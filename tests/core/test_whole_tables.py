"""Tables made all hot with what a selection leaves, by hand."""

from __future__ import annotations

import pytest

from fae_torchrec.core import whole_tables
from fae_torchrec.core.hot_set import HotSet, select_hot_set
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.whole_tables import with_whole_tables
from tests.core.small_profiles import profile_of_inputs, small_tables

# Rows of 4 bytes. Seen: 2 of 4 rows of a, 2 of 6 of b; cold accesses of what was not counted go to b.
TABLES = small_tables([4, 6], dims=(1, 1))
PROFILE = profile_of_inputs(TABLES, [[[0], [0]], [[1], [1]]], [[[0], [0]], [[0], [5]]])


def _hot(budget: int, profile: PopularityProfile = PROFILE) -> HotSet:
    return select_hot_set(profile, budget, pinned_max_rows=0)


@pytest.mark.parametrize(
    ("budget", "hot"),
    [
        (16, (2, 2)),  # what was seen, and nothing left
        (23, (2, 2)),  # 7 bytes: the 2 rows that a lacks need 8
        (24, (4, 2)),
        (31, (4, 2)),
        (32, (2, 6)),  # both would fit alone; b has the cold accesses
        (40, (4, 6)),
    ],
)
def test_what_fits(budget: int, hot: tuple[int, int]) -> None:
    completed = with_whole_tables(_hot(budget), PROFILE)
    assert tuple(len(completed.hot_ids[name]) for name in ("a", "b")) == hot
    assert completed.used_bytes == 4 * sum(hot) <= completed.budget_bytes == budget
    if hot[1] == 6:
        assert (completed.hot_inputs, completed.coverage) == (1.0, 1.0)
    else:
        assert completed.hot_inputs == 0.5


def test_bytes_beside_and_what_does_not_pay() -> None:
    assert {name: len(ids) for name, ids in with_whole_tables(_hot(32), PROFILE, lambda _: 1).hot_ids.items()} == {"a": 4, "b": 2}
    kept = _hot(40)
    assert with_whole_tables(kept, PROFILE, pays=lambda access: False) is kept
    only_a = with_whole_tables(kept, PROFILE, pays=lambda access: access.table.name == "a")
    assert {name: len(ids) for name, ids in only_a.hot_ids.items()} == {"a": 4, "b": 2}


def test_a_placement_names_no_more_rows_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_tables, "MOST_ROWS", 5)
    assert {name: len(ids) for name, ids in with_whole_tables(_hot(40), PROFILE).hot_ids.items()} == {"a": 4, "b": 2}
