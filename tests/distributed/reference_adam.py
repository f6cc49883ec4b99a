"""A slow, plain torch Adam for FBGEMM's CPU kernel, which has none of its own: what lets the tests train with Adam without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from fbgemm_gpu import split_table_batched_embeddings_ops_training as tbe
from fbgemm_gpu.split_embedding_codegen_lookup_invokers import lookup_adam
from fbgemm_gpu.split_embedding_codegen_lookup_invokers.lookup_args import CommonArgs, Momentum, OptimizerArgs
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

from fae_torchrec.distributed import refusals


@contextmanager
def reference_adam() -> Iterator[None]:
    """Makes Adam work on the CPU while it lasts: for plans, for kernels made in it, and for their forwards.

    A rank is a process of its own, so the function that runs on it opens the context itself. FBGEMM 1.8's constructor refuses Adam on
    the CPU in one assertion, but has all that Adam keeps (momenta, step count); its Adam has no CPU operator.
    """
    with (
        mock.patch.object(tbe.SplitTableBatchedEmbeddingBagsCodegen, "__init__", _accepting_adam),
        mock.patch.object(lookup_adam, "invoke", _invoke),
        mock.patch.object(refusals, "_cpu_kernel_lacks", return_value=False),
    ):
        yield


_stock_init = tbe.SplitTableBatchedEmbeddingBagsCodegen.__init__


def _accepting_adam(self: Any, *args: Any, **kwargs: Any) -> None:
    """The stock constructor, with Adam in Adagrad's place among the optimizers for the CPU; it asks for Adagrad nowhere else."""
    if kwargs.get("optimizer") is not EmbOptimType.ADAM:
        _stock_init(self, *args, **kwargs)
        return
    names = mock.Mock(**{**EmbOptimType.__members__, "EXACT_ADAGRAD": EmbOptimType.ADAM})
    with mock.patch.object(tbe, "OptimType", names):
        _stock_init(self, *args, **kwargs)


class _Feature(NamedTuple):
    """One feature's part of a batch.

    Attributes:
        columns: its columns in the pooled output.
        rows: int64 [n], table row of each of its ids.
        bags: int64 [n], bag of each of its ids.
        scale: float32 [n, 1], what each row is multiplied with in its bag's sum.
        first: where its table begins in the weights and in the two momenta; features of one table have the same.
    """

    columns: slice
    rows: torch.Tensor
    bags: torch.Tensor
    scale: torch.Tensor
    first: tuple[int, int, int]

    def cells(self, state: int, rows: torch.Tensor) -> torch.Tensor:
        """Where `rows` lie in the flat weights (0) or a momentum (1, 2), int64 [rows, dim]."""
        dim = self.columns.stop - self.columns.start
        return self.first[state] + rows.unsqueeze(1) * dim + torch.arange(dim)


def _features(args: CommonArgs, momenta: tuple[Momentum, Momentum]) -> list[_Feature]:
    columns, features = args.D_offsets.tolist(), []
    firsts = zip(args.weights_offsets.tolist(), momenta[0].offsets.tolist(), momenta[1].offsets.tolist(), strict=True)
    offsets = args.offsets.to(torch.int64)
    bags_per_feature = (offsets.numel() - 1) // (len(columns) - 1)
    for i, first in enumerate(firsts):
        bounds = offsets[i * bags_per_feature : (i + 1) * bags_per_feature + 1]
        lengths, here = bounds.diff(), slice(int(bounds[0]), int(bounds[-1]))
        bags = torch.repeat_interleave(torch.arange(bags_per_feature), lengths)
        scale = torch.ones(len(bags)) if args.indice_weights is None else args.indice_weights[here]
        if args.pooling_mode == PoolingMode.MEAN.value:
            scale = scale / lengths[bags]
        features.append(_Feature(slice(columns[i], columns[i + 1]), args.indices[here].to(torch.int64), bags, scale.unsqueeze(1), first))
    return features


