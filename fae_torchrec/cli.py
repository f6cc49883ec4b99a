"""The command line: fae vocabulary | profile | place | plan | report | segregate | train | compare | measure | launch | doctor."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fae_torchrec.core.errors import ConfigError, FAEError

if TYPE_CHECKING:
    from fae_torchrec.config import RunConfig

_ABOUT = """\
FAE hot and cold embeddings for TorchRec: the rows that most accesses go to are hot and lie in fast memory, the others are cold and stay
in host memory, and training takes batches that touch hot rows only wherever the data allow.

An experiment is one YAML or JSON file: the data, the model, the budget of fast memory. To begin with:

  fae doctor                                        is this environment able to run?
  fae report --config examples/configs/demo.yaml    how skewed are the accesses, and what does a budget of fast memory buy?
  fae compare --config examples/configs/demo.yaml   all of it, trained and set beside stock TorchRec

Or keep your TorchRec training script as it is: fae launch --help

place, plan, report, segregate, train and compare measure a profile by themselves if the output folder has none of the same data and
sampling.
"""
_COMMANDS = {
    "vocabulary": "number the categories of the train data by how often they occur, once and before all else, if data.coding.method is "
    "'vocabulary'; writes the file that data.coding.vocabulary names",
    "profile": "count how often each row is accessed, on a sample of the train data; under torchrun the ranks share the work; writes "
    "OUTPUT/profile.npz",
    "place": "select the hot rows under the budget (placement.budget); writes OUTPUT/hot_set.npz and OUTPUT/placement.npz",
    "plan": "plan the model for ranks and hardware that need not be there: which rows are hot, where every table lies, what a step moves, "
    "where a rank's memory goes, and why; placement.budget=auto lets it choose the budget; writes OUTPUT/plan.json",
    "report": "picture how skewed the accesses are and which share of the samples a budget makes all hot; writes OUTPUT/popularity.html, "
    "the same numbers as popularity.json, and the pictures as popularity_*.png; or, with --paper, set finished comparisons of the paper's "
    "workloads beside the paper's tables (docs/paper.md): writes OUTPUT/paper.html, .md and .json",
    "segregate": "write the train data once as hot and cold samples, for fast epochs without segregating again; writes a store to "
    "loader.store, or to OUTPUT/store; train and compare read it if loader.store (--store) names it",
    "train": "train one placement and score it; under torchrun it joins the ranks, else it starts them (--ranks); with --checkpoint it "
    "goes on from the newest checkpoint of that folder; writes OUTPUT/train.json",
    "compare": "train placements on the same data and seed, in turns, and set them side by side; writes OUTPUT/report.json, .html and .md; "
    "of a config (--config), or of your own TorchRec script (--script, docs/comparing.md)",
    "measure": "time what this machine's ranks can do, for `fae plan --what-if --hardware FILE`; writes that file; half a minute",
    "launch": "run an unmodified TorchRec training script with hot and cold rows: launch --config FILE SCRIPT ARGUMENTS, alone or under "
    "torchrun; the config is one of its own (docs/launch.md); writes OUTPUT/launch.json",
    "doctor": "print versions, devices, whether torch, torchrec and fbgemm fit together, and what to install if not",
}
_WITHOUT_CONFIG = ("doctor", "measure")
_CONFIG_HELP = """\
The config has the sections data, model, profile, placement, schedule, loader, train, checkpoint, compare, and output, the folder for what
is written; see examples/configs/. The data are one of synthetic, parquet, criteo (its text files), criteo_npy, avazu, taobao, csv. Any
key can be overridden: --set train.epochs=2 --set placement.budget=64MiB
"""
_PLACEMENT_HELP = (
    "stock: TorchRec alone; fae: hot and cold rows, and batches that are all hot; fae-unsegregated: hot and cold rows, and batches in the "
    "order of the data (default: fae)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; default: the process's own.

    Returns:
        The exit code: 0 done, 1 `doctor` found a problem, 2 bad input, 130 interrupted (one message on standard error, no traceback).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["launch"]:
        from fae_torchrec.launch import main as launch  # it parts our options from the script's, which argparse cannot

        return launch(given[1:], "fae launch")
    given, of_script = _parted(given)
    arguments = _parser().parse_args(given)
    try:
        if arguments.command == "doctor":
            from fae_torchrec.doctor import examine  # alone: it must run where torch is missing

            return examine(arguments.json)
        arguments.command_line, arguments.script_arguments = ["fae", *given, *(["--", *of_script] if of_script else [])], of_script
        if arguments.command == "measure":
            from fae_torchrec.distributed.local_ranks import quiet_host
            from fae_torchrec.measure import run_measure

            quiet_host()
            return run_measure(arguments)
        return _run(arguments)
    except KeyboardInterrupt:
        print(f"fae {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except FAEError as error:
        print(f"fae {arguments.command}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ != "PlannerError":  # TorchRec's word for a plan that cannot be; imported only if it was raised
            raise
        print(f"fae {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parted(given: list[str]) -> tuple[list[str], list[str]]:
    """Arguments of ours and, after `--`, those of the script that `fae compare` runs."""
    if given[:1] != ["compare"] or "--" not in given:
        return given, []
    at = given.index("--")
    return given[:at], given[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fae", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(_COMMANDS))
    for name, what in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=what,
            description=what,
            epilog=None if name in _WITHOUT_CONFIG else _CONFIG_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "launch":
            continue  # for the list of commands; `main` hands it on
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        if name == "measure":
            command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what trains (default: cpu)")
            command.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks that train on this machine (default: 1)")
            command.add_argument("--output", default="hardware.json", metavar="FILE", help="what to write (default: hardware.json)")
            command.add_argument("--quiet", action="store_true", help="no progress bars")
        if name in _WITHOUT_CONFIG:
            continue
        command.add_argument("--config", required=name not in ("compare", "report"), metavar="FILE", help="the experiment, YAML or JSON")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; may be repeated")
        if name != "vocabulary":
            command.add_argument("--output", metavar="DIR", help="folder for what is written (default: `output` of the config)")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        command.add_argument(
            "--max-bad-lines",
            type=int,
            metavar="N",
            help="malformed lines of text files that are skipped and counted; one more ends the command (default: data.max_bad_lines, "
            "which is 0 if not given)",
        )
        if name == "profile":
            command.add_argument("--workers", type=int, metavar="N", help="processes that read and count (default: profile.workers)")
            command.add_argument(
                "--torchrec-stats",
                action="store_true",
                help="also measure each table's cache statistics for TorchRec's own planner (EmbeddingOffloadStats: cacheability, expected "
                "lookups, LRU miss ratios); writes OUTPUT/cache_statistics.npz and .json",
            )
            command.add_argument(
                "--global-batch-size",
                type=int,
                metavar="N",
                help="samples of a step over all ranks, for --torchrec-stats (default: train.batch_size)",
            )
        if name == "report":
            _add_paper(command)
        if name in ("place", "plan", "segregate"):
            command.add_argument(
                "--ranks", type=int, default=1, metavar="N", help="ranks that will train, which placement.budget=auto asks for (default: 1)"
            )
        if name == "plan":
            command.add_argument(
                "--hardware",
                nargs="+",
                metavar="NAME[:RANKS]",
                help="a preset (v100, t4, a10, a100, h100, h200, gh200, cpu) or a file that `fae measure` wrote, and ranks of it: v100:8 "
                "(default: machines like this one, with train.device)",
            )
            _add_what_if(command)
        if name in ("segregate", "train", "compare"):
            command.add_argument("--store", metavar="DIR", help="the store of hot and cold samples (default: loader.store)")
        if name == "segregate":
            command.add_argument("--workers", type=int, metavar="N", help="processes that read and write (default: loader.workers)")
        if name == "compare":
            command.add_argument("--ranks", type=int, nargs="+", metavar="N", help="numbers of ranks (default: compare.ranks)")
            _add_compare(command)
        if name == "train":
            command.add_argument("--placement", choices=("stock", "fae", "fae-unsegregated"), default="fae", help=_PLACEMENT_HELP)
            command.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks to start on this machine (default: 1)")
            command.add_argument("--load", metavar="DIR", help="start from this checkpoint, of any placement and number of ranks")
            command.add_argument("--save", metavar="DIR", help="save the trained model, weights and optimizer; a new folder")
            command.add_argument(
                "--checkpoint",
                metavar="DIR",
                help="keep checkpoints in this folder, and go on from the newest that is there (default: checkpoint.folder)",
            )
            command.add_argument(
                "--checkpoint-every", type=int, metavar="N", help="steps between checkpoints (default: checkpoint.every_steps)"
            )
            command.add_argument("--keep", type=int, metavar="N", help="checkpoints that stay (default: checkpoint.keep)")
            command.add_argument("--tensorboard", metavar="DIR", help="write TensorBoard scalars (default: train.tensorboard)")
    return parser


def _add_compare(command: argparse.ArgumentParser) -> None:
    """The options of `fae compare` beside its config's keys."""
    add = command.add_argument
    add("--repeats", type=int, metavar="N", help="how often each is run, in turns, in another order each time (default: compare.repeats)")
    add(
        "--placements",
        nargs="+",
        metavar="NAME",
        help="what is compared (default: compare.placements): fae, fae-unsegregated, and TorchRec's own: stock; on CUDA also stock-hbm, "
        "stock-uvm, stock-uvm-caching, stock-prefetch; on a CPU stock-host. With --script: stock, fae, and fae:KEY=VALUE,... for fae with "
        "other keys of the launch config (default: stock fae)",
    )
    add(
        "--allow-unequal",
        action="store_true",
        default=None,
        help="report runs that did not do the same work, marked as not comparable, instead of ending with code 2",
    )
    own = command.add_argument_group("your own script", "fae compare --script SCRIPT --launch FILE [options] -- ARGUMENTS OF THE SCRIPT")
    own.add_argument("--script", metavar="SCRIPT", help="instead of --config: a TorchRec training script, as `fae launch` runs it")
    own.add_argument("--module", metavar="NAME", help="instead of --script: a module, as after python -m")
    own.add_argument("--launch", metavar="FILE", help='with --script: the config of `fae launch`, such as {"hbm_budget": "64MiB"}')
    own.add_argument("--warm-up", type=int, metavar="N", help="with --script: first steps that are not in the step times (default: 5)")


