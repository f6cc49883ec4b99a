"""Where a training step's time goes, from a profiler's trace: what FAE's paper shows in its Fig. 14, and what that does not tell apart.

Every moment of the profiled steps belongs to one category, so that the shares add up to 1:

- On the CPU it is the time of the thread that trains, by the innermost range, autograd node or collective that says what it is for.
- On a GPU it is the time of its kernels and copies, each by the operator that launched it. Where several run at once they share the time
  evenly. What is left is `idle`.

An embedding's optimizer is fused into its backward by FBGEMM: its update is `backward`, and `optimizer` is that of the dense part alone.
"""

from __future__ import annotations

import re
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fae_torchrec.distributed.compact_gradients import EXCHANGES_HOT_GRADIENTS
from fae_torchrec.distributed.staging import MOVES_COLD_ROWS

PROFILED, STEP = "## fae: profiled steps ##", "## fae: profiled step ##"
"""Ranges that the trace must have: one around all steps and the wait for the device, and one around each step."""

CATEGORIES: Mapping[str, str] = {
    "embedding_sync": (
        "copying hot rows between their places when training changes between hot and cold batches; 0 by construction: a row has one owner"
    ),
    "transfer": (
        "copies between host and device, and cold rows on their way to a staging area or a cache; 0 on a CPU. Rows that a kernel reads "
        "from host memory as it goes (UVM) cannot be told from the kernel: they are in forward and backward"
    ),
    "embedding_exchange": "between ranks: ids, pooled rows, their gradients, gradients of hot rows, and waiting for them",
    "input_dist": "ids found in their tiers and put in order for their ranks",
    "forward": "lookups and the dense part",
    "backward": "of the dense part and of the embeddings, with the fused update of the rows",
    "dense_all_reduce": "the dense part's gradients, between ranks",
    "optimizer": "of the dense part; zero_grad",
    "other": "the next batch handed over, and whatever is in no range",
    "idle": "the GPU waits for the host; 0 on a CPU",
}
"""The categories in the order of a picture, and what is in them."""

Event = Mapping[str, Any]

_COLLECTIVE = re.compile(r"^(c10d|_c10d_functional)::(?!wait_tensor|barrier)|^(nccl|gloo):")
_ALL_REDUCE = re.compile(r"all_?reduce")
_EXCHANGE = re.compile(
    # TorchRec's collectives of embeddings, their autograd nodes and the waits for them (torchrec.distributed.comm_ops, dist_data, types)
    r"all2all|reduce_?scatter|all_?gather|\[output_dist|## wait_sparse_data_dist|Awaitable wait\(\)|Request wait\(\)|"
    + re.escape(EXCHANGES_HOT_GRADIENTS),
    re.IGNORECASE,
)
_RULES: Sequence[tuple[str, re.Pattern[str]]] = (
    ("transfer", re.compile(rf"{re.escape(MOVES_COLD_ROWS)}|## sharded_module_prefetch|l[rf]u_cache_populate")),
    ("forward", re.compile(r"^## _(Bags|Sequences)Awaitable wait\(\)")),  # ours: where the tiers' sums are joined
    ("dense_all_reduce", re.compile(r"^torch::distributed::reducer")),
    ("embedding_exchange", _EXCHANGE),
    ("input_dist", re.compile(r"^## start_sparse_data_dist")),
    ("backward", re.compile(r"^autograd::engine::evaluate_function|^## backward")),
    ("forward", re.compile(r"^## (forward|start_embedding_lookup|dense_forward)|^DistributedDataParallel\.forward")),
    ("optimizer", re.compile(r"^## (optimizer|zero_grad)|^Optimizer\.")),
    ("other", re.compile(r"^## (copy_batch_to_gpu|inplace_copy_batch_to_gpu|next_batch|load_batch|wait_for_batch)")),
)
_LINK_COPY = re.compile(r"^Memcpy (HtoD|DtoH)")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class StepTimes:
    """One rank's profiled steps of one kind.

    Attributes:
        step_us: microseconds of each step on the host.
        category_us: microseconds of all steps together, by category; they add up to what was profiled.
        collectives: calls of collectives in all steps, by name.
        on_device: whether the time is a GPU's.
    """

    step_us: tuple[float, ...]
    category_us: Mapping[str, float]
    collectives: Mapping[str, int]
    on_device: bool = False


