"""The log of events by hand: order, gaps, and what is kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.data.event_log import EventLog, open_event_log, read_event_log
from fae_torchrec.data.text_lines import TextLines

TEXT = "7,10,1,pv,100\n3,20,2,buy,50\n7,30,3,cart,40\n7,10,1,fav,100\n3,20,2,pv,45\n"


def arrays(log: EventLog) -> list[list[float]]:
    return [getattr(log, name).tolist() for name in ("users", "offsets", "items", "categories", "gaps", "first_of_item")]


BY_HAND = [[3, 7], [0, 2, 5], [20, 20, 30, 10, 10], [2, 2, 3, 1, 1], [0, 5, 0, 60, 0], [3, 0, 2]]


def test_events_are_in_the_order_of_user_and_time(tmp_path: Path) -> None:
    path = tmp_path / "u.csv"
    path.write_text(TEXT)
    log = read_event_log(TextLines([path]))
    assert arrays(log) == BY_HAND and log.skipped == {}
    assert [log.items.dtype, log.categories.dtype, log.gaps.dtype, log.users.dtype] == [np.int32, np.int32, np.float32, np.int32]
    in_order = sorted(TEXT.splitlines(), key=lambda line: (int(line.split(",")[0]), int(line.split(",")[4])))
    path.write_text("\n".join(in_order))
    assert arrays(read_event_log(TextLines([path], shard_bytes=20))) == BY_HAND
    assert arrays(read_event_log(TextLines([path]), ["pv"])) == [[3, 7], [0, 1, 2], [20, 10], [2, 1], [0, 0], [1, 0]]


def test_a_kept_log_belongs_to_files_and_settings(tmp_path: Path) -> None:
    path, folder = tmp_path / "u.csv", tmp_path / "index"
    path.write_text(TEXT)
    assert arrays(open_event_log(TextLines([path]), ["pv", "buy", "cart", "fav"], folder)) == BY_HAND
    assert arrays(open_event_log(TextLines([path]), ["fav", "cart", "buy", "pv"], folder)) == BY_HAND
    assert len(list(folder.iterdir())) == 1, "the order of the behaviours says nothing, and nothing temporary is left"
    open_event_log(TextLines([path]), ["pv"], folder)
    open_event_log(TextLines([path], max_bad_lines=1), ["pv"], folder)
    assert len(list(folder.iterdir())) == 3
    with pytest.raises(ConfigError, match="cannot keep the events"):
        open_event_log(TextLines([path]), ["pv"], path / "folder in a file")
