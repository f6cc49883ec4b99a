"""Events of users in the order of time, read from text once and held in arrays, or memory-mapped from a folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.core.fingerprint import fingerprint
from fae_torchrec.data.delimited import DelimitedParser
from fae_torchrec.data.text_lines import TextBlock, TextLines

BEHAVIOURS = ("pv", "buy", "cart", "fav")
"""What the fourth column of Taobao's UserBehavior.csv may say: page view, purchase, added to the cart, favoured."""

_COLUMNS = {"user": pa.int32(), "item": pa.int32(), "category": pa.int32(), "behaviour": pa.binary(), "time": pa.int64()}
_NUMBERS = ("user", "item", "category", "time")
_ARRAYS = ("items", "categories", "gaps", "users", "offsets", "first_of_item")
_DESCRIPTION = "log.json"


@dataclass(frozen=True, eq=False)
class EventLog:
    """E events of U users: user u's are those at offsets[u]..offsets[u + 1] - 1, in the order of time (ties: of the file).

    Attributes:
        items: int32 [E].
        categories: int32 [E].
        gaps: seconds since the user's event before, float32 [E]; 0 for the first.
        users: int32 [U], ascending.
        offsets: int64 [U + 1].
        first_of_item: int64 [distinct items], one event of each item: the first.
        skipped: file -> malformed lines skipped.
    """

    items: np.ndarray
    categories: np.ndarray
    gaps: np.ndarray
    users: np.ndarray
    offsets: np.ndarray
    first_of_item: np.ndarray
    skipped: dict[str, int] = field(default_factory=dict)


def read_event_log(lines: TextLines, behaviours: Sequence[str] = BEHAVIOURS) -> EventLog:
    """Reads lines of user, item, category, behaviour, time (Taobao's UserBehavior.csv, without a header) into a log.

    Memory, measured: at most about 40 bytes per event that is kept, while reading and sorting, and 12 afterwards; for the 100 million
    events of the public file 4 and 1.2 GB.

    Args:
        lines: the text; malformed lines go to its `bad_lines`.
        behaviours: which events to keep.

    Raises:
        ConfigError: an unknown behaviour.
        DataError: more lines are malformed than allowed (a missing or non-integer value, an unknown behaviour), or no event is kept.
    """
    unknown = sorted(set(behaviours) - set(BEHAVIOURS))
    if unknown or not behaviours:
        raise ConfigError(f"behaviours {list(behaviours)}: name at least one of {list(BEHAVIOURS)}, and no others")
    parser = DelimitedParser(_COLUMNS, delimiter=",", quoting=False, bad_lines=lines.bad_lines)
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in _NUMBERS}
    for shard in tqdm(range(lines.num_shards), desc="read events", unit="shard", delay=2, disable=None, leave=False):
        for block in lines.blocks(shard):
            table = _checked(parser.parse(block), block, lines)
            table = table.filter(_is_in(table, behaviours))
            for name in _NUMBERS:
                pieces[name].append(table.column(name).to_numpy().copy())  # a view would hold on to all of the table
    columns = {name: np.concatenate(pieces.pop(name)) for name in _NUMBERS}  # a column's pieces are freed before the next is joined
    if not columns["user"].size:
        raise DataError(f"{lines.name}: no event of behaviour {list(behaviours)}; correct the paths or the behaviours")
    return _in_order(columns, lines.bad_lines.skipped)


def open_event_log(lines: TextLines, behaviours: Sequence[str], folder: str | os.PathLike[str]) -> EventLog:
    """As `read_event_log`, but reads the text only the first time: the log is kept in `folder` and memory-mapped, so that workers share it.

    Args:
        lines: the text.
        behaviours: which events to keep.
        folder: a local folder; made if it does not exist. Each log has a folder of its own in it, named after files and behaviours.

    Raises:
        ConfigError: the folder cannot be written.
        DataError: as `read_event_log`, or the kept log is damaged.
    """
    kept = Path(folder) / f"events-{fingerprint('event log', lines.name, sorted(behaviours), lines.bad_lines.max_bad_lines)}"
    if not kept.is_dir():
        _keep(read_event_log(lines, behaviours), kept)
    try:
        arrays = {name: np.asarray(np.load(kept / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in _ARRAYS}
        return EventLog(**arrays, skipped=json.loads((kept / _DESCRIPTION).read_text()))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{kept} is damaged ({error}); remove this folder, and it will be made again") from error


def _keep(log: EventLog, folder: Path) -> None:
    """Writes a log under a temporary name first: a folder of the right name is whole."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".events-", dir=folder.parent))
        try:
            for name in _ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(log, name))
            (temporary / _DESCRIPTION).write_text(json.dumps(log.skipped))
            if not folder.is_dir():  # else another process was faster
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if not folder.is_dir():
            raise ConfigError(f"cannot keep the events in {folder} ({error}); give a folder that is writable and has room") from error


def _checked(table: Any, block: TextBlock, lines: TextLines) -> Any:
    """The rows without a missing value and with a known behaviour; reports the others."""
    reasons = np.zeros(table.num_rows, dtype=object)
    behaviour = table.column("behaviour")
    known = _is_in(table, BEHAVIOURS).to_numpy()
    for row in np.flatnonzero(~known).tolist():
        reasons[row] = f"behaviour {(behaviour[row].as_py() or b'').decode('utf-8', 'backslashreplace')!r} is not one of {list(BEHAVIOURS)}"
    for name in _NUMBERS:
        if table.column(name).null_count:
            reasons[table.column(name).is_null().to_numpy()] = f"column {name!r} is missing"
    bad = np.flatnonzero(reasons)
    return table.filter(pa.array(lines.bad_lines.report(block, bad, reasons[bad].tolist()))) if bad.size else table


def _is_in(table: Any, behaviours: Sequence[str]) -> Any:
    return pc.is_in(table.column("behaviour"), value_set=pa.array([name.encode() for name in behaviours], pa.binary()))


def _in_order(columns: dict[str, np.ndarray], skipped: dict[str, int]) -> EventLog:
    user, time = columns["user"], columns["time"]
    if not ((user[1:] > user[:-1]) | ((user[1:] == user[:-1]) & (time[1:] >= time[:-1]))).all():
        order = np.lexsort((time, user))  # stable
        del user, time
        for name in _NUMBERS:
            columns[name] = columns[name][order]
        del order
    user = columns.pop("user")
    starts = np.concatenate([[0], np.flatnonzero(user[1:] != user[:-1]) + 1])
    users = user[starts]
    gaps = np.zeros(len(user), dtype=np.float32)
    gaps[1:] = np.diff(columns.pop("time"))
    gaps[starts] = 0
    offsets = np.concatenate([starts, [len(user)]]).astype(np.int64)
    first_of_item = np.unique(columns["item"], return_index=True)[1]
    return EventLog(columns["item"], columns["category"], gaps, users, offsets, first_of_item, skipped)
