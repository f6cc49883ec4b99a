"""The cold tier on the host, where the device's own would be: the same result, pipelined or not; on a CPU both are the same memory."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch

from fae_torchrec.distributed import tier_builder
from fae_torchrec.distributed.host_tier import HostTier, OnHost
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.local_tier import LocalTier
from tests.distributed import sequence_model
from tests.distributed.sequence_model import Setup
from tests.distributed.small_model import Case, new_batch, optimizer_state, placement_of, shard, train, whole_tensors
from tests.training.small_pipeline import new_batches, run_pipeline

CASE = Case("rowwise_adagrad")
KINDS = "MCHHMCHM"


def _trained(rank: int, *, pipelined: bool) -> dict[str, torch.Tensor]:
    model = shard(CASE, placement_of(CASE))
    batches = new_batches(CASE, KINDS, rank)
    if pipelined:
        run_pipeline(model, batches)
    else:
        train(model, batches)
    return {**whole_tensors(model.state_dict()), **optimizer_state(model)}


def _sequences(rank: int) -> dict[str, torch.Tensor]:
    setup = Setup("rowwise_adagrad")
    model = sequence_model.shard(setup, sequence_model.placement_of(setup))
    train(model, [sequence_model.new_batch(setup, step, rank, hot=step % 3 == 0) for step in range(5)])
    return {**whole_tensors(model.state_dict()), **optimizer_state(model)}


def _see(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {"device": _trained(rank, pipelined=False), "sequences": _sequences(rank)}
    with mock.patch.object(tier_builder, "StockTier", HostTier), mock.patch.object(LocalTier, "fits", return_value=False):
        seen["host"] = _trained(rank, pipelined=False)
        seen["host, pipelined"] = _trained(rank, pipelined=True)
        seen["sequences, host"] = _sequences(rank)
        collection = shard(CASE, placement_of(CASE)).module.ebc
        context = collection.create_context()
        inputs = list(collection.input_dist(context, new_batch(CASE, 0, rank).sparse_features).wait().wait())
    seen["wrapped"] = [isinstance(part, OnHost) for part in (context.cold, inputs[1])]
    return seen


@cache
def _seen(ranks: int) -> list[dict[str, Any]]:
    return run_on_local_ranks(_see, ranks, timeout_s=120)


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_trains_as_the_device_does(ranks: int) -> None:
    for seen in _seen(ranks):
        for one, other in (("host", "device"), ("host, pipelined", "device"), ("sequences, host", "sequences")):
            assert seen[one].keys() == seen[other].keys()
            assert all(torch.equal(seen[one][key], value) for key, value in seen[other].items()), (one, other)


def test_no_stream_is_told_of_what_lies_on_the_host() -> None:
    assert _seen(1)[0]["wrapped"] == [True, True]
