"""The profiling pass of `fae launch`: a child process of each rank runs the script until its first batches are counted."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from fae_torchrec.core.errors import DataError, FAEError
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.launch_config import LaunchConfig
from fae_torchrec.launch_ranks import LaunchRanks
from fae_torchrec.launch_script import ScriptRun

if TYPE_CHECKING:
    from fae_torchrec.launch_standins import Counted

_KEPT_INPUTS, _FRESH_INPUTS = 131_072, 65_536  # over all ranks
_LOG_LINES = 15
_POLL_S = 0.05
PROFILING = "FAE_LAUNCH_PROFILING"
"""In the environment of the child, for scripts that write what should not be written twice."""
# This package is found last, and the current folder not at all: the script's imports are those that it would have.
_CHILD = (
    "import sys; sys.path[:] = [p for p in sys.path if p] + [sys.argv[1]]; from fae_torchrec.launch_profile import main; main(sys.argv[2:])"
)


def profile_script(
    config: LaunchConfig, script: ScriptRun, ranks: LaunchRanks, *, show_progress: bool = False
) -> tuple[PopularityProfile | None, dict[str, Any]]:
    """Runs the script on all ranks until enough of its batches are counted. Every rank calls it; rank 0 gets the result.

    Args:
        config: how many batches, and which of their samples.
        script: what to run.
        ranks: all ranks.
        show_progress: whether rank 0 shows a bar on standard error.

    Returns:
        The profile of all ranks' batches, None if the script fed none; and what is to be said of the pass: "batches", "samples", "used"
        (names of TorchRec) and "ended", why it ended. On other ranks than 0: None, {}.

    Raises:
        FAEError: on rank 0: the script failed before it fed a batch, or its batches cannot be counted.
    """
    port = ranks.free_port()
    child = _Child(config, script, ranks, port, show_progress)
    outcomes: list[Counted] = []
    failure: Exception | None = None
    try:
        try:
            outcomes = ranks.gather(child.counted)
        except Exception as error:
            failure = error
        ranks.share(lambda: None)  # no child leaves while another may still need it
    finally:
        child.end()
    if failure is not None:
        raise failure
    return _merged(outcomes, script) if outcomes else (None, {})


class _Child:
    """A rank's process of the profiling pass.

    Args:
        config: what is counted.
        script: what is run.
        ranks: all ranks.
        port: where the script's process group meets in this pass.
        show_progress: whether rank 0 shows a bar.
    """

    def __init__(self, config: LaunchConfig, script: ScriptRun, ranks: LaunchRanks, port: int, show_progress: bool) -> None:
        self._job = {
            "config": config.to_dict(),
            "target": script.target,
            "arguments": list(script.arguments),
            "is_module": script.is_module,
            "rank": ranks.rank,
            "world_size": ranks.world_size,
        }
        self._script = script
        self._environment = _environment(port, ranks.world_size)
        self._bar = show_progress and ranks.rank == 0 and sys.stderr.isatty()
        self._log = Path(config.output, f"profile_rank{ranks.rank}.log")
        self._process: subprocess.Popen[bytes] | None = None

    def counted(self) -> Counted:
        """Runs it, and waits for what it has counted; it may stay until `end`.

        Raises:
            FAEError: the script failed before it fed a batch, or its batches cannot be counted.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        bar = os.dup(2) if self._bar else None
        try:
            with tempfile.TemporaryDirectory() as folder, self._log.open("wb") as output:
                result, job = Path(folder, "counted"), Path(folder, "job")
                job.write_text(json.dumps({**self._job, "bar": bar, "result": str(result)}))
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _CHILD, str(Path(__file__).resolve().parents[1]), str(job)],
                    env=self._environment,
                    stdout=output,
                    stderr=output,
                    pass_fds=() if bar is None else (bar,),
                )
                while self._process.poll() is None and not result.is_file():
                    time.sleep(_POLL_S)
                outcome = pickle.loads(result.read_bytes()) if result.is_file() else None
        finally:
            if bar is not None:
                os.close(bar)
        if outcome is None:
            raise self._failed(f"its process ended with code {self._process.returncode}")
        if isinstance(outcome, FAEError):
            raise outcome
        counted, failure = outcome
        if counted.partial is None and failure is not None:
            raise self._failed(failure)
        return cast("Counted", counted)

    def end(self) -> None:
        """Kills it, if it is still there."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _failed(self, how: str) -> FAEError:
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return FAEError(
            f"the profiling pass of `{self._script.text}` failed before the script fed a batch ({how}). In that pass the model is not "
            "sharded and nothing is trained. See that the script runs without fae launch; if it does, give fae launch a `profile` or "
            f"`placement`, which need no such pass. The end of {self._log}:\n" + "\n".join(f"  {line}" for line in lines)
        )


def _environment(port: int, world_size: int) -> dict[str, str]:
    """The rank's environment, but for a meeting place of the pass's own, so that the script's real group finds nothing of it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC_", "FAE_LAUNCH_"))}
    own = {"MASTER_PORT": str(port)} if world_size > 1 or "MASTER_PORT" in kept else {}
    return {**kept, **own, PROFILING: "1"}


