"""HotColdDataLoader on 2 real gloo ranks of very unequal hot counts, over three epochs, streamed and from a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from fae_torchrec.core.schedule import Policy, ShuffleSchedule
from fae_torchrec.data.dataloader import HotColdDataLoader
from fae_torchrec.data.store import SegregatedStore
from fae_torchrec.data.store_writer import write_store
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.distributed.process_group import gather_counts
from tests.data.simulated_ranks import PLACEMENT, Dealt, Stream

# Rank 0 has 95 % hot samples and more of them, rank 1 one hot sample in 40.
HOT = [[n % 20 != 3 for n in range(400)], [n % 40 == 0 for n in range(290)]]
WHOLE = Dealt([n % 3 == 0 for n in range(331)])
POLICIES: tuple[Policy, ...] = ("fae", "fixed", "proportional", "stock")
EPOCHS = 3
Run = list[tuple[int, str, float, list[int]]]


def _three_epochs(rank: int, store: str) -> dict[str, Run]:
    group = dist.new_group(backend="gloo")
    agree = gather_counts(group)
    runs: dict[str, Run] = {}

    def note(name: str, loader: HotColdDataLoader) -> None:
        runs[name] = []
        for epoch in range(EPOCHS):
            for phase, batches in loader.phases():
                for batch in batches:
                    dist.barrier()  # a step of all ranks, while threads agree on the next window
                    runs[name].append((epoch, batch.kind, batch.weight, batch.sample_numbers.tolist()))
                loader.schedule.observe(phase.count)
        # A pass that all ranks leave early, and one more after it.
        for _, batch in zip(range(5), loader, strict=False):
            assert batch.num_samples >= 0
        loader.close()
        assert next(iter(loader)).position is not None
        loader.close()

    for policy in POLICIES:
        for window, buffer in ((7, 1 << 30), (None, 6000)):
            options: dict[str, Any] = {"batch_size": 16, "rank": rank, "world_size": 2, "agree": agree}
            stream = Stream(HOT[rank], [9, 16])
            schedule = ShuffleSchedule(policy)
            note(
                f"{policy} {window}",
                HotColdDataLoader(stream.batches, PLACEMENT, schedule=schedule, window_batches=window, buffer_bytes=buffer, **options),
            )
        if policy != "stock":
            opened = SegregatedStore.open(store)
            note(f"{policy} store", HotColdDataLoader(opened, PLACEMENT, schedule=ShuffleSchedule(policy), shuffle=True, **options))
    return runs


def test_three_epochs_of_very_unequal_ranks(tmp_path: Path) -> None:
    write_store(tmp_path / "store", WHOLE, PLACEMENT)
    results = run_on_local_ranks(_three_epochs, 2, str(tmp_path / "store"), timeout_s=120)
    assert len(results[0]) == 11
    for name in results[0]:
        first, second = results[0][name], results[1][name]
        assert [step[:2] for step in first] == [step[:2] for step in second], name
        for epoch in range(EPOCHS):
            numbers = [sorted(n for e, _, _, part in run if e == epoch for n in part) for run in (first, second)]
            if name.endswith("store"):
                assert sorted(numbers[0] + numbers[1]) == list(range(331)), name
            else:  # position * 2 + rank
                assert numbers[0] == [2 * n for n in range(400)], name
                assert numbers[1] == [2 * n + 1 for n in range(290)], name
        for (_, _, weight, part), (_, _, other_weight, other_part) in zip(first, second, strict=True):
            samples = len(part) + len(other_part)
            of_step = samples if name.startswith("stock") else 32
            assert samples and (weight, other_weight) == (2 * len(part) / of_step, 2 * len(other_part) / of_step)
    # With segregation rank 1 had fillers in most hot steps, and said so by its weight.
    assert sum(weight == 0 for _, kind, weight, _ in results[1]["fae None"] if kind == "hot") > 10
