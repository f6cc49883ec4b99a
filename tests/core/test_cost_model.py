"""The cost model: bytes by hand, caches and whole tables by a slower method, and what must add up."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fae_torchrec.core.access_curve import AccessCurve
from fae_torchrec.core.access_model import AccessModel, HotShare, Independent
from fae_torchrec.core.cost_model import CostModel, Job, Work, _costs, _Links, step_seconds
from fae_torchrec.core.errors import ConfigError, FingerprintError
from fae_torchrec.core.hardware import Hardware, hardware_preset
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec

V100, CPU = hardware_preset("v100"), hardware_preset("cpu")
# Rows of 16 and 8 bytes of weights; "b" is looked up twice by every sample, through one feature.
TABLES = TableSet((TableSpec("a", 1000, 4, ("x",), optimizer=Optimizer.ADAGRAD), TableSpec("b", 10, 2, ("y",))))
CURVES = {"a": AccessCurve.uniform(1000), "b": AccessCurve.uniform(10, 2.0)}
ACCESS = AccessModel(TABLES, CURVES, Independent(), "by hand")
A_BYTES, B_BYTES = 16 + 16, 8 + 4  # of a row with its state


def _model(ranks: int, batch_size: int = 3, hardware: Hardware = V100, access: AccessModel = ACCESS) -> CostModel:
    return CostModel(Job(access.tables, batch_size, ranks, dense_parameters=10, dense_macs=100), access, hardware)


def _distinct(rows: float, lookups: float) -> float:
    """Of evenly accessed rows."""
    return rows * (1 - (1 - 1 / rows) ** lookups)


def test_the_dense_part_by_hand() -> None:
    alone, four = _model(1).stock("hbm"), _model(4).stock("hbm")
    assert alone.flops == four.flops == 3 * 100 * 6, "two operations a multiplication, forward once, backward twice"
    assert alone.sent_bytes == alone.collectives == 0
    # Of 40 bytes of gradients a ring sends 3/4 twice; the exchange of ids and rows is in the next test.
    assert four.sent_bytes - (72 + 24 + 144) * 3 / 4 == pytest.approx(2 * 40 * 3 / 4)


def test_stock_exchange_of_two_ranks_by_hand() -> None:
    work = _model(2).stock("hbm")
    ids, lengths, pooled = 8 * 3 * 3, 4 * 3 * 2, 4 * 3 * (4 + 2)
    assert work.intra_bytes == pytest.approx((ids + lengths + 2 * pooled) / 2 + 40)
    assert (work.inter_bytes, work.collectives, work.tiers) == (0, 6, 1), "three of ids, two of rows, one of dense gradients"
    touched_a, touched_b = _distinct(1000, 6) / 2, _distinct(10, 12) / 2
    assert work.fast_rows == pytest.approx(9 + touched_a + touched_b)
    moved = 3 * 16 + 6 * 8 + 2 * (touched_a * A_BYTES + touched_b * B_BYTES)
    assert work.fast_bytes == pytest.approx(moved + 2 * pooled)
    assert work.link_bytes == work.host_rows == work.cache_ids == work.split_ids == 0


def test_stock_placements_on_one_rank_by_hand() -> None:
    model, touched_a, touched_b = _model(1), _distinct(1000, 3), _distinct(10, 6)
    pooled = 4 * 3 * (4 + 2)
    # Weights for the forward, and for the update there and back; Adagrad's state there and back; row-wise state stays in HBM.
    uvm = model.stock("uvm")
    assert uvm.link_bytes == pytest.approx(touched_a * (3 * 16 + 2 * 16) + touched_b * 3 * 8)
    assert uvm.fast_bytes == 2 * pooled
    host = model.stock("host")
    assert host.link_bytes == 2 * pooled and host.host_rows == pytest.approx(9 + touched_a + touched_b)
    assert host.host_bytes == pytest.approx(3 * 16 + 6 * 8 + 2 * (touched_a * A_BYTES + touched_b * B_BYTES))
    by_table = model.stock("by_table", 10 * B_BYTES)
    assert by_table.link_bytes == pytest.approx(touched_a * 80)
    assert by_table.fast_bytes == pytest.approx(2 * pooled + 6 * 8 + 2 * touched_b * B_BYTES)
    assert model.stock("by_table", 0).link_bytes == pytest.approx(uvm.link_bytes)
    assert model.stock("by_table", TABLES.total_bytes) == model.stock("hbm")
    nothing_kept = model.stock("prefetch", 0)
    assert nothing_kept.link_bytes == pytest.approx(touched_a * (2 * 16 + 2 * 16) + touched_b * 2 * 8)
    assert nothing_kept.cache_ids == 9 and 0 < model.stock("uvm_caching", 0).cache_ids < 9
    assert model.stock("prefetch", 10**6).link_bytes == 0, "all rows fit into the cache"
    # With room for 510 rows all of b is there, whose rows are looked up most, and about half of a.
    slot = (1000 * 16 + 10 * 8) / 1010 + 20
    assert model.stock("prefetch", 510 * slot).link_bytes == pytest.approx(touched_a * 64 / 2, rel=0.01)
    # On a CPU all memory is the same.
    for placement in ("hbm", "uvm", "host", "prefetch"):
        assert _model(1, hardware=CPU).stock(placement) == model.stock("hbm")  # type: ignore[arg-type]


def _all_hot(model: CostModel) -> HotShare:
    return model.access.share(TABLES.total_bytes, pinned_max_rows=1)


def _half_hot(model: CostModel) -> HotShare:
    """All of b, which has more lookups per byte, and half of a."""
    share = model.access.share(10 * B_BYTES + 500 * A_BYTES, pinned_max_rows=1)
    assert share.hot_rows.tolist() == [500, 10] and share.hot_inputs == 0.5
    return share


def test_hot_exchange_by_gathering_by_hand() -> None:
    model = _model(2)
    work = model.fae(_all_hot(model), "hot", "uvm", split_ahead=True)
    own_a, own_b = _distinct(1000, 3), _distinct(10, 6)
    slots = 4 * (own_a + own_b) + 3 * 8
    gradients = 4 * (4 * own_a + 2 * own_b)
    assert work.sent_bytes == pytest.approx(slots + gradients + 40)
    assert (work.collectives, work.tiers, work.split_ids) == (3 + 1, 1, 0)
    # Every rank updates the rows of both.
    assert work.fast_rows == pytest.approx(9 + 2 * (own_a + own_b))
    moved = 3 * 16 + 6 * 8 + 2 * 2 * (own_a * A_BYTES + own_b * B_BYTES)
    assert work.fast_bytes == pytest.approx(moved + 2 * 4 * 3 * 6)
    assert model.fae(_all_hot(model), "hot", "uvm", split_ahead=False).split_ids == 9


def test_hot_exchange_by_a_sum_over_the_union_by_hand() -> None:
    model = _model(4, batch_size=2000)
    work = model.fae(_all_hot(model), "hot", "uvm", split_ahead=True)
    own = _distinct(1000, 2000), _distinct(10, 4000)
    union = _distinct(1000, 8000), _distinct(10, 16000)
    assert 2 * (4 * union[0] + 2 * union[1]) < 4 * (4 * own[0] + 2 * own[1]), "fewer bytes than gathering"
    slots = (4 * sum(own) + 3 * 8) * 3
    assert work.sent_bytes == pytest.approx(slots + 2 * 3 / 4 * 4 * (4 * union[0] + 2 * union[1]) + 2 * 3 / 4 * 40)
    assert work.fast_rows == pytest.approx(6000 + sum(union))
    # With few samples gathering sends less.
    few = _model(4).fae(_all_hot(model), "hot", "uvm", split_ahead=True)
    own = _distinct(1000, 3), _distinct(10, 6)
    assert few.sent_bytes == pytest.approx((4 * sum(own) + 24 + 4 * (4 * own[0] + 2 * own[1])) * 3 + 60)


def test_sharded_hot_rows_travel_as_stock_rows_do() -> None:
    model = _model(2)
    work = model.fae(_all_hot(model), "hot", "uvm", split_ahead=True, hot_tier="sharded")
    assert work == model.stock("hbm")


def test_unpooled_rows_travel_once_for_every_id() -> None:
    """Two ids of b in a sample are two rows where they are not pooled, of one bag."""
    unpooled = TableSet(tuple(replace(table, pooled=False) for table in TABLES))
    access = AccessModel(unpooled, CURVES, Independent(), "by hand")
    pooled, rows = (_model(2, access=each).stock("hbm") for each in (ACCESS, access))
    ids, lengths = 8 * 3 * 3, 4 * 3 * 2
    assert rows.sent_bytes == pytest.approx((ids + lengths + 2 * 4 * 3 * (4 + 2 * 2)) / 2 + 40)
    assert rows.sent_bytes - pooled.sent_bytes == pytest.approx(2 * 4 * 3 * 2 / 2)
    assert rows.fast_bytes - pooled.fast_bytes == pytest.approx(2 * 4 * 3 * 2)
    share = _all_hot(_model(2))
    by_row = [_model(2, access=each).fae(share, "hot", "uvm", split_ahead=True, hot_tier="row_wise") for each in (ACCESS, access)]
    assert by_row[0].sent_bytes == pytest.approx((ids + lengths + 2 * 2 * 4 * 3 * (4 + 2)) / 2 + 40), "two ranks' parts of a bag"
    assert by_row[1].sent_bytes == pytest.approx(rows.sent_bytes), "a row lies on one rank"
    # Of half of a that is cold, all of its lengths and one row an id; see the pooled form below.
    cold = _model(2, access=access).fae(_half_hot(_model(2)), "cold", "uvm_caching", split_ahead=True)
    own_b = _distinct(10, 6)
    assert cold.sent_bytes == pytest.approx(40 + (4 * own_b + 24) + 4 * 2 * own_b + (8 * 3 + 4 * 3 + 2 * 4 * 3 * 4) / 2)


def test_hot_and_cold_batches_of_a_partly_hot_table_by_hand() -> None:
    """Half of a's rows are hot: hot samples look up those alone, cold samples the others alone."""
    model = _model(1, batch_size=400)
    share, pooled = _half_hot(model), 4 * 400 * 6
    hot = model.fae(share, "hot", "uvm", split_ahead=True)
    assert hot.fast_rows == pytest.approx(400 + 800 + _distinct(500, 400) + _distinct(10, 800))
    assert hot.link_bytes == 0 and hot.tiers == 1
    cold = model.fae(share, "cold", "uvm", split_ahead=True)
    assert cold.link_bytes == pytest.approx(_distinct(500, 400) * (2 * 16 + 2 * 16)), "b has no cold rows"
    assert cold.fast_rows == pytest.approx(400 + 800 + _distinct(500, 400) + _distinct(10, 800))
    moved = 400 * 16 + 800 * 8 + 2 * (_distinct(500, 400) * A_BYTES + _distinct(10, 800) * B_BYTES)
    assert cold.fast_bytes == pytest.approx(moved + 2 * pooled + 2 * 4 * 400 * 4)
    assert (cold.tiers, cold.cache_ids, cold.host_rows) == (2, 0, 0)
    assert model.fae(share, "cold", "uvm_caching", split_ahead=True) == replace(cold, cache_ids=400)
    host = model.fae(share, "cold", "host", split_ahead=True)
    assert host.host_rows == pytest.approx(400 + _distinct(500, 400)) and host.link_bytes == 2 * 4 * 400 * 4
    assert host.fast_bytes + host.host_bytes == pytest.approx(cold.fast_bytes), "the same rows are moved, and what is pooled of them"
    on_cpu = _model(1, batch_size=400, hardware=CPU).fae(share, "cold", "host", split_ahead=True)
    assert on_cpu.link_bytes == 0 and on_cpu.host_bytes == host.host_bytes


