"""What the commands of the command line do, and what they print; each imports what it needs when it runs."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fae_torchrec.core.errors import ConfigError

if TYPE_CHECKING:
    from fae_torchrec.config import RunConfig


def run_vocabulary(arguments: Namespace, config: RunConfig) -> int:
    """Fits the vocabulary of `data.coding`."""
    from fae_torchrec.experiment_data import make_vocabulary

    vocabulary, path = make_vocabulary(config, show_progress=not arguments.quiet), config.data.coding.vocabulary
    lines = [f"{path}: vocabulary {vocabulary.fingerprint} of {vocabulary.source}", "rows that the tables need:"]
    lines += [f"  {feature:<24} {rows:>12,}" for feature, rows in vocabulary.rows.items()]
    described = {"path": path, "fingerprint": vocabulary.fingerprint, "source": vocabulary.source, "rows": vocabulary.rows}
    _print(arguments, lines, json.dumps(described, indent=1))
    return 0


def run_profile(arguments: Namespace, config: RunConfig) -> int:
    """Measures popularity, by all ranks of torchrun together if there are several."""
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


def run_report(arguments: Namespace, config: RunConfig) -> int:
    """Pictures popularity and what a budget buys."""
    from fae_torchrec.popularity_report import popularity_report, write_popularity_report
    from fae_torchrec.training.report_table import bytes_text, percent_text

    report = popularity_report(config, arguments.command_line, show_progress=not arguments.quiet)
    paths = write_popularity_report(report, config.output)
    placement = report["placement"]
    lines = [f"budget {bytes_text(placement['budget_bytes'])}, which makes this share of the samples all hot:"]
    for name, selection in placement["selections"].items():
        share, low, high = (percent_text(selection[key]) for key in ("hot_inputs", "low", "high"))
        lines.append(f"  {name:<12} {share:>6} %  ({low} to {high})")
    _print(arguments, [*lines, *map(str, paths)], paths[0].read_text(encoding="utf-8"))
    return 0


def is_of_paper(arguments: Namespace) -> bool:
    """Whether `fae report` sets finished comparisons beside the paper rather than picturing a config's data.

    Raises:
        ConfigError: both are asked for, or neither, or options of the other one.
    """
    if arguments.paper is not None:
        wrong = [f"--{name}" for name in ("config", "set") if getattr(arguments, name)]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: received with --paper, which reads finished runs; leave out one of them")
        return True
    wrong = [f"--{name}" for name in ("workload", "bytes", "numbers") if getattr(arguments, name)]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: given without --paper; add it, or leave them out")
    if arguments.config is None:
        raise ConfigError("nothing to report; give --config and an experiment, or --paper and reports of fae compare")
    return False


def run_place(arguments: Namespace, config: RunConfig) -> int:
    """Selects the hot rows."""
    from fae_torchrec.compare import describe_placement
    from fae_torchrec.experiment import placed_tables
    from fae_torchrec.experiment_data import open_data
    from fae_torchrec.experiment_placement import make_placement, settle_hot_set
    from fae_torchrec.experiment_profile import make_profile
    from fae_torchrec.training.report_table import bytes_text, percent_text

    data = open_data(config)
    tables = placed_tables(config, data)
    profile = make_profile(config, data, tables, show_progress=not arguments.quiet)
    config, hot_set = settle_hot_set(config, data, profile, [arguments.ranks])
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


def run_plan(arguments: Namespace, config: RunConfig) -> int:
    """Plans the model for given ranks and hardware, or predicts what would be."""
    from fae_torchrec.plan import run_plan as plan
    from fae_torchrec.what_if import check_options, run_what_if

    check_options(arguments)
    return (run_what_if if arguments.what_if else plan)(arguments, config)


def run_segregate(arguments: Namespace, config: RunConfig) -> int:
    """Writes the train data as a store of hot and cold samples."""
    from fae_torchrec.experiment_data import open_data
    from fae_torchrec.experiment_placement import place_rows
    from fae_torchrec.experiment_store import make_store
    from fae_torchrec.training.report_table import percent_text

    data = open_data(config)
    placement = place_rows(config, data, [arguments.ranks], show_progress=not arguments.quiet)
    store, is_new = make_store(config, data, placement, show_progress=not arguments.quiet)
    num_bytes = sum(file.num_bytes for file in store.layout.files)
    described = {
        "path": store.path,
        "fingerprint": store.fingerprint,
        "written": is_new,
        "placement": store.placement_fingerprint,
        "data": store.data_name,
        "samples": store.num_samples,
        "hot_samples": store.hot_samples,
        "bytes": num_bytes,
        "bytes_per_sample": num_bytes / store.num_samples,
        "skipped": dict(store.layout.skipped_lines),
    }
    lines = [
        f"{store.path}: store {store.fingerprint} of placement {placement.fingerprint}{'' if is_new else ', already there'}",
        f"{store.num_samples:,} samples, {percent_text(store.hot_samples / store.num_samples)} % of them all hot, "
        f"{described['bytes_per_sample']:.1f} bytes on disk per sample",
        *(f"skipped {number:,} malformed line(s) of {file}" for file, number in store.layout.skipped_lines.items()),
    ]
    _print(arguments, lines, json.dumps(described, indent=1))
    return 0


def run_train(arguments: Namespace, config: RunConfig) -> int:
    """Trains one placement: joins the ranks of torchrun, or starts its own."""
    from functools import partial

    from fae_torchrec.distributed.local_ranks import from_first_rank, launched_group, run_on_local_ranks
    from fae_torchrec.experiment import prepare, run_placement
    from fae_torchrec.training.report import write_json

    show, checkpoints = not arguments.quiet, (arguments.load, arguments.save)
    device = config.train.device
    with launched_group(device) as group:
        if group is None:
            config, placement = prepare(config, arguments.placement, arguments.ranks, *checkpoints, show_progress=show)
            job = (config, arguments.placement, placement, show, *checkpoints)
            result = run_on_local_ranks(run_placement, arguments.ranks, *job, device_type=device)[0]
        else:  # torchrun: every rank runs this command
            make = partial(prepare, config, arguments.placement, group.size(), *checkpoints, show_progress=show)
            config, placement = from_first_rank(make, group)
            result = run_placement(group.rank(), config, arguments.placement, placement, show, *checkpoints)
            if group.rank():
                return 0
    path = write_json(result, Path(config.output, "train.json"))
    _print(arguments, [*_train_lines(result), str(path), *([arguments.save] if arguments.save else [])], path.read_text(encoding="utf-8"))
    return 0


def _train_lines(result: Mapping[str, Any]) -> list[str]:
    """A trained run as text: scores, speed, and where a step's time goes."""
    from fae_torchrec.training.report_table import percent_text

    lines = [f"resumed from {result['resumed_from']}"] if "resumed_from" in result else []
    if "loaded" in result:
        lines.append(f"{result['loaded']['path']}: {_scores_text(result['loaded'])}")
    hot = "" if result["hot_batches"] is None else f", {percent_text(result['hot_batches'])} % of the batches hot"
    lines.append(
        f"{result['placement']} on {result['ranks']} rank(s): {result['samples_per_s']:,.0f} samples/s{hot}, {_scores_text(result)}"
    )
    for kind, stages in result["breakdown"].items():
        times = ", ".join(f"{stage} {milliseconds:.1f}" for stage, milliseconds in stages.items())
        lines.append(f"  ms of a {kind} step, not overlapped: {times}")
    return lines


