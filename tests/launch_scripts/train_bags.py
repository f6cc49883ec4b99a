"""A TorchRec training script that knows nothing of fae_torchrec, for tests/test_launch*.py: it tells which samples every step was given.

Every sample carries its number in its dense feature, and the model hands it through, so that the script can report what its pipeline
trained. The tables start constant and the dense part from a seed, so two runs on the same batches give the same losses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed import TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

FEATURES = ("user", "item", "shop", "page")
DIM = 8


@dataclass
class TaggedBatch(Batch):
    """A batch of a type of the script's own."""

    tag: str = ""


class Scorer(nn.Module):
    def __init__(self, tables: list[EmbeddingBagConfig]) -> None:
        super().__init__()
        self.bags = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        torch.manual_seed(3)
        self.over = nn.Linear(DIM * len(tables), 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        logits = self.over(self.bags(batch.sparse_features).values()).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.dense_features.detach())


def batches(args: argparse.Namespace, rank: int, world_size: int, stage: str, number: int) -> Iterator[Batch]:
    """This rank's batches: sample number, ids (Zipf-like, or uniform) and labels are functions of stage, rank and step."""
    kind = TaggedBatch if args.tagged else Batch
    for step in range(number):
        rng = np.random.default_rng([17, stage == "train", rank, step])
        size = args.batch_size - (args.short_last if step == number - 1 else 0)
        shape = (len(FEATURES), size)
        if args.uniform:
            ids = rng.integers(0, args.rows, shape)
        else:
            # Most samples are popular in every feature: what is rare comes together.
            rare = rng.random(size) < 0.25
            ids = np.where(rare, rng.integers(0, args.rows, shape), rng.integers(0, args.rows // 100, shape))
        numbers = np.arange(size) + args.batch_size * (step * world_size + rank)
        labels = (ids[0] + ids[1]) % 2
        yield kind(
            dense_features=torch.from_numpy(numbers.astype(np.float32))[:, None],
            sparse_features=KeyedJaggedTensor(
                list(FEATURES), torch.from_numpy(ids.reshape(-1)), lengths=torch.ones(ids.size, dtype=torch.int32), stride=size
            ),
            labels=torch.from_numpy(labels.astype(np.float32)),
        )


def chunked(iterator: Iterator[Batch], size: int) -> Iterator[Iterator[Batch]]:
    for first in iterator:
        yield itertools.chain([first], itertools.islice(iterator, size - 1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--told", required=True, help="folder for what each rank tells")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--short_last", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--validate_every", type=int, default=None)
    parser.add_argument("--stop_after", type=int, default=None)
    parser.add_argument("--plan", choices=("planner", "default", "sharders"), default="planner")
    parser.add_argument("--loop", choices=("pipeline", "own"), default="pipeline")
    parser.add_argument("--uniform", action="store_true")
    parser.add_argument("--tagged", action="store_true")
    parser.add_argument("--fewer_on_last_rank", type=int, default=0)
    parser.add_argument("--fail", action="store_true")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world_size, device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    steps = args.steps - (args.fewer_on_last_rank if rank == world_size - 1 else 0)

    def constant(weight: torch.Tensor) -> torch.Tensor:
        return nn.init.constant_(weight, 0.01)

    tables = [
        EmbeddingBagConfig(name=f"t_{f}", embedding_dim=DIM, num_embeddings=args.rows, feature_names=[f], init_fn=constant)
        for f in FEATURES
    ]
    model = Scorer(tables)
    apply_optimizer_in_backward(torch.optim.SGD, model.bags.parameters(), {"lr": 1.0})
    plan, sharders = None, None
    if args.plan == "planner":
        planner = EmbeddingShardingPlanner(
            topology=Topology(world_size=world_size, local_world_size=world_size, compute_device="cpu"), batch_size=args.batch_size
        )
        plan = planner.collective_plan(model, get_default_sharders(), dist.GroupMember.WORLD)
    elif args.plan == "sharders":
        sharders = [EmbeddingBagCollectionSharder()]
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    optimizer = CombinedOptimizer([sharded.fused_optimizer, KeyedOptimizerWrapper(dense, lambda p: torch.optim.SGD(p, lr=0.1))])
    told: dict[str, object] = {"train": [], "losses": [], "evaluated": []}

    if args.loop == "own":
        for batch in batches(args, rank, world_size, "train", steps):
            optimizer.zero_grad()
            loss, (_, _, numbers) = sharded(batch)
            loss.backward()
            optimizer.step()
            told["train"].append(numbers[:, 0].long().tolist())
    else:
        pipeline = TrainPipelineSparseDist(sharded, optimizer, device, execute_all_batches=True)
        for _ in range(args.epochs):
            train(args, pipeline, batches(args, rank, world_size, "train", steps), told, lambda: batches(args, rank, world_size, "val", 5))
        evaluate(pipeline, batches(args, rank, world_size, "val", 5), told)
    if args.fail:
        raise ValueError("the script fails at its end")
    with open(os.path.join(args.told, f"rank{rank}.json"), "w") as file:
        json.dump(told, file)
    print(f"rank {rank}: the script is done")


def train(args: argparse.Namespace, pipeline: TrainPipelineSparseDist, iterator: Iterator[Batch], told: dict, validation) -> None:
    pipeline._model.train()
    taken = []
    for part in chunked(iterator, args.validate_every) if args.validate_every else [iterator]:
        while len(taken) != args.stop_after:
            try:
                loss, _, numbers = pipeline.progress(part)
            except StopIteration:
                break
            taken.append(numbers[:, 0].long().tolist())
            told["losses"].append(float(loss))
        if args.validate_every:
            evaluate(pipeline, validation(), told)
            pipeline._model.train()
    told["train"].append(taken)


def evaluate(pipeline: TrainPipelineSparseDist, iterator: Iterator[Batch], told: dict) -> None:
    pipeline._model.eval()
    seen = []
    with torch.no_grad():
        while True:
            try:
                _, _, numbers = pipeline.progress(iterator)
            except StopIteration:
                break
            seen.append(numbers[:, 0].long().tolist())
    told["evaluated"].append(seen)


if __name__ == "__main__":
    main()
