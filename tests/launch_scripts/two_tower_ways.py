"""For tests/test_two_tower.py, under torchrun: examples/two_tower.py with --fae off, planner and pipeline in one process group.

Each rank writes what the runs told, and how often a cold tier began an exchange. Then a checkpoint of the run with hot and cold rows is
loaded into the stock model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from fae_torchrec import load_checkpoint, save_checkpoint
from fae_torchrec.core.errors import StateError
from fae_torchrec.distributed.tiers import StockTier

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import two_tower  # the path must be there first
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

BEGIN, SCORE = StockTier.input_dist, two_tower.auc


def main(folder: Path, arguments: list[str]) -> None:
    device = two_tower.start_process_group()
    told: dict[str, Any] = {}
    pipelines: dict[str, Any] = {}
    test_batches: list[Any] = []
    for way in ("off", "planner", "pipeline"):
        exchanges = []

        def input_dist(tier: StockTier, *args: Any, _exchanges: list[StockTier] = exchanges) -> Any:
            _exchanges.append(tier)
            return BEGIN(tier, *args)

        def test(pipeline: Any, batches: Any, device: torch.device, _way: str = way) -> float:
            pipelines[_way], test_batches[:] = pipeline, list(batches)
            return SCORE(pipeline, iter(test_batches), device)

        with mock.patch.object(StockTier, "input_dist", input_dist), mock.patch.object(two_tower, "auc", test):
            told[way] = two_tower.run(two_tower._parser().parse_args([*arguments, "--fae", way]), device)
        told[way]["cold_exchanges"] = len(exchanges)
        told[way]["cold_tiers"] = len(set(map(id, exchanges)))

    trained, stock = pipelines["pipeline"], pipelines["off"]
    save_checkpoint(folder / "checkpoint", trained._model, trained._optimizer)
    dense = KeyedOptimizerWrapper(dict(in_backward_optimizer_filter(stock._model.named_parameters())), torch.optim.Adam)
    optimizer = CombinedOptimizer([stock._model.fused_optimizer, dense])
    try:
        load_checkpoint(folder / "checkpoint", stock._model, optimizer)
    except StateError as error:
        told["without a state"] = str(error)
    dense.init_state()
    load_checkpoint(folder / "checkpoint", stock._model, optimizer)
    told["loaded auc"] = two_tower.auc(stock, iter(test_batches), device)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
