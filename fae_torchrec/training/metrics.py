"""Loss, AUC and accuracy of a model on a stream of batches, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchmetrics.functional.classification import binary_accuracy, binary_auroc
from torchrec.datasets.utils import Batch

from fae_torchrec.core.errors import DataError
from fae_torchrec.distributed.process_group import all_gather_single


@dataclass(frozen=True)
class Scores:
    """How well a model predicts.

    Attributes:
        auc: area under the ROC curve, exact (ties count half); 0 where one class is missing.
        logloss: mean binary cross-entropy in nats.
        accuracy: share of right answers at a threshold of 0.5.
        samples: samples scored, over all ranks.
    """

    auc: float
    logloss: float
    accuracy: float
    samples: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], device: torch.device, group: dist.ProcessGroup | None = None) -> Scores:
    """Scores a model that returns `(loss, (loss, logits, labels))`, as TorchRec's DLRMTrain does.

    Args:
        model: sharded or not; put into eval mode and back.
        batches: this rank's batches; every rank must have equally many (the model's collectives run on each).
        device: where the model lies.
        group: the ranks to score over; None for this rank alone.

    Raises:
        DataError: there is no sample at all, or a label that is not 0 or 1.
    """
    training = model.training
    model.eval()
    logits, labels = [torch.empty(0, device=device)], [torch.empty(0, device=device)]
    for batch in batches:
        _, (_, batch_logits, batch_labels) = model(batch.to(device))
        logits.append(batch_logits.detach().float())
        labels.append(batch_labels.detach().float())
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
    )


def check_labels(labels: torch.Tensor) -> None:
    """Checks test labels, any shape.

    Raises:
        DataError: one is neither 0 nor 1.
    """
    wrong = labels[(labels != 0) & (labels != 1)]
    if wrong.numel():
        raise DataError(f"test labels must be 0 or 1, received {float(wrong[0]):g}; code the label column so")


def _gather(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Joins a 1-d tensor of every rank, in rank order; lengths may differ."""
    if group is None or group.size() == 1:
        return values
    length = torch.tensor([values.numel()], device=values.device)
    lengths = length.new_empty(group.size())
    all_gather_single(lengths, length, group=group)
    longest = int(lengths.max())
    padded = torch.nn.functional.pad(values, (0, longest - values.numel()))
    everyone = values.new_empty(group.size() * longest)
    all_gather_single(everyone, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(everyone.view(group.size(), longest), lengths.tolist(), strict=True)])
