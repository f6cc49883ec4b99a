"""State in and out: stock keys and values, and hot rows that follow what is loaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from fae_torchrec.distributed.homes import local_tables
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from tests.distributed.small_model import Case, new_batch, optimizer_state, placement_of, shard, start_weights, train, whole_tensors

CASE = Case(optimizer="rowwise_adagrad")
PLACEMENT = placement_of(CASE)
SPLIT = {"big": 60, "wide": 30, "other": 25}


def _batches(rank: int, first: int, last: int) -> Any:
    return (new_batch(CASE, step, rank) for step in range(first, last))


def _hot_rows(model: DistributedModelParallel) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's hot rows: weights and optimizer state, by table."""
    tier = getattr(model.module.ebc, "_hot", None)  # stock has none
    return {table.table: {name: tensor.clone() for name, tensor in table.tensors().items()} for table in (tier.tables() if tier else ())}


def _homes(model: DistributedModelParallel) -> dict[str, dict[str, torch.Tensor]]:
    """Views of this rank's shards of the cold tier."""
    return {table.table: table.tensors() for table in local_tables(model.module.ebc._cold[0].module._lookups)}


def _fill_in_place(state: dict[str, Any], value: float) -> None:
    """Loads as torch.distributed.checkpoint does: into the very tensors that state_dict gave."""
    for entry in state.values():
        if isinstance(entry, dict):
            _fill_in_place(entry, value)
        elif isinstance(entry, ShardedTensor):
            for piece in entry.local_shards():
                piece.tensor.detach().fill_(value)
        else:
            entry.detach().fill_(value)


def _error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return "no error"


