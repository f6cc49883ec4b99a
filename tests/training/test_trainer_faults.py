"""The trainer stopped and resumed, on the same and on other numbers of ranks; and faults of one rank, which every rank hears of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fae_torchrec.core.errors import FAEError
from fae_torchrec.distributed.local_ranks import run_on_local_ranks
from fae_torchrec.training.sample_audit import check_audit
from tests.training.trainer_runs import FOLDER, RESUMED, RUNS, SAMPLES, alone, dies, end_alone, everything

both = pytest.mark.parametrize("ranks", [1, 2])


@both
@pytest.mark.parametrize("name", RESUMED)
def test_resuming_changes_nothing(name: str, ranks: int) -> None:
    """Two pieces against one run: the same weights to the last bit, the same figures, each sample once by the audit."""
    for rank in everything(ranks):
        resumed, whole = rank["resumed"][name], rank[name]
        steps = len(whole["trained"])
        assert resumed["pieces"] == [9, steps - 9, 0]
        assert all(torch.equal(value, whole["weights"][key]) for key, value in resumed["weights"].items())
        for figure in ("test", "train_loss", "samples_by_kind", "steps_by_kind", "swap_losses"):
            assert getattr(resumed["result"], figure) == getattr(whole["result"], figure)
    audits = check_audit(f"{FOLDER.name}/{ranks} ranks/{name}/samples", np.arange(SAMPLES.num_samples // ranks * ranks))
    assert len(audits) == RUNS[name][2] and all(audit.exact for audit in audits.values())


@pytest.mark.parametrize(("begun", "ended"), [(1, 2), (2, 1)])
def test_another_number_of_ranks(begun: int, ended: int) -> None:
    """The epoch that was begun is finished with the samples it was begun with; the next one has those of the new ranks."""
    everything(2)
    pieces = [rank["ended"] for rank in everything(2)] if ended == 2 else [alone(end_alone, Path(FOLDER.name))]
    audits = check_audit(f"{FOLDER.name}/{begun} to {ended}/samples", np.arange(SAMPLES.num_samples // begun * begun))
    assert audits[0].exact
    second = audits[1]
    dropped = {2: [640], 1: []}
    assert (second.missing.tolist(), second.repeated.tolist()) == (dropped[ended] if begun == 1 else [], [])
    assert second.unknown.tolist() == ([640] if ended == 1 else [])
    assert all(len(piece["trained"]) for piece in pieces) and pieces[0]["result"].steps_by_kind["hot"] > 0


@both
def test_a_missing_value_stops_all_ranks(ranks: int) -> None:
    for rank in everything(ranks):
        seen = rank["diverged"]
        kind = "hot" if seen["kind"] == "H" else "cold"
        assert f"DivergedError: the training loss is not a finite number any more: first at step 10, a {kind} batch" in seen["error"]
        assert f"on rank {ranks - 1}" in seen["error"]
        assert seen["left"] == ["step_000000004", "step_000000008"], "nothing of step 12 was saved"
        assert 10 <= seen["steps"] <= 12


@both
def test_a_test_loss_that_is_no_number_stops_all_ranks(ranks: int) -> None:
    """What the last update did shows in no training loss."""
    for rank in everything(ranks):
        at_the_end, at_a_swap, unwatched = rank["diverged at the end"]
        assert at_the_end.startswith("DivergedError: the test loss after step 9 is nan: the model has diverged")
        assert at_a_swap.startswith("DivergedError: the test loss after step ") and "step 9" not in at_a_swap
        assert unwatched == "no error", "the control: nobody was to look"


@both
def test_a_source_that_fails_stops_all_ranks(ranks: int) -> None:
    errors = [rank["broken source"] for rank in everything(ranks)]
    assert errors[-1].startswith("ConfigError: the disk is gone")
    assert len({error.rsplit("after")[-1] for error in errors}) == 1 and not errors[0].endswith("after 0 steps")
    if ranks == 2:
        assert "the sources of the ranks [1] failed" in errors[0]


@both
def test_a_folder_of_another_run_is_refused(ranks: int) -> None:
    for rank in everything(ranks):
        other_run, other_schedule, same = rank["other runs"]
        assert "ConfigError" in other_run and "lr was None, is 0.5; model.dim was 4, is 8;" in other_run
        assert "ConfigError" in other_schedule and "fixed" in other_schedule and "proportional" in other_schedule
        assert same == "no error", "the control"


def test_a_rank_that_dies_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(FAEError, match="rank 1 was killed by SIGKILL: "):  # and not what that did to rank 0
        run_on_local_ranks(dies, 2, tmp_path, timeout_s=60)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000004"]
