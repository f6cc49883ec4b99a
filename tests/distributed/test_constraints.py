"""The table of tiers: what it offers is what stock has, and what it does not is refused."""

from __future__ import annotations

import pytest
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.types import PlannerError

from fae_torchrec.distributed.constraints import COLD_TIERS, HOT_TIERS, cold_options, hot_options


def test_tiers_offer_what_stock_has() -> None:
    for (tier, device), options in [*COLD_TIERS.items(), *HOT_TIERS.items()]:
        for sharder in (EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()):
            offered = [kind for kind in options.sharding_types if kind in sharder.sharding_types(device)]
            assert offered, (tier, device, sharder)
            assert all(set(options.kernels) <= set(sharder.compute_kernels(kind, device)) for kind in offered)
    assert "row_wise" not in EmbeddingBagCollectionSharder().sharding_types("cpu"), "or the hot tier could have it there"


def test_auto() -> None:
    for device, ranks, tier in (("cpu", 1, "host"), ("cpu", 2, "host"), ("cuda", 1, "uvm"), ("cuda", 8, "uvm_caching")):
        assert cold_options("auto", device, ranks) is COLD_TIERS[tier, device]


def test_unknown_tiers() -> None:
    for tier in ("ssd", "uvm"):
        message = rf"no cold tier '{tier}' on device 'cpu'; choose one of \['host on cpu', 'host on cuda', 'uvm on cuda', .*or 'auto'"
        with pytest.raises(PlannerError, match=message):
            cold_options(tier, "cpu", 1)
    for tier in ("data_parallel", "row_wise"):
        message = rf"no hot tier '{tier}' on device 'cpu'; choose one of \['replicated on cpu', .*'row_wise on cuda'\]"
        with pytest.raises(PlannerError, match=message):
            hot_options(tier, "cpu")
    with pytest.raises(PlannerError, match="no cold tier 'auto' on device 'mtia'"):
        cold_options("auto", "mtia", 1)
