"""Loss, AUC and accuracy of a model on a stream of batches, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchmetrics.functional.classification import binary_accuracy, binary_auroc
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import DataError
from fae_torchrec.data.batches import HotColdBatch
from fae_torchrec.data.filler import filler_like
from fae_torchrec.data.segregate import plain_batch
from fae_torchrec.distributed.process_group import all_gather_single, gather_counts

_WINDOW_BATCHES = 8


@dataclass(frozen=True)
class Scores:
    """How well a model predicts.

    Attributes:
        auc: area under the ROC curve, exact (ties count half); 0 where one class is missing.
        logloss: mean binary cross-entropy in nats.
        accuracy: share of right answers at a threshold of 0.5.
        samples: samples scored, over all ranks.
        outputs: what was scored: logits (float32) and labels, [samples] each, rank after rank in the order of each rank's batches; on the
            device that the model lies on.
    """

    auc: float
    logloss: float
    accuracy: float
    samples: int
    outputs: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False, compare=False)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], device: torch.device, group: dist.ProcessGroup | None = None) -> Scores:
    """Scores a model that returns `(loss, (loss, logits, labels))`, as TorchRec's DLRMTrain does. Collective: every rank calls it.

    Args:
        model: sharded or not; put into eval mode and back.
        batches: this rank's batches. Ranks may have different numbers of them: one that has no more takes part in the model's collectives
            with fillers, which are not scored. A promise to be hot is not kept, because another rank's batch may not be.
        device: where the model lies.
        group: the ranks to score over; None for this rank alone.

    Raises:
        DataError: there is no sample at all, or a label that is not 0 or 1; another rank's batches raised an error (on that rank it is
            raised itself).
    """
    group = group if group is not None and group.size() > 1 else None
    training = model.training
    model.eval()
    logits, labels = [torch.empty(0, device=device)], [torch.empty(0, device=device)]
    try:
        for batch in batches if group is None else _as_many(batches, device, group):
            _, (_, batch_logits, batch_labels) = model(plain_batch(batch).to(device))
            if not (isinstance(batch, HotColdBatch) and batch.num_samples == 0):
                logits.append(batch_logits.detach().float())
                labels.append(batch_labels.detach().float())
    finally:
        model.train(training)
    all_logits, all_labels = _gather(torch.cat(logits), group), _gather(torch.cat(labels), group)
    if not all_labels.numel():
        raise DataError("there are no samples to evaluate on; received an empty stream of test batches on every rank")
    check_labels(all_labels)
    # float64: in float32 the sigmoid makes ties of different large logits.
    probabilities, targets = all_logits.double().sigmoid(), all_labels.to(torch.int64)
    return Scores(
        auc=float(binary_auroc(probabilities, targets)),
        logloss=float(nn.functional.binary_cross_entropy_with_logits(all_logits.double(), all_labels.double())),
        accuracy=float(binary_accuracy(probabilities, targets)),
        samples=all_labels.numel(),
        outputs=(all_logits, all_labels),
    )


def check_labels(labels: torch.Tensor) -> None:
    """Checks test labels, any shape.

    Raises:
        DataError: one is neither 0 nor 1.
    """
    wrong = labels[(labels != 0) & (labels != 1)]
    if wrong.numel():
        raise DataError(f"test labels must be 0 or 1, received {float(wrong[0]):g}; code the label column so")


def _as_many(batches: Iterable[Batch], device: torch.device, group: dist.ProcessGroup) -> Iterator[Batch]:
    """Makes the ranks' streams equally long by fillers. The ranks agree on many batches at once, which are read ahead."""
    agree, stream = gather_counts(group, device), iter(batches)
    like: Batch | None = None
    while True:
        failure: Exception | None = None
        window: list[Batch] = []
        try:
            window.extend(islice(stream, _WINDOW_BATCHES))
        except Exception as error:  # whatever a reader may raise: the other ranks must not wait for this one
            failure = error
        like = window[-1] if window else like
        counts, has_like = agree(np.array([-1 if failure else len(window), like is not None])).T
        if failure:
            raise failure
        if counts.min() < 0:
            raise DataError(f"reading the test batches failed on rank {int(counts.argmin())}; its own error says why")
        longest = int(counts.max())
        if counts.min() < longest and not has_like.all():
            like = _from_rank(int(counts.argmax()), like, group)
        for _ in range(longest - len(window)):
            assert like is not None
            window.append(filler_like(like, kind="mixed"))
        yield from window
        if longest < _WINDOW_BATCHES:
            return


def _from_rank(rank: int, batch: Batch | None, group: dist.ProcessGroup) -> Batch:
    """A filler like that rank's batch, for ranks that have never seen one."""
    fillers = [None if batch is None else filler_like(batch, kind="mixed").to(torch.device("cpu"))]
    dist.broadcast_object_list(fillers, group=group, group_src=rank)
    assert fillers[0] is not None
    return fillers[0]


def _gather(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Joins a 1-d tensor of every rank, in rank order; lengths may differ."""
    if group is None:
        return values
    length = torch.tensor([values.numel()], device=values.device)
    lengths = length.new_empty(group.size())
    all_gather_single(lengths, length, group=group)
    longest = int(lengths.max())
    padded = torch.nn.functional.pad(values, (0, longest - values.numel()))
    everyone = values.new_empty(group.size() * longest)
    all_gather_single(everyone, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(everyone.view(group.size(), longest), lengths.tolist(), strict=True)])
