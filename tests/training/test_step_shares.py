"""Where a step's time goes: made-up traces with sums by hand, and profiled steps of a real model on 1 and 2 ranks."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from fae_torchrec.core.schedule import ShuffleSchedule
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training import step_profile
from fae_torchrec.training.step_profile import profile_steps
from fae_torchrec.training.step_shares import CATEGORIES, PROFILED, STEP, StepTimes, category, step_shares, step_times
from fae_torchrec.training.train_pipeline import FAETrainPipeline
from tests.training.small_run import CPU, Samples, new_loader, new_model, new_placement, sharded

NODE = "autograd::engine::evaluate_function: "


def event(name: str, ts: float, dur: float, tid: int = 1, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "tid": tid, "cat": cat, "args": args}


def ranges(*steps: tuple[float, float], window: tuple[float, float]) -> list[dict[str, Any]]:
    """The ranges that the collector makes: (start, duration) each."""
    made = [event(STEP, *step, cat="user_annotation") for step in steps]
    return [event(PROFILED, *window, cat="user_annotation"), *made]


def found(times: StepTimes) -> dict[str, float]:
    """Microseconds by category, without those of nothing."""
    return {name: round(us, 6) for name, us in times.category_us.items() if us}


HOST = [
    *ranges((0, 100), (110, 90), window=(0, 200)),
    event("## start_sparse_data_dist 7 ##", 0, 10, cat="user_annotation"),
    event("fbgemm::permute_2D_sparse_data", 1, 4),
    event("c10d::alltoall_base_", 6, 3),
    event("## forward 6 ##", 10, 30, cat="user_annotation"),
    event("aten::addmm", 12, 8),
    event("[output_dist]_[model]_[table_wise]", 20, 10, cat="user_annotation"),
    event("aten::cat", 21, 2),
    event("## _BagsAwaitable wait() ##", 30, 8, cat="user_annotation"),
    event("[output_dist_wait]_[model]_[table_wise]", 31, 5, cat="user_annotation"),
    event("## backward 6 ##", 40, 50, cat="user_annotation"),
    event(NODE + "AddmmBackward0", 42, 10),
    event(NODE + "All2All_Pooled_WaitBackward", 52, 8),
    event(NODE + "_ReplicatedBackward", 60, 10),
    event("## fae: exchange of hot rows' gradients ##", 61, 6, cat="user_annotation"),
    event("c10d::allreduce_", 62, 1),
    event("c10d::allreduce_", 72, 3),
    event("## optimizer 6 ##", 90, 9, cat="user_annotation"),
    # Elsewhere: the dense part's all-reduce is under way until 85, of which backward has nothing else to do from 75 on.
    event("gloo:all_reduce", 72, 13, tid=9, cat="user_annotation"),
    event("aten::mm", 0, 200, tid=9),
    event("aten::mm", 300, 50),
    {"ph": "i", "name": "no duration", "ts": 3},
]


def test_host_by_hand() -> None:
    times = step_times(HOST)
    assert times.step_us == (100, 90) and not times.on_device
    assert found(times) == {
        "embedding_exchange": 3 + 10 + 5 + 8 + 6,  # all to all, output dist, its wait, its backward, hot gradients
        "input_dist": 10 - 3,
        "forward": 30 - 10 - 5,  # joining the tiers' sums is forward
        "dense_all_reduce": 3 + 10,  # the call, then 75 to 85
        "backward": 50 - 8 - 6 - 3 - 10,
        "optimizer": 9,
        "other": 200 - 10 - 30 - 50 - 9,  # the second step has no ranges
    }
    assert sum(times.category_us.values()) == 200
    assert times.collectives == {"c10d::alltoall_base_": 1, "c10d::allreduce_": 2}


def test_an_event_that_ends_late_is_cut_off() -> None:
    """Times in a trace are rounded: a child may seem to end after its parent, whose time it must not leave."""
    trace = [*ranges((0, 10), window=(0, 10)), event("## forward 1 ##", 2, 5, cat="user_annotation"), event("Optimizer.step#SGD", 4, 3.001)]
    assert found(step_times(trace)) == {"forward": 2, "optimizer": 3, "other": 5}


def device_trace() -> list[dict[str, Any]]:
    launch = {"cat": "cuda_runtime"}
    kernel = {"tid": 7, "cat": "kernel"}
    return [
        *ranges((0, 20), (20, 20), window=(0, 100)),
        event("## forward 1 ##", 0, 10, cat="user_annotation"),
        event("aten::mm", 1, 3),
        event("cudaLaunchKernel", 2, 1, correlation=1, **launch),
        event("## copy_batch_to_gpu 2 ##", 10, 5, cat="user_annotation"),
        event("cudaMemcpyAsync", 11, 1, correlation=2, **launch),
        event(NODE + "MmBackward0", 20, 10, tid=2),
        event("cudaLaunchKernel", 21, 1, tid=2, correlation=3, **launch),
        event("c10d::allreduce_", 31, 5, tid=2),
        event("cudaLaunchKernelExC", 32, 1, tid=2, correlation=4, **launch),
        event("## fae: cold rows on their way ##", 15, 4, cat="user_annotation"),
        event("cuLaunchKernel", 16, 1, cat="cuda_driver", correlation=5),
        event("gemm", 10, 20, correlation=1, **kernel),
        event("Memcpy HtoD (Pinned -> Device)", 20, 20, tid=8, cat="gpu_memcpy", correlation=2),  # 20..30 beside gemm, 30..40 alone
        event("gemm", 40, 30, correlation=3, **kernel),
        event("ncclDevKernel_AllReduce", 50, 30, correlation=4, **kernel),  # 50..60 beside it, 60..70 with the next too
        event("vectorized_gather", 60, 10, correlation=5, **kernel),
        event("nobody's", 90, 20, correlation=99, **kernel),  # ends after the window
    ]


def test_device_by_hand() -> None:
    times = step_times(device_trace())
    assert times.on_device
    assert found(times) == {
        "forward": 10 + 5,
        "transfer": round(5 + 10 + 10 / 3, 6),
        "backward": round(10 + 5 + 10 / 3, 6),
        "dense_all_reduce": round(5 + 10 / 3 + 10, 6),
        "other": 10,
        "idle": 10 + 10,
    }
    assert sum(times.category_us.values()) == pytest.approx(100)
    shares = step_shares([times])
    assert shares["on"] == "cuda" and shares["step_ms"] == pytest.approx(0.05), "the host runs ahead: the mean of the window"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["aten::copy_"], "other"),
        (["aten::mm", "MmBackward0", NODE + "MmBackward0"], "backward"),
        (["fbgemm::split_embedding_backward_codegen_rowwise_adagrad_cpu", NODE + "torch::autograd::CppNode<SplitLookup>"], "backward"),
        (["fbgemm::split_embedding_codegen_forward_cpu", "[lookup]_[m]_[table_wise]", "## forward 3 ##"], "forward"),
        (["aten::index_select", "## all2all_data:kjt lengths ##", "## start_sparse_data_dist 3 ##"], "embedding_exchange"),
        (["aten::sort", "## start_sparse_data_dist 3 ##"], "input_dist"),
        (["aten::cat", "## _RowsAwaitable wait() ##", "## runtime_forward_assemble_KJT ##", "## forward 3 ##"], "embedding_exchange"),
        (["c10d::reduce_scatter_", NODE + "x"], "embedding_exchange"),
        (["c10d::allreduce_", NODE + "torch::autograd::AccumulateGrad"], "dense_all_reduce"),
        (["nccl:all_reduce", "c10d::allreduce_", "## fae: exchange of hot rows' gradients ##"], "embedding_exchange"),
        (["aten::mul", "torch::distributed::reducer::mul_out", NODE + "torch::autograd::AccumulateGrad"], "dense_all_reduce"),
        (["fbgemm::lru_cache_populate", "## forward 3 ##"], "transfer"),
        (["aten::zero_", "Optimizer.zero_grad#Adagrad.zero_grad", "## zero_grad ##"], "optimizer"),
        (["## copy_batch_to_gpu 3 ##", STEP, PROFILED], "other"),
        (["aten::embedding_bag_all_hot", "## forward 3 ##"], "forward"),
    ],
)  # fmt: skip
def test_category(names: list[str], expected: str) -> None:
    assert category(names) == expected


def test_ranks_and_medians() -> None:
    """The step is the median of all; shares are of all ranks' time, and milliseconds add up to the step."""
    first = StepTimes((1000, 3000), {**dict.fromkeys(CATEGORIES, 0.0), "forward": 4000.0}, {"c10d::allreduce_": 2})
    second = StepTimes((2000, 2000), {**dict.fromkeys(CATEGORIES, 0.0), "forward": 1000.0, "backward": 3000.0}, {"c10d::allreduce_": 2})
    made = step_shares([first, second])
    assert (made["steps"], made["step_ms"], made["on"]) == (2, 2.0, "cpu")
    assert made["shares"] == {**dict.fromkeys(CATEGORIES, 0.0), "forward": 5 / 8, "backward": 3 / 8}
    assert made["milliseconds"]["forward"] == 1.25 and made["milliseconds"]["backward"] == 0.75
    assert made["collectives"] == {"allreduce_": 1}


