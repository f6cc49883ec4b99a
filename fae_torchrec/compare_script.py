"""fae compare --script: somebody's own training script under several placements, in turns, by `fae launch` and torchrun."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fae_torchrec.compare_turns import summary, turns
from fae_torchrec.core.errors import ConfigError, FAEError
from fae_torchrec.doctor import collect
from fae_torchrec.launch_config import LaunchConfig, load_launch_config
from fae_torchrec.launch_script import ScriptRun
from fae_torchrec.report_parts import describe_environment
from fae_torchrec.training.report_verdicts import baseline_of

_MARK = "fae launch |"
_SAID_LINES = 3
_SCORE = re.compile(r"auroc|\bauc\b", re.IGNORECASE)
_AUROC = re.compile(r"auroc[^\n]*?[:=]\s*([01]?\.\d+|[01]\.?\d*(?:e-?\d+)?)\b", re.IGNORECASE)
_FAILURE = re.compile(r"^E\d{4} .* failed \(exitcode", re.MULTILINE)  # where torchrun begins to tell of a rank that failed
_BAR = re.compile(r"^.*\d+/\d+ \[\d[^]]*\]")  # tqdm's, which has no end of line before what is printed next
_WORK = {"samples": "trained samples:", "train_steps": "took training steps:", "evaluation_steps": "took evaluation steps:"}
FIGURES = (
    "samples_per_s", "step_ms", "hot_batches", "hot_bytes", "spared_bytes_per_sample", "host_peak_bytes", "device_peak_bytes",
    "printed_auroc", "wall_s",
)  # fmt: skip
"""What the repeats of a run are summarized by."""


@dataclass(frozen=True)
class ScriptComparison:
    """What is run, and how often.

    Attributes:
        script: what to run.
        launch: file of the config of `fae launch`.
        overrides: of its keys, "key=value".
        placements: "stock", "fae", and "fae:key=value,..." for fae with other keys of that config; at least two.
        ranks: numbers of ranks.
        repeats: turns; each runs every placement.
        warm_up: first steps of a run that are not in its step time.
        output: folder for the report, the logs and what `fae launch` keeps.
        allow_unequal: reports runs that did not do the same work, instead of raising.
    """

    script: ScriptRun
    launch: str
    overrides: tuple[str, ...] = ()
    placements: tuple[str, ...] = ("stock", "fae")
    ranks: tuple[int, ...] = (1,)
    repeats: int = 1
    warm_up: int = 5
    output: str = "runs/compare"
    allow_unequal: bool = False

    def __post_init__(self) -> None:
        for name, values in (("--placements", self.placements), ("--ranks", self.ranks)):
            if len(set(values)) != len(values):
                raise ConfigError(f"{name}: received {list(values)}; give none twice")
        if min(self.ranks) < 1 or self.repeats < 1 or self.warm_up < 0:
            raise ConfigError(
                f"received --ranks {list(self.ranks)}, --repeats {self.repeats}, --warm-up {self.warm_up}; ranks and repeats must be at "
                "least 1, the warm-up at least 0"
            )
        wrong = [name for name in self.placements if name.partition(":")[0] not in ("stock", "fae") or name.startswith("stock:")]
        if wrong or len(self.placements) < 2:
            raise ConfigError(
                f"--placements: received {list(self.placements)}; give at least two of stock, fae, and fae:KEY=VALUE,... with keys of the "
                "launch config"
            )

    def overrides_of(self, placement: str) -> list[str]:
        """Of the launch config, with the placement's own keys last."""
        own = placement.partition(":")[2]
        return [*self.overrides, *(own.split(",") if own else [])]

    def config_of(self, placement: str) -> LaunchConfig:
        """The launch config of a placement.

        Raises:
            ConfigError: it is no good.
        """
        return load_launch_config(self.launch, self.overrides_of(placement))