@dataclass
class _Span:
    """An event of a thread. `own` are the parts of it that no event within it covers, (start, end); known up to `covered`."""

    event: Event
    start: float
    end: float
    outer: _Span | None
    covered: float
    own: list[tuple[float, float]] = field(default_factory=list)

    def cover(self, start: float, end: float) -> None:
        """Tells of the next event within it."""
        if self.covered < min(start, self.end):
            self.own.append((self.covered, min(start, self.end)))
        self.covered = max(self.covered, end)

    @property
    def names(self) -> Iterator[str]:
        """Its name and those around it, the innermost first."""
        span: _Span | None = self
        while span is not None:
            yield str(span.event["name"])
            span = span.outer


def category(names: Sequence[str]) -> str:
    """What a piece of time is for.

    Args:
        names: of the ranges and operators that it is in, the innermost first.
    """
    for place, name in enumerate(names):
        if _COLLECTIVE.search(name):
            dense = _ALL_REDUCE.search(name) and not any(_EXCHANGE.search(outer) for outer in names[place + 1 :])
            return "dense_all_reduce" if dense else "embedding_exchange"
        for found, pattern in _RULES:
            if pattern.search(name):
                return found
    return "other"


def step_times(events: Iterable[Event]) -> StepTimes:
    """Sorts the time of the profiled steps into categories.

    Args:
        events: `traceEvents` of a trace as torch.profiler exports it (Chrome's format, times in microseconds), with `PROFILED` and `STEP`.

    Raises:
        ValueError: the trace has no `PROFILED` range, or no `STEP` in it.
    """
    whole = [event for event in events if event.get("ph") == "X" and "dur" in event]
    window = next((event for event in whole if event["name"] == PROFILED and event.get("cat") == "user_annotation"), None)
    if window is None:
        raise ValueError(f"the trace has no range {PROFILED!r}")
    start, end = window["ts"], window["ts"] + window["dur"]
    inside = [event for event in whole if event["ts"] < end and event["ts"] + event["dur"] > start]
    steps = [event["dur"] for event in inside if event["name"] == STEP and event.get("cat") == "user_annotation"]
    if not steps:
        raise ValueError(f"the trace has no range {STEP!r}")
    on_device = [event for event in inside if event.get("cat") in _ON_DEVICE]
    hosts = _threads([event for event in inside if event.get("cat") in ("cpu_op", "user_annotation", *_LAUNCHES)])
    if on_device:
        categories = _of_device(on_device, [span for spans in hosts.values() for span in spans], start, end)
    else:
        categories = _of_thread(hosts[window["tid"]], [event for event in inside if event["tid"] != window["tid"]], start, end)
    collectives = Counter(event["name"] for event in inside if event["name"].startswith("c10d::"))
    return StepTimes(tuple(steps), categories, collectives, bool(on_device))


def step_shares(ranks: Sequence[StepTimes]) -> dict[str, Any]:
    """The profiled steps of all ranks as a report has them.

    Args:
        ranks: of each, the same number of steps.

    Returns:
        "steps" (of a rank); "step_ms": on the CPU the median over steps and ranks, on a GPU, whose steps the host runs ahead of, the mean;
        "shares": category -> share of all ranks' time; "milliseconds": category -> its share of `step_ms`; "collectives": calls a step and
        rank, by name; "on": "cpu" or "cuda".
    """
    total = {name: sum(times.category_us[name] for times in ranks) for name in CATEGORIES}
    all_us, steps = sum(total.values()), sum(len(times.step_us) for times in ranks)
    on_device = any(times.on_device for times in ranks)
    step_ms = all_us / steps / 1e3 if on_device else statistics.median(us for times in ranks for us in times.step_us) / 1e3
    shares = {name: us / all_us for name, us in total.items()}
    calls = Counter[str]()
    for times in ranks:
        calls.update(times.collectives)
    return {
        "steps": len(ranks[0].step_us),
        "step_ms": step_ms,
        "milliseconds": {name: share * step_ms for name, share in shares.items()},
        "shares": shares,
        "collectives": {name.removeprefix("c10d::"): count / steps for name, count in sorted(calls.items())},
        "on": "cuda" if on_device else "cpu",
    }


