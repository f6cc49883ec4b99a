"""TBSM, the Time-based Sequence Model (FAE's RMC1 on Taobao), from TorchRec's parts: `model.factory: tbsm.py:build_tbsm`.

A sample is a history of 20 events of a user and a candidate item; every feature (user, item, category) is a bag of 21 ids, the history
first, the candidate last. A small DLRM, the *tower*, makes a vector of every step; attention over the history's vectors says whether the
user will click on the candidate.

From facebookresearch/tbsm (tbsm_pytorch.py with the options of bench/tbsm_bench.sh: --model-type=tsl --tsl-inner=def --tsl-mechanism=mlp
--tsl-proj) are: the widths; ReLU after every layer, the tower's last and the final MLP's hidden one among them, and a sigmoid after the
attention MLP's last; vectors of history and candidate projected on the unit sphere; attention MLP((H A^T A w)^T) and the context
attention^T H; the start: normal weights with a variance of 2 / (inputs + outputs), normal biases of 1 / outputs, A of 1 / width, and
tables uniform within +-rows^-1/2 (TorchRec's default too).

What differs: all tables are one EmbeddingCollection, asked once for all steps, and the tower runs once over the steps of all samples; the
original calls both 21 times, or with --run-fast twice. The last sigmoid is in the loss (BCEWithLogitsLoss). The dense feature is one of
the sample, the same at each of its steps; the original's is the step's number / 21. Histories may be shorter: they are taken from their
end, and steps that are not there are zero vectors, which take no part in attention or context; the original looks up row 0 for them. Of
longer ones the last 20 events count. Optimizers and learning rates are `train`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import InteractionArch
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.mlp import MLP, Perceptron
from torchrec.sparse.jagged_tensor import JaggedTensor

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.training.model_spec import ModelSpec

HISTORY, TOWER, ATTENTION = 20, (15, 15), (15, 15)
"""Of the paper: events before the candidate, widths of the tower's top MLP, hidden widths of the attention MLP."""


def build_tbsm(spec: ModelSpec) -> TBSMTrain:
    """The model factory.

    Args:
        spec: `dense_arch` are the widths of the tower's bottom MLP, the last `embedding_dim`; `over_arch` those of the final MLP, the last
            1; `options` may have "history", "tower" and "attention" (see above).

    Raises:
        ConfigError: an unknown option, or widths that do not fit.
    """
    unknown = sorted(spec.options.keys() - {"history", "tower", "attention"})
    if unknown:
        raise ConfigError(f"model.options: unknown {unknown}; allowed are history, tower and attention")
    history, tower = spec.options.get("history", HISTORY), tuple(spec.options.get("tower", TOWER))
    attention = tuple(spec.options.get("attention", ATTENTION))
    if not (isinstance(history, int) and history >= 1 and tower and attention):
        raise ConfigError(f"model.options: received {dict(spec.options)}; history must be at least 1, tower and attention lists of widths")
    if not spec.num_dense or spec.dense_arch[-1:] != (spec.embedding_dim,) or len(spec.over_arch) < 2 or spec.over_arch[-1] != 1:
        raise ConfigError(
            f"model: received {spec.num_dense} dense features, dense_arch {list(spec.dense_arch)}, over_arch {list(spec.over_arch)}; TBSM "
            f"needs at least one dense feature, dense_arch that ends in embedding_dim ({spec.embedding_dim}), and over_arch of two or more "
            "widths that ends in 1, as [16] and [60, 1]"
        )
    tables = [
        EmbeddingConfig(name=f"t_{feature}", num_embeddings=rows, embedding_dim=spec.embedding_dim, feature_names=[feature])
        for feature, rows in spec.rows.items()
    ]
    embeddings = EmbeddingCollection(tables=tables, device=spec.device)
    return TBSMTrain(embeddings, SequenceArch(list(spec.rows), spec.num_dense, spec.dense_arch, tower, attention, spec.over_arch, history))