def test_a_trace_without_ranges() -> None:
    with pytest.raises(ValueError, match="profiled steps"):
        step_times(HOST[1:])
    with pytest.raises(ValueError, match="profiled step ##"):
        step_times([each for each in HOST if each["name"] != STEP])


def _unreadable(rank: int) -> dict[str, Any]:
    """The second rank's trace cannot be read."""
    if rank:
        step_profile.step_times = lambda events: step_times([])  # type: ignore[assignment]
    group = dist.group.WORLD
    unsharded = new_model()
    placement = new_placement(model_tables(unsharded))
    model, optimizer = sharded(unsharded, placement)
    loader = new_loader(Samples(64), placement, ShuffleSchedule("fixed"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shares = profile_steps(lambda: FAETrainPipeline(model, optimizer, CPU), loader, 1, CPU, group)
    return {"shares": shares, "warned": [str(each.message) for each in caught if "left out" in str(each.message)]}


def test_a_trace_that_cannot_be_read_loses_nothing_else() -> None:
    """Of one rank alone: every rank leaves the kind out, none hangs, and the first says why."""
    first, second = run_on_local_ranks(_unreadable, 2, timeout_s=240)
    assert first["shares"] == second["shares"] == {} and second["warned"] == []
    assert [text.partition(" steps")[0] for text in first["warned"]] == ["the cold", "the hot"]
    assert "has no range" in first["warned"][0]


STEPS = 4


def _profile(rank: int) -> dict[str, Any]:
    group = dist.group.WORLD
    made: dict[str, Any] = {}
    for name in ("stock", "fae"):
        unsharded = new_model(dim=32)
        placement = new_placement(model_tables(unsharded))
        model, optimizer = sharded(unsharded, placement if name == "fae" else None)
        model.train()
        pipeline = FAETrainPipeline if name == "fae" else TrainPipelineSparseDist
        loader = new_loader(Samples(160), placement, ShuffleSchedule("fixed" if name == "fae" else "stock"))
        made[name] = profile_steps(lambda new=pipeline, of=(model, optimizer): new(*of, CPU), loader, STEPS, CPU, group)
    return made


@cache
def profiled(ranks: int) -> list[dict[str, Any]]:
    return run_on_local_ranks(_profile, ranks, timeout_s=240)


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_of_a_real_model(ranks: int) -> None:
    made = profiled(ranks)
    assert made == [made[0]] * ranks, "the same on every rank"
    assert made[0]["stock"].keys() == {"mixed"} and made[0]["fae"].keys() == {"hot", "cold"}
    for kinds in made[0].values():
        for shares in kinds.values():
            assert shares["steps"] == STEPS and shares["step_ms"] > 0 and shares["on"] == "cpu"
            assert sum(shares["shares"].values()) == pytest.approx(1)
            assert sum(shares["milliseconds"].values()) == pytest.approx(shares["step_ms"])
            assert all(share >= 0 for share in shares["shares"].values()), shares["shares"]
            none = {"embedding_sync", "transfer", "idle"}
            assert all(shares["shares"][name] == 0 for name in none), "nothing of a GPU, and nothing to synchronise"
            assert all(shares["shares"][name] > 0.01 for name in ("forward", "backward")), shares["shares"]
            assert shares["shares"]["optimizer"] > 0
            assert shares["shares"]["other"] < 0.5, "most of a step's time has a name"


def test_hot_batches_leave_the_cold_exchange_out() -> None:
    """On two ranks: rows of the cold tier and of stock tables travel by all to all; of a hot batch only gathered gradients do."""
    made = profiled(2)[0]
    hot, cold, stock = made["fae"]["hot"], made["fae"]["cold"], made["stock"]["mixed"]
    assert "alltoall_base_" not in hot["collectives"], hot["collectives"]
    assert cold["collectives"]["alltoall_base_"] >= 2, "the control: pooled rows forth, their gradients back"
    assert stock["collectives"]["alltoall_base_"] >= 2
    for shares in (hot, cold, stock):
        assert shares["collectives"]["allreduce_"] >= 1 and shares["shares"]["dense_all_reduce"] > 0
        assert shares["shares"]["embedding_exchange"] > 0
    alone = profiled(1)[0]["fae"]["hot"]
    assert "alltoall_base_" not in alone["collectives"]