class _LookupAdam(torch.autograd.Function):
    """Looks rows up and pools them; its backward updates the rows looked up, as FBGEMM's fused kernels do."""

    @staticmethod
    def forward(
        ctx: Any, _: torch.Tensor, args: CommonArgs, optimizer: OptimizerArgs, momenta: tuple[Momentum, Momentum], step: int
    ) -> torch.Tensor:
        ctx.features, ctx.unpooled = _features(args, momenta), args.pooling_mode == PoolingMode.NONE.value
        ctx.tensors = (args.host_weights.detach(), momenta[0].host.detach(), momenta[1].host.detach())
        ctx.optimizer, ctx.step, ctx.learning_rate = optimizer, step, args.learning_rate_tensor
        weights, blocks = ctx.tensors[0], []
        for feature in ctx.features:
            block = weights[feature.cells(0, feature.rows)].float() * feature.scale
            if not ctx.unpooled:
                bags = (args.offsets.numel() - 1) // len(ctx.features)
                block = torch.zeros(bags, block.shape[1]).index_add_(0, feature.bags, block)
            blocks.append(block)
        return torch.cat(blocks, dim=0 if ctx.unpooled else 1).to(SparseType.from_int(args.output_dtype).as_dtype())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        grad = grad.float()
        if ctx.optimizer.gradient_clipping:
            grad = grad.clamp(-ctx.optimizer.max_gradient, ctx.optimizer.max_gradient)
        if ctx.unpooled:
            parts = grad.split([len(feature.rows) for feature in ctx.features])
        else:
            parts = [grad[:, feature.columns][feature.bags] for feature in ctx.features]
        by_table: dict[tuple[int, int, int], list[tuple[_Feature, torch.Tensor]]] = {}
        for feature, part in zip(ctx.features, parts, strict=True):
            by_table.setdefault(feature.first, []).append((feature, part * feature.scale))
        for table in by_table.values():
            rows, which = torch.cat([feature.rows for feature, _ in table]).unique(return_inverse=True)
            each = torch.cat([part for _, part in table])
            _update(ctx, table[0][0], rows, torch.zeros(len(rows), each.shape[1]).index_add_(0, which, each))
        return (None,) * 5


def _update(ctx: Any, feature: _Feature, rows: torch.Tensor, grad: torch.Tensor) -> None:
    """Adam on distinct rows, the formula of FBGEMM's CUDA kernel: weight decay decoupled, epsilon outside the root."""
    weights, first, second = ctx.tensors
    here, of_first, of_second = (feature.cells(state, rows) for state in range(3))
    hyper = ctx.optimizer
    first[of_first] = m = hyper.beta1 * first[of_first] + (1 - hyper.beta1) * grad
    second[of_second] = v = hyper.beta2 * second[of_second] + (1 - hyper.beta2) * grad * grad
    ratio = m / (1 - hyper.beta1**ctx.step) / ((v / (1 - hyper.beta2**ctx.step)).sqrt() + hyper.eps)
    old = weights[here].float()
    weights[here] = (old - ctx.learning_rate.item() * (ratio + hyper.weight_decay * old)).to(weights.dtype)


def _invoke(args: CommonArgs, optimizer: OptimizerArgs, momentum1: Momentum, momentum2: Momentum, iter: int, **_: Any) -> torch.Tensor:
    """Stands for `lookup_adam.invoke`; what the tests do not use is refused."""
    if args.vbe_metadata.B_offsets is not None or args.feature_requires_grad is not None or optimizer.use_rowwise_bias_correction:
        raise NotImplementedError("reference Adam: no variable batch per feature, frozen features or row-wise bias correction")
    if args.indice_weights is not None and args.indice_weights.requires_grad:
        raise NotImplementedError("reference Adam: no gradient of per-sample weights")
    return _LookupAdam.apply(args.placeholder_autograd_tensor, args, optimizer, (momentum1, momentum2), iter)