class TBSMTrain(nn.Module):
    """TBSM with its loss.

    Without branches that depend on data, so that TorchRec's pipelines can trace it and start the exchange of ids early: what has such is
    below, in `SequenceArch`.

    Args:
        embedding_collection: a table for each feature.
        arch: everything else.
    """

    def __init__(self, embedding_collection: EmbeddingCollection, arch: SequenceArch) -> None:
        super().__init__()
        self.embedding_collection = embedding_collection
        self.arch = arch
        self.loss_fn = nn.BCEWithLogitsLoss()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The loss (a scalar), and (loss, logits [samples], labels [samples]) without gradient."""
        rows = self.embedding_collection(batch.sparse_features)
        logits = self.arch(batch.dense_features, rows)
        loss = self.loss_fn(logits, batch.labels.float())
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


class SequenceArch(nn.Module):
    """From the rows of all ids to a logit for each sample.

    Args:
        features: each with a bag of the steps' ids, equally long in all of a sample.
        num_dense: dense features.
        bottom: widths of the tower's MLP over the dense features; the last is that of the rows.
        tower: widths of its MLP over the interactions.
        attention: hidden widths of the MLP over the history's weights.
        over: widths of the MLP over context and candidate; the last is 1.
        history: steps before the candidate, the last of the bag.
    """

    def __init__(
        self,
        features: Sequence[str],
        num_dense: int,
        bottom: Sequence[int],
        tower: Sequence[int],
        attention: Sequence[int],
        over: Sequence[int],
        history: int,
    ) -> None:
        super().__init__()
        self.features, self.history = tuple(features), history
        interactions = bottom[-1] + len(features) * (len(features) + 1) // 2
        self.bottom = MLP(num_dense, list(bottom))
        self.interaction = InteractionArch(len(features))
        self.tower = MLP(interactions, list(tower))
        self.metric = nn.Parameter(torch.empty(tower[-1], tower[-1]))  # TBSM's A
        self.attention = nn.Sequential(MLP(history, list(attention)), Perceptron(attention[-1], history, activation=torch.sigmoid))
        self.over = nn.Sequential(MLP(2 * tower[-1], list(over[:-1])), nn.Linear(over[-2], 1))
        nn.init.normal_(self.metric, std=tower[-1] ** -0.5)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.normal_(layer.bias, std=layer.out_features**-0.5)

    def forward(self, dense: torch.Tensor, rows: Mapping[str, JaggedTensor]) -> torch.Tensor:
        """The logits, float32 [samples].

        Args:
            dense: float32 [samples, num_dense].
            rows: feature -> the rows of its ids [steps of all samples, dim].

        Raises:
            ConfigError: the bags of a sample are not equally long; looked at on the CPU alone, where it costs nothing.
        """
        lengths = self._lengths(rows)
        steps = torch.stack([rows[feature].values() for feature in self.features], dim=1)
        of_samples = self.bottom(dense).repeat_interleave(lengths, dim=0, output_size=steps.shape[0])
        vectors = nn.functional.normalize(self.tower(self.interaction(of_samples, steps)), dim=1)
        vectors = self._from_the_end(vectors, lengths)
        history, candidate = vectors[:, :-1], vectors[:, -1]
        wanted = candidate @ self.metric.T @ self.metric
        weights = self.attention(torch.bmm(history, wanted.unsqueeze(2)).squeeze(2))
        context = torch.bmm(weights.unsqueeze(1), history).squeeze(1)
        logits: torch.Tensor = self.over(torch.cat([context, candidate], dim=1)).squeeze(1)
        return logits

    def _lengths(self, rows: Mapping[str, JaggedTensor]) -> torch.Tensor:
        """Steps of each sample, int [samples]."""
        first, *others = (rows[feature].lengths() for feature in self.features)
        if first.device.type == "cpu" and not all(torch.equal(first, other) for other in others):
            raise ConfigError(
                f"TBSM: the bags of {list(self.features)} are not equally long in every sample; a step has an id of each, the user's "
                "again at every step"
            )
        return first

    def _from_the_end(self, vectors: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The last history + 1 steps of each sample [samples, history + 1, width]; zero vectors stand before a shorter bag."""
        ends = lengths.to(torch.int64).cumsum(0).unsqueeze(1)
        back = torch.arange(self.history, -1, -1, device=vectors.device)
        at = torch.where(back < lengths.unsqueeze(1), ends - back, 0)  # of the vectors behind one of zeros
        padded = torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors])
        return padded.index_select(0, at.flatten()).unflatten(0, at.shape)
