"""Checkpoints from stock to ours and back: other ranks, other hot sets, other sharding, both ways of saving, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.training.training_state import flat
from tests.distributed.small_model import Case, new_model, placement_of
from tests.training.small_checkpoints import CHAIN_OPTIMIZERS, Hop, placement_b, run_hops

SPAWNS = [
    (1, [Hop("stock", None, "table_wise")]),
    (2, [Hop("A", "stock", "A"), Hop("cut", None, "cut"), Hop("A of cut", "cut", "A")]),
    (1, [Hop("B", "A", "B"), Hop("B of cut", "cut", "B"), Hop("stock again", "A of cut", "table_wise")]),
    (2, [Hop("cut again", "B", "cut"), Hop("A of B", "B of cut", "A"), Hop("cut of cut", "cut again", "cut")]),
]
HOPS = [(hop, ranks) for ranks, hops in SPAWNS for hop in hops if hop.source]
ROWS = {"wide": 90, "other": 120}  # of the tables that "cut" shards by columns, each into two halves


Seen = dict[tuple[str, str], dict[str, Any]]
"""What the hops saw, by (hop, optimizer)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def seen(folder: Path) -> Seen:
    for name in CHAIN_OPTIMIZERS:
        (folder / name).mkdir()
    everything: Seen = {}
    for ranks, hops in SPAWNS:
        of_ranks = run_on_local_ranks(run_hops, ranks, folder, hops, timeout_s=200)
        everything.update(of_ranks[0])
    return everything


def _reshaped(state: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Row-wise state of column-sharded tables [2 * rows] as [rows] and back, by hand: the mean of the halves, or twice the same."""
    reshaped = dict(state)
    for key, value in state.items():
        for table, rows in ROWS.items():
            if f"/{table}.momentum1" in key and value.dim() == 1:
                halves = [value[:rows].tolist(), value[-rows:].tolist()]  # the same half twice where there is one
                row = torch.tensor([(a + b) / 2 for a, b in zip(*halves, strict=True)])
                reshaped[key] = value if value.shape == like[key].shape else row.repeat(len(like[key]) // rows)
    return reshaped


@pytest.mark.parametrize("optimizer", CHAIN_OPTIMIZERS)
@pytest.mark.parametrize("hop", [hop for hop, _ in HOPS], ids=[f"{hop.source} to {hop.plan} on {ranks}" for hop, ranks in HOPS])
def test_what_is_loaded_is_what_was_saved(seen: Seen, hop: Hop, optimizer: str) -> None:
    saved, here = seen[str(hop.source), optimizer]["saved"], seen[hop.name, optimizer]
    for way in ["dcp", "plain"]:
        loaded = here[f"loaded {way}"]
        assert loaded["weights"].keys() == saved["weights"].keys() and loaded["state"].keys() == saved["state"].keys()
        expected = {"weights": saved["weights"], "state": _reshaped(saved["state"], loaded["state"])}
        for part, tensors in expected.items():
            for key, tensor in tensors.items():
                assert torch.equal(loaded[part][key], tensor), (way, part, key)
    after = here["saved"]
    assert not any(torch.equal(after["weights"][key], saved["weights"][key]) for key in after["weights"]), "control: the hop trained"
    assert all(value.any() for value in after["state"].values()), "control: there is a state"


@pytest.mark.parametrize("optimizer", CHAIN_OPTIMIZERS)
@pytest.mark.parametrize("hop", [hop for hop, _ in HOPS], ids=[f"{hop.source} to {hop.plan} on {ranks}" for hop, ranks in HOPS])
def test_training_goes_on_as_where_it_was_saved(seen: Seen, hop: Hop, optimizer: str) -> None:
    """The second loss depends on optimizer state, on the step count and on promoted hot rows."""
    before = seen[str(hop.source), optimizer]["losses after"]
    cut = "cut" in (_plan(hop.source), hop.plan) and _plan(hop.source) != hop.plan
    known = 1 if cut and optimizer == "rowwise_adagrad" else 2  # a state per column shard makes another update
    for way in ["dcp", "plain"]:
        assert seen[hop.name, optimizer][f"losses {way}"][:known] == pytest.approx(before[:known], rel=1e-5), way
    assert before[1] != pytest.approx(before[0], rel=1e-3), "control: a step changes the loss"


def _plan(name: str | None) -> str:
    return next(hop.plan for _, hops in SPAWNS for hop in hops if hop.name == name)


@pytest.mark.parametrize("optimizer", CHAIN_OPTIMIZERS)
@pytest.mark.parametrize("name", ["stock", "A", "cut", "B"])
def test_files_hold_whole_tensors_under_stock_keys(seen: Seen, folder: Path, name: str, optimizer: str) -> None:
    """The plain file as it is; the other read by torch's own converter."""
    saved = seen[name, optimizer]["saved"]
    plain = torch.load(folder / optimizer / f"{name}.pt")
    unsharded = new_model(Case()).state_dict()
    assert {key: value.shape for key, value in plain["model"].items()} == {key: value.shape for key, value in unsharded.items()}
    dcp_to_torch_save(folder / optimizer / name, folder / optimizer / f"{name} converted.pt")
    converted = torch.load(folder / optimizer / f"{name} converted.pt")
    for weights, state in ((plain["model"], plain["optimizer"]), (converted["model"], converted["optimizer"]["state"])):
        found = {"weights": weights, "state": {"/".join(key): value for key, value in flat((), state)}}
        for part, tensors in saved.items():
            assert found[part].keys() == tensors.keys()
            for key, tensor in tensors.items():
                assert type(found[part][key]) is torch.Tensor and torch.equal(found[part][key], tensor), (part, key)
    columns = {f"ebc.embedding_bags.{table}.weight": [4, 4] for table in ("wide", "other")}
    assert plain["column_widths"] == (columns if name == "cut" else {})
    steps = {"stock": 5, "A": 10, "cut": 5, "B": 15}[name]
    assert plain.get("optimizer_step") == converted.get("fae_optimizer_step") == (steps if optimizer == "adam" else None)


def test_a_checkpoint_remembers_what_it_was_told(seen: Seen) -> None:
    case = Case(optimizer="adagrad")
    placements = [{"ebc": {"fingerprint": p.fingerprint, "hot_tier": "replicated"}} for p in (placement_of(case), placement_b(case))]
    assert seen["A", "adagrad"]["extra"] == {"hop": "stock", "placements": {}}
    assert seen["B", "adagrad"]["extra"] == {"hop": "A", "placements": placements[0]}
    assert seen["cut again", "adagrad"]["extra"] == {"hop": "B", "placements": placements[1]}