def _merged(outcomes: Sequence[Counted], script: ScriptRun) -> tuple[PopularityProfile | None, dict[str, Any]]:
    from fae_torchrec.data.partial_profile import PartialProfile

    parts, seen = [], set[str]()
    batches = 0
    for counted in outcomes:
        if counted.partial is None or not seen.isdisjoint(counted.digests):  # a rank that is fed what another is fed says nothing new
            continue
        parts.append(counted.partial)
        seen.update(counted.digests)
        batches += len(counted.digests)
    told = {
        "batches": batches,
        "samples": sum(part.total_samples for part in parts),
        "used": sorted(set().union(*(counted.used for counted in outcomes))),
        "ended": outcomes[0].ended,
    }
    if not parts:
        return None, told
    try:
        return PartialProfile.merged(parts).profile(f"the first {batches} batches that {script.text} feeds"), told
    except DataError as error:
        raise DataError(f"profiling `{script.text}`: {error} (profile_batches, profile_rate)") from error


def main(argv: Sequence[str]) -> None:
    """The child: runs the script with stand-ins, writes what was counted, and leaves without ceremony."""
    with suppress(ImportError, AttributeError):
        from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]  # private, torch 2.13

        _prctl_pr_set_pdeathsig(signal.SIGKILL)
    job = json.loads(Path(argv[0]).read_text())
    result = Path(job["result"])
    outcome, waits = _count(job)
    draft = result.with_suffix(".draft")
    draft.write_bytes(pickle.dumps(outcome))
    draft.rename(result)
    sys.stdout.flush()
    sys.stderr.flush()
    while waits:  # to be killed: other ranks may still need what this one's process group keeps
        time.sleep(60)
    os._exit(0)  # the script's process group, threads and workers are not wound up: nobody waits for them


def _count(job: dict[str, Any]) -> tuple[FAEError | tuple[Counted, str | None], bool]:
    """What was counted and what the script failed with; and whether the process should stay until the others have counted, too."""
    from fae_torchrec.data.partial_profile import Sampling
    from fae_torchrec.launch_patches import replaced
    from fae_torchrec.launch_standins import BatchCounter, Profiled, stand_ins

    config = LaunchConfig.from_dict(job["config"])
    share = (max(1, kept // job["world_size"]) for kept in (_KEPT_INPUTS, _FRESH_INPUTS))
    sampling = Sampling(config.profile_rate, config.seed, *share)
    stream = None if job["bar"] is None else os.fdopen(job["bar"], "w")
    bar = tqdm(total=config.profile_batches, desc="profile", unit="batch", file=stream, disable=stream is None)

    def step() -> None:
        bar.update()

    counter = BatchCounter(job["rank"], config.profile_batches, sampling, config.stock_tables, step)
    failure, waits = None, False
    try:
        with replaced(stand_ins(counter)):
            ScriptRun(job["target"], tuple(job["arguments"]), job["is_module"]).run()
        ended = "the script ended"
    except Profiled as reason:
        ended, waits = str(reason), True
    except FAEError as error:
        return error, False
    except SystemExit as leave:
        ended = f"the script left with exit code {leave.code}"
        failure = ended if leave.code not in (None, 0) else None
    except BaseException as error:
        if type(error).__name__ == "PlannerError":
            return FAEError(str(error)), False
        traceback.print_exc()
        ended = failure = f"the script raised {type(error).__name__}"
    finally:
        bar.close()
    return (counter.counted(ended), failure), waits
