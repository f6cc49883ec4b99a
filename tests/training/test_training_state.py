"""What a state may be loaded from: reshaped row-wise states, half precision, DTensors; and errors that name the key and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, table_wise
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from fae_torchrec.core.errors import FAEError, StateError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.checkpoint import load_checkpoint, save_checkpoint
from fae_torchrec.training.shard import build_optimizer, shard_model
from fae_torchrec.training.training_state import Entry, Piece, Wanted, check_fits, flat, widths_of
from fae_torchrec.training.whole_state import load_whole_state, whole_state
from tests.distributed.small_model import Case, new_batch, placement_of, shard
from tests.training.small_checkpoints import adam_on_cpu, model_of, see, stock_model, train_on

CASE = Case(optimizer="rowwise_adagrad")
BIG, FP16, BF16 = (f"ebc.embedding_bags.{table}.weight" for table in ("big", "fp16", "bf16"))


def _entry(*shape: int, pieces: int = 1) -> Entry:
    """A sharded value cut along its first dimension."""
    sizes = (shape[0] // pieces, *shape[1:])
    return Entry(shape, torch.float32, tuple((n, Piece((n * sizes[0], *(0 for _ in shape[1:])), sizes)) for n in range(pieces)))


def test_refit_by_hand() -> None:
    row, per_shard = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([1.0, 2.0, 3.0, 5.0, 6.0, 7.0])  # two column shards of a table of 3 rows
    assert Wanted(_entry(3), 3, (1, 1)).refit(per_shard).tolist() == [3.0, 4.0, 5.0]
    assert Wanted(_entry(3), 3, (3, 1)).refit(per_shard).tolist() == [2.0, 3.0, 4.0]
    assert Wanted(_entry(6, pieces=2), 3).refit(row).tolist() == [3.0, 4.0, 5.0] * 2
    assert Wanted(_entry(9, pieces=3), 3, (1, 1)).refit(per_shard).tolist() == [3.0, 4.0, 5.0] * 3
    assert Wanted(_entry(6, pieces=2), 3, (1, 1)).refit(per_shard) is per_shard
    steps = Wanted(_entry(3, pieces=3), 100).refit(torch.tensor([7, 7]))
    assert steps.tolist() == [7, 7, 7] and steps.dtype == torch.int64


def test_refit_there_and_back_is_bit_for_bit() -> None:
    row = torch.rand(1000, generator=torch.Generator().manual_seed(3)) ** 9
    for shards in (2, 3, 5, 7):
        there = Wanted(_entry(1000 * shards, pieces=shards), 1000).refit(row)
        assert there.shape == (1000 * shards,)
        assert torch.equal(Wanted(_entry(1000), 1000, (4,) * (shards - 1) + (12,)).refit(there), row)


def test_which_shapes_are_taken() -> None:
    no_dims = Entry((), torch.float32, ((0, Piece((), ())),))
    halves, whole, one_per_shard = Wanted(_entry(200), 200, (4, 4)), Wanted(_entry(200), 200), Wanted(_entry(2, pieces=2), 200)
    assert halves.takes((200,)) and halves.takes((400,)) and whole.takes((200,)) and one_per_shard.takes((1,)) and Wanted(no_dims).takes(())
    assert Wanted(_entry(600, pieces=3), 200).takes((200,)) and Wanted(_entry(200, 4), 200).takes((200, 4))
    assert not any(halves.takes(shape) for shape in [(150,), (201,), (600,), (1,), (0,), (), (200, 1), (200, 4), None])
    assert not whole.takes((400,)), "the table was not saved in column shards"
    assert not any(Wanted(_entry(200, 4), 200).takes(shape) for shape in [(200,), (400, 4), (200, 8)])
    assert not Wanted(_entry(200)).takes((400,)), "what belongs to no table keeps its shape"


def test_misfits_are_told_by_name() -> None:
    wanted = {"model.table.weight": Wanted(_entry(6, 4)), "model.step": Wanted(Entry(None, None, ()))}
    check_fits("it", {"model.table.weight": (6, 4), "model.step": None}, wanted)
    with pytest.raises(StateError) as error:
        check_fits("it", {"model.tabel.weight": (6, 4), "model.step": (1,), "other": None}, wanted)
    assert str(error.value).startswith(
        "it does not fit this model: model.table.weight is missing (is it the unexpected model.tabel.weight?); model.tabel.weight is "
        "unexpected; other is unexpected; model.step: received shape (1,), allowed no tensor. Nothing was loaded."
    )
    with pytest.raises(StateError, match="; and 12 more"):
        check_fits("it", {str(number): None for number in range(18)}, wanted)


def test_widths_and_paths() -> None:
    assert widths_of([((0, 8), (5, 4)), ((0, 0), (5, 8)), ((5, 0), (5, 8)), ((5, 8), (5, 4))]) == [8, 4]
    assert widths_of([((0,), (5,))]) == []
    assert dict(flat(("a",), {"b": {"c": 1}, "d": {}, "e": 2})) == {("a", "b", "c"): 1, ("a", "e"): 2}


def _error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except FAEError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _misfits(rank: int, folder: Path, model: DistributedModelParallel) -> dict[str, Any]:
    """Errors of loading into one model, and whether it changed."""
    optimizer = build_optimizer(model, 0.1)
    train_on(model, optimizer, [new_batch(CASE, step, rank) for step in range(2)])
    before = see(model, optimizer)
    errors: dict[str, str] = {}

    def plain(name: str, change: Callable[[dict[str, Any]], object]) -> None:
        whole = whole_state(model, optimizer)
        if whole is not None:
            change(whole)
        errors[name] = _error_of(lambda: load_whole_state(model, optimizer, whole))

    weight = model.state_dict()[BIG]
    plain("renamed", lambda whole: whole["model"].update({BIG.replace("big", "bgi"): whole["model"].pop(BIG)}))
    plain("shape", lambda whole: whole["model"].update({BIG: torch.zeros(201, 4)}))
    plain("state is missing", lambda whole: whole["optimizer"][BIG].pop("big.momentum1"))
    plain("state's shape", lambda whole: whole["optimizer"][BIG].update({"big.momentum1": torch.zeros(150)}))
    plain("no tensor", lambda whole: whole["model"].update({BIG: "gone"}))
    plain("sharded", lambda whole: whole["model"].update({BIG: weight}))
    errors["no state"] = _error_of(lambda: load_whole_state(model, optimizer, None))

    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    save_checkpoint(folder / "good", model, optimizer)
    save_checkpoint(folder / "weights", model, None)
    state["model"][BIG.replace("big", "bgi")] = state["model"].pop(BIG)
    save(state, checkpoint_id=folder / "renamed")
    other = shard(Case(optimizer="adagrad"), None)
    save_checkpoint(folder / "of adagrad", other, build_optimizer(other, 0.1))
    save(model.state_dict(), checkpoint_id=folder / "without a model")
    for name, damage in (("unfinished", None), ("damaged", b"no metadata"), ("short", b"")):
        save_checkpoint(folder / name, model, optimizer)
        if rank == 0 and damage is None:
            (folder / name / ".metadata").unlink()
        elif rank == 0:
            (folder / name / (".metadata" if damage else "__1_0.distcp")).write_bytes(damage or b"")
        dist.barrier()
    for name in ("renamed", "weights", "of adagrad", "without a model", "unfinished", "damaged", "short"):
        errors[f"file: {name}"] = _error_of(lambda name=name: load_checkpoint(folder / name, model, optimizer))  # type: ignore[misc]
    errors["file: there already"] = _error_of(lambda: save_checkpoint(folder / "good", model, optimizer))
    errors["file: extra"] = _error_of(lambda: save_checkpoint(folder / "new", model, optimizer, extra={"hot": {1, 2}}))
    after = see(model, optimizer)
    unchanged = all(torch.equal(tensor, after[part][key]) for part, tensors in before.items() for key, tensor in tensors.items())

    train_on(model, optimizer, [new_batch(CASE, 2, rank)])
    trained = see(model, optimizer)
    load_checkpoint(folder / "good", model, None)
    weights_alone = see(model, optimizer)
    return {
        "errors": errors,
        "unchanged": unchanged,
        "weights alone": [
            all(torch.equal(tensor, expected[part][key]) for key, tensor in weights_alone[part].items())
            for part, expected in (("weights", before), ("state", trained), ("weights", trained))
        ],
    }


class _Halves(nn.Module):
    """Tables of half precision, wide enough for column shards of different widths."""

    def __init__(self) -> None:
        super().__init__()
        tables = [("fp16", 10, 12, DataType.FP16), ("bf16", 9, 8, DataType.BF16)]
        configs = [
            EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[name], data_type=data_type)
            for name, rows, dim, data_type in tables
        ]
        self.ebc = EmbeddingBagCollection(tables=configs, device=torch.device("cpu"))
        apply_optimizer_in_backward(RowWiseAdagrad, self.ebc.parameters(), {"lr": 0.1})


def _ours(model: nn.Module) -> DistributedModelParallel:
    """Hot rows 3 of "fp16" and all of "bf16"."""
    hot_ids = {"fp16": np.array([1, 4, 7]), "bf16": np.arange(9)}
    placement = RowPlacement(
        tables=model_tables(model), hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0
    )
    assert dist.group.WORLD is not None
    return shard_model(model, placement, 16, torch.device("cpu"), dist.group.WORLD)


def _halves(rank: int, folder: Path) -> list[Any]:
    """A made-up state in column shards of 8 and 4 columns, as ShardedTensors and as DTensors, and in our model, loaded both ways."""
    weights = {"fp16": torch.float16, "bf16": torch.bfloat16}
    generator = torch.Generator().manual_seed(4)
    given: dict[str, Any] = {"model": {}, "optimizer": {}, "column_widths": {FP16: [8, 4]}}
    for name, rows, dim, shards in (("fp16", 10, 12, 2), ("bf16", 9, 8, 1)):
        key = f"ebc.embedding_bags.{name}.weight"
        given["model"][key] = torch.randn(rows, dim, generator=generator).to(weights[name])
        given["optimizer"][key] = {f"{name}.momentum1": torch.rand(rows * shards, generator=generator)}
    given["model"][FP16][0, :2] = torch.tensor([-0.0, torch.nan])
    plan = {"fp16": column_wise(size_per_rank=[8, 4]), "bf16": table_wise(rank=1)}
    states: list[Any] = [given]
    for name, dtensor in (("sharded", False), ("dtensor", True)):
        cut = stock_model(_Halves(), plan, dtensor=dtensor)
        load_whole_state(cut, cut.fused_optimizer, given if rank == 0 else None)
        save_checkpoint(folder / name, cut, cut.fused_optimizer)
        states.append(whole_state(cut, cut.fused_optimizer))
        load_checkpoint(folder / name, cut, cut.fused_optimizer)
        states.append(whole_state(cut, cut.fused_optimizer))
    for source in ("plain", "sharded", "dtensor"):
        ours = _ours(_Halves())
        if source == "plain":
            load_whole_state(ours, ours.fused_optimizer, given if rank == 0 else None)
        else:
            load_checkpoint(folder / source, ours, ours.fused_optimizer)
        states.append(whole_state(ours, ours.fused_optimizer))
    return states


def _without_us(rank: int, folder: Path) -> list[dict[str, Any]]:
    """A stock model saved by torch alone, loaded by us into ours, trained, saved by us and loaded by torch alone into a stock model."""
    models = {name: shard(CASE, placement) for name, placement in (("from", None), ("ours", placement_of(CASE)), ("to", None))}
    optimizers = {name: build_optimizer(model, 0.1) for name, model in models.items()}
    train_on(models["from"], optimizers["from"], [new_batch(CASE, step, rank) for step in range(2)])
    saved = {"model": models["from"].state_dict(), "optimizer": optimizers["from"].state_dict(), "epoch": 3}
    save(saved, checkpoint_id=folder / "by torch")
    seen = [see(models["from"], optimizers["from"])]
    assert load_checkpoint(folder / "by torch", models["ours"], optimizers["ours"]) == {}
    seen.append(see(models["ours"], optimizers["ours"]))
    train_on(models["ours"], optimizers["ours"], [new_batch(CASE, 2, rank)])
    save_checkpoint(folder / "by us", models["ours"], optimizers["ours"])
    seen.append(see(models["ours"], optimizers["ours"]))
    state = {"model": models["to"].state_dict(), "optimizer": optimizers["to"].state_dict()}
    load(state, checkpoint_id=folder / "by us")
    models["to"].load_state_dict(state["model"])
    optimizers["to"].load_state_dict(state["optimizer"])
    return [*seen, see(models["to"], optimizers["to"])]


def _step_counts(rank: int, plan: str) -> list[int]:
    """Adam's step count in a model that has trained, and again after another count was loaded and one step more."""
    with adam_on_cpu():
        case, counts = Case(optimizer="adam"), []
        model = model_of(case, plan)
        optimizer = build_optimizer(model, 0.1)
        for steps in (4, 1):
            train_on(model, optimizer, [new_batch(case, step, rank) for step in range(steps)])
            whole = whole_state(model, optimizer)
            counts.append(whole["optimizer_step"] if whole else 0)
            load_whole_state(model, optimizer, {**whole, "optimizer_step": 10} if whole else None)
    return counts