def test_cold_exchange_of_two_ranks_by_hand() -> None:
    model = _model(2)
    share = _half_hot(model)
    cold, hot = (model.fae(share, kind, "uvm_caching", split_ahead=True) for kind in ("cold", "hot"))  # type: ignore[arg-type]
    own_b = _distinct(10, 6)
    hot_tier = (4 * own_b + 24) + 4 * 2 * own_b
    # Three ids of a and three lengths, pooled rows of four floats there and back; half of it stays on the rank.
    assert cold.sent_bytes == pytest.approx(40 + hot_tier + (8 * 3 + 4 * 3 + 2 * 4 * 3 * 4) / 2)
    own_a = _distinct(500, 3)
    assert hot.sent_bytes == pytest.approx(40 + (4 * (own_a + own_b) + 24) + 4 * (4 * own_a + 2 * own_b))
    assert (hot.collectives, cold.collectives) == (4, 9)


def test_one_rank_sends_nothing() -> None:
    model = _model(1)
    works = [model.stock(placement, 5000) for placement in ("hbm", "uvm", "by_table", "uvm_caching", "prefetch", "host")]  # type: ignore[arg-type]
    for tier in ("replicated", "sharded"):
        for share in (_all_hot(model), _half_hot(model)):
            works += [model.fae(share, kind, "uvm", split_ahead=False, hot_tier=tier) for kind in ("hot", "cold")]  # type: ignore[arg-type]
            works.append(model.epoch(share, "uvm", split_ahead=False, hot_tier=tier))  # type: ignore[arg-type]
    assert [(work.sent_bytes, work.collectives) for work in works] == [(0, 0)] * len(works)