def _threads(events: Iterable[Event]) -> dict[Any, list[_Span]]:
    """The events of every thread, nested in one another by their times."""
    of_thread: dict[Any, list[Event]] = {}
    for event in events:
        of_thread.setdefault(event["tid"], []).append(event)
    return {thread: _nested(some) for thread, some in of_thread.items()}


def _nested(events: list[Event]) -> list[_Span]:
    """Events of one thread, each in the latest that has not ended; one that would end after it is cut off with it."""
    spans: list[_Span] = []
    open_spans: list[_Span] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        while open_spans and open_spans[-1].end <= start:
            open_spans.pop().cover(float("inf"), float("inf"))
        outer = open_spans[-1] if open_spans else None
        if outer is not None:
            end = min(end, outer.end)
            outer.cover(start, end)
        spans.append(_Span(event, start, end, outer, covered=start))
        open_spans.append(spans[-1])
    for span in open_spans:
        span.cover(float("inf"), float("inf"))
    return spans


def _of_thread(spans: Iterable[_Span], elsewhere: Iterable[Event], start: float, end: float) -> dict[str, float]:
    """Time of the training thread, by category.

    The wait for DistributedDataParallel's last all-reduce at the end of backward has no range: of what is in backward alone, it is the
    part during which an all-reduce of this rank is under way.
    """
    under_way = _union((event["ts"], event["ts"] + event["dur"]) for event in elsewhere if _is_all_reduce(event))
    us = dict.fromkeys(CATEGORIES, 0.0)
    for span in spans:
        own = [(max(first, start), min(last, end)) for first, last in span.own if first < end and last > start]
        if not own:
            continue
        found, duration = category([*span.names]), sum(last - first for first, last in own)
        if str(span.event["name"]).startswith("## backward"):
            waited = sum(_overlap(piece, under_way) for piece in own)
            us["dense_all_reduce"] += waited
            duration -= waited
        us[found] += duration
    us["other"] += end - start - sum(us.values())  # rounding of the trace's times
    return us


def _of_device(events: Iterable[Event], spans: Iterable[_Span], start: float, end: float) -> dict[str, float]:
    """Time of the GPU, by category; of moments when several kernels run each has its part."""
    launches = {
        span.event["args"]["correlation"]: span
        for span in spans
        if span.event.get("cat") in _LAUNCHES and "correlation" in span.event.get("args", {})
    }
    edges: list[tuple[float, int, str]] = []
    for event in events:
        launch = launches.get(event.get("args", {}).get("correlation"))
        found = "other" if launch is None else category([*launch.names])
        if _LINK_COPY.search(event["name"]):
            found = "transfer"
        edges += [(max(event["ts"], start), 1, found), (min(event["ts"] + event["dur"], end), -1, found)]
    us = dict.fromkeys(CATEGORIES, 0.0)
    running: Counter[str] = Counter()
    at = start
    for time, change, found in sorted(edges, key=lambda edge: edge[:2]):
        if count := sum(running.values()):
            for name, number in running.items():
                us[name] += (time - at) * number / count
        else:
            us["idle"] += time - at
        running[found] += change
        at = time
    us["idle"] += end - at
    return us


def _is_all_reduce(event: Event) -> bool:
    return bool(_COLLECTIVE.search(event["name"]) and _ALL_REDUCE.search(event["name"]))


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Intervals that do not overlap, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _overlap(piece: tuple[float, float], intervals: Sequence[tuple[float, float]]) -> float:
    """How much of a piece lies in intervals (sorted, apart)."""
    total = 0.0
    for start, end in intervals[max(bisect_left(intervals, piece) - 1, 0) :]:
        if start >= piece[1]:
            break
        total += max(min(end, piece[1]) - max(start, piece[0]), 0.0)
    return total
