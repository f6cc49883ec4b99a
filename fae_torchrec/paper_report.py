"""fae report --paper: finished comparisons of the paper's workloads as plain values, beside what the paper prints of them."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.paper_numbers import read_numbers
from fae_torchrec.training.paper_page import paper_lines, paper_markdown, paper_page
from fae_torchrec.training.paper_tables import GIB, WORKLOADS, data_title, recognised, unlike_model
from fae_torchrec.training.report import write_json
from fae_torchrec.training.report_verdicts import baseline_of, overlap_text
from fae_torchrec.training.whole_file import write_whole

_OUTPUT = "runs/paper"
_OF_RUN = (
    "placement", "ranks", "repeats", "samples", "steps", "samples_per_s", "samples_per_s_spread", "hot_inputs", "hot_batches",
    "cold_rows_per_sample", "lookups_per_sample", "test_accuracy", "test_accuracy_spread", "test_auc", "test_auc_spread", "test_logloss",
    "test_logloss_spread", "less_baseline", "wall_s", "step_shares",
)  # fmt: skip
_SCHEMES = (("stock_host", None), ("as_published", None), ("ours", "host"), ("ours", "uvm"))


def paper_report(
    paths: Sequence[str],
    named: Mapping[str, Sequence[str]],
    command: Sequence[str],
    bytes_path: str | None = None,
    numbers_path: str | None = None,
) -> dict[str, Any]:
    """Reads comparisons and says what of them stands beside the paper.

    Args:
        paths: reports of `fae compare` (report.json); their workload is recognised.
        named: workload -> further reports, taken for it whatever they trained.
        command: the command line, for the report.
        bytes_path: what benchmarks/paper_bytes.py wrote, or None.
        numbers_path: the paper's numbers as a reader wrote them down, or None.

    Returns:
        Plain values: schema, kind "paper", created, command, comparisons (see `of_comparison`), bytes (see `counted_bytes`), numbers
        (see `fae_torchrec.paper_numbers`; None without a file).

    Raises:
        ConfigError: no report, a file that is none, or a workload that is not recognised or does not exist;
            numbers that cannot be.
    """
    for name in named:
        if name not in WORKLOADS:
            raise ConfigError(f"--workload: received {name!r}; allowed are {', '.join(WORKLOADS)}")
    reports = [(path, None) for path in paths] + [(path, name) for name, some in named.items() for path in some]
    if not reports:
        raise ConfigError("--paper: received no report; give report.json of one or more runs of fae compare")
    found = [of_comparison(path, _read(path), name) for path, name in reports]
    order = list(WORKLOADS)
    return {
        "schema": 1,
        "kind": "paper",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "comparisons": sorted(found, key=lambda each: order.index(each["workload"])),
        "bytes": None if bytes_path is None else counted_bytes(bytes_path),
        "numbers": None if numbers_path is None else read_numbers(numbers_path),
    }


def of_comparison(path: str, report: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """One comparison as the page has it.

    Args:
        path: where the report is, for messages.
        report: of `fae compare`.
        name: of the workload; None recognises it.

    Returns:
        workload, path, data (its name), data_title (in a few words), synthetic, scale (of the published rows; None for files),
        train_samples, test_samples, rows, epochs, batch_size, device, hardware, created, unlike (how it differs from the paper's workload,
        sentences), not_comparable, and runs: the report's figures, and beside them `baseline`, `train_s` (seconds of training: samples over
        samples/s), `time_ratio`, `time_note` (of spreads that overlap), `sample_bytes` (of fp32 rows that a sample brings from outside the
        hot tier), `bytes_ratio` and `epoch_gib` (over the train data once). The ratios are to the baseline on as many ranks, None for
        itself.

    Raises:
        ConfigError: the workload is not recognised.
    """
    config = report["config"]
    name = name or recognised(config)
    if name is None:
        model = config["model"]
        raise ConfigError(
            f"{path}: data {report['data']['name']!r} with model.embedding_dim {model.get('embedding_dim')}, dense_arch "
            f"{model.get('dense_arch')} and over_arch {model.get('over_arch')} are none of the paper's workloads ({', '.join(WORKLOADS)}, "
            f"as in examples/configs); name the one that they stand for: --workload NAME={path}"
        )
    data, train, synthetic = report["data"], config["train"], (config["data"].get("synthetic") or {})
    base = baseline_of(run["placement"] for run in report["runs"])
    bases = {run["ranks"]: run for run in report["runs"] if run["placement"] == base}
    row_bytes = 4 * config["model"]["embedding_dim"]
    return {
        "workload": name,
        "path": str(path),
        "data": data["name"],
        "data_title": data_title(config),
        "synthetic": bool(synthetic),
        "scale": synthetic.get("scale"),
        **{key: data.get(key) for key in ("train_samples", "test_samples", "rows")},
        "epochs": train["epochs"],
        "batch_size": train["batch_size"],
        "device": train["device"],
        "hardware": report.get("hardware") or {},
        "created": report.get("created"),
        "unlike": unlike_model(WORKLOADS[name], config),
        "not_comparable": list(report.get("not_comparable") or ()),
        "runs": [_of_run(run, bases.get(run["ranks"]), row_bytes, data["train_samples"]) for run in report["runs"]],
    }


def counted_bytes(path: str) -> dict[str, Any]:
    """What benchmarks/paper_bytes.py counted, for an epoch as long as the paper's.

    Returns:
        quick (whether its sizes were made small, so that its figures mean nothing), and shapes: data set -> GPUs -> scheme ("stock_host",
        "as_published", "ours host", "ours uvm") -> GiB over PCIe and in host memory ("pcie", "tier").

    Raises:
        ConfigError: the file is not what that program writes.
    """
    values = _json(path)
    shapes = values.get("shapes") if isinstance(values, Mapping) else None
    try:
        assert isinstance(shapes, Mapping) and shapes
        found = {
            shape: {
                gpus: {" ".join(filter(None, (scheme, tier))): _gib(counts[scheme][gpus], tier) for scheme, tier in _SCHEMES}
                for gpus in counts["ours"]
            }
            for shape, counts in shapes.items()
        }
    except (AssertionError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"--bytes: {path} is not what benchmarks/paper_bytes.py writes; give its JSON, or leave it out") from None
    return {"path": str(path), "quick": "--quick" in (values.get("command") or ()), "shapes": found}


def run_paper_report(arguments: Namespace) -> int:
    """Writes the page and prints what stands in it, briefly."""
    named: dict[str, list[str]] = {}
    for given in arguments.workload:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--workload: received {given!r}; give NAME=REPORT, such as RMC2=runs/kaggle/report.json")
        named.setdefault(name, []).append(path)
    report = paper_report(arguments.paper, named, arguments.command_line, arguments.bytes, arguments.numbers)
    paths = write_paper_report(report, arguments.output or _OUTPUT)
    if arguments.json:
        print(paths[0].read_text(encoding="utf-8").rstrip())
    else:
        print("\n".join([*paper_lines(report), "", *map(str, paths)]))
    return 0


def write_paper_report(report: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Writes paper.html and paper.md, then paper.json, each under a temporary name first; returns the paths, the JSON first."""
    texts = {"paper.html": paper_page(report), "paper.md": paper_markdown(report)}
    written = [write_whole(text, Path(folder, name)) for name, text in texts.items()]
    return [write_json(report, Path(folder, "paper.json")), *written]


