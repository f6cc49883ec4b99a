"""The work of a run: which samples it trained, from which weights and with which settings; and what makes two runs not comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.optim.keyed import KeyedOptimizer

from fae_torchrec.data.batches import HotColdBatch
from fae_torchrec.training.baselines import SAME_ARITHMETIC

_HASHED_VALUES = 65_536  # of each weight: what a seed draws differs everywhere, if at all
_RELATIVE = 1e-4  # of the start loss: the same sums in another order

Work = Mapping[str, Any]


class TrainedSamples:
    """Sums over the samples that this rank has trained. They are the same for any order of the samples and any cut into batches.

    Attributes:
        sums: "samples", "ids", "id_sum" and "positives".
    """

    def __init__(self) -> None:
        self.sums = dict.fromkeys(("samples", "ids", "id_sum", "positives"), 0)

    def add(self, batch: HotColdBatch) -> None:
        """Adds a batch that was trained; a filler adds nothing."""
        if batch.num_samples:
            ids = batch.sparse_features.values()
            values = (batch.num_samples, ids.numel(), int(ids.sum()), round(float(batch.labels.sum())))
            self.sums = {name: total + value for (name, total), value in zip(self.sums.items(), values, strict=True)}

    def of_ranks(self, group: dist.ProcessGroup, device: torch.device) -> dict[str, int]:
        """The sums of all ranks. Collective."""
        sums = torch.tensor(list(self.sums.values()), dtype=torch.int64, device=device)
        dist.all_reduce(sums, group=group)
        return dict(zip(self.sums, sums.tolist(), strict=True))


def weights_fingerprint(model: nn.Module) -> str:
    """A short hash of a model's weights: names, shapes, dtypes, and evenly spaced values of each (at most 65,536, the last included)."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.state_dict().items():
        flat = weight.detach().reshape(-1)
        places = torch.linspace(0, max(flat.numel() - 1, 0), min(flat.numel(), _HASHED_VALUES), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sharding_types(plan: ShardingPlan) -> list[str]:
    """The sharding types of a plan's tables, sorted."""
    collections = [part for part in plan.plan.values() if isinstance(part, EmbeddingModuleShardingPlan)]
    return sorted({sharding.sharding_type for collection in collections for sharding in collection.values()})


def learning_rates(optimizer: KeyedOptimizer) -> list[float]:
    """The learning rates of all parameter groups, each once."""
    return sorted({float(group["lr"]) for group in optimizer.param_groups if "lr" in group})


def unequal_work(works: Mapping[str, Work]) -> list[str]:
    """What makes runs not comparable; empty if nothing does.

    Samples may differ by fewer than a global batch and kind (the last batches of a kind may be part full) where the run is cut by
    `train.steps` or `drop_last` leaves samples out, and otherwise by what cannot be dealt to the ranks: fewer than `ranks` an epoch.

    Args:
        works: name of the run -> its work; the first is what the others are held against. Keys: "ranks", "batch_size", "epochs",
            "whole_epochs", "steps", "test_samples", "start_weights", "start_logloss", "optimizer", "learning_rates", "sharding_types"
            and those of `TrainedSamples`. A key that a run lacks is not compared.

    Returns:
        A sentence each, which names the runs and both values.
    """
    first, *others = works
    problems = [
        f"{name} shards a table as {kind}, which is not the arithmetic of one whole table; allowed are {', '.join(SAME_ARITHMETIC)}"
        for name, work in works.items()
        for kind in work.get("sharding_types") or ()
        if kind not in SAME_ARITHMETIC
    ]
    for name in others:
        base, work = works[first], works[name]
        for key, words in _EQUAL.items():
            if key in base and key in work and base[key] != work[key]:
                problems.append(f"{name} {words} {_value(work[key])}, {first} {_value(base[key])}")
        if "start_logloss" in base and "start_logloss" in work:
            ours, theirs = work["start_logloss"], base["start_logloss"]
            if abs(ours - theirs) > _RELATIVE * abs(theirs):
                problems.append(f"{name} starts from a test log loss of {ours:.6f}, {first} from {theirs:.6f}")
        same, stopped = _sums(work) == _sums(base), _is_stopped(base, work)
        if stopped and not same and base["steps"] != work["steps"]:
            problems.append(f"{name} trained {work['steps']:,} steps, {first} {base['steps']:,}")
        slack, difference = _slack(base, stopped=stopped), abs(work["samples"] - base["samples"])
        if difference > slack:
            problems.append(
                f"{name} trained {work['samples']:,} samples, {first} {base['samples']:,}; they may differ by {slack:,} (not dealt)"
            )
        elif not (stopped or base["drop_last"] or difference or same):
            problems.append(f"{name} trained other samples than {first}: as many, but the sums of their ids or labels differ")
    return problems


def unlike_samples(works: Mapping[str, Work]) -> list[str]:
    """What a reader should know of runs that did equal work on not quite the same samples; a sentence each."""
    first, *others = works
    notes = []
    for name in others:
        base, work = works[first], works[name]
        if work["samples"] != base["samples"]:
            notes.append(f"{name} trained {work['samples']:,} samples, {first} {base['samples']:,}")
        elif _sums(work) != _sums(base):
            why = "train.steps ends the run within an epoch" if _is_stopped(base, work) else "loader.drop_last leaves the last ones out"
            notes.append(
                f"{name} trained as many samples as {first}, but others: {why}, and {name} takes an epoch's samples in another order. "
                "Speed and bytes can be compared, scores only roughly"
            )
    return notes


_EQUAL = {
    "ranks": "ran on ranks:",
    "batch_size": "trained with a batch size of",
    "epochs": "trained for epochs:",
    "test_samples": "was scored on test samples:",
    "start_weights": "started from the weights",
    "optimizer": "trained with the optimizer settings",
    "learning_rates": "ended with the learning rates",
}


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _sums(work: Work) -> Sequence[Any]:
    return [work.get(key) for key in ("samples", "ids", "id_sum", "positives")]


def _is_stopped(*works: Work) -> bool:
    """Whether `train.steps` ended a run."""
    return not all(work["whole_epochs"] for work in works)


def _slack(work: Work, *, stopped: bool) -> int:
    """Samples by which runs of the same work may differ."""
    ranks, epochs = work["ranks"], work["epochs"]
    if stopped or work["drop_last"]:
        return int(2 * work["batch_size"] * ranks * (1 if stopped else epochs))
    return int((ranks - 1) * epochs)