def test_an_epoch_looks_up_what_stock_looks_up() -> None:
    """Lookups of hot and cold batches, by tier, add up to all; the law's mass of each tier is its lookups."""
    tables = TableSet((TableSpec("a", 4000, 4, ("x",)), TableSpec("b", 300, 4, ("y",))))
    access = AccessModel(tables, {"a": AccessCurve.zipf(4000, 1.1), "b": AccessCurve.zipf(300, 0.9)}, Independent(), "law")
    model = _model(1, batch_size=64, access=access)
    for budget in (20, 3_001, 30_000, 60_000):
        share = access.share(budget, pinned_max_rows=1)
        hot, cold = (model._tier_masses(share, kind) for kind in ("hot", "cold"))  # type: ignore[arg-type]
        for number, curve in enumerate(access.curves):
            in_hot = share.hot_inputs * hot[0][number] + (1 - share.hot_inputs) * cold[0][number]
            in_cold = share.hot_inputs * hot[1][number] + (1 - share.hot_inputs) * cold[1][number]
            np.testing.assert_allclose(in_hot, curve.mass * share.hot[number], atol=1e-12)
            np.testing.assert_allclose(in_cold, curve.mass * (1 - share.hot[number]), atol=1e-12)
        if share.hot_inputs:
            assert [float(of_table.sum()) for of_table in hot[0]] == pytest.approx([1, 1])
        assert [float((h + c).sum()) for h, c in zip(*cold, strict=True)] == pytest.approx([1, 1])