def _of_run(run: Mapping[str, Any], base: Mapping[str, Any] | None, row_bytes: int, epoch: int) -> dict[str, Any]:
    """A run's figures, and its ratios to the baseline."""
    speed, cold = run.get("samples_per_s"), run.get("cold_rows_per_sample")
    other = None if base is None or base["placement"] == run["placement"] else base
    base_speed, base_cold = (None, None) if other is None else (other.get("samples_per_s"), other.get("cold_rows_per_sample"))
    return {
        **{key: run.get(key) for key in _OF_RUN},
        "baseline": None if base is None else base["placement"],
        "train_s": run["samples"] / speed if speed and run.get("samples") else None,
        "time_ratio": base_speed / speed if speed and base_speed else None,
        "time_note": "" if other is None else overlap_text(run, other, "samples_per_s"),
        "sample_bytes": None if cold is None else cold * row_bytes,
        "bytes_ratio": cold / base_cold if cold is not None and base_cold else None,
        "epoch_gib": None if cold is None else cold * row_bytes * epoch / GIB,
    }


def _gib(counted: Mapping[str, Any], tier: str | None) -> dict[str, float]:
    moved = (counted if tier is None else counted[tier])["paper_epoch"]
    return {key: moved[key] / GIB for key in ("pcie", "tier")}


def _read(path: str) -> Mapping[str, Any]:
    """A report of `fae compare` of a config.

    Raises:
        ConfigError: it is something else.
    """
    report, remedy = _json(path), "give report.json of `fae compare --config`"
    if not isinstance(report, Mapping):
        raise ConfigError(f"--paper: {path} is no report of fae compare; {remedy}")
    if report.get("script"):
        raise ConfigError(f"--paper: {path} compares a script, whose model and data are its own; {remedy}")
    parts: Iterable[str] = ("config", "data", "runs")
    missing = [part for part in parts if not report.get(part)]
    if missing:
        what = f"a report of kind {report['kind']!r}" if report.get("kind") else f"no report of fae compare (it lacks {', '.join(missing)})"
        raise ConfigError(f"--paper: {path} is {what}; {remedy}")
    return report


def _json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give the path of a JSON file") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}; give the path of a JSON file") from None
