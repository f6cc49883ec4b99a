"""The exchange of compact gradients against a dense sum, both ways, with and without quantized communication."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import NoOpQuantizedCommCodec

from fae_torchrec.distributed.compact_gradients import exchange_compact_gradients, reduces
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.touched_rows import exchange_touched_rows
from fae_torchrec.training.traffic import CollectiveCounter

SLOTS = 40
WORLDS = [2, 3]
Slots = list[list[list[int]]]  # [ranks][groups]; two ranks take the first two

CASES: dict[str, tuple[list[int], list[torch.dtype], Slots]] = {
    # name: (dims, dtypes, slots)
    "all alike": ([4], [torch.float32], [[[1, 5, 6, 30]]] * 3),
    "apart": ([4], [torch.float32], [[[1, 2]], [[3, 4, 39]], [[0]]]),
    "several groups": ([4, 8, 3], [torch.float32] * 3, [[[1, 5], [7, 8, 9], [0]], [[5, 6], [], [0, 1, 2]], [[], [8, 9], []]]),
    "several groups alike": ([4, 8], [torch.float32] * 2, [[[1, 5], [7, 8, 9]], [[1, 5], [7, 9]], [[1], [7, 8, 9]]]),
    "one rank touches nothing": ([5], [torch.float32], [[[3, 4]], [[]], [[4]]]),
    "one rank touches something": ([5, 2], [torch.float32] * 2, [[[], []], [[2, 3], [9]], [[], []]]),
    "no rank touches anything": ([5, 2], [torch.float32] * 2, [[[], []]] * 3),
    "half precision": ([4], [torch.float16], [[[1, 5]], [[5, 6]], [[5]]]),
    "several dtypes": ([4, 2], [torch.float16, torch.float32], [[[1, 5], [3]], [[1, 5], [3]], [[5], []]]),
}
# Gathered by three ranks too, the others are summed over the union; two always gather.
GATHERED = {"apart", "half precision"}

QUANTIZED = ([4, 7], [torch.float32] * 2, [[[1, 5, 6], [0, 2, 11]], [[5], []], [[6, 7, 8, 9], [11, 12, 13, 14, 15, 16]]])


class _RowsOf16(QuantizedCommCodec):  # type: ignore[misc]
    """Quantizes rows of 16, like FBGEMM's row-wise FP8, which has no kernel for the CPU."""

    def create_context(self) -> QuantizationContext:
        return QuantizationContext(row_dim=16)


def _fbgemm(precision: CommType, loss_scale: float | None = None) -> Any:
    return get_qcomm_codecs(QCommsConfig(backward_precision=precision, backward_loss_scale=loss_scale)).backward


# name: (codec, values in a quantized row, its bytes, its largest error on values within 0.5)
CODECS: dict[str, tuple[Any, int, int, float]] = {
    "fp16": (_fbgemm(CommType.FP16), 32, 64, 2**-12),
    "fp16, scaled loss": (_fbgemm(CommType.FP16, 4.0), 32, 64, 2**-12),
    "bf16": (_fbgemm(CommType.BF16), 32, 64, 2**-9),
    "int8": (_fbgemm(CommType.INT8), 32, 32 + 8, 0.51 / 255),
    "rows of 16": (_RowsOf16(SparseType.INT8), 16, 16 + 8, 0.51 / 255),
    "fp8": (_fbgemm(CommType.FP8), 1, 1, 2**-5),
}