def _simulated_misses(draws: list[np.ndarray], size: int) -> float:
    """Rows that a step brings into an LRU cache, mean of the second half of the steps."""
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    missed = []
    for step in zip(*draws, strict=True):
        rows = [(table, row) for table, ids in enumerate(step) for row in np.unique(ids).tolist()]
        missed.append(sum(row not in cache for row in rows))
        for row in rows:
            cache[row] = None
            cache.move_to_end(row)
        while len(cache) > size:
            cache.popitem(last=False)
    return float(np.mean(missed[len(missed) // 2 :]))


@pytest.mark.parametrize(("size", "ranks"), [(150, 1), (400, 1), (400, 2), (900, 1)])
def test_cache_misses_against_a_simulated_cache(size: int, ranks: int) -> None:
    tables = TableSet((TableSpec("a", 1000, 4, ("x",)), TableSpec("b", 800, 4, ("y", "z"))))
    curves = {"a": AccessCurve.zipf(1000, 1.1, 2.0), "b": AccessCurve.zipf(800, 0.7, lookups=2.0)}
    model = _model(ranks, batch_size=32 // ranks, access=AccessModel(tables, curves, Independent(), "law"))
    random = np.random.default_rng(size)
    draws = [random.choice(len(c.chance), size=(600, int(32 * c.lookups)), p=c.chance) for c in curves.values()]
    slot = 16 + 20  # a row's weights and FBGEMM's bookkeeping
    assert model.cache_misses(size * slot / ranks) == pytest.approx(_simulated_misses(draws, size), rel=0.05)
    assert model.cache_misses(1800 * slot) == 0
    assert model.cache_misses(0) == pytest.approx(sum(curve.distinct(32).sum() for curve in curves.values()))


def test_whole_tables_by_hand() -> None:
    """Lookups per byte: b 2/120, c 1/80, a 1/32,000."""
    tables = TableSet((*TABLES, TableSpec("c", 5, 3, ("z",))))
    access = AccessModel(tables, {**CURVES, "c": AccessCurve.uniform(5)}, Independent(), "by hand")
    one, two = _model(1, access=access), _model(2, access=access)
    rooms = {119: [0, 0, 0], 120: [0, 1, 0], 199: [0, 1, 0], 200: [0, 1, 1], 32_199: [0, 1, 1], 32_200: [1, 1, 1]}
    assert {room: one.whole_tables(room).tolist() for room in rooms} == rooms
    assert two.whole_tables(60).tolist() == [0, 1, 0], "two ranks share them"


def test_fast_memory_by_hand() -> None:
    """Row-wise state of b's 10 rows stays in HBM behind UVM, and with a cache 4 bytes of map for all 1010 rows."""
    model = _model(2)
    assert model.fast_bytes("hbm") == (32_000 + 120) / 2
    assert model.fast_bytes("host", 99) == 0
    assert model.fast_bytes("uvm", 99) == 20
    assert model.fast_bytes("by_table", 99) == 20 + 99
    assert model.fast_bytes("prefetch", 99) == model.fast_bytes("uvm_caching", 99) == 20 + 2020 + 99
    assert model.fast_bytes("fae", 99) == 20 + 99
    assert model.fast_bytes("fae", 99, "uvm_caching") == 20 + 2020 + 99
    assert _model(2, hardware=CPU).fast_bytes("host", 99) == 16_060
    assert _model(2, hardware=CPU).fast_bytes("fae", 99) == 16_060 + 99


@given(st.integers(1, 6), st.integers(1, 8), st.floats(1, 1e9))
def test_links_add_up(hosts: int, per_host: int, size: float) -> None:
    ranks = hosts * per_host
    links = _Links(ranks, per_host)
    reduced, sent = links.reduced(size), links.to_others(size)
    assert reduced["intra_bytes"] + reduced["inter_bytes"] == pytest.approx(2 * (ranks - 1) / ranks * size)
    assert sent["intra_bytes"] + sent["inter_bytes"] == pytest.approx(size if ranks > 1 else 0)
    for found in (reduced, sent):
        assert min(found.values()) >= -1e-6 * size and found["collectives"] == 1
        assert hosts > 1 or found["inter_bytes"] == pytest.approx(0, abs=1e-6 * size)
        assert per_host > 1 or found["intra_bytes"] == pytest.approx(0, abs=1e-6 * size)


def test_links_of_two_hosts_of_four_by_hand() -> None:
    links = _Links(8, 4)
    assert links.to_others(70) == {"intra_bytes": 30, "inter_bytes": 40, "collectives": 1}, "three of the seven others are near"
    # Within the host 3/4 twice; between the hosts half of a rank's quarter, twice.
    assert links.reduced(80) == pytest.approx({"intra_bytes": 120, "inter_bytes": 20, "collectives": 1})


def test_more_ranks_than_a_host_has_send_to_other_hosts() -> None:
    near, far = _model(4), _model(4, hardware=V100.on_hosts_of(2))
    share = _half_hot(near)
    for kind in ("hot", "cold"):
        a, b = (model.fae(share, kind, "uvm_caching", split_ahead=False) for model in (near, far))  # type: ignore[arg-type]
        assert a.inter_bytes == 0 < b.inter_bytes and a.sent_bytes == pytest.approx(b.sent_bytes)
        assert step_seconds(b, replace(V100, step_s=0)) > step_seconds(a, replace(V100, step_s=0))


def test_costs_are_in_the_order_of_works_parts() -> None:
    assert list(_costs(V100)) == [field.name for field in fields(Work)]
    work = Work(*range(1, 14))
    seconds = work.seconds(replace(V100, fast_row_s=2e-9))
    assert seconds["flops"] == 1 / 8e12 and seconds["fast_rows"] == 2 * 2e-9
    assert seconds["fast_bytes"] == pytest.approx(3 / 270e9) and seconds["host_rows"] == pytest.approx(4 * 700e-9)
    assert seconds["link_bytes"] == pytest.approx(6 / 9.45e9) and seconds["inter_bytes"] == pytest.approx(8 / 5e9)
    assert seconds["collectives"] == pytest.approx(9 * 30e-6) and seconds["tiers"] == pytest.approx(12 * 0.2e-3)
    assert seconds["steps"] == pytest.approx(13 * 6e-3)
    assert work.sent_bytes == 7 + 8
    assert work.plus(flops=1.0, tiers=2.0) == replace(work, flops=2.0, tiers=14.0)
    assert work.mixed(Work(), 0.25).flops == 0.25 and work.mixed(Work(), 0.25).steps == 0.25 * 13 + 0.75
    json.dumps(vars(_model(2).stock("prefetch", 500)))


def test_the_host_queues_a_gpus_step_beside_it_and_is_part_of_a_cpus() -> None:
    little, much = Work(flops=8e9), Work(flops=8e10)
    assert [step_seconds(work, V100) for work in (little, much)] == pytest.approx([6e-3, 10e-3])
    assert step_seconds(little, CPU) == pytest.approx(5e-3 + 8e9 / 4e10)


def test_an_epochs_seconds_are_the_mean_of_its_steps() -> None:
    model = _model(1, batch_size=4000)
    share = _half_hot(model)
    steps = [model.fae(share, kind, "uvm", split_ahead=True) for kind in ("hot", "cold")]  # type: ignore[arg-type]
    # So that the host is the longer one beside hot batches, and the device with cold ones.
    parts = [sum(work.seconds(V100).values()) - V100.step_s for work in steps]
    between = replace(V100, step_s=(parts[0] + parts[1]) / 2)
    found = _model(1, 4000, between).epoch_seconds(share, "uvm", split_ahead=True)
    assert found == pytest.approx((between.step_s + parts[1]) / 2)
    assert found > step_seconds(model.epoch(share, "uvm", split_ahead=True), between), "a cold step does not hide a hot one's host"
    for name, value in vars(model.epoch(share, "uvm", split_ahead=True)).items():
        assert value == pytest.approx((getattr(steps[0], name) + getattr(steps[1], name)) / 2), name


def test_more_hot_rows_never_cost_a_cold_tier_more() -> None:
    tables = TableSet((TableSpec("a", 100_000, 16, ("x",)), TableSpec("b", 5_000, 16, ("y",))))
    access = AccessModel(tables, {"a": AccessCurve.zipf(100_000, 1.05), "b": AccessCurve.zipf(5_000, 1.2)}, Independent(), "law")
    model = _model(1, batch_size=1024, access=access)
    links = [model.epoch(access.share(budget, 1), "uvm", split_ahead=True).link_bytes for budget in np.geomspace(1000, 7e6, 20).astype(int)]
    assert (np.diff(links) <= 1e-6).all() and links[-1] < 0.1 * links[0]


def test_wrong_jobs_are_refused() -> None:
    for size, ranks in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match=f"at least 1, received {size} and {ranks}"):
            Job(TABLES, size, ranks, 10, 100)
    other = TableSet((TableSpec("a", 999, 4, ("x",)), TableSpec("b", 10, 2, ("y",))))
    with pytest.raises(FingerprintError, match=r"access model \(by hand\)"):
        CostModel(Job(other, 1, 1, 10, 100), ACCESS, V100)


def test_only_bags_with_a_cold_id_enter_the_cold_exchange() -> None:
    """Of two split tables, a with fewer cold bags: b's decide how many bags of both are exchanged."""
    tables = TableSet((TableSpec("a", 1000, 4, ("fa",)), TableSpec("b", 1000, 4, ("fb",))))
    curves = {
        "a": AccessCurve(np.array([100.0, 900.0]), np.array([0.95 / 100, 0.05 / 900]), 1.0, 2),
        "b": AccessCurve(np.array([100.0, 900.0]), np.array([0.8 / 100, 0.2 / 900]), 2.0, 2),  # two ids a bag
    }
    access = AccessModel(tables, curves, Independent(), "by hand")
    share = access.share(200 * tables["a"].row_bytes, pinned_max_rows=0)
    assert share.hot_rows.tolist() == [100, 100]
    model = CostModel(Job(tables, 50, 2, 0, 0), access, CPU)
    hot_mass, cold_mass = model._tier_masses(share, "cold")
    cold = [float(mass.sum()) for mass in cold_mass]
    bags = 50 * (1 - (1 - cold[1]) ** 2)
    assert bags > 50 * cold[0], "b has more"
    own = float(model._distinct_rows(hot_mass, 50, share.hot).sum())
    ids = 50 * (cold[0] + 2 * cold[1])
    hot_tier = 4 * own + 24 + 16 * own  # slots, counts, gradients of four floats to the other rank
    cold_tier = (8 * ids + 4 * bags * 2 + 2 * 4 * bags * 8) / 2
    assert model.fae(share, "cold", "host", split_ahead=False).sent_bytes == pytest.approx(hot_tier + cold_tier)
