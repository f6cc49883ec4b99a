"""Models, plans and steps of the checkpoint tests: what runs on their ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.distributed import refusals
from fae_torchrec.training.checkpoint import load_checkpoint, save_checkpoint
from fae_torchrec.training.shard import build_optimizer
from fae_torchrec.training.training_state import flat
from fae_torchrec.training.whole_state import load_whole_state, whole_state
from tests.distributed.reference_adam import reference_adam
from tests.distributed.small_model import OPTIMIZERS, Case, new_batch, new_model, placement_of, shard, whole_tensors

CHAIN_OPTIMIZERS = ["adagrad", "rowwise_adagrad", "adam"]
PROBES = 2


@dataclass(frozen=True)
class Hop:
    """A model that starts from a saved one, trains and is saved.

    Attributes:
        name: of the saved state.
        source: the state it loads, or None to start anew.
        plan: "table_wise", "cut" (by columns and rows), "A" or "B" (ours, with two hot sets).
    """

    name: str
    source: str | None
    plan: str


def placement_b(case: Case) -> RowPlacement:
    """Another hot set than `placement_of`: another table is all hot, another all cold."""
    tables = placement_of(case).tables
    rng = np.random.default_rng(23)
    hot = {"tiny": 6, "big": 30, "wide": 90, "frozen": 10, "other": 0}
    hot_ids = {table.name: np.sort(rng.choice(table.rows, hot[table.name], replace=False)) for table in tables}
    return RowPlacement(tables=tables, hot_ids=hot_ids, hot_set_fingerprint="by hand", budget_bytes=0, hot_inputs=0.0, coverage=0.0)


def stock_model(model: Any, generators: dict[str, Any], *, dtensor: bool = False) -> DistributedModelParallel:
    """A stock model by a plan of one's own for its collection `ebc`."""
    sharder, cpu = EmbeddingBagCollectionSharder(), torch.device("cpu")
    plan = construct_module_sharding_plan(model.ebc, generators, sharder=sharder, device_type="cpu")
    assert dist.group.WORLD is not None
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    if dtensor:
        env.output_dtensor, env.device_mesh = True, init_device_mesh("cpu", (dist.get_world_size(),))
    return DistributedModelParallel(model, env=env, device=cpu, plan=ShardingPlan({"ebc": plan}), sharders=[sharder])


def cut() -> dict[str, Any]:
    """Tables by columns (one of them twice on one rank), by rows and whole."""
    last = dist.get_world_size() - 1
    whole = {"tiny": table_wise(rank=last), "frozen": table_wise(rank=0)}
    return {**whole, "big": row_wise(), "wide": column_wise(ranks=[last, 0]), "other": column_wise(ranks=[last, last])}


def model_of(case: Case, plan: str) -> DistributedModelParallel:
    """A new model by the name of its plan."""
    if plan == "cut":
        return stock_model(new_model(case), cut())
    return shard(case, {"table_wise": None, "A": placement_of(case), "B": placement_b(case)}[plan])


def see(model: DistributedModelParallel, optimizer: KeyedOptimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and optimizer state, put together by the test's own means. Collective."""
    states = {"/".join(key): value for key, value in flat((), optimizer.state_dict()["state"])}
    return {"weights": clones(whole_tensors(model.state_dict())), "state": clones(whole_tensors(states))}


def clones(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that stay when training goes on."""
    return {key: tensor.clone() for key, tensor in tensors.items()}


def train_on(model: DistributedModelParallel, optimizer: CombinedOptimizer, batches: Iterable[Any]) -> list[float]:
    """Trains; returns the losses."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@contextmanager
def adam_on_cpu() -> Iterator[None]:
    """Adam among the small models' optimizers."""
    accepted = mock.patch.object(refusals, "_cpu_kernel_lacks", return_value=False)
    with reference_adam(), accepted, mock.patch.dict(OPTIMIZERS, adam=torch.optim.Adam):
        yield


def run_hops(rank: int, folder: Path, hops: list[Hop]) -> dict[tuple[str, str], dict[str, Any]]:
    """Runs hops on one number of ranks, both ways of saving, all optimizers.

    Returns:
        By (hop, optimizer): what the two loads gave, what was saved, the first losses after loading, and those after saving; the
        batches of these losses are the same at every hop and on every rank.
    """
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    with adam_on_cpu():
        for hop in hops:
            for name in CHAIN_OPTIMIZERS:
                case = Case(optimizer=name)
                seen[hop.name, name] = run_hop(rank, folder / name, hop, case)
    return seen


def run_hop(rank: int, folder: Path, hop: Hop, case: Case) -> dict[str, Any]:
    """One hop with one optimizer."""
    probes = [new_batch(case, step, 0) for step in range(PROBES)]
    seen: dict[str, Any] = {}
    for way in ["dcp", "plain"]:
        model = model_of(case, hop.plan)
        optimizer = build_optimizer(model, 0.1)
        if hop.source is not None:
            source = folder / hop.source
            if way == "dcp":
                seen["extra"] = load_checkpoint(source, model, optimizer)
            else:
                load_whole_state(model, optimizer, torch.load(source.with_suffix(".pt")) if rank == 0 else None)
            seen[f"loaded {way}"] = see(model, optimizer)
        seen[f"losses {way}"] = train_on(model, optimizer, probes)
    train_on(model, optimizer, [new_batch(case, step, rank) for step in range(5, 8)])
    save_checkpoint(folder / hop.name, model, optimizer, extra={"hop": hop.name})
    whole = whole_state(model, optimizer)
    assert (whole is not None) == (rank == 0)
    if whole is not None:
        torch.save(whole, (folder / hop.name).with_suffix(".pt"))
    seen["saved"] = see(model, optimizer)
    seen["losses after"] = train_on(model, optimizer, probes)
    return seen
