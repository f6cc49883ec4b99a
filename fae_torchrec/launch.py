"""`fae launch`: runs an unmodified TorchRec training script with FAE on. The only place that changes the host (`launch_patches`)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fae_torchrec.core.errors import ConfigError, FAEError, FingerprintError

if TYPE_CHECKING:
    from fae_torchrec.launch_config import LaunchConfig
    from fae_torchrec.launch_script import ScriptRun

ABOUT = """\
Runs a TorchRec training script as it is, with hot and cold rows: EmbeddingShardingPlanner becomes FAEShardingPlanner, the default sharders
include ours, and TrainPipelineSparseDist becomes FAETrainPipeline, which sorts the script's own training batches into hot and cold ones.
The script takes as many steps as ever, on the same samples; evaluation batches are left as they are.

  fae launch --config fae.json train.py --epochs 1
  torchrun --nproc-per-node 2 --no-python fae launch --config fae.json train.py --epochs 1
  fae launch --config fae.json -m mypackage.train --epochs 1

The smallest config is {"hbm_budget": "64MiB"}: the fast memory of each rank that hot rows may take. Which rows are popular is measured
first: a child process of each rank runs the script until its first batches (profile_batches) are counted, then the script runs for real. A
second launch of the same script with the same arguments finds profile and placement in the output folder (runs/launch). All keys of the
config: docs/launch.md. Where FAE does not pay, it says why, and the script runs on TorchRec's own parts (when_not_paying).
"""
Wanted = Literal["fae", "stock"]


def run_script(
    config: LaunchConfig,
    script: ScriptRun,
    *,
    placement: Wanted = "fae",
    show_progress: bool = False,
    announce: Callable[[list[str]], None] | None = None,
) -> dict[str, Any]:
    """Runs a script in this process, under one placement; every rank of a launcher's environment calls it.

    Args:
        config: how.
        script: what.
        placement: "fae" replaces TorchRec's parts, where that pays (see `when_not_paying`); "stock" replaces nothing and counts and times
            the steps of TrainPipelineSparseDist.
        show_progress: a bar while the script's batches are profiled.
        announce: on rank 0, given the blocks of lines for people, at the start and at the end.

    Returns:
        The record that rank 0 writes to launch.json in the output folder; see docs/launch.md.

    Raises:
        FAEError: bad input, on every rank before the script runs; or what the script's model or batches ran into.
        PlannerError: the script's model cannot be planned with the placement.
        SystemExit: the script left with a code that says failure.
        Exception: what the script raised. The record is written first.
    """
    from fae_torchrec.launch_parts import Session
    from fae_torchrec.launch_patches import replaced
    from fae_torchrec.launch_placement import Prepared, forget, prepare
    from fae_torchrec.launch_ranks import LaunchRanks
    from fae_torchrec.launch_report import end_lines, make_record, start_lines
    from fae_torchrec.training.report import write_json

    ranks = LaunchRanks()
    first = ranks.rank == 0
    ranks.share(script.check)
    prepared = Prepared(None, "", None) if placement == "stock" else prepare(config, script, ranks, show_progress=show_progress)
    pays = prepared.why_not is None or config.when_not_paying == "fae"
    session = Session(config, prepared.placement if pays else None)
    if first and announce is not None:
        announce(start_lines(script, prepared, session, ranks.world_size, stock_wanted=placement == "stock"))
    path = Path(config.output, "launch.json")
    failure: BaseException | None = None
    try:
        with replaced(session.replacements()):
            script.run()
    except SystemExit as leave:
        failure = leave if leave.code not in (None, 0) else None
    except BaseException as error:
        failure = error
        if isinstance(error, FingerprintError) and config.placement is None and config.profile is None:
            failure = FingerprintError(
                f"{error}. The placement was an earlier launch's; it is forgotten: launch again, and it is made anew"
            )
            if first:
                forget(config)
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    record = make_record(script, prepared, session, ranks.world_size, placement, said, str(path))
    if first:
        write_json(record, path)
        if announce is not None:
            announce(end_lines(record))
    if failure is None or isinstance(failure, FAEError) or type(failure).__name__ == "PlannerError":  # else the other ranks may go on
        _leave_group()
    if failure is not None:
        raise failure
    return record


def _leave_group() -> None:
    """Ends the process group where the script did not: torch 2.13 may abort at exit when gloo's threads are still there."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None, prog: str = "python -m fae_torchrec.launch") -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; default: the process's own.
        prog: what help and messages call the command.

    Returns:
        The exit code: 0 done, 2 bad input (one message on standard error), 130 interrupted. What the script raises comes out as it is.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        options, rest = split_arguments(given)
        arguments = parser(prog).parse_args(options)
        return _run(arguments, rest)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except FAEError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ != "PlannerError":  # TorchRec's word for a plan that cannot be
            raise
        print(f"{prog}: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, rest: list[str]) -> int:
    from dataclasses import replace

    from fae_torchrec.launch_config import load_launch_config
    from fae_torchrec.launch_script import ScriptRun

    if not rest:
        raise ConfigError("no script was given; add the path of one, or -m and a module, after the options, then its arguments")
    is_module = rest[0] == "-m"
    if is_module and len(rest) < 2:
        raise ConfigError("-m: no module was given; name one, such as -m mypackage.train")
    config = load_launch_config(arguments.config, arguments.set)
    if arguments.output:
        config = replace(config, output=arguments.output)
    target, *own = rest[1:] if is_module else rest
    script = ScriptRun(target, tuple(own), is_module)

    def announce(lines: list[str]) -> None:
        print("\n".join(lines), flush=True)

    record = run_script(
        config,
        script,
        placement=arguments.placement,
        show_progress=not arguments.quiet,
        announce=None if arguments.json else announce,
    )
    if arguments.json and _is_first():
        print(json.dumps(record), flush=True)
    return 0


def _is_first() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def parser(prog: str) -> argparse.ArgumentParser:
    """The parser of what stands before the script."""
    made = argparse.ArgumentParser(prog=prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.usage = f"{prog} --config FILE [options] (SCRIPT | -m MODULE) [ARGUMENTS ...]"
    add_options(made)
    return made


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the command, for its own parser and for the help of `fae`."""
    command.add_argument(
        "--config", required=True, metavar="FILE", help='how to launch, YAML or JSON; the smallest: {"hbm_budget": "64MiB"}'
    )
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the config; may be repeated")
    command.add_argument("--output", metavar="DIR", help="folder for what is written (default: `output` of the config, runs/launch)")
    command.add_argument(
        "--placement",
        choices=("fae", "stock"),
        default="fae",
        help="stock replaces nothing and measures the script as it is, for comparison (default: fae)",
    )
    command.add_argument("--json", action="store_true", help="print the record as one line of JSON at the end, and no text of ours")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def split_arguments(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts our own options from the script and its arguments, which may look like ours.

    Args:
        given: all arguments.

    Returns:
        Our options; and SCRIPT ARGUMENTS... or -m MODULE ARGUMENTS...
    """
    with_value = {"--config", "--set", "--output", "--placement"}
    at = 0
    while at < len(given) and given[at].startswith("--"):
        if given[at] == "--":
            return list(given[:at]), list(given[at + 1 :])
        at += 2 if given[at] in with_value else 1
    if at < len(given) and given[at] == "-h":
        return [*given[:at], "--help"], []
    return list(given[:at]), list(given[at:])


if __name__ == "__main__":
    sys.exit(main())