def _add_paper(command: argparse.ArgumentParser) -> None:
    """The options of `fae report --paper`."""
    paper = command.add_argument_group("beside the paper", "fae report --paper runs/kaggle/report.json [more ...] [--workload NAME=REPORT]")
    add = paper.add_argument
    add(
        "--paper",
        nargs="*",
        metavar="REPORT",
        help="instead of --config: report.json of one or more runs of `fae compare` on the paper's workloads (RMC1 Taobao, RMC2 Kaggle, "
        "RMC3 Terabyte, RMC4 Avazu, SYN-M1 to SYN-M4), which are recognised by their data and their model's widths; without --output what "
        "is written goes to runs/paper",
    )
    add(
        "--workload",
        action="append",
        default=[],
        metavar="NAME=REPORT",
        help="with --paper: take this report for a workload, whatever it trained; the page says how it differs; may be repeated",
    )
    add("--bytes", metavar="FILE", help="with --paper: what benchmarks/paper_bytes.py counted, for Table 7 (JSON)")
    add(
        "--numbers",
        metavar="FILE",
        help="with --paper: what you read in the paper's Tables 4 and 5 and Fig. 14, which this project could not look up (YAML or JSON, "
        "docs/paper.md has a template); it stands on the page as from FILE",
    )


def _add_what_if(command: argparse.ArgumentParser) -> None:
    """The options of `fae plan --what-if`."""
    add = command.add_argument
    add(
        "--what-if",
        action="store_true",
        help="predict a step's time and bytes under every placement and budget, on all that --hardware names (v100:1,4,8 h200): the "
        "winner, the margin, and whether FAE pays; writes OUTPUT/what_if.json, .html and .png (docs/what_if.md)",
    )
    add(
        "--budgets",
        nargs="+",
        default=[],
        metavar="SHARE",
        help="with --what-if: shares of all tables' bytes (default: ten, 0.1%% to 100%%)",
    )
    add(
        "--access",
        choices=("auto", "law", "profile", "uniform"),
        default="auto",
        help="with --what-if: where access curves come from; the law of generated data, a profile, or every row alike (default: the law if "
        "the data are generated, else the profile)",
    )
    add("--calibration", metavar="FILE", help="with --what-if: measured steps to feed back, JSON (docs/what_if.md)")