def _see(rank: int, folder: Path) -> dict[str, Any]:
    models = {"stock": None, "ours": placement_of(CASE)}
    seen: dict[str, Any] = {name: _misfits(rank, folder / name, shard(CASE, placement)) for name, placement in models.items()}
    seen["without us"] = _without_us(rank, folder)
    return {**seen, "halves": _halves(rank, folder), "steps": [_step_counts(rank, plan) for plan in ("table_wise", "A")]}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_local_ranks(_see, 2, tmp_path_factory.mktemp("states"), timeout_s=200)


MISFITS = {
    "renamed": f"StateError: the state does not fit this model: model.{BIG} is missing (is it the unexpected model.ebc.embedding_bags.bgi",
    "shape": f"model.{BIG}: received shape (201, 4), allowed shape (200, 4). Nothing was loaded. Load it into the model",
    "state is missing": f"optimizer.{BIG}.big.momentum1 is missing. Nothing was loaded",
    "state's shape": f"optimizer.{BIG}.big.momentum1: received shape (150,), allowed shape (200,)",
    "no tensor": f"model.{BIG}: received no tensor, allowed shape (200, 4)",
    "sharded": f"model.{BIG}: received a ShardedTensor, allowed is a whole tensor; use save_checkpoint",
    "no state": "StateError: the state is NoneType; rank 0 must give a dict as whole_state does",
    "file: renamed": f"model.{BIG} is missing (is it the unexpected model.ebc.embedding_bags.bgi.weight?)",
    "file: weights": f"optimizer.state.{BIG}.big.momentum1 is missing",
    "file: of adagrad": f"optimizer.state.{BIG}.big.momentum1: received shape (200, 4), allowed shape (200,)",
    "file: without a model": f"model.{BIG} is missing (is it the unexpected {BIG}?)",
    "file: unfinished": "ConfigError: no checkpoint in ",
    "file: damaged": "DataError: ",
    "file: short": "__1_0.distcp is 0 bytes long, at least",
    "file: there already": "ConfigError: ",
    "file: extra": "DataError: extra: Object of type set is not JSON serializable; allowed are values that JSON can write",
}