def run_compare(arguments: Namespace, config: RunConfig) -> int:
    """Trains all configured placements and reports them side by side."""
    from fae_torchrec.compare import compare
    from fae_torchrec.training.report import write_report
    from fae_torchrec.training.report_table import text_table

    if arguments.ranks:
        if min(arguments.ranks) < 1 or len(set(arguments.ranks)) < len(arguments.ranks):
            raise ConfigError(f"--ranks: received {arguments.ranks}; give numbers of at least 1, none twice")
        config = replace(config, compare=replace(config.compare, ranks=tuple(arguments.ranks)))
    report = compare(config, arguments.command_line, show_progress=not arguments.quiet)
    paths = write_report(report, config.output)
    _print(arguments, [text_table(report), "", *_told(report), *map(str, paths)], paths[0].read_text(encoding="utf-8"))
    return 0


def is_of_script(arguments: Namespace) -> bool:
    """Whether `fae compare` is of a script rather than of a config.

    Raises:
        ConfigError: both are given, or neither, or options of the other one.
    """
    script, of_config = arguments.script or arguments.module, ("config", "store", "max_bad_lines")
    if not script:
        wrong = [name for name, value in (("--launch", arguments.launch), ("--warm-up", arguments.warm_up)) if value is not None]
        wrong += ["-- ARGUMENTS"] if arguments.script_arguments else []
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: given without --script; name the script that they are for, or leave them out")
        if arguments.config is None:
            raise ConfigError("nothing to compare; give --config and an experiment, or --script, --launch and your training script")
        return False
    if arguments.script and arguments.module:
        raise ConfigError("--script and --module: received both; give one")
    wrong = [f"--{name.replace('_', '-')}" for name in of_config if getattr(arguments, name) is not None]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: received with --script, which has its own data and model; leave out one of them")
    if arguments.launch is None:
        raise ConfigError('--launch: missing with --script; give the config of `fae launch`, the smallest is {"hbm_budget": "64MiB"}')
    return True


def run_compare_script(arguments: Namespace) -> int:
    """Runs somebody's own script under all placements and reports them side by side."""
    from fae_torchrec.compare_script import ScriptComparison, compare_script
    from fae_torchrec.launch_script import ScriptRun
    from fae_torchrec.training.report import write_report
    from fae_torchrec.training.report_table import text_table

    comparison = ScriptComparison(
        ScriptRun(arguments.module or arguments.script, tuple(arguments.script_arguments), is_module=bool(arguments.module)),
        launch=arguments.launch,
        overrides=tuple(arguments.set),
        placements=tuple(arguments.placements or ("stock", "fae")),
        ranks=tuple(arguments.ranks or (1,)),
        repeats=1 if arguments.repeats is None else arguments.repeats,
        warm_up=5 if arguments.warm_up is None else arguments.warm_up,
        output=arguments.output or "runs/compare",
        allow_unequal=bool(arguments.allow_unequal),
    )
    report = compare_script(comparison, arguments.command_line, show_progress=not arguments.quiet)
    paths = write_report(report, comparison.output)
    _print(arguments, [text_table(report), "", *_told(report), *map(str, paths)], paths[0].read_text(encoding="utf-8"))
    return 0


def _told(report: Mapping[str, Any]) -> list[str]:
    """What a comparison says beside its figures."""
    from fae_torchrec.training.report_shares import shares_lines
    from fae_torchrec.training.report_verdicts import verdicts

    lines = [f"NOT COMPARABLE: {text}" for text in report["not_comparable"]]
    lines += [f"{name}{rest}" for name, rest in verdicts(report)]
    lines += [*report["notes"], *shares_lines(report)]
    return [*lines, ""] if lines else []


def _print(arguments: Namespace, lines: Sequence[str], as_json: str) -> None:
    print(as_json.rstrip() if arguments.json else "\n".join(lines))


def _scores_text(scores: Any) -> str:
    return f"test AUC {scores['test_auc']:.4f}, logloss {scores['test_logloss']:.4f}"
