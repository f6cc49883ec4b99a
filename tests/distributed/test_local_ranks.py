"""run_on_local_ranks, from_first_rank and merged_on_first_rank: results in order, a rank's own error, nobody left behind."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fae_torchrec.core.errors import DataError
from fae_torchrec.distributed.local_ranks import (
    _own_error,
    from_first_rank,
    launched_group,
    merged_on_first_rank,
    run_on_local_ranks,
    world_size_of_environment,
)
from tests.distributed.death_signal import death_signal


class MadeUpError(Exception):
    """Raised by a rank of these tests."""


def _raises() -> None:
    raise DataError("of rank 0 alone")


def _told(call: Callable[[], Any]) -> str:
    """The DataError of a call."""
    try:
        return f"none, but {call()}"
    except DataError as raised:
        return str(raised)


def _merged(group: dist.ProcessGroup, *failing: int, merge: bool = True) -> Any:
    """What each rank counted and who merged it; `failing` ranks raise, and so does the merge if it must not be."""

    def part() -> list[int]:
        if dist.get_rank() in failing:
            raise DataError(f"of rank {dist.get_rank()}'s part")
        return [10 * dist.get_rank() + number for number in range(2)]

    def joined(parts: list[list[int]]) -> tuple[int, list[list[int]]]:
        if not merge:
            raise DataError("of the merge")
        return dist.get_rank(), parts

    return merged_on_first_rank(part, joined, group)


def _see(rank: int, word: str, folder: str) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    last = dist.new_group([1])  # a group whose first rank is not the world's
    return {
        "rank": (rank, dist.get_rank(), dist.get_world_size(), os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"]),
        "word": word,
        "signal when the parent ends": death_signal(),
        "from first rank": from_first_rank(lambda: ("made on", dist.get_rank()), group),
        "from the group's first rank": from_first_rank(dist.get_rank, last) if rank == 1 else None,
        "error": _told(lambda: from_first_rank(_raises, group)),
        "merged": _merged(group),
        "merged in the group": _merged(last) if rank == 1 else None,
        "errors of a part": [_told(lambda failing=failing: _merged(group, *failing)) for failing in ([1], [0], [0, 1])],
        "error of the merge": _told(lambda: _merged(group, merge=False)),
        "merged after errors": _merged(group),
        "tensor": torch.full((2,), float(rank)),
        "backend": dist.get_backend(),
        "world size of environment": world_size_of_environment(),
    }


def test_results_in_rank_order(tmp_path: Path) -> None:
    results = run_on_local_ranks(_see, 2, "word", str(tmp_path), timeout_s=60)
    for rank, seen in enumerate(results):
        assert seen["rank"] == (rank, rank, 2, str(rank), "2")
        assert seen["word"] == "word"
        assert seen["signal when the parent ends"] == signal.SIGKILL, "nobody is left behind"
        assert seen["from first rank"] == ("made on", 0)
        assert seen["error"] == "of rank 0 alone", "on every rank"
        assert seen["merged"] == seen["merged after errors"] == (0, [[0, 1], [10, 11]]), "merged on rank 0, in the order of the ranks"
        assert seen["errors of a part"] == ["of rank 1's part", "of rank 0's part", "of rank 0's part"]
        assert seen["error of the merge"] == "of the merge"
        assert seen["tensor"].tolist() == [rank, rank]
        assert seen["backend"] == "gloo"
        assert seen["world size of environment"] == 2
    assert results[1]["from the group's first rank"] == 1
    assert results[1]["merged in the group"] == (1, [[10, 11]])


def _fails_on_rank_1(rank: int, folder: str) -> None:
    Path(folder, str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        raise MadeUpError("what rank 1 says")
    dist.barrier()  # waits for rank 1 for ever


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_failing_ranks_own_error_is_raised(tmp_path: Path) -> None:
    with pytest.raises(MadeUpError, match=r"^what rank 1 says$") as error:
        run_on_local_ranks(_fails_on_rank_1, 2, str(tmp_path), timeout_s=60)
    assert "_fails_on_rank_1" in str(error.value.__cause__), "that rank's traceback"
    assert all(_gone(int((tmp_path / str(rank)).read_text())) for rank in range(2))


def _sleeps(rank: int, folder: str) -> None:
    Path(folder, "pid").write_text(str(os.getpid()))
    time.sleep(600)


def test_ranks_that_take_too_long_are_killed(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"_sleeps did not end within 15 s on 1 ranks; the ranks were killed"):
        run_on_local_ranks(_sleeps, 1, str(tmp_path), timeout_s=15)  # a rank takes seconds to start
    assert _gone(int((tmp_path / "pid").read_text()))


def test_the_first_error_that_can_be_read_counts(tmp_path: Path) -> None:
    failure = RuntimeError("the process ended")
    assert _own_error(str(tmp_path), failure) is failure
    (tmp_path / "error0").write_bytes(b"cut off")
    assert _own_error(str(tmp_path), failure) is failure
    for rank, age in ((2, 10), (1, 20)):
        path = tmp_path / f"error{rank}"
        path.write_bytes(pickle.dumps(ValueError(f"of rank {rank}")))
        os.utime(path, (1000 - age, 1000 - age))
    assert str(_own_error(str(tmp_path), failure)) == "of rank 1", "the older"


def test_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world_size_of_environment() == 1
    with launched_group("cpu") as group:
        assert group is None
    assert not dist.is_initialized()