@pytest.mark.parametrize("model", ["stock", "ours"])
@pytest.mark.parametrize("name", MISFITS)
def test_misfits_fail_on_every_rank_alike(seen: list[dict[str, Any]], model: str, name: str) -> None:
    messages = [of_rank[model]["errors"][name] for of_rank in seen]
    assert MISFITS[name] in messages[0] and messages[0] == messages[1]


@pytest.mark.parametrize("model", ["stock", "ours"])
def test_misfits_change_nothing(seen: list[dict[str, Any]], model: str) -> None:
    for of_rank in seen:
        assert of_rank[model]["errors"].keys() == MISFITS.keys() and of_rank[model]["unchanged"]
        assert of_rank[model]["weights alone"] == [True, True, False], "loaded; the optimizer's state left alone; control: they had changed"


def test_torch_alone_writes_for_us_and_reads_from_us(seen: list[dict[str, Any]]) -> None:
    by_torch, loaded, by_us, loaded_by_torch = seen[0]["without us"]
    for given, found in ((by_torch, loaded), (by_us, loaded_by_torch)):
        assert all(torch.equal(tensor, found[part][key]) for part, tensors in given.items() for key, tensor in tensors.items())
    assert not torch.equal(by_torch["weights"][BIG], by_us["weights"][BIG]), "control: trained in between"


def _bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


def test_half_precision_and_columns_of_different_widths(seen: list[dict[str, Any]]) -> None:
    given, *states = seen[0]["halves"]
    assert seen[1]["halves"][1:] == [None] * len(states)
    momentum = given["optimizer"][FP16]["fp16.momentum1"]
    rows = [(8 * wide + 4 * narrow) / 12 for wide, narrow in momentum.view(2, 10).t().tolist()]
    for number, state in enumerate(states):
        for key, weight in given["model"].items():
            assert state["model"][key].dtype == weight.dtype and _bits(state["model"][key]) == _bits(weight)
        expected = momentum if number < 4 else torch.tensor(rows)
        assert torch.equal(state["optimizer"][FP16]["fp16.momentum1"], expected), number
        assert torch.equal(state["optimizer"][BF16]["bf16.momentum1"], given["optimizer"][BF16]["bf16.momentum1"])
        assert state["column_widths"] == ({FP16: [8, 4]} if number < 4 else {})


def test_a_loaded_step_count_reaches_a_model_that_has_trained(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["steps"] == [[4, 11], [4, 11]], "stock, ours"
