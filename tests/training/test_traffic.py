"""Every counted collective's bytes by hand, on two ranks, DDP and backward included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_reduce as functional_all_reduce
from torch.nn.parallel import DistributedDataParallel

from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.process_group import all_gather_single
from fae_torchrec.training.traffic import CollectiveCounter

# name of the case -> (name of the collective, bytes that leave rank 0, bytes that leave rank 1)
EXPECTED = {
    "all_reduce": ("allreduce", 40, 40),  # 10 fp32; in a ring of 2: 2 * 1/2 of 40
    "all_reduce int8": ("allreduce", 7, 7),
    "all_gather_single": ("allgather_base", 48, 48),  # 6 int64 to one other rank
    "all_gather": ("allgather", 12, 12),  # 3 fp32
    "reduce_scatter": ("reduce_scatter_base", 16, 16),  # half of 8 fp32
    "broadcast": ("broadcast", 40, 40),  # 10 fp64 cross once; half of that is booked on each rank
    "all_to_all even": ("alltoall_base", 24, 24),  # 4 rows of 12 bytes, two of them to the other rank
    "all_to_all uneven": ("alltoall_base", 36, 12),  # of 4 rows rank 0 keeps 1 and rank 1 keeps 3
    "all_to_all nothing": ("alltoall_base", 0, 0),
    "send": ("send", 20, 0),  # 5 int32 from rank 0
    "barrier": ("barrier", 0, 0),
    # Linear(3, 1): 4 fp32 of gradients; the bias and the weight share a bucket.
    "ddp": ("allreduce", 16, 16),
    "own backward": ("allreduce", 24, 24),  # 6 fp32 of gradient, reduced inside an autograd function
}


class _ReduceInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


def _uneven(rank: int) -> None:
    sent, received = ([1, 3], [1, 1]) if rank == 0 else ([1, 3], [3, 3])
    dist.all_to_all_single(torch.empty(sum(received), 3), torch.ones(4, 3), received, sent)


def _exchange(rank: int) -> None:
    if rank == 0:
        dist.send(torch.zeros(5, dtype=torch.int32), 1)
    else:
        dist.recv(torch.zeros(5, dtype=torch.int32), 0)


def _count(rank: int) -> dict[str, Any]:
    ddp = DistributedDataParallel(nn.Linear(3, 1))
    leaf = torch.ones(6, requires_grad=True)
    out = torch.ones(10)
    cases: dict[str, Any] = {
        "all_reduce": lambda: dist.all_reduce(out),
        "all_reduce int8": lambda: dist.all_reduce(torch.zeros(7, dtype=torch.int8)),
        "all_gather_single": lambda: all_gather_single(torch.empty(12, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)),
        "all_gather": lambda: dist.all_gather([torch.empty(3), torch.empty(3)], torch.zeros(3)),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(4), torch.zeros(8)),
        "broadcast": lambda: dist.broadcast(torch.zeros(10, dtype=torch.float64), src=1),
        "all_to_all even": lambda: dist.all_to_all_single(torch.empty(4, 3), torch.zeros(4, 3)),
        "all_to_all uneven": lambda: _uneven(rank),
        "all_to_all nothing": lambda: dist.all_to_all_single(torch.empty(0, 3), torch.zeros(0, 3), [0, 0], [0, 0]),
        "send": lambda: _exchange(rank),
        "barrier": dist.barrier,
        "ddp": lambda: ddp(torch.ones(2, 3)).sum().backward(),
        "own backward": lambda: _ReduceInBackward.apply(leaf).sum().backward(),
    }
    counted = {}
    for name, case in cases.items():
        with CollectiveCounter(rank, 2) as counter:
            case()
        case_calls = {name: calls for name, calls in counter.calls.items() if name not in ("recv",)}
        counted[name] = (case_calls, dict(counter.sent_bytes), counter.total_bytes)
    with CollectiveCounter(rank, 2) as counter:
        for _ in range(3):  # DDP rebuilds its buckets after the first step
            ddp(torch.ones(2, 3)).sum().backward()
    dist.all_reduce(torch.zeros(100))  # outside: not counted
    result, uncounted = out.tolist(), []
    parts = [torch.empty(1)] * 2 if rank == 0 else None
    for unknown in (lambda: dist.scatter(torch.empty(1), parts), lambda: functional_all_reduce(out, "sum", [0, 1])):
        with CollectiveCounter(rank, 2) as unknowing:
            dist.all_reduce(out)
            unknown()
        uncounted.append((dict(unknowing.uncounted), unknowing.total_bytes))
    return {"counted": counted, "ddp allreduce": counter.sent_bytes["allreduce"], "result": result, "uncounted": uncounted}


def test_bytes_by_hand() -> None:
    results = run_on_local_ranks(_count, 2, timeout_s=120)
    for rank, result in enumerate(results):
        for case, (name, *sent) in EXPECTED.items():
            calls, sent_bytes, total = result["counted"][case]
            if (case, rank) != ("send", 1):
                assert calls == {name: 1}, (case, rank)
                assert sent_bytes == {name: sent[rank]}, (case, rank)
            assert total == sent[rank], (case, rank)
        assert result["ddp allreduce"] == 3 * 16
        assert result["result"] == [2.0] * 10, "counting changes nothing"
        (scatter, total), (functional, functional_total) = result["uncounted"]
        assert scatter == {"scatter": 1} and any("all_reduce" in name for name in functional)
        assert math.isnan(total) and math.isnan(functional_total), "an unknown part makes the whole unknown"


@pytest.mark.parametrize(("name", "args"), [("allreduce", ([torch.zeros(9)],)), ("alltoall_base", (None, torch.zeros(4), None, [], []))])
def test_one_rank_sends_nothing(name: str, args: tuple[Any, ...]) -> None:
    assert CollectiveCounter(0, 1)._sent(name, args) == 0


def test_all_to_all_of_a_list() -> None:
    """Gloo has no all_to_all of tensor lists, so its rule is asked directly: rank 1 keeps the second of three tensors."""
    parts = [torch.zeros(2), torch.zeros(5), torch.zeros(3, dtype=torch.float64)]
    assert CollectiveCounter(1, 3)._sent("alltoall", ([], parts)) == 2 * 4 + 3 * 8