def _run(arguments: argparse.Namespace) -> int:
    from fae_torchrec import commands
    from fae_torchrec.config import load_config  # here: --help and doctor must not wait for torch
    from fae_torchrec.distributed.local_ranks import quiet_host, world_size_of_environment

    quiet_host()
    if arguments.command not in ("profile", "train") and world_size_of_environment() > 1:
        does = "starts its own ranks" if arguments.command == "compare" else "is the work of one process"
        raise ConfigError(f"fae {arguments.command} {does}; received a torchrun environment of several; start it as one process")
    ranks = getattr(arguments, "ranks", None)
    if isinstance(ranks, int) and ranks < 1:
        raise ConfigError(f"--ranks: received {ranks}; give at least 1")
    if arguments.command == "compare" and commands.is_of_script(arguments):
        return commands.run_compare_script(arguments)
    if arguments.command == "report" and commands.is_of_paper(arguments):
        from fae_torchrec.paper_report import run_paper_report

        return run_paper_report(arguments)
    config = load_config(arguments.config, [*arguments.set, *_overrides(arguments)])
    if getattr(arguments, "output", None):
        config = replace(config, output=arguments.output)
    run: Callable[[argparse.Namespace, RunConfig], int] = getattr(commands, f"run_{arguments.command}")
    return run(arguments, config)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """The options that are keys of the config."""
    keys = {
        "max_bad_lines": "data.max_bad_lines",
        "workers": "loader.workers" if arguments.command == "segregate" else "profile.workers",
        "store": "loader.store",
        "checkpoint": "checkpoint.folder",
        "checkpoint_every": "checkpoint.every_steps",
        "keep": "checkpoint.keep",
        "tensorboard": "train.tensorboard",
        "repeats": "compare.repeats",
        "placements": "compare.placements",
        "allow_unequal": "compare.allow_unequal",
    }
    given = {key: getattr(arguments, option, None) for option, key in keys.items()}
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]  # JSON is YAML, whatever a path has in it


if __name__ == "__main__":
    sys.exit(main())
