"""Replicas that differ in one bit are found, on every rank, and named."""

from __future__ import annotations

from functools import cache

import torch

from fae_torchrec.core.errors import ReplicaError
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.replica_check import checksum
from tests.distributed.small_model import Case, new_batch, placement_of, shard, train

CASE = Case(optimizer="rowwise_adagrad")


def test_a_checksum_sees_every_bit_and_every_place() -> None:
    tensor = torch.tensor([1.0, 2.0, -3.0])
    bits = tensor.view(torch.int32).tolist()
    assert checksum(tensor).tolist() == [sum(bits), bits[0] + 2 * bits[1] + 3 * bits[2]]
    assert checksum(tensor).tolist() != checksum(tensor[[1, 0, 2]]).tolist()
    assert checksum(torch.tensor([0.0])).tolist() != checksum(torch.tensor([-0.0])).tolist()
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        values = torch.arange(4).to(dtype)
        other = values.clone()
        other[2] = 7
        assert checksum(values).tolist() != checksum(other).tolist()
    assert checksum(torch.empty(0, 4)).tolist() == [0, 0]


def _check(rank: int) -> list[str]:
    model = shard(CASE, placement_of(CASE))
    train(model, [new_batch(CASE, step, rank) for step in range(3)])
    module = model.module.ebc
    module.check_replicas()
    messages = []
    tables = {table.table: table.tensors() for table in module._hot.tables()}
    for table, name in (("big", "weight"), ("wide", "sum")):
        value = tables[table][name].view(-1)[3:4]
        if rank == 1:  # the lowest bit of one element
            value.view(torch.int32).bitwise_xor_(1)
        try:
            module.check_replicas()
        except ReplicaError as error:
            messages.append(str(error))
    module.promote()
    module.check_replicas()
    return messages


@cache
def _messages() -> list[list[str]]:
    return run_on_local_ranks(_check, 2, timeout_s=60)


def test_one_bit_is_found_on_every_rank_and_mended_by_promoting() -> None:
    first, second = _messages()
    assert first == second
    assert "{'big/weight': [1]}" in first[0]
    assert "{'big/weight': [1], 'wide/sum': [1]}" in first[1]


def test_one_rank_has_nothing_to_compare() -> None:
    assert run_on_local_ranks(_check, 1, timeout_s=60) == [[]]