def compare_script(comparison: ScriptComparison, command: Sequence[str], *, show_progress: bool = False) -> dict[str, Any]:
    """Runs the script under every placement, in turns, each run in processes of its own.

    Args:
        comparison: what to run.
        command: the command line, for the report.
        show_progress: a bar over the runs on standard error.

    Returns:
        The report (see `fae_torchrec.training.report`).

    Raises:
        ConfigError: the script or a config is no good, before any run; or the placements did not do the same work (unless
            `allow_unequal`), found after their first turn.
        FAEError: a run failed; the message has its last words and the name of its log.
    """
    comparison.script.check()
    for name in comparison.placements:
        comparison.config_of(name)
    report: dict[str, Any] = {
        "schema": 1,
        "title": f"fae compare of {comparison.script.target}",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        **describe_environment(collect()),
        "script": comparison.script.text,
        "config": {name: comparison.config_of(name).to_dict() for name in comparison.placements},
        "repeats": comparison.repeats,
        "warm_up_steps": comparison.warm_up,
        "warnings": [],
        "not_comparable": [],
        "notes": [],
        "runs": [],
    }
    count = len(comparison.ranks) * comparison.repeats * len(comparison.placements)
    with tqdm(total=count, unit="run", disable=not show_progress) as bar:
        for ranks in comparison.ranks:
            report["runs"] += _run_on(ranks, comparison, report, bar)
    return report


def _run_on(ranks: int, comparison: ScriptComparison, report: dict[str, Any], bar: tqdm[Any]) -> list[dict[str, Any]]:
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in comparison.placements}
    for turn, order in enumerate(turns(comparison.placements, comparison.repeats)):
        for place, name in enumerate(order):
            bar.set_description(f"{name}, {ranks} rank{'s' if ranks > 1 else ''}")
            entry = run_once(comparison, name, ranks, turn)
            done[name].append({**entry, "turn": turn, "place": place})
            bar.update()
        if turn == 0:
            _check_work(ranks, {name: entries[0] for name, entries in done.items()}, comparison, report)
    each = ("turn", "place", "train_steps", "samples", "said", *FIGURES)
    return [
        {**summary(entries, FIGURES), "each": [{key: entry.get(key) for key in each} for entry in entries]} for entries in done.values()
    ]


def run_once(comparison: ScriptComparison, placement: str, ranks: int, turn: int) -> dict[str, Any]:
    """One run of the script, by torchrun; its output goes to a log beside the record of `fae launch`.

    Args:
        comparison: what to run.
        placement: of `comparison.placements`.
        ranks: processes on this machine.
        turn: for the log's name.

    Returns:
        The entry of the run, see `entry_of`.

    Raises:
        FAEError: it failed.
    """
    runs = Path(comparison.output, "runs")
    runs.mkdir(parents=True, exist_ok=True)
    name = f"{re.sub(r'[^A-Za-z0-9.]+', '_', placement)}_{ranks}_{turn}"
    log, kept, record = runs / f"{name}.log", runs / f"{name}.json", Path(comparison.output, "launch", "launch.json")
    record.unlink(missing_ok=True)  # an earlier run's
    target = ["-m", comparison.script.target] if comparison.script.is_module else [comparison.script.target]
    overrides = [word for override in comparison.overrides_of(placement) for word in ("--set", override)]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "fae_torchrec.launch"),
        *("--config", comparison.launch, *overrides, "--output", str(record.parent), "--placement", placement.partition(":")[0], "--quiet"),
        *(*target, *comparison.script.arguments),
    ]
    code = run_logged(command, log)
    text = log.read_text(encoding="utf-8", errors="replace")
    if code or not record.is_file():
        words = " / ".join(_own_lines(text)[-_SAID_LINES:]) or "nothing"
        raise FAEError(
            f"the script ended with code {code} under the placement {placement} on {ranks} rank(s); it last said: {words}. All of it is in "
            f"{log}; run it alone with `fae launch`"
        )
    record.replace(kept)
    return entry_of(json.loads(kept.read_text(encoding="utf-8")), placement, text, comparison.warm_up)


def run_logged(command: Sequence[str], log: Path) -> int:
    """Runs a command, all of its output into a file; returns its exit code."""
    package = str(Path(__file__).resolve().parents[1])  # found by the ranks too where it is not installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode


