"""When the stock planner's search is bounded, and what of."""

from __future__ import annotations

from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.types import ParameterConstraints

from fae_torchrec.core.tables import TableSpec
from fae_torchrec.distributed.stock_search import stock_search

TYPES = ["table_wise", "row_wise", "table_row_wise"]


def _tables(number: int) -> list[TableSpec]:
    """One table of half of all bytes, and equal ones."""
    small = [TableSpec(f"t{i}", 1000, 4, (f"f{i}",)) for i in range(number - 1)]
    return [TableSpec("big", 1000 * (number - 1), 4, ("f",)), *small]


def _constraints(tables: list[TableSpec]) -> dict[str, ParameterConstraints]:
    return {table.name: ParameterConstraints(sharding_types=list(TYPES)) for table in tables}


def topology(ranks: int) -> Topology:
    return Topology(world_size=ranks, local_world_size=min(ranks, 8), compute_device="cuda")


def test_a_small_search_is_left_alone() -> None:
    tables = _tables(20)
    constraints, given = _constraints(tables), {"batch_size": 8}
    found = stock_search(tables, topology(8), constraints, given)
    assert found.constraints is constraints and found.arguments is given and found.reason == ""


def test_a_large_search_is_bounded() -> None:
    tables = _tables(300)
    constraints = _constraints(tables)
    found = stock_search(tables, topology(64), constraints, {"batch_size": 8}, chosen=["t7"])
    assert found.constraints["big"].sharding_types == TYPES, "more than a rank's share"
    assert found.constraints["t0"].sharding_types == ["table_wise"]
    assert found.constraints["t7"].sharding_types == TYPES, "the user's own choice"
    assert constraints["t0"].sharding_types == TYPES, "what was given stays as it was"
    assert len(found.arguments["proposer"]) == 3 and found.arguments["batch_size"] == 8
    assert found.reason.startswith("300 tables on 64 ranks: the 298 tables that are smaller than a rank's share")
    rough = stock_search(tables, topology(64), constraints, {}, rough=True)
    assert rough.constraints["big"].sharding_types == ["table_wise"]


def test_a_proposer_of_ones_own_is_kept() -> None:
    proposer = GreedyProposer()
    found = stock_search(_tables(300), topology(64), {}, {"proposer": proposer})
    assert found.arguments["proposer"] is proposer and "give up" not in found.reason
