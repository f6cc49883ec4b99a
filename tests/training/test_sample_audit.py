"""The audit finds what is missing and what is repeated, and nothing where all is well: on any number of ranks, after any restart."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.training.sample_audit import SampleAudit, check_audit, discard, read_audit


def record(folder: Path, numbers: np.ndarray, first: int, last: int, *, ranks: int, flushes: tuple[int, ...]) -> None:
    """Steps first+1..last of two epochs of 12 steps, each taking the next 4 of `numbers`, dealt to the ranks in contiguous runs."""
    for rank in range(ranks):
        audit = SampleAudit(str(folder), rank, first_step=first)
        for step in range(first + 1, last + 1):
            epoch, place = divmod(step - 1, 12)
            share = np.array_split(numbers[4 * place : 4 * place + 4], ranks)[rank]
            audit.record(epoch, step, "hot" if step % 2 else "cold", share)
            if step in flushes:
                audit.flush(step)


def problems(folder: Path, expected: int | np.ndarray) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """(missing, repeated, unknown) of the epochs that are not exact."""
    found = check_audit(str(folder), expected).items()
    return {epoch: (a.missing.tolist(), a.repeated.tolist(), a.unknown.tolist()) for epoch, a in found if not a.exact}


def test_columns_by_hand(tmp_path: Path) -> None:
    audit = SampleAudit(str(tmp_path / "deep" / "down"), 3)
    audit.record(0, 1, "cold", np.array([7, 5]))
    audit.record(0, 2, "hot", np.zeros(0, dtype=np.int64))  # a filler
    audit.record(1, 3, "mixed", np.array([2**40]))
    assert os.listdir(tmp_path / "deep" / "down") == [], "nothing is written before a checkpoint"
    audit.flush(3)
    audit.flush(3)
    assert os.listdir(tmp_path / "deep" / "down") == ["samples_000000000001_000000000003_rank00003.npz"]
    read = read_audit(str(tmp_path / "deep" / "down"))
    columns = [column.tolist() for column in (read.epochs, read.steps, read.ranks, read.kinds, read.samples)]
    assert columns == [[0, 0, 1], [1, 1, 3], [3, 3, 3], [0, 0, 2], [7, 5, 2**40]]
    assert problems(tmp_path / "deep" / "down", np.array([5, 7])) == {1: ([5, 7], [], [2**40])}


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    saves=st.sets(st.integers(1, 23), max_size=4),
    killed=st.integers(0, 24),
    seed=st.integers(0, 99),
)
def test_a_killed_run_that_goes_on_is_exact(
    tmp_path_factory: pytest.TempPathFactory, ranks: tuple[int, int], saves: set[int], killed: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("audit")
    numbers = np.random.default_rng(seed).permutation(1000)[:48]
    record(folder, numbers, 0, killed, ranks=ranks[0], flushes=tuple(saves))
    written = [step for step in saves if step <= killed]
    done = max([0, *written[: seed % 3]])  # not always the newest: its checkpoint may have been cut short
    discard(str(folder), done)
    record(folder, numbers, done, 24, ranks=ranks[1], flushes=(*saves, 24))
    assert problems(folder, numbers) == {}
    read = read_audit(str(folder))
    assert np.array_equal(np.unique(read.steps), np.arange(1, 25))
    assert set(read.ranks[read.steps > done].tolist()) <= set(range(ranks[1]))


def test_negative_controls(tmp_path: Path) -> None:
    """Six steps a segment: the first six have samples 0..23, on two ranks the odd pairs of four are rank 1's."""
    numbers = np.arange(48)
    record(tmp_path, numbers, 0, 24, ranks=2, flushes=(6, 12, 18, 24))
    assert problems(tmp_path, 48) == {}
    assert problems(tmp_path, 50) == {epoch: ([48, 49], [], []) for epoch in (0, 1)}
    assert problems(tmp_path, 47) == {epoch: ([], [], [47]) for epoch in (0, 1)}
    lost = tmp_path / "samples_000000000001_000000000006_rank00001.npz"
    content = lost.read_bytes()
    lost.unlink()
    of_rank_1 = [n for n in range(24) if n % 4 >= 2]
    assert problems(tmp_path, 48) == {0: (of_rank_1, [], [])}
    lost.write_bytes(content)
    (tmp_path / "samples_000000000013_000000000018_rank00007.npz").write_bytes(
        (tmp_path / "samples_000000000013_000000000018_rank00001.npz").read_bytes()
    )
    assert problems(tmp_path, 48) == {1: ([], of_rank_1, [])}, "given twice"


def test_discard_takes_what_comes_after_and_what_was_never_finished(tmp_path: Path) -> None:
    discard(str(tmp_path / "not there"), 0)
    record(tmp_path, np.arange(48), 0, 24, ranks=2, flushes=(6, 12, 18))
    (tmp_path / ".samples_000000000019_000000000024_rank00000.npz.77.tmp").write_text("half")
    (tmp_path / "other.txt").write_text("not ours")
    discard(str(tmp_path), 12)
    assert sorted(os.listdir(tmp_path)) == [
        "other.txt",
        *(f"samples_{first:012d}_{last:012d}_rank0000{rank}.npz" for first, last in ((1, 6), (7, 12)) for rank in (0, 1)),
    ]
    discard(str(tmp_path), 0)
    with pytest.raises(ConfigError, match="no sample audit"):
        read_audit(str(tmp_path))


def test_a_damaged_segment_is_named(tmp_path: Path) -> None:
    record(tmp_path, np.arange(48), 0, 6, ranks=1, flushes=(6,))
    (segment,) = tmp_path.iterdir()
    segment.write_bytes(segment.read_bytes()[:-50])
    with pytest.raises(DataError, match=segment.name):
        check_audit(str(tmp_path), 48)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make the folder"):
        SampleAudit(str(tmp_path / "file" / "x"), 0)
    audit = SampleAudit(str(tmp_path / "gone"), 0)
    audit.record(0, 1, "hot", np.arange(2))
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="cannot write the sample audit"):
        audit.flush(1)