def _gradients(case: Any, rank: int, *, integers: bool = True) -> list[torch.Tensor]:
    """Integers, whose sums are exact in any order; or values within 0.5."""
    dims, dtypes, slots = case
    numbers = torch.Generator().manual_seed(rank)
    shapes = [(len(slots[rank][group]), dim) for group, dim in enumerate(dims)]
    if integers:
        return [torch.randint(-9, 10, shape, generator=numbers).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return [torch.rand(shape, generator=numbers) - 0.5 for shape in shapes]


def _dense(slots: Any, gradients: torch.Tensor) -> torch.Tensor:
    """The other way to sum: a gradient for every row there is."""
    rows = torch.zeros(SLOTS, gradients.shape[1], dtype=torch.float64)
    for slot, gradient in zip(slots.tolist() if isinstance(slots, torch.Tensor) else slots, gradients, strict=True):
        rows[slot] += gradient.to(torch.float64)
    return rows


def _expected(case: Any, world: int, *, integers: bool = True) -> list[torch.Tensor]:
    dims, _, slots = case
    of_ranks = [_gradients(case, rank, integers=integers) for rank in range(world)]
    return [sum(_dense(slots[rank][group], of_ranks[rank][group]) for rank in range(world)) for group in range(len(dims))]


def _see(rank: int) -> dict[str, Any]:
    group, clean = dist.group.WORLD, torch.zeros(1, dtype=torch.int64)
    assert group is not None
    seen: dict[str, Any] = {}

    def exchange(name: str, case: Any, codec: Any = None, *, may_reduce: bool = True, integers: bool = True) -> None:
        slots = [torch.tensor(slots, dtype=torch.int64) for slots in case[2][: group.size()][rank]]
        touched = exchange_touched_rows(slots, clean, promised_hot=False, group=group).wait().wait()
        if not may_reduce:
            touched = replace(touched, union=[])
        with CollectiveCounter(rank, group.size()) as counter:
            result = exchange_compact_gradients(_gradients(case, rank, integers=integers), touched, group, codec)
        seen[name] = result, dict(counter.calls), counter.total_bytes

    for name, case in CASES.items():
        exchange(name, case)
        exchange(f"{name}, gathered", case, may_reduce=False)
    for name, (codec, _, _, _) in CODECS.items():
        exchange(name, QUANTIZED, codec, integers=False)
    exchange("fp16, all alike", CASES["all alike"], _fbgemm(CommType.FP16))
    exchange("fp16, nothing", CASES["no rank touches anything"], _fbgemm(CommType.FP16))
    exchange("fp16, half precision", CASES["half precision"], _fbgemm(CommType.FP16))
    exchange("fp32", CASES["all alike"], _fbgemm(CommType.FP32))
    exchange("default codec", CASES["all alike"], NoOpQuantizedCommCodec())
    return seen


@cache
def _seen(world: int) -> list[dict[str, Any]]:
    return run_on_local_ranks(_see, world, timeout_s=120)


def _same_on_every_rank(world: int, name: str) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], dict[str, int], float]:
    """What rank 0 saw, after the others were found to have the same bits."""
    result, calls, sent = _seen(world)[0][name]
    for others, their_calls, their_bytes in (seen[name] for seen in _seen(world)[1:]):
        assert (their_calls, their_bytes) == (calls, sent)
        for (slots, gradients), (their_slots, theirs) in zip(result, others, strict=True):
            assert torch.equal(slots, their_slots)
            assert gradients.dtype == theirs.dtype
            assert torch.equal(gradients.view(torch.uint8), theirs.view(torch.uint8))
    return result, calls, sent


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_the_sum_over_slots_is_the_sum_over_ranks(name: str, world: int) -> None:
    dims, dtypes, slots = CASES[name]
    for way in (name, f"{name}, gathered"):
        result, calls, sent = _same_on_every_rank(world, way)
        for (of_all, gradients), rows, dtype, dim in zip(result, _expected(CASES[name], world), dtypes, dims, strict=True):
            assert torch.equal(_dense(of_all, gradients), rows)
            assert (gradients.dtype, gradients.shape, of_all.dtype) == (dtype, (of_all.numel(), dim), torch.int64)
        size = max(dtype.itemsize for dtype in dtypes)
        if name == "no rank touches anything":
            assert calls == {}
        elif way == name and world == 3 and name not in GATHERED:
            union = [set().union(*(slots[rank][group] for rank in range(world))) for group in range(len(dims))]
            assert list(calls) == ["allreduce"]
            assert sent == int(2 * (world - 1) / world * size * sum(len(slots) * dim for slots, dim in zip(union, dims, strict=True)))
            assert all((of_all.diff() > 0).all() for of_all, _ in result)
        else:
            longest = max(sum(len(mine) * dim for mine, dim in zip(slots[rank], dims, strict=True)) for rank in range(world))
            assert list(calls.values()) == [1]
            assert "allreduce" not in calls
            assert sent == (world - 1) * size * longest


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CODECS)
def test_quantized_gradients(name: str, world: int) -> None:
    _, row, bytes_of_row, error = CODECS[name]
    result, calls, sent = _same_on_every_rank(world, name)
    exact = _expected(QUANTIZED, world, integers=False)
    for (slots, gradients), rows in zip(result, exact, strict=True):
        assert gradients.dtype == torch.float32
        torch.testing.assert_close(_dense(slots, gradients), rows, rtol=0, atol=world * error)
        assert not torch.equal(_dense(slots, gradients), rows), "a rank's own part is decoded too: something must be lost"
    dims, _, touched = QUANTIZED
    longest = max(sum(len(mine) * dim for mine, dim in zip(touched[rank], dims, strict=True)) for rank in range(world))
    assert list(calls.values()) == [1]
    assert sent == (world - 1) * -(-longest // row) * bytes_of_row
    assert sent < (world - 1) * longest * 4, "less than unquantized"


@pytest.mark.parametrize("world", WORLDS)
def test_the_loss_scale_is_undone(world: int) -> None:
    """Bit for bit what stock's codec gives: times the scale, half precision, divided by the scale."""
    result, _, _ = _same_on_every_rank(world, "fp16, scaled loss")
    for group, (_, gradients) in enumerate(result):
        of_ranks = torch.cat([_gradients(QUANTIZED, rank, integers=False)[group] for rank in range(world)])
        assert torch.equal(gradients, ((4 * of_ranks).half() / 4).float())


@pytest.mark.parametrize("world", WORLDS)
def test_edges_of_codecs(world: int) -> None:
    """Encoded gradients are never summed on the way; a codec that changes nothing changes nothing."""
    for name, case in (("fp16, all alike", "all alike"), ("fp16, half precision", "half precision")):
        result, calls, _ = _same_on_every_rank(world, name)
        assert "allreduce" not in calls
        assert result[0][1].dtype == CASES[case][1][0]
        assert torch.equal(_dense(*result[0]), _expected(CASES[case], world)[0]), "small integers are exact in half precision"
    result, calls, _ = _same_on_every_rank(world, "fp16, nothing")
    assert calls == {}
    assert [tuple(gradients.shape) for _, gradients in result] == [(0, 5), (0, 2)]
    for name in ("fp32", "default codec"):
        (_, gradients), *_ = _same_on_every_rank(world, name)[0]
        (_, plain), *_ = _same_on_every_rank(world, "all alike")[0]
        assert torch.equal(gradients, plain)
        assert _same_on_every_rank(world, name)[1:] == _same_on_every_rank(world, "all alike")[1:]


def test_the_check_sees_a_rank_that_is_left_out() -> None:
    """Negative control."""
    (slots, gradients), *_ = _same_on_every_rank(3, "all alike, gathered")[0]
    assert torch.equal(_dense(slots, gradients), _expected(CASES["all alike"], 3)[0])
    assert not torch.equal(_dense(slots[:-4], gradients[:-4]), _expected(CASES["all alike"], 3)[0])
    assert not torch.equal(_dense(slots, gradients), _expected(CASES["all alike"], 2)[0])


@pytest.mark.parametrize(
    ("counts", "dims", "union", "reduced"),
    [
        # Values sent from a rank: gather (n-1) x longest, reduce 2(n-1)/n x union.
        ([[10], [10]], [4], [10], False),  # 40 and 40: equal, gathered
        ([[10], [10]], [4], [20], False),  # 40 and 80
        ([[10], [10], [10]], [4], [10], True),  # 80 and 53
        ([[10], [10], [10]], [4], [15], False),  # 80 and 80
        ([[10], [10], [10]], [4], [14], True),  # 80 and 75
        ([[10], [10], [10]], [4], [30], False),  # 80 and 160
        ([[10], [0], [0]], [4], [10], True),  # 80 and 53: the others would send 40 of nothing each
        ([[1, 10], [10, 1], [0, 0]], [1, 8], [10, 10], True),  # 162 and 120
        ([[1, 10], [10, 1], [0, 0]], [4, 4], [10, 10], False),  # 88 and 106.7 by dims of 4
        ([[3], [3], [3], [3], [3], [3], [3], [3]], [1], [11], True),  # 21 and 19.25
        ([[3], [3], [3], [3], [3], [3], [3], [3]], [1], [12], False),  # 21 and 21
    ],
)
def test_the_cheaper_way(counts: list[list[int]], dims: list[int], union: list[int], reduced: bool) -> None:
    assert reduces(counts, dims, union) == reduced
