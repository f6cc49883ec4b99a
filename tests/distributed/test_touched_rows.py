"""What the ranks tell each other of a step: rows touched, counts, and errors that are the same on every rank."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fae_torchrec.core.errors import HotBatchError
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.touched_rows import TouchedRows, check_kind, check_promise, exchange_touched_rows
from fae_torchrec.training.traffic import CollectiveCounter

RANKS = 3
LAST = 2**31 - 1

# Slots of ranks 0, 1 and 2, each [groups]; what every rank must have of all, and their union.
CASES: dict[str, tuple[list[list[list[int]]], list[list[int]], list[list[int]]]] = {
    "two groups": (
        [[[1, 4, 9], [0]], [[4], [2, 3, LAST]], [[0, 1], []]],
        [[1, 4, 9, 4, 0, 1], [0, 2, 3, LAST]],
        [[0, 1, 4, 9], [0, 2, 3, LAST]],
    ),
    "rank 1 touches nothing": ([[[5], [5]], [[], []], [[2, 5], [7]]], [[5, 2, 5], [5, 7]], [[2, 5], [5, 7]]),
    "a group that nobody touches": ([[[], [1]], [[], [2]], [[], [1]]], [[], [1, 2, 1]], [[], [1, 2]]),
    "one group": ([[[3]], [[3]], [[3]]], [[3, 3, 3]], [[3]]),
    "nothing at all": ([[[], []]] * 3, [[], []], [[], []]),
}

# Misses and kinds of the ranks, and a part of the message that every rank must raise, None for none.
STEPS: dict[str, tuple[list[int], list[bool], str | None]] = {
    "cold step": ([0, 0, 0], [False] * 3, None),
    "hot step": ([0, 0, 0], [True] * 3, None),
    "broken promise": ([0, 0, 5], [True] * 3, r"ids per rank: {2: 5}"),
    "kinds differ": ([0, 0, 0], [False, True, True], r"ranks [1, 2] are promised to be hot"),
    "kinds differ and a broken promise": ([3, 0, 0], [True, False, False], r"ranks [0] are promised to be hot"),
}


def _slots(groups: list[list[int]]) -> list[torch.Tensor]:
    return [torch.tensor(slots, dtype=torch.int64) for slots in groups]


def _see(rank: int) -> dict[str, Any]:
    group, clean = dist.group.WORLD, torch.zeros(1, dtype=torch.int64)
    assert group is not None
    seen: dict[str, Any] = {}
    for name, (slots, _, _) in CASES.items():
        with CollectiveCounter(rank, RANKS) as counter:
            touched = exchange_touched_rows(_slots(slots[rank]), clean, promised_hot=False, group=group).wait().wait()
        assert all(torch.equal(a, b) for a, b in zip(touched.own, _slots(slots[rank]), strict=True))
        seen[name] = touched, counter.calls.total(), counter.total_bytes
    first = exchange_touched_rows(_slots([[rank, 7]]), clean, promised_hot=True, group=group, may_reduce=False)
    seen["without union"] = first.wait().wait()
    for name, (misses, kinds, _) in STEPS.items():
        for tier in ("replicated", "sharded"):
            step: dict[str, Any] = {"promised_hot": kinds[rank], "group": group}
            count = torch.tensor([misses[rank]])
            with CollectiveCounter(rank, RANKS) as counter:
                try:
                    (check_kind(count, **step) if tier == "sharded" else exchange_touched_rows(_slots([[rank]]), count, **step)).wait()
                    error = None
                except HotBatchError as raised:
                    error = str(raised)
            dist.barrier()  # the rank still talks with the others, and nothing is under way
            seen[f"{name}, {tier}"] = error, counter.calls.total()
    return seen


@cache
def _seen() -> list[dict[str, Any]]:
    return run_on_local_ranks(_see, RANKS, timeout_s=120)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_knows_all_rows(name: str) -> None:
    slots, of_all, union = CASES[name]
    counts = [[len(group) for group in groups] for groups in slots]
    longest = max(sum(numbers) for numbers in counts)
    for seen in _seen():
        touched, calls, sent = seen[name]
        assert touched.counts == counts
        assert [group.tolist() for group in touched.of_all] == of_all
        assert [group.tolist() for group in touched.union] == union
        assert {group.dtype for group in touched.of_all + touched.union} == {torch.int64}
        assert calls == (2 if longest else 1), "nothing more travels once all know that no row is touched"
        assert sent == (RANKS - 1) * (8 * (len(counts[0]) + 2) + 4 * longest), "a small int64 tensor, then slots of 4 bytes"


def test_the_union_is_found_on_request_only() -> None:
    for seen in _seen():
        assert seen["without union"].union == []
        assert [group.tolist() for group in seen["without union"].of_all] == [[0, 7, 1, 7, 2, 7]]


@pytest.mark.parametrize("tier", ["replicated", "sharded"])
@pytest.mark.parametrize("name", STEPS)
def test_the_step_is_checked_on_every_rank_alike(name: str, tier: str) -> None:
    message = STEPS[name][2]
    seen = [ranks[f"{name}, {tier}"] for ranks in _seen()]
    errors = {error for error, _ in seen}
    assert len(errors) == 1
    error = errors.pop()
    assert error is None if message is None else message in error
    # Counts alone where something is wrong, and the slots after them where all is well.
    assert {calls for _, calls in seen} == {2 if tier == "replicated" and message is None else 1}


def test_alone() -> None:
    misses = torch.tensor([2])
    with pytest.raises(HotBatchError, match=r"ids per rank: \{0: 2\}"):
        check_kind(misses, promised_hot=True, group=None).wait()
    check_kind(misses, promised_hot=False, group=None).wait()
    check_kind(torch.tensor([0]), promised_hot=True, group=None).wait()


def test_check_promise() -> None:
    check_promise([0, 0], [True, True])
    check_promise([0, 0], [False, False])
    with pytest.raises(HotBatchError, match=r"ranks \[1\]"):
        check_promise([0, 0], [False, True])


def test_all_tensors_are_kept_for_the_stream() -> None:
    kept: list[tuple[str, Any]] = []

    class Slots:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_stream(self, stream: Any) -> None:
            kept.append((self.name, stream))

    own, of_all, union = ([Slots(f"{field}{group}") for group in range(2)] for field in ("own", "of_all", "union"))
    TouchedRows(own, of_all, [[1, 1]], union).record_stream("stream")  # type: ignore[arg-type]
    assert {name for name, stream in kept if stream == "stream"} == {"own0", "own1", "of_all0", "of_all1", "union0", "union1"}
