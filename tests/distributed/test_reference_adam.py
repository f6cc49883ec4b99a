"""The reference Adam looks up as the stock CPU kernel does, and updates as torch's own Adam does on the rows touched."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torchrec.modules.embedding_configs import PoolingType

from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from tests.distributed import small_model
from tests.distributed.reference_adam import reference_adam
from tests.distributed.small_model import Case, new_batch, optimizer_state, shard, train, whole_tensors

SHAPES = [(7, 4), (30, 8)]  # rows, dim
TABLE_OF_FEATURE = [0, 1, 1]
BAGS = 5
POOLINGS = [(PoolingMode.SUM, False), (PoolingMode.SUM, True), (PoolingMode.MEAN, False), (PoolingMode.NONE, False)]  # and whether weighted
SETTINGS = {"learning_rate": 0.05, "eps": 1e-3, "beta1": 0.8, "beta2": 0.95}


def _kernel(optimizer: EmbOptimType, pooling: PoolingMode = PoolingMode.SUM, **settings: float) -> Any:
    shapes = SHAPES if pooling is not PoolingMode.NONE else [(rows, 4) for rows, _ in SHAPES]
    with reference_adam():
        kernel = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in shapes],
            feature_table_map=TABLE_OF_FEATURE,
            pooling_mode=pooling,
            optimizer=optimizer,
            **settings,
        )
    generator = torch.Generator().manual_seed(1)
    for weight in kernel.split_embedding_weights():
        weight.copy_(torch.rand(weight.shape, generator=generator) - 0.5)
    return kernel


def _ids(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Few distinct rows, so that they repeat in a bag and between features of one table; empty bags; weights."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, 4, (len(TABLE_OF_FEATURE) * BAGS,), generator=generator)
    indices = torch.randint(0, 7, (int(lengths.sum()),), generator=generator)
    return indices, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), torch.rand(len(indices), generator=generator)


@pytest.mark.parametrize(("pooling", "weighted"), POOLINGS)
def test_forward_is_the_stock_kernels(pooling: PoolingMode, weighted: bool) -> None:
    indices, offsets, weights = _ids(0)
    ours, stock = _kernel(EmbOptimType.ADAM, pooling), _kernel(EmbOptimType.EXACT_SGD, pooling)
    with reference_adam():
        out = ours(indices, offsets, weights if weighted else None)
    torch.testing.assert_close(out, stock(indices, offsets, weights if weighted else None), rtol=1e-6, atol=1e-7)
    assert out.requires_grad


def _by_torch(step: int, tables: list[torch.Tensor], pooling: PoolingMode, weighted: bool) -> torch.Tensor:
    """The same lookup by `embedding_bag`, with sparse gradients that SparseAdam takes."""
    indices, offsets, weights = _ids(step)
    blocks = []
    for i, table in enumerate(TABLE_OF_FEATURE):
        bounds = offsets[i * BAGS : (i + 1) * BAGS + 1]
        ids, scale = indices[bounds[0] : bounds[-1]], weights[bounds[0] : bounds[-1]]
        if pooling is PoolingMode.NONE:
            blocks.append(torch.nn.functional.embedding(ids, tables[table], sparse=True))
            continue
        blocks.append(
            torch.nn.functional.embedding_bag(
                ids,
                tables[table],
                bounds - bounds[0],
                mode=pooling.name.lower(),
                sparse=True,
                per_sample_weights=scale if weighted else None,
                include_last_offset=True,
            )
        )
    return torch.cat(blocks, dim=0 if pooling is PoolingMode.NONE else 1)


def _epsilon_as_fbgemm(optimizer: torch.optim.SparseAdam, epsilon: float, step: int) -> None:
    """SparseAdam adds its epsilon before it corrects the second momentum's bias; FBGEMM, as torch's dense Adam, after."""
    (group,) = optimizer.param_groups
    group["eps"] = epsilon * (1 - group["betas"][1] ** step) ** 0.5


@pytest.mark.parametrize(("pooling", "weighted"), POOLINGS)
def test_updates_are_those_of_torch(pooling: PoolingMode, weighted: bool) -> None:
    kernel = _kernel(EmbOptimType.ADAM, pooling, **SETTINGS)
    tables = [weight.clone().requires_grad_() for weight in kernel.split_embedding_weights()]
    optimizer = torch.optim.SparseAdam(tables, lr=0.05, betas=(0.8, 0.95))
    for step in range(6):
        indices, offsets, weights = _ids(step)
        with reference_adam():
            out = kernel(indices, offsets, weights if weighted else None)
        (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
        optimizer.zero_grad()
        same = _by_torch(step, tables, pooling, weighted)
        (same * torch.arange(same.numel()).view_as(same).sin()).sum().backward()
        _epsilon_as_fbgemm(optimizer, 1e-3, step + 1)
        optimizer.step()
    for table, weight, state in zip(tables, kernel.split_embedding_weights(), kernel.get_optimizer_state(), strict=True):
        torch.testing.assert_close(weight, table.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dict(state), {name: optimizer.state[table][name] for name in state}, rtol=1e-5, atol=1e-7)
        assert sorted(state) == ["exp_avg", "exp_avg_sq"]
    untouched = kernel.split_embedding_weights()[1][7:]
    assert torch.equal(untouched, _kernel(EmbOptimType.ADAM, pooling).split_embedding_weights()[1][7:]), "rows not touched stay"


def test_epsilon_weight_decay_and_clipping_by_hand() -> None:
    kernel = _kernel(EmbOptimType.ADAM, learning_rate=0.5, weight_decay=0.1, gradient_clipping=True, max_gradient=2.0, eps=1.0)
    expected = kernel.split_embedding_weights()[0].clone()
    offsets = torch.tensor([0, 1, *[1] * (len(TABLE_OF_FEATURE) * BAGS - 1)])
    for _ in range(2):
        with reference_adam():
            out = kernel(torch.tensor([3]), offsets)
        (out[0, :4] * 100).sum().backward()
        # A constant gradient of 2: at every step the corrected momenta are 2 and 4.
        expected[3] -= 0.5 * (2 / (2 + 1) + 0.1 * expected[3])
        torch.testing.assert_close(kernel.split_embedding_weights()[0], expected)
    torch.testing.assert_close(kernel.get_optimizer_state()[0]["exp_avg"][3], torch.full((4,), 0.1 * 2.0 * (1 + 0.9)))


def test_without_it_the_cpu_refuses_adam() -> None:
    """If FBGEMM learns Adam on the CPU, this module goes."""
    with pytest.raises(AssertionError, match="not supported in CPU mode"):
        SplitTableBatchedEmbeddingBagsCodegen(
            [(7, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], feature_table_map=[0], optimizer=EmbOptimType.ADAM
        )


CASE = Case(optimizer="adam", pooling=PoolingType.MEAN, steps=5)


def _train_stock(rank: int) -> Any:
    with reference_adam(), mock.patch.dict(small_model.OPTIMIZERS, adam=torch.optim.Adam):
        model = shard(CASE, None)
        train(model, (new_batch(CASE, step, rank) for step in range(CASE.steps)))
        return whole_tensors(model.state_dict()), optimizer_state(model)


@cache
def _trained(ranks: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return run_on_local_ranks(_train_stock, ranks, timeout_s=60)[0]


def test_stock_sharded_model_is_the_unsharded_one_under_torch() -> None:
    """Two ranks, table-wise: the same as one model that torch trains on both ranks' batches, its gradient their mean."""
    weights, state = _trained(2)
    with mock.patch.dict(small_model.OPTIMIZERS, adam=torch.optim.Adam):
        model = small_model.SmallModel(CASE)
        model.over.load_state_dict(small_model.new_model(CASE).over.state_dict())
    tables = {key: value.clone().requires_grad_() for key, value in small_model.start_weights(CASE).items()}
    adam = torch.optim.SparseAdam(list(tables.values()), lr=small_model.LEARNING_RATE)
    sgd = torch.optim.SGD(model.over.parameters(), lr=small_model.LEARNING_RATE)
    for step in range(CASE.steps):
        adam.zero_grad()
        sgd.zero_grad()
        for rank in range(2):
            batch = new_batch(CASE, step, rank)
            pooled = {}
            for config in small_model.configs(CASE):
                for name, feature in zip(small_model._names(config, CASE), config.feature_names, strict=True):
                    ids = batch.sparse_features[feature]
                    table = tables[f"ebc.embedding_bags.{config.name}.weight"]
                    pooled[name] = torch.nn.functional.embedding_bag(
                        ids.values(), table, ids.offsets().long(), mode="mean", sparse=True, include_last_offset=True
                    )
            logits = model.over(torch.cat([batch.dense_features, *(pooled[name] for name in model.names)], dim=1)).squeeze(1)
            (torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels) / 2).backward()
        _epsilon_as_fbgemm(adam, 1e-8, step + 1)
        adam.step()
        sgd.step()
    for key, table in tables.items():
        torch.testing.assert_close(weights[key], table.detach(), rtol=1e-5, atol=1e-5)
        name = key.split(".")[-2]
        torch.testing.assert_close(state[f"{key}/{name}.momentum1"], adam.state[table]["exp_avg"], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(state[f"{key}/{name}.exp_avg_sq"], adam.state[table]["exp_avg_sq"], rtol=1e-4, atol=1e-12)
