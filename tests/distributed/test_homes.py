"""Homes moves rows between tables that are cut differently over the ranks, bit for bit and a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fae_torchrec.distributed import homes
from fae_torchrec.distributed.homes import Homes, LocalTable
from fae_torchrec.distributed.local_ranks import run_on_local_ranks

DTYPES = {"weight": torch.float16, "momentum": torch.float32, "sum": torch.float32, "steps": torch.int64}
DIM = 3
HOT_IDS = {"split": [1, 4, 5, 8, 9, 10, 19], "other": [0, 2]}
ROWS = {"split": 20, "other": 3, "hot": 4}
# First row and rows of the shard on each rank. `other` has hot rows and home on different ranks, `hot` is all hot.
HOT_CUTS = {"split": [(0, 3), (3, 4)], "other": [(0, 2), None], "hot": [(0, 2), (2, 2)]}
COLD_CUTS = {"split": [(0, 9), (9, 11)], "other": [None, (0, 3)]}
# Values that a sum in floating point would change or hide.
ODD = torch.tensor([-0.0, float("nan"), float("-inf"), 6e-8, 65504.0])


def _whole(rows: int, seed: int, name: str) -> torch.Tensor:
    """A table's tensor, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, DIM) if name in ("weight", "momentum") else (rows,)
    values = torch.rand(shape, generator=generator) - 0.5
    values.view(-1)[:2] = ODD[seed % 4 : seed % 4 + 2]
    return values.to(DTYPES[name]) if name != "steps" else torch.tensor([seed])


def _tables(cuts: dict[str, list[Any]], rows: dict[str, int], seed: int, rank: int, names: list[str]) -> list[LocalTable]:
    """This rank's shards; `steps` is of the whole kernel."""
    tables = []
    for table, of_ranks in cuts.items():
        if of_ranks[rank] is None:
            continue
        first, count = of_ranks[rank]
        whole = {name: _whole(rows[table], seed + i, name) for i, name in enumerate(names)}
        here = {name: value if name == "steps" else value[first : first + count].clone() for name, value in whole.items()}
        weights = here.pop("weight")
        tables.append(LocalTable(table, first, 0, weights, here, kernel=None))  # type: ignore[arg-type]
    return tables


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _together(tables: list[LocalTable]) -> dict[str, dict[str, torch.Tensor]]:
    """All ranks' shards as whole tensors."""
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, [(table.table, table.row_offset, table.tensors()) for table in tables])
    whole: dict[str, dict[str, torch.Tensor]] = {}
    for table, _, tensors in sorted((shard for of_rank in of_all for shard in of_rank), key=lambda shard: shard[1]):
        for name, tensor in tensors.items():
            known = whole.setdefault(table, {})
            known[name] = torch.cat([known[name], tensor]) if name in known else tensor
    return whole


def _move(rank: int, part_bytes: int) -> dict[str, Any]:
    names = list(DTYPES)
    hot = _tables(HOT_CUTS, {"split": 7, "other": 2, "hot": 4}, 10, rank, names)
    cold = _tables(COLD_CUTS, ROWS, 50, rank, names)
    settled: list[str] = []
    seen: dict[str, Any] = {"hot at first": _together(hot), "cold at first": _together(cold)}
    moved: list[int] = []

    def spy(tensor: torch.Tensor, group: Any) -> None:
        moved.append(tensor.numel() * tensor.element_size())
        of_group(tensor, group)

    of_group: Callable[..., None] = homes.sum_of_disjoint
    with (
        mock.patch.object(homes, "local_tables", lambda lookups: iter(cold)),
        mock.patch.object(homes, "sum_of_disjoint", spy),
        mock.patch.object(homes, "PART_BYTES", part_bytes),
    ):
        hot_ids = {table: torch.tensor(ids) for table, ids in HOT_IDS.items()}
        at = Homes(lambda: iter(hot), [], hot_ids, [], dist.group.WORLD, lambda: settled.append("settled"), replicated=False)
        at.write_back()
        seen["nothing changed"] = _together(cold)
        seen["moved for nothing"] = list(moved)
        at.hot_rows_change()
        at.write_back()
        seen["written back"], seen["moved"] = _together(cold), list(moved)
        for table in cold:
            table.weights.fill_(2.0)
        at.write_back()
        seen["cold after another"] = _together(cold)
        at.promote()
        seen["promoted"] = _together(hot)
    seen["settled"] = settled
    return seen


@pytest.fixture(scope="module", params=[1, 20, 10**6], ids="{} bytes at a time".format)
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    first, second = run_on_local_ranks(_move, 2, request.param, timeout_s=60)
    assert [first["moved"], first["settled"]] == [second["moved"], second["settled"]], "every rank takes part alike"
    return {**first, "part": request.param}


def test_write_back_moves_hot_rows_bit_for_bit_and_no_others(seen: dict[str, Any]) -> None:
    assert seen["moved for nothing"] == []
    for table, ids in HOT_IDS.items():
        before, hot, after = (seen[name][table] for name in ("cold at first", "hot at first", "written back"))
        cold = [i for i in range(ROWS[table]) if i not in ids]
        for name in ("weight", "momentum", "sum"):
            assert torch.equal(_bits(seen["nothing changed"][table][name]), _bits(before[name])), "homes and hot rows were the same"
            assert torch.equal(_bits(after[name][ids]), _bits(hot[name])), (table, name)
            assert torch.equal(_bits(after[name][cold]), _bits(before[name][cold])), (table, name)
            assert not torch.equal(_bits(hot[name]), _bits(before[name][ids])), "control: they differed"
        assert "steps" not in after, "the kernel's own"


def test_no_more_than_a_part_moves_at_a_time(seen: dict[str, Any]) -> None:
    row = max(DIM * torch.float32.itemsize, DIM * torch.float16.itemsize)
    assert max(seen["moved"]) <= max(seen["part"], row)
    assert sum(seen["moved"]) == (7 + 2) * (DIM * 2 + DIM * 4 + 4), "every hot row of a split table once"


def test_what_was_loaded_into_the_homes_is_promoted_and_not_overwritten(seen: dict[str, Any]) -> None:
    assert all((tensors["weight"] == 2.0).all() for tensors in seen["cold after another"].values())
    for table in HOT_IDS:
        assert (seen["promoted"][table]["weight"] == 2.0).all()
        for name in ("momentum", "sum"):
            assert torch.equal(_bits(seen["promoted"][table][name]), _bits(seen["hot at first"][table][name])), (table, name)
    for name, tensor in seen["hot at first"]["hot"].items():
        assert torch.equal(_bits(seen["promoted"]["hot"][name]), _bits(tensor)), "an all-hot table is its own home"
    assert seen["settled"] == ["settled"] * 4, "the cold tier's cache, before every look at the homes"
