"""The command line: fae vocabulary | profile | place | report | train | compare | doctor."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fae_torchrec.core.errors import ConfigError, FAEError

_ABOUT = """\
FAE hot and cold embeddings for TorchRec: the rows that most accesses go to are hot and lie in fast memory, the others are cold and stay
in host memory, and training takes batches that touch hot rows only wherever the data allow.

An experiment is one YAML or JSON file: the data, the model, the budget of fast memory. To begin with:

  fae doctor                                        is this environment able to run?
  fae report --config examples/configs/demo.yaml    how skewed are the accesses, and what does a budget of fast memory buy?
  fae compare --config examples/configs/demo.yaml   all of it, trained and set beside stock TorchRec

place, report, train and compare measure a profile by themselves if the output folder has none of the same data and sampling.
"""
_COMMANDS = {
    "vocabulary": "number the categories of the train data by how often they occur, once and before all else, if data.coding.method is "
    "'vocabulary'; writes the file that data.coding.vocabulary names",
    "profile": "count how often each row is accessed, on a sample of the train data; under torchrun the ranks share the work; writes "
    "OUTPUT/profile.npz",
    "place": "select the hot rows under the budget (placement.budget); writes OUTPUT/hot_set.npz and OUTPUT/placement.npz",
    "report": "picture how skewed the accesses are and which share of the samples a budget makes all hot; writes OUTPUT/popularity.html, "
    "the same numbers as popularity.json, and the pictures as popularity_*.png",
    "train": "train one placement and score it; under torchrun it joins the ranks, else it starts them (--ranks); writes OUTPUT/train.json",
    "compare": "train all configured placements on the same data and seed; writes OUTPUT/report.json and OUTPUT/report.html",
    "doctor": "print versions, devices, whether torch, torchrec and fbgemm fit together, and what to install if not",
}
_CONFIG_HELP = """\
The config has the sections data, model, profile, placement, schedule, train, compare, and output, the folder for what is written; see
examples/configs/. The data are one of synthetic, parquet, criteo (its text files), criteo_npy, avazu, taobao, csv. Any key can be
overridden: --set train.epochs=2 --set placement.budget=64MiB
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
        The exit code: 0 done, 1 `doctor` found a problem, 2 bad input (one message on standard error, no traceback).
    """
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "doctor":
            from fae_torchrec.doctor import examine  # alone: it must run where torch is missing

            return examine(arguments.json)
        return _run(arguments, ["fae", *(sys.argv[1:] if argv is None else argv)])
    except FAEError as error:
        print(f"fae {arguments.command}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ != "PlannerError":  # TorchRec's word for a plan that cannot be; imported only if it was raised
            raise
        print(f"fae {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fae", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(_COMMANDS))
    for name, what in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=what,
            description=what,
            epilog=None if name == "doctor" else _CONFIG_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        if name == "doctor":
            continue
        command.add_argument("--config", required=True, metavar="FILE", help="the experiment, YAML or JSON")
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
        if name == "compare":
            command.add_argument("--ranks", type=int, nargs="+", metavar="N", help="numbers of ranks (default: compare.ranks)")
        if name == "train":
            command.add_argument("--placement", choices=("stock", "fae", "fae-unsegregated"), default="fae", help=_PLACEMENT_HELP)
            command.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks to start on this machine (default: 1)")
            command.add_argument("--load", metavar="DIR", help="start from this checkpoint, of any placement and number of ranks")
            command.add_argument("--save", metavar="DIR", help="save the trained model, weights and optimizer; a new folder")
    return parser


def _run(arguments: argparse.Namespace, command: list[str]) -> int:
    from fae_torchrec.config import load_config  # here and below: --help and doctor must not wait for torch
    from fae_torchrec.distributed.local_ranks import quiet_host, world_size_of_environment

    quiet_host()
    if arguments.command not in ("profile", "train") and world_size_of_environment() > 1:
        does = "starts its own ranks" if arguments.command == "compare" else "is the work of one process"
        raise ConfigError(f"fae {arguments.command} {does}; received a torchrun environment of several; start it as one process")
    config = load_config(arguments.config, [*arguments.set, *_overrides(arguments)])
    if getattr(arguments, "output", None):
        config = replace(config, output=arguments.output)
    if arguments.command == "compare":
        return _compare(arguments, config, command)
    if arguments.command == "train":
        return _train(arguments, config)
    if arguments.command == "report":
        return _report(arguments, config, command)
    if arguments.command == "vocabulary":
        return _vocabulary(arguments, config)
    return _profile(arguments, config) if arguments.command == "profile" else _place(arguments, config)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """The options that are keys of the config."""
    keys = {"max_bad_lines": "data.max_bad_lines", "workers": "profile.workers"}
    given = {key: getattr(arguments, option, None) for option, key in keys.items()}
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def _vocabulary(arguments: argparse.Namespace, config: Any) -> int:
    from fae_torchrec.experiment_data import make_vocabulary

    vocabulary, path = make_vocabulary(config, show_progress=not arguments.quiet), config.data.coding.vocabulary
    lines = [f"{path}: vocabulary {vocabulary.fingerprint} of {vocabulary.source}", "rows that the tables need:"]
    lines += [f"  {feature:<24} {rows:>12,}" for feature, rows in vocabulary.rows.items()]
    described = {"path": path, "fingerprint": vocabulary.fingerprint, "source": vocabulary.source, "rows": vocabulary.rows}
    _print(arguments, lines, json.dumps(described, indent=1))
    return 0


def _profile(arguments: argparse.Namespace, config: Any) -> int:
    from fae_torchrec.core.histogram import top_share
    from fae_torchrec.distributed.local_ranks import launched_group
    from fae_torchrec.experiment import placed_tables
    from fae_torchrec.experiment_data import open_data
    from fae_torchrec.experiment_profile import make_cache_statistics, make_profile, save_profile
    from fae_torchrec.report_parts import describe_profile
    from fae_torchrec.training.report_table import percent_text

    size = arguments.global_batch_size
    if size is not None and (size < 1 or not arguments.torchrec_stats):
        raise ConfigError(f"--global-batch-size: received {size}; give at least 1, and --torchrec-stats with it")
    data = open_data(config)
    tables = placed_tables(config, data)
    show = not arguments.quiet
    with launched_group("cpu") as group:
        profile = make_profile(config, data, tables, show_progress=show, group=group)
        if group is not None and group.rank():
            return 0
    path = Path(config.output, "profile.npz")
    if config.profile.path is not None:  # a named one is brought here
        path = save_profile(config, profile)
    top = [(name, profile.counts[name]) for name in tables.names]
    lines = [
        f"{path}: profile {profile.fingerprint} of {profile.num_samples:,} of {profile.total_samples:,} samples",
        *(f"skipped {number:,} malformed line(s) of {file}" for file, number in profile.skipped.items()),
        "the tables' most accessed 1 % of rows take this share of their accesses:",
        *(f"  {name:<24} {counts.rows:>12,} rows  {percent_text(top_share(counts)):>6} %" for name, counts in top),
    ]
    described = {**describe_profile(profile), "path": str(path)}
    if arguments.torchrec_stats:
        statistics, where = make_cache_statistics(config, data, tables, size, show_progress=show)
        lines += [f"{where}: cache statistics {statistics.fingerprint} for TorchRec's planner"]
        described["torchrec_stats"] = {"path": str(where), **statistics.to_json()}
    _print(arguments, lines, json.dumps(described, indent=1))
    return 0


def _report(arguments: argparse.Namespace, config: Any, command: list[str]) -> int:
    from fae_torchrec.popularity_report import popularity_report, write_popularity_report
    from fae_torchrec.training.report_table import bytes_text, percent_text

    report = popularity_report(config, command, show_progress=not arguments.quiet)
    paths = write_popularity_report(report, config.output)
    placement = report["placement"]
    lines = [f"budget {bytes_text(placement['budget_bytes'])}, which makes this share of the samples all hot:"]
    for name, selection in placement["selections"].items():
        share, low, high = (percent_text(selection[key]) for key in ("hot_inputs", "low", "high"))
        lines.append(f"  {name:<12} {share:>6} %  ({low} to {high})")
    _print(arguments, [*lines, *map(str, paths)], paths[0].read_text(encoding="utf-8"))
    return 0


def _place(arguments: argparse.Namespace, config: Any) -> int:
    from fae_torchrec.compare import describe_placement
    from fae_torchrec.experiment import make_hot_set, make_placement, placed_tables
    from fae_torchrec.experiment_data import open_data
    from fae_torchrec.experiment_profile import make_profile
    from fae_torchrec.training.report_table import bytes_text, percent_text

    data = open_data(config)
    tables = placed_tables(config, data)
    profile = make_profile(config, data, tables, show_progress=not arguments.quiet)
    hot_set = make_hot_set(config, profile) if config.placement.path is None else None
    placement, path = make_placement(config, tables, hot_set)
    described = describe_placement(config, profile, hot_set, placement)
    each = "on each rank" if config.placement.hot_tier == "replicated" else "over all ranks"
    lines = [
        f"{path}: placement {placement.fingerprint}",
        f"{bytes_text(placement.hot_bytes)} of {bytes_text(tables.total_bytes)} are hot, "
        f"the budget is {bytes_text(placement.budget_bytes)} {each}",
        f"hot inputs {percent_text(placement.hot_inputs)} % of samples ({' to '.join(map(percent_text, placement.hot_inputs_interval))} %)",
        f"coverage {percent_text(placement.coverage)} % of the counted accesses",
        *(
            f"  {row['table']:<24} {row['kind']:<6} {row['hot_rows']:>12,} of {row['rows']:>12,} rows  {bytes_text(row['bytes_hot']):>10}"
            for row in described["per_table"]
        ),
    ]
    if hot_set is not None and hot_set.resolution_reached:
        lines.append(
            "the sample does not tell the rows at the budget's boundary apart (seen once or never); profile.sample_rate of about "
            f"{hot_set.resolving_rate:.2g} would"
        )
    _print(arguments, lines, json.dumps({**described, "path": str(path)}, indent=1))
    return 0


def _train(arguments: argparse.Namespace, config: Any) -> int:
    from functools import partial

    from fae_torchrec.distributed.local_ranks import from_first_rank, launched_group, run_on_local_ranks
    from fae_torchrec.experiment import prepare, run_placement
    from fae_torchrec.training.report import write_json

    if arguments.ranks < 1:
        raise ConfigError(f"--ranks: received {arguments.ranks}; give at least 1")
    show, checkpoints = not arguments.quiet, (arguments.load, arguments.save)
    device = config.train.device
    with launched_group(device) as group:
        if group is None:
            placement = prepare(config, arguments.placement, arguments.ranks, *checkpoints, show_progress=show)
            job = (config, arguments.placement, placement, show, *checkpoints)
            result = run_on_local_ranks(run_placement, arguments.ranks, *job, device_type=device)[0]
        else:  # torchrun: every rank runs this command
            make = partial(prepare, config, arguments.placement, group.size(), *checkpoints, show_progress=show)
            placement = from_first_rank(make, group)
            result = run_placement(group.rank(), config, arguments.placement, placement, show, *checkpoints)
            if group.rank():
                return 0
    path = write_json(result, Path(config.output, "train.json"))
    loaded = result.get("loaded")
    lines = [f"{loaded['path']}: {_scores_text(loaded)}"] if loaded else []
    lines.append(f"{result['placement']} on {result['ranks']} rank(s): {result['samples_per_s']:,.0f} samples/s, {_scores_text(result)}")
    lines += [str(path), *([arguments.save] if arguments.save else [])]
    _print(arguments, lines, path.read_text(encoding="utf-8"))
    return 0


def _compare(arguments: argparse.Namespace, config: Any, command: list[str]) -> int:
    from fae_torchrec.compare import compare
    from fae_torchrec.training.report import write_report
    from fae_torchrec.training.report_table import text_table

    if arguments.ranks:
        if min(arguments.ranks) < 1 or len(set(arguments.ranks)) < len(arguments.ranks):
            raise ConfigError(f"--ranks: received {arguments.ranks}; give numbers of at least 1, none twice")
        config = replace(config, compare=replace(config.compare, ranks=tuple(arguments.ranks)))
    report = compare(config, command, show_progress=not arguments.quiet)
    paths = write_report(report, config.output)
    _print(arguments, [text_table(report), "", *(str(path) for path in paths)], paths[0].read_text(encoding="utf-8"))
    return 0


def _print(arguments: argparse.Namespace, lines: Sequence[str], as_json: str) -> None:
    print(as_json.rstrip() if arguments.json else "\n".join(lines))


def _scores_text(scores: Any) -> str:
    return f"test AUC {scores['test_auc']:.4f}, logloss {scores['test_logloss']:.4f}"


if __name__ == "__main__":
    sys.exit(main())
