"""The profiling pass: what is counted, when it ends, and what is said when it cannot be done."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.core.placement import RowPlacement
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec
from fae_torchrec.data.partial_profile import ProfileTally, Sampling
from fae_torchrec.launch_placement import does_not_pay, fresh_coverage
from fae_torchrec.launch_profile import _merged
from fae_torchrec.launch_script import ScriptRun
from fae_torchrec.launch_standins import BatchCounter, Profiled, ids_of, stand_ins

ROOT = Path(__file__).resolve().parents[1]
ALL = Sampling(1.0, 7, 100, 100)


def model(optimizer: Any = torch.optim.Adagrad) -> nn.Module:
    tables = [EmbeddingBagConfig(name=f"t_{f}", embedding_dim=4, num_embeddings=10, feature_names=[f]) for f in "ab"]
    bags = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    apply_optimizer_in_backward(optimizer, bags.parameters(), {"lr": 0.1})
    return nn.ModuleDict({"bags": bags})


def kjt(a: list[int], b: list[int]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(["a", "b"], torch.tensor(a + b), lengths=torch.ones(len(a) + len(b), dtype=torch.int32))


def counter(batches: int = 10, rank: int = 0) -> BatchCounter:
    made = BatchCounter(rank, batches, ALL, ())
    made.see_model("DistributedModelParallel", model(), None)
    return made


def test_counts_are_those_of_the_batches() -> None:
    counting = counter()
    with pytest.raises(Profiled, match="first pass was over after 2 batches"):
        counting.feed(iter([kjt([1, 1, 2], [0, 3, 3]), kjt([1], [9])]))
    partial = counting.counted("").partial
    assert partial is not None
    assert {name: dict(zip(c.ids.tolist(), c.counts.tolist(), strict=True)) for name, c in partial.counts.items()} == {
        "t_a": {1: 3, 2: 1},
        "t_b": {0: 1, 3: 2, 9: 1},
    }
    assert partial.total_samples == 4
    assert partial.tables["t_a"].optimizer is Optimizer.ADAGRAD, "so that bytes have the optimizer's state in them"


def test_ends_after_so_many_batches() -> None:
    given = iter([kjt([n], [n]) for n in range(5)])
    with pytest.raises(Profiled, match=r"3 batches \(profile_batches\) were counted"):
        counter(batches=3).feed(given)
    assert len(list(given)) == 2, "no more is read than is counted"


def test_ends_when_batches_come_again() -> None:
    counting = counter()
    with pytest.raises(Profiled, match="come again after 2"):
        counting.feed(iter([kjt([0], [0]), kjt([1], [1]), kjt([0], [0]), kjt([2], [2])]))
    partial = counting.counted("").partial
    assert partial is not None
    assert partial.total_samples == 2, "a batch that was seen says nothing new"


def test_an_id_that_is_no_row_is_an_error() -> None:
    with pytest.raises(DataError, match=r"t_a.*10"):
        counter().feed(iter([kjt([10], [0])]))


def test_a_table_that_cannot_be_placed_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"t_a.*RMSprop"):
        BatchCounter(0, 10, ALL, ()).see_model("DistributedModelParallel", model(torch.optim.RMSprop), None)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda k: k,
        lambda k: (torch.ones(2), k),
        lambda k: {"ids": k, "labels": torch.ones(2)},
        lambda k: SimpleNamespace(features=k, labels=torch.ones(2)),
        lambda k: [KeyedJaggedTensor(["a"], k["a"].values(), lengths=k["a"].lengths()), {"b": k}],
    ],
)
def test_ids_are_found_in_batches_of_any_type(wrap: Callable[[KeyedJaggedTensor], Any]) -> None:
    found = ids_of(wrap(kjt([1, 2], [3, 4])), ("a", "b"))
    assert found["b"].values().tolist() == [3, 4]
    assert found["a"].values().tolist()[:2] == [1, 2]


def test_a_batch_without_the_features_ends_the_pass() -> None:
    with pytest.raises(Profiled, match=r"no KeyedJaggedTensor with the features \['c'\]"):
        ids_of(kjt([1], [2]), ("a", "c"))


def test_ranks_are_merged_and_one_that_is_fed_the_same_is_not_counted_twice() -> None:
    outcomes = []
    for rank, given in enumerate(([kjt([1], [1])], [kjt([2], [2]), kjt([3], [3])], [kjt([1], [1])])):
        counting = counter(rank=rank)
        with pytest.raises(Profiled):
            counting.feed(iter(given))
        outcomes.append(counting.counted("done"))
    profile, told = _merged(outcomes, ScriptRun("train.py"))
    assert profile is not None
    assert profile.counts["t_a"].ids.tolist() == [1, 2, 3]
    assert (told["batches"], told["samples"], told["ended"]) == (3, 3, "done")


def test_coverage_of_samples_that_were_not_counted() -> None:
    """Of six samples three were counted; the others access the rows 1, 3 and 2, of which 1 and 2 are hot."""
    tally = ProfileTally(TableSet((TableSpec("t", 10, 4, ("a",)),)), Sampling(0.5, 7, 100, 100))
    given = KeyedJaggedTensor(["a"], torch.tensor([1, 1, 2, 1, 3, 2]), lengths=torch.ones(6, dtype=torch.int32))
    tally.add_batch(given, np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9]), np.arange(6))  # the first three are counted
    profile = tally.partial().profile()
    placement = RowPlacement(profile.tables, {"t": np.array([1, 2])}, "test", 1000, 0.5, 1.0)
    assert profile.coverage(placement.hot_ids) == 1.0
    assert fresh_coverage(profile, placement) == 2 / 3


def test_nothing_counted_is_no_profile() -> None:
    profile, told = _merged([BatchCounter(0, 1, ALL, ()).counted("the script ended")], ScriptRun("train.py"))
    assert profile is None
    assert told == {"batches": 0, "samples": 0, "used": [], "ended": "the script ended"}


def test_stand_ins_show_the_batches_and_shard_nothing() -> None:
    counting = BatchCounter(0, 10, ALL, ())
    given = stand_ins(counting)
    unsharded = model()
    standing: Any = given["DistributedModelParallel"](unsharded, device=torch.device("cpu"))
    assert isinstance(standing, DistributedModelParallel)
    assert standing.module is unsharded
    assert [name for name, _ in standing.named_parameters()] == [name for name, _ in unsharded.named_parameters()]
    assert standing.fused_optimizer.param_groups == []
    pipeline: Any = given["TrainPipelineSparseDist"](standing, None, torch.device("cpu"))
    assert isinstance(pipeline, TrainPipelineSparseDist)
    standing.eval()
    with pytest.raises(StopIteration):
        pipeline.progress(iter([kjt([0], [0])]))
    assert counting.counted("").partial is None, "evaluation batches are not counted"
    standing.train()
    with pytest.raises(Profiled):
        pipeline.progress(iter([kjt([0], [0])]))
    assert counting.counted("").used == {"DistributedModelParallel", "TrainPipelineSparseDist"}
    planner: Any = given["EmbeddingShardingPlanner"](Topology(world_size=1, local_world_size=1, compute_device="cpu"))
    assert isinstance(planner, EmbeddingShardingPlanner)
    assert list(planner.plan(unsharded, standing.sharders).plan) == ["bags"], "a script that looks at its plan finds the stock one"


@pytest.mark.parametrize(
    ("hot_inputs", "ranks", "budget", "why"),
    [
        (0.1, 2, 100, None),
        (0.0999, 2, 100, "only 10.0 % of the samples .* too few batches"),
        (0.9, 1, 10_000_000, "all tables together take .* fit into the budget"),
        (0.9, 2, 10_000_000, None),
    ],
)
def test_whether_it_pays(hot_inputs: float, ranks: int, budget: int, why: str | None) -> None:
    tables = TableSet((TableSpec("t", 1000, 4, ("a",)),))
    placement = RowPlacement(tables, {"t": np.arange(10)}, "test", budget, hot_inputs, 0.5)
    said = does_not_pay(placement, 0.1, ranks)
    if why is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(why, said)


def test_scripts_and_modules_run_as_main(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'beside'\n")
    (tmp_path / "train.py").write_text("import sys\nfrom beside import WORD\nprint(__name__, WORD, sys.argv)\n")
    code = (
        "import sys; from fae_torchrec.launch_script import ScriptRun; before = list(sys.argv), list(sys.path); "
        "ScriptRun('train.py', ('--a', 'b')).run(); ScriptRun('train', ('--c',), is_module=True).run(); "
        "print(before == (sys.argv, sys.path))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    script, module, same = shown.stdout.splitlines()
    assert script == "__main__ beside ['train.py', '--a', 'b']"
    assert module == f"__main__ beside ['{tmp_path / 'train.py'}', '--c']"
    assert same == "True"


def test_the_digest_is_of_the_text(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("a = 1\n")
    first = ScriptRun(str(script)).check()
    script.write_text("a = 2\n")
    assert first != ScriptRun(str(script)).check()
    with pytest.raises(ConfigError, match="there is no script"):
        ScriptRun(str(tmp_path / "none.py")).check()
