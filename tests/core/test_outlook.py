"""Outlooks: what is refused, which placement wins, and the sentence that says why; never that FAE pays where no row is popular."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from fae_torchrec.core.access_curve import AccessCurve
from fae_torchrec.core.access_model import AccessModel, Independent
from fae_torchrec.core.cost_model import CostModel, Job, Work
from fae_torchrec.core.errors import BudgetError, ConfigError
from fae_torchrec.core.hardware import PRESETS, Hardware, hardware_preset
from fae_torchrec.core.outlook import NAMES, PARTS, Option, Outlook, _advice, best, budgets_of, fae_cold_tier, look_out
from fae_torchrec.core.tables import TableSet, TableSpec
from fae_torchrec.data.criteo_access import criteo_access
from fae_torchrec.data.criteo_shape import SPARSE_NAMES, criteo_shape

V100, CPU = hardware_preset("v100"), hardware_preset("cpu")
GIB = 2**30
SHARES = (0.002, 0.01, 0.05, 0.1, 0.2)


def _criteo(dataset: str) -> TableSet:
    shape = criteo_shape(dataset)
    rows = shape.rows(1.0).tolist()
    return TableSet(tuple(TableSpec(f"t_{n}", size, shape.embedding_dim, (n,)) for n, size in zip(SPARSE_NAMES, rows, strict=True)))


TERABYTE, KAGGLE = _criteo("terabyte"), _criteo("kaggle")  # 64 GiB and 2 GiB
LAW, UNIFORM = criteo_access("terabyte", 1.0, TERABYTE), AccessModel.uniform(TERABYTE)
BUDGETS = budgets_of(TERABYTE.total_bytes, SHARES, 0)


def _outlook(access: AccessModel, ranks: int = 1, batch_size: int = 16_384, hardware: Hardware = V100) -> Outlook:
    job = Job(access.tables, batch_size, ranks, dense_parameters=2.4e6, dense_macs=1.5e6)
    budgets = budgets_of(access.tables.total_bytes, SHARES, 0) if access.tables is not TERABYTE else BUDGETS
    return look_out(CostModel(job, access, hardware), budgets)


def _of(outlook: Outlook, placement: str) -> list[Option]:
    return [option for option in outlook.options if option.placement == placement]


def _option(placement: str, step_s: float, **more: Any) -> Option:
    parts = dict.fromkeys(PARTS, 0.0) | {"flops": step_s}
    return Option(
        **{"budget_bytes": 0, "work": Work(), "step_s": step_s, "parts": parts, "fast_bytes": 0.0, "host_bytes": 0.0, "refused": ""}
        | {"placement": placement}
        | more
    )


def test_every_placement_is_looked_at_under_every_budget() -> None:
    alone, four = _outlook(UNIFORM), _outlook(UNIFORM, ranks=4)
    assert [option.placement for option in alone.options if not option.budget_bytes] == ["hbm", "uvm", "host"]
    for outlook, ours in ((alone, ["fae"]), (four, ["fae", "fae_sharded"])):
        assert {option.placement for option in outlook.options} == {"hbm", "uvm", "host", "by_table", "uvm_caching", "prefetch", *ours}
        for placement in ("by_table", "uvm_caching", "prefetch", *ours):
            assert [option.budget_bytes for option in _of(outlook, placement)] == BUDGETS
    on_cpu = _outlook(AccessModel.uniform(KAGGLE), ranks=2, hardware=CPU)
    assert {option.placement for option in on_cpu.options} == {"host", "fae", "fae_sharded"}
    assert [option.name for option in alone.options[:3]] == ["all-HBM", "UVM", "host"] and set(NAMES) >= {o.placement for o in four.options}


def test_budgets_may_come_in_any_order_and_twice() -> None:
    model = _outlook(UNIFORM).model
    assert look_out(model, [*BUDGETS[::-1], BUDGETS[0]]).to_json() == look_out(model, BUDGETS).to_json()


def test_what_does_not_fit_is_refused_and_never_best() -> None:
    outlook = _outlook(LAW)
    (hbm,) = _of(outlook, "hbm")
    # 64.41 GiB of rows, 27.5 MiB of the dense part, 0.41 GiB of activations; 0.85 of 16 GiB can be used.
    assert hbm.refused == "takes 64.84 GiB of fast memory per rank, 13.60 GiB can be used" and hbm.fast_bytes > 64 * GIB
    assert [bool(option.refused) for option in _of(outlook, "prefetch")] == [False] * 4 + [True]
    for option in outlook.options:
        assert bool(option.refused) == (option.fast_bytes > 0.85 * 16 * GIB), "128 GiB of host memory hold all tables"
    winner = outlook.best()
    assert winner is not None and not winner.refused
    small = _outlook(LAW, hardware=replace(V100, host_bytes=64 * GIB))
    (uvm,) = _of(small, "uvm")
    assert uvm.refused == "takes 64.41 GiB of the host's memory per rank, 57.60 GiB can be used"
    assert small.best() is None and small.margin is None and not small.pays
    assert small.advice == f"FAE does not fit here: the smallest budget {uvm.refused}; take more ranks, or smaller budgets."
    assert small.to_json()["winner"] is None
    assert not _of(_outlook(LAW, ranks=2, hardware=replace(V100, host_bytes=64 * GIB)), "uvm")[0].refused, "two ranks share the tables"


def test_fae_pays_where_popular_rows_fit_and_tables_do_not() -> None:
    outlook = _outlook(LAW)
    ours, stock = outlook.best(fae=True), outlook.best(fae=False)
    assert ours is not None and stock is not None and outlook.pays and outlook.best() is ours
    assert outlook.margin == pytest.approx(stock.step_s / ours.step_s) and outlook.margin > 1.05
    assert outlook.advice.startswith(f"FAE pays here: {outlook.margin:.2f} times as fast as {stock.name}, ")
    assert f"{ours.hot_inputs:.1%} of the inputs and {ours.coverage:.1%} of the lookups are hot" in outlook.advice
    assert f"({ours.budget_bytes / TERABYTE.total_bytes:.1%} of the tables)" in outlook.advice
    assert outlook.advice.endswith(f"A step is dominated by {ours.dominated_by}.")
    # What the law says of that budget is what the option says.
    share = LAW.share(ours.budget_bytes)
    assert ours.hot_inputs == share.hot_inputs and ours.coverage == pytest.approx(float(share.coverage.mean()))


def test_the_time_of_fae_is_the_mean_of_its_hot_and_cold_steps() -> None:
    outlook = _outlook(LAW, ranks=4)
    option, model = _of(outlook, "fae")[2], outlook.model
    share = LAW.share(round(0.75 * option.budget_bytes))  # a quarter is a cache of cold rows
    assert option.step_s == pytest.approx(model.epoch_seconds(share, "uvm_caching", split_ahead=False))
    assert option.hot_inputs == share.hot_inputs
    spread = _of(outlook, "fae_sharded")[2]
    assert spread.hot_inputs == LAW.share(4 * round(0.75 * option.budget_bytes)).hot_inputs > share.hot_inputs


def test_fae_does_not_pay_where_all_tables_fit_into_fast_memory() -> None:
    outlook = _outlook(criteo_access("kaggle", 1.0, KAGGLE))
    assert not outlook.pays and ", because all tables fit into fast memory; " in outlook.advice
    stock = outlook.best(fae=False)
    assert stock is not None and stock.placement == "hbm" and f"all-HBM takes {1000 * stock.step_s:.2f} ms." in outlook.advice


def test_fae_does_not_pay_on_a_cpu_whose_memory_is_all_alike() -> None:
    outlook = _outlook(criteo_access("kaggle", 1.0, KAGGLE), batch_size=512, hardware=CPU)
    assert not outlook.pays and ", because the memory of a CPU is as fast for all rows; " in outlook.advice


@pytest.mark.parametrize("batch_size", [512, 4_096, 16_384, 65_536])
@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_fae_never_pays_where_rows_are_accessed_alike(ranks: int, batch_size: int) -> None:
    outlook = _outlook(UNIFORM, ranks, batch_size)
    assert not outlook.pays, outlook.advice
    assert outlook.advice.startswith("FAE does not "), outlook.advice


def test_uniform_accesses_are_given_as_the_reason() -> None:
    advice = _outlook(UNIFORM).advice
    assert "because a table's rows are accessed nearly alike: hot rows take" in advice and "whole tables of the same bytes" in advice
    assert "nearly alike" not in _outlook(LAW).advice


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"v100"}))
def test_small_tables_on_every_rank_are_no_reason_for_fae(name: str) -> None:
    """Uniform accesses on slow links: copies of whole small tables save exchanges, but TorchRec can copy them itself."""
    hardware = replace(hardware_preset(name), fast_bytes=200 * GIB)
    for ranks in (2, 16):
        outlook = _outlook(UNIFORM, ranks, hardware=hardware)
        assert not outlook.pays, outlook.advice


def test_many_ids_per_sample_leave_no_hot_samples() -> None:
    """Of 100 lookups all are hot with the hundredth power of the coverage, however popular the rows."""
    tables = TableSet((TableSpec("bags", 60_000_000, 64, ("ids",)), TableSpec("users", 20_000_000, 64, ("user",))))
    curves = {"bags": AccessCurve.zipf(60_000_000, 1.05, lookups=100.0), "users": AccessCurve.zipf(20_000_000, 1.05)}
    access = AccessModel(tables, curves, Independent(), "bags")
    outlook = _outlook(access, batch_size=1024)
    ours = outlook.best(fae=True)
    assert ours is not None and ours.coverage is not None
    share = access.share(ours.budget_bytes)
    assert share.hot_inputs == pytest.approx(share.coverage[0] ** 100 * share.coverage[1])
    assert ours.hot_inputs == share.hot_inputs < 0.001 < 0.7 < ours.coverage
    slow = replace(V100, step_s=1.0)  # so that no placement is faster than another
    alike = _outlook(access, batch_size=1024, hardware=slow)
    ours = max((o for o in alike.options if o.placement == "fae" and not o.refused), key=lambda option: option.budget_bytes)
    assert ours.hot_inputs is not None and ours.coverage is not None and ours.hot_inputs < 0.05 and not alike.pays
    hot = f"all are hot for {ours.hot_inputs:.2%} of the samples only, though {ours.coverage:.1%} of the ids are"
    assert f"because a sample looks up 101 ids, and {hot}; " in alike.advice


def _advised(*options: Option, ranks: int = 1, access: AccessModel = LAW) -> tuple[bool, str]:
    return _advice(CostModel(Job(access.tables, 64, ranks, 10, 10), access, V100), options)


def _fae(step_s: float, **more: Any) -> Option:
    return _option(more.pop("placement", "fae"), step_s, **{"hot_inputs": 0.6, "coverage": 0.95, "budget_bytes": GIB} | more)


def test_fae_pays_from_five_per_cent_on() -> None:
    pays, advice = _advised(_option("uvm", 0.0106), _option("hbm", 0.001, refused="too large"), _fae(0.010))
    assert pays and "1.06 times as fast as UVM, 10.00 ms against 10.60 ms a step, with 1.00 GiB per rank (1.6% of the tables)" in advice
    assert "60.0% of the inputs and 95.0% of the lookups are hot. A step is dominated by the dense part." in advice
    pays, advice = _advised(_option("uvm", 0.0104), _fae(0.010))
    assert not pays and advice == (
        "FAE does not pay here, because a step is dominated by the dense part; the best it would do is 10.00 ms a step with 1.00 GiB per "
        "rank (1.6% of the tables), UVM takes 10.40 ms."
    )
    pays, advice = _advised(_option("uvm", 0.010, refused="too large"), _fae(0.010, budget_bytes=2**20))
    assert (
        pays
        and advice == "No stock placement fits here; FAE does, with 1.0 MiB per rank (0.0% of the tables) of fast memory: 10.00 ms a step."
    )
    pays, advice = _advised(_option("uvm", 0.010), _fae(0.020, refused="takes 1"), _fae(0.010, refused="takes 2"))
    assert not pays and "the smallest budget takes 1;" in advice


def test_whole_tables_of_the_same_bytes_are_what_hot_rows_must_beat() -> None:
    """1 GiB holds the 20 smallest tables of Terabyte whole, 20/26 of the lookups; eight copies of 1/8 GiB hold no more tables."""
    room = TERABYTE.total_bytes
    sizes = sorted(table.total_bytes for table in TERABYTE)
    held = sum(sum(sizes[: number + 1]) <= GIB for number in range(26)) / 26
    assert held == 20 / 26
    needed = 1 - 0.7 * (1 - held)
    # One rank, hot rows copied to eight ranks, and hot rows spread over eight ranks: 1 GiB of different rows each time.
    cases: list[tuple[int, dict[str, Any]]] = [(1, {}), (8, {}), (8, {"placement": "fae_sharded", "budget_bytes": GIB // 8})]
    for ranks, more in cases:
        for coverage, pays in ((needed + 0.01, True), (needed - 0.01, False)):
            found, advice = _advised(_option("uvm", 0.010), _fae(0.005, coverage=coverage, **more), ranks=ranks)
            assert found == pays, advice
            assert pays or f"hot rows take {coverage:.1%} of the lookups, whole tables of the same bytes {held:.1%}" in advice
    assert not _advised(_option("hbm", 0.010), _fae(0.005, coverage=needed - 0.01))[0]
    pays, advice = _advised(_option("hbm", 0.010), _fae(0.005, coverage=1.0, hot_inputs=1.0, budget_bytes=room))
    assert not pays and "because whole tables fit where hot rows do" in advice


def test_best_and_margin() -> None:
    options = (_option("uvm", 0.02), _option("prefetch", 0.015), _option("hbm", 0.001, refused="x"), _fae(0.012), _fae(0.010))
    model = CostModel(Job(TERABYTE, 64, 1, 10, 10), LAW, V100)
    outlook = Outlook(model, options, True, "")
    assert (outlook.best(), outlook.best(fae=False), outlook.best(fae=True)) == (options[4], options[1], options[4])
    assert outlook.margin == pytest.approx(1.5), "over the next placement, not the next budget"
    assert Outlook(model, options[3:], True, "").margin is None
    assert best([]) is None and best(options[:3], fae=True) is None
    busy = replace(options[1], step_s=0.01, parts=dict(options[1].parts, steps=0.01))
    assert best([busy, options[4]]) is busy, "of equals stock"
    small = replace(options[4], budget_bytes=1)
    assert best([options[4], small, replace(options[4], step_s=0.00995)]) is small, "of those that take as long the smallest budget"
    assert best([options[4], replace(small, step_s=0.0102)]) is options[4]
    idle = replace(small, parts=dict.fromkeys(PARTS, 0.0))
    assert best([small, idle]) is idle, "and then the one that leaves the device more to spare"


def test_dominated_by_groups_parts_and_leaves_out_a_host_that_is_not_the_longer_one() -> None:
    parts = dict.fromkeys(PARTS, 0.0) | {"flops": 3.0, "fast_rows": 2.0, "fast_bytes": 2.0, "link_bytes": 3.5}
    rows = replace(_option("uvm", 10.5), parts=parts)
    assert rows.dominated_by == "rows in fast memory", "2 + 2 of rows are more than 3.5"
    hidden = replace(rows, parts={**parts, "steps": 6.0})  # a GPU: 10.5 beside 6
    assert hidden.dominated_by == "rows in fast memory"
    bound = replace(rows, step_s=12.0, parts={**parts, "steps": 12.0})
    assert bound.dominated_by == "the host, which queues the step"
    on_cpu = replace(rows, step_s=16.5, parts={**parts, "steps": 6.0})  # 10.5 and then 6
    assert on_cpu.dominated_by == "the host, which queues the step"


@pytest.mark.parametrize("name", ["v100", "gh200", "cpu"])
def test_json_is_plain_and_finite(name: str) -> None:
    outlook = _outlook(LAW, ranks=2, batch_size=2048, hardware=hardware_preset(name))
    values = json.loads(json.dumps(outlook.to_json(), allow_nan=False))
    assert values["hardware"] == hardware_preset(name).to_json()
    assert (values["ranks"], values["batch_size"], values["pays"], values["advice"]) == (2, 2048, outlook.pays, outlook.advice)
    assert len(values["options"]) == len(outlook.options) and values["margin"] == outlook.margin
    winner = outlook.best()
    assert values["winner"] == (winner and {"placement": winner.placement, "budget_bytes": winner.budget_bytes})
    for value, option in zip(values["options"], outlook.options, strict=True):
        assert value["name"] == option.name and value["dominated_by"] == option.dominated_by
        assert value["work"].keys() == value["parts_s"].keys() == PARTS.keys()
        assert math.isclose(sum(value["parts_s"].values()), sum(option.parts.values()))
        assert 0 < value["step_s"] < 1e3 and all(seconds >= -1e-12 for seconds in value["parts_s"].values())
        if name == "cpu" and not option.is_fae:
            assert value["step_s"] == pytest.approx(sum(value["parts_s"].values()))


def test_the_cold_tier_is_what_the_planner_would_take() -> None:
    models = [CostModel(Job(TERABYTE, 64, ranks, 10, 10), LAW, hardware) for ranks, hardware in ((1, V100), (2, V100), (2, CPU))]
    assert [fae_cold_tier(model) for model in models] == ["uvm", "uvm_caching", "host"]


def test_budgets_of() -> None:
    assert budgets_of(1000, [0.5, 0.01, 0.1, 0.5], 0) == [10, 100, 500]
    assert budgets_of(1000, [0.5, 0.01, 0.1], 100) == [100, 500]
    with pytest.raises(BudgetError, match="largest budget is 500 bytes, tables that are always hot take 501; give a larger one"):
        budgets_of(1000, [0.5, 0.01], 501)
    with pytest.raises(BudgetError, match="largest budget is 0 bytes"):
        budgets_of(1000, [], 1)


def test_budgets_that_cannot_be_are_refused() -> None:
    model = _outlook(UNIFORM).model
    with pytest.raises(ConfigError, match="at least one budget, received none"):
        look_out(model, [])
    least = sum(table.total_bytes for table in TERABYTE if table.rows <= 1024)
    with pytest.raises(BudgetError, match=f"smallest budget is {least - 1} bytes, tables of at most 1024 rows, .* take {least}; give"):
        look_out(model, [GIB, least - 1])
    assert _of(look_out(model, [least]), "fae")[0].budget_bytes == least