def _see(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def see(name: str, model: DistributedModelParallel) -> None:
        seen[name] = {"weights": whole_tensors(model.state_dict()), "state": optimizer_state(model), "hot": _hot_rows(model)}

    stock, ours = shard(CASE, None), shard(CASE, PLACEMENT)
    for name, model in (("stock", stock), ("ours", ours)):
        train(model, _batches(rank, 0, 5))
        see(name, model)
        state = model.state_dict()
        seen[f"keys of {name}"] = sorted(state)
        seen[f"shards of {name}"] = {key: str(value.metadata()) for key, value in state.items() if isinstance(value, ShardedTensor)}
        optimizer = model.fused_optimizer.state_dict()["state"]
        seen[f"optimizer keys of {name}"] = {key: sorted(value) for key, value in optimizer.items()}

    # Loading weights in the middle of training leaves the optimizer's state alone.
    train(ours, _batches(rank, 5, 6))
    seen["before"] = _hot_rows(ours)
    ours.load_state_dict(dict(seen["stock"]["weights"]))  # DistributedModelParallel renames the keys of the dict it is given
    see("loaded whole tensors", ours)
    train(ours, _batches(rank, 5, 8))
    ours.load_state_dict(stock.state_dict())
    see("loaded sharded tensors", ours)

    # A checkpoint of weights and optimizer state, into a new model; and on from there.
    train(ours, _batches(rank, 8, 10))
    new = shard(CASE, PLACEMENT)
    new.load_state_dict(ours.state_dict())
    new.fused_optimizer.load_state_dict(ours.fused_optimizer.state_dict())
    see("saved", ours)
    see("restored", new)
    for name, model in (("saved", ours), ("restored", new)):
        train(model, _batches(rank, 10, 14))
        see(f"{name}, trained on", model)

    for first in ("model", "optimizer"):
        train(ours, _batches(rank, 14, 15))
        weights, state = ours.state_dict(), ours.fused_optimizer.state_dict()
        _fill_in_place(weights, 0.25)
        _fill_in_place(state["state"], 0.5)
        if first == "model":
            ours.load_state_dict(weights)
        ours.fused_optimizer.load_state_dict(state)
        if first == "optimizer":
            ours.load_state_dict(weights)
        see(f"loaded in place, {first} first", ours)

    train(ours, _batches(rank, 15, 16))
    for tensors in _homes(ours).values():
        for tensor in tensors.values():
            tensor.fill_(7.0)
    ours.module.ebc.write_back()
    seen["written back"] = {table: {name: x.clone() for name, x in tensors.items()} for table, tensors in _homes(ours).items()}
    seen["hot rows written back"] = _hot_rows(ours)

    state = start_weights(CASE)
    ebc = {key.removeprefix("ebc."): value for key, value in state.items()}
    without = {key: value for key, value in ebc.items() if "tiny" not in key and "big" not in key}
    module = ours.module.ebc
    seen["errors"] = {
        "missing": _error_of(lambda: module.load_state_dict(without)),
        "unexpected": _error_of(lambda: module.load_state_dict({**ebc, "made_up": torch.zeros(1)})),
        "rows": _error_of(lambda: module.load_state_dict({**ebc, "embedding_bags.tiny.weight": torch.zeros(1, 4)})),
        "more rows": _error_of(lambda: module.load_state_dict({**ebc, "embedding_bags.big.weight": torch.zeros(201, 4)})),
        "parent": _error_of(lambda: nn.Module.load_state_dict(ours.module, {**state, **ours.module.over.state_dict(prefix="over.")})),
    }
    train(ours, _batches(rank, 16, 17))
    before = _hot_rows(ours)
    result = module.load_state_dict(without, strict=False)
    after = _hot_rows(ours)
    seen["not strict"] = (
        sorted(result.missing_keys),
        {table: torch.equal(before[table]["weight"], after[table]["weight"]) for table in before},
    )
    return seen


@cache
def _seen(ranks: int) -> list[dict[str, Any]]:
    return run_on_local_ranks(_see, ranks, timeout_s=120)


RANKS = pytest.mark.parametrize("ranks", [1, 2])


def _assert_hot_rows_are(hot: dict[str, dict[str, torch.Tensor]], weights: dict[str, torch.Tensor]) -> None:
    for table, tensors in hot.items():
        ids = torch.from_numpy(PLACEMENT.hot_ids[table])
        assert torch.equal(tensors["weight"], weights[f"ebc.embedding_bags.{table}.weight"][ids]), table


@RANKS
def test_state_is_the_stock_state(ranks: int) -> None:
    for seen in _seen(ranks):
        assert seen["keys of ours"] == seen["keys of stock"]
        for key, keys in seen["optimizer keys of ours"].items():
            assert keys == seen["optimizer keys of stock"].get(key, keys)
        for key, shards in seen["shards of ours"].items():
            assert shards.split("placement")[0] == seen["shards of stock"][key].split("placement")[0]
        torch.testing.assert_close(seen["ours"]["weights"], seen["stock"]["weights"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen["ours"]["state"], seen["stock"]["state"], rtol=1e-5, atol=1e-9)
        assert all(value.any() for value in seen["stock"]["state"].values()), "control: there is a state"


@RANKS
@pytest.mark.parametrize("how", ["whole", "sharded"])
def test_loading_stock_weights_promotes_them_and_leaves_the_optimizer_alone(ranks: int, how: str) -> None:
    for seen in _seen(ranks):
        loaded = seen[f"loaded {how} tensors"]
        stock = seen["stock"]["weights"]
        assert all(torch.equal(loaded["weights"][key], value) for key, value in stock.items()), "bit for bit"
        _assert_hot_rows_are(loaded["hot"], stock)
        if how == "whole":
            for table, tensors in seen["before"].items():
                assert torch.equal(loaded["hot"][table]["sum"], tensors["sum"])


@RANKS
def test_restoring_weights_and_optimizer_goes_on_bit_for_bit(ranks: int) -> None:
    for seen in _seen(ranks):
        for after in ("", ", trained on"):
            saved, restored = seen[f"saved{after}"], seen[f"restored{after}"]
            for part in ("weights", "state"):
                assert saved[part].keys() == restored[part].keys()
                for key, value in saved[part].items():
                    if "over" not in key:  # the dense part is not restored here
                        torch.testing.assert_close(restored[part][key], value, rtol=0 if not after else 1e-5, atol=0 if not after else 1e-6)
            assert all(torch.equal(x, restored["hot"][t][n]) for t, v in saved["hot"].items() for n, x in v.items()) or after


@RANKS
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_loading_in_place_as_distributed_checkpoint_does(ranks: int, first: str) -> None:
    for seen in _seen(ranks):
        loaded = seen[f"loaded in place, {first} first"]
        assert all((value == 0.25).all() for key, value in loaded["weights"].items() if "embedding_bags" in key)
        assert all((value == 0.5).all() for value in loaded["state"].values())
        assert all((tensors["weight"] == 0.25).all() for tensors in loaded["hot"].values())
        assert all((tensors["sum"] == 0.5).all() for tensors in loaded["hot"].values())


@RANKS
def test_write_back_touches_hot_rows_alone(ranks: int) -> None:
    for seen in _seen(ranks):
        for table, tensors in seen["written back"].items():
            hot = torch.zeros(PLACEMENT.tables[table].rows, dtype=torch.bool)
            hot[torch.from_numpy(PLACEMENT.hot_ids[table])] = True
            assert hot.sum() == SPLIT.get(table, 0)
            for name, home in tensors.items():
                assert (home[~hot] == 7.0).all(), (table, name)
                if hot.any():
                    assert torch.equal(home[hot], seen["hot rows written back"][table][name])


@RANKS
def test_replicas_are_bit_identical_after_every_load(ranks: int) -> None:
    first, last = _seen(ranks)[0], _seen(ranks)[-1]
    for name in (
        "ours",
        "loaded whole tensors",
        "loaded sharded tensors",
        "restored",
        "restored, trained on",
        "loaded in place, model first",
    ):
        for table, tensors in first[name]["hot"].items():
            assert all(torch.equal(tensor, last[name]["hot"][table][key]) for key, tensor in tensors.items()), (name, table)


@RANKS
def test_what_does_not_fit_is_an_error_on_every_rank(ranks: int) -> None:
    for seen in _seen(ranks):
        errors = seen["errors"]
        assert "missing keys ['embedding_bags.tiny.weight', 'embedding_bags.big.weight'], unexpected keys []" in errors["missing"]
        assert "missing keys [], unexpected keys ['made_up']" in errors["unexpected"]
        assert "embedding_bags.tiny.weight: received shape (1, 4), the table has (6, 4)" in errors["rows"], "not broadcast"
        assert "embedding_bags.big.weight: received shape (201, 4), the table has (200, 4)" in errors["more rows"]
        assert "call DistributedModelParallel.load_state_dict" in errors["parent"]
        missing, kept = seen["not strict"]
        assert missing == ["embedding_bags.big.weight", "embedding_bags.tiny.weight"]
        assert kept == {"tiny": True, "big": True, "wide": False, "other": False}, "what is not loaded stays, though it was trained since"
