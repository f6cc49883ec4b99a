"""What all tests share: ranks of most tests are forked from a server that has imported torch and TorchRec once, which takes seconds.

And torch computes in one thread: tests are small, and threads that wait for each other on shared cores make them many times slower.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from fae_torchrec.distributed import local_ranks

# These look at the ranks as processes: how they start, what they print, how they die.
_SPAWNED = ("test_local_ranks", "test_cli", "test_cli_train", "test_trainer_faults", "test_crash")
_IMPORTED = [
    "tests.distributed.small_model",
    "tests.distributed.sequence_model",
    "tests.training.small_pipeline",
    "fae_torchrec.experiment",
]

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def ranks_that_start_fast(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.module.__name__.rpartition(".")[2] in _SPAWNED:
        yield
        return
    multiprocessing.set_forkserver_preload(_IMPORTED)

    def forked(*args: Any, start_method: str, **kwargs: Any) -> Any:
        assert start_method == "spawn"
        return start_processes(*args, **kwargs, start_method="forkserver")  # type: ignore[no-untyped-call]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_ranks, "start_processes", forked)
        yield