def entry_of(record: Mapping[str, Any], placement: str, text: str, warm_up: int) -> dict[str, Any]:
    """The report's entry of one run.

    Args:
        record: what `fae launch` wrote (docs/launch.md).
        placement: as it was asked for.
        text: what the run printed.
        warm_up: first steps that are left out of the step time; of a run that has no more, the last step is taken.

    Returns:
        "placement", "ranks", "ran_on" ("fae" or "stock"), "why_not", `FIGURES`, the work ("samples", "train_steps", "evaluation_steps"),
        and "said": the lines with a score that the script printed last, or its last lines.
    """
    seconds = record["step_seconds"][warm_up:] or record["step_seconds"][-1:]
    fae, steps, samples = record["placement"] == "fae", record["steps"], record["samples"]
    lines = _own_lines(text)
    scores, numbers = [line for line in lines if _SCORE.search(line)], _AUROC.findall("\n".join(lines))
    return {
        "placement": placement,
        "ranks": record["world_size"],
        "ran_on": record["placement"],
        "why_not": record["why_not"],
        "samples_per_s": record["samples_per_s"],
        "step_ms": 1000 * statistics.median(seconds) if seconds else None,
        "hot_batches": record["hot_share"] if fae else None,
        "hot_bytes": record["placed"]["hot_bytes"] if fae and record["placed"] else None,
        "spared_bytes_per_sample": record["hot_lookup_bytes"] * record["world_size"] / samples if fae and samples else None,
        "host_peak_bytes": record["peak_bytes"].get("host"),
        "device_peak_bytes": record["peak_bytes"].get("device"),
        "printed_auroc": float(numbers[-1]) if numbers else None,
        "wall_s": record["seconds"],
        "samples": samples,
        "train_steps": steps["hot"] + steps["other"],
        "evaluation_steps": steps["evaluation"],
        "notes": record["notes"],
        "said": (scores or lines)[-_SAID_LINES:],
    }


def unequal_scripts(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What makes runs of a script not comparable: other samples or steps than the first; a sentence each.

    Args:
        entries: placement -> its entry; the first is what the others are held against.
    """
    first, *others = entries
    problems = [f"{name} took no training step that could be seen" for name, entry in entries.items() if not entry["train_steps"]]
    for name in others:
        for key, words in _WORK.items():
            if entries[name][key] != entries[first][key]:
                problems.append(f"{name} {words} {entries[name][key]:,}, {first}: {entries[first][key]:,}")
    return problems


def _check_work(ranks: int, entries: Mapping[str, dict[str, Any]], comparison: ScriptComparison, report: dict[str, Any]) -> None:
    """Refuses placements under which the script did not do the same work, or says so in the report.

    Raises:
        ConfigError: so it is, and `allow_unequal` is false.
    """
    where = f"on {ranks} rank{'s' if ranks > 1 else ''}"
    for name, entry in entries.items():
        if name != "stock" and entry["ran_on"] == "stock":
            report["warnings"].append(
                f"{where}: {name} ran on TorchRec's own parts, because FAE does not pay here: {entry['why_not']} (the launch config's "
                "when_not_paying: fae runs it all the same)"
            )
        report["notes"] += [f"{where}, {name}: {note}" for note in entry["notes"]]
    first = baseline_of(entries)
    problems = [f"{where}: {text}" for text in unequal_scripts({first: entries[first], **entries})]
    if problems and not comparison.allow_unequal:
        raise ConfigError(
            f"--script: the runs did not do the same work; {'; '.join(problems)}. Make the script's work independent of time and speed, or "
            "give --allow-unequal for a report that says that they are not comparable"
        )
    report["not_comparable"] += problems


def _own_lines(text: str) -> list[str]:
    """What the script itself printed: no empty lines, none of `fae launch` and none of torchrun's log and report of a failure."""
    lines = [_BAR.sub("", line.split("\r")[-1]).strip() for line in _FAILURE.split(text, maxsplit=1)[0].splitlines()]
    return [line for line in lines if line and not line.startswith(_MARK) and not re.match(r"^[WIE]\d{4} ", line)]
