"""fae compare over runs that are made up: order, medians, paired intervals, refused work, warnings; and the Markdown that is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fae_torchrec import cli, compare
from fae_torchrec.compare_scores import ScoredRuns, all_score_intervals, score_intervals
from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.score_interval import auc_components, auc_estimate, logloss_terms
from tests.small_config import new_config, write_experiment

Ran = list[tuple[str, int, int]]
LABELS = (np.arange(400) % 3 == 0).astype(np.uint8)


def logits(name: str, seed: int) -> np.ndarray:
    """Noisy ones; those of stock-host are a little better."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=400) + LABELS * (1.2 if name == "stock-host" else 1.0)).astype(np.float32)


def work(**changes: Any) -> dict[str, Any]:
    return {
        "ranks": 1, "batch_size": 32, "epochs": 1, "drop_last": False, "whole_epochs": True, "steps": 22, "samples": 701, "ids": 2103,
        "id_sum": 7, "positives": 300, "test_samples": 400, "start_weights": "3f2a", "start_logloss": 0.7, "optimizer": "sgd",
        "learning_rates": [0.1], "sharding_types": ["table_wise"], **changes,
    }  # fmt: skip


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """(placement, ranks, seed) of the runs that were made, in order; the n-th takes 100 + n samples/s."""
    runs: Ran = []

    def fake(function: Any, ranks: int, config: Any, name: str, *rest: Any, device_type: str) -> list[dict[str, Any]]:
        runs.append((name, ranks, config.train.seed))
        np.savez(rest[-1], logits=logits(name, config.train.seed), labels=LABELS)
        scores = auc_components(logits(name, config.train.seed), LABELS)
        return [
            {
                "placement": name, "ranks": ranks, "samples_per_s": 100.0 + len(runs), "samples_per_s_spread": [1.0, 2.0],
                "test_auc": float(scores[LABELS == 1].mean()), "host_peak_bytes": 2**20, "fast_memory_bytes": 0, "work": work(ranks=ranks),
                "bytes_crossed_by_collective": {"allreduce": 12.0, "alltoall_base": 30.0},
            }
        ]  # fmt: skip

    monkeypatch.setattr(compare, "run_on_local_ranks", fake)
    monkeypatch.setattr(compare, "collect", lambda: None)  # a process that imports torch
    monkeypatch.setattr(compare, "describe_environment", lambda _: {})
    return runs


def report_of(folder: Path, *overrides: str) -> dict[str, Any]:
    placements = "compare.placements=[fae, stock, stock-host]"
    return compare.compare(new_config(folder, placements, *overrides), ["fae", "compare"])


def test_runs_take_turns(tmp_path: Path, ran: Ran) -> None:
    report = report_of(tmp_path, "compare.ranks=[1, 2]", "compare.repeats=2")
    orders = [["fae", "stock", "stock-host"], ["stock", "stock-host", "fae"]]
    assert ran == [(name, ranks, 0) for ranks in (1, 2) for order in orders for name in order]
    assert [(run["placement"], run["ranks"]) for run in report["runs"]] == [(n, r) for r in (1, 2) for n in ("fae", "stock", "stock-host")]
    fae, stock = report["runs"][:2]
    assert (fae["samples_per_s"], fae["samples_per_s_spread"]) == (103.5, [101.0, 106.0]), "the first and the sixth run"
    assert (stock["samples_per_s"], stock["samples_per_s_spread"]) == (103.0, [102.0, 104.0])
    assert [(each["turn"], each["place"], each["samples_per_s"]) for each in fae["each"]] == [(0, 0, 101.0), (1, 2, 106.0)]
    assert (report["repeats"], report["warm_up_steps"], report["not_comparable"]) == (2, 5, [])


def test_scores_are_paired_with_the_baseline(tmp_path: Path, ran: Ran) -> None:
    runs = {run["placement"]: run for run in report_of(tmp_path)["runs"]}
    less = {name: run["less_baseline"] for name, run in runs.items()}
    assert less["stock"] is None and less["fae"]["baseline"] == "stock"
    assert [less["fae"]["auc"][key] for key in ("value", "low", "high")] == [0.0, 0.0, 0.0], "the same logits"
    one, other = (auc_components(logits(name, 0), LABELS) for name in ("stock-host", "stock"))
    paired = auc_estimate([one - other], LABELS)
    assert less["stock-host"]["auc"] == pytest.approx({"value": paired.value, "low": paired.low, "high": paired.high})
    assert paired.low > 0, "noise that both share does not hide the difference"
    low, high = runs["stock"]["test_auc_interval"]
    assert low < runs["stock"]["test_auc"] < high


def test_seeds_may_vary(tmp_path: Path, ran: Ran) -> None:
    report = report_of(tmp_path, "compare.repeats=3", "compare.vary_seed=true", "train.seed=5")
    assert [seed for _, _, seed in ran] == [5, 5, 5, 6, 6, 6, 7, 7, 7]
    expected = auc_estimate([auc_components(logits("stock", seed), LABELS) for seed in (5, 6, 7)], LABELS)
    assert report["runs"][1]["test_auc_interval"] == pytest.approx([expected.low, expected.high])


def test_unequal_work_is_refused(tmp_path: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    fake, words = compare.run_on_local_ranks, "fae trained 640 samples, stock 701"

    def unequal(function: Any, ranks: int, config: Any, name: str, *rest: Any, **more: Any) -> Any:
        entries = fake(function, ranks, config, name, *rest, **more)
        return [{**entries[0], "work": work(**({"samples": 640} if name == "fae" else {}))}]

    monkeypatch.setattr(compare, "run_on_local_ranks", unequal)
    given = ["compare", "--config", str(write_experiment(tmp_path)), "--repeats", "3", "--quiet"]
    assert cli.main(given) == 2
    err = capfd.readouterr().err
    assert re.search(f"^fae compare: compare: the placements did not do the same work; on 1 rank: {words}.*--allow-unequal", err)
    assert len(ran) == 2, "found after the first turn"
    assert not (tmp_path / "out" / "report.json").exists()
    assert cli.main([*given, "--allow-unequal"]) == 0
    assert f"NOT COMPARABLE: on 1 rank: {words}" in capfd.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["not_comparable"]) == 1 and "test_auc_interval" not in report["runs"][0]
    assert "**NOT COMPARABLE" in (tmp_path / "out" / "report.md").read_text()
    assert "Not comparable: the runs did not do the same work" in (tmp_path / "out" / "report.html").read_text()


def test_a_baseline_that_does_not_exist_here(tmp_path: Path, ran: Ran, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["compare", "--config", str(write_experiment(tmp_path)), "--placements", "fae", "stock-uvm"]
    assert cli.main(given) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "received 'stock-uvm' with train.device 'cpu'" in err
    assert ran == [] and not (tmp_path / "out").exists(), "before any work"


def test_a_cache_that_is_too_small_is_warned_of(tmp_path: Path) -> None:
    """As for CUDA; nothing is trained. Two batches of 32 touch more than the 5 rows that 180 bytes hold."""
    config = new_config(tmp_path, "train.device=cuda", "compare.placements=[stock, stock-prefetch]", "compare.cache=180B")
    data = compare.open_data(config)
    placement = compare.make_placement(
        config, compare.placed_tables(config, data), compare.settle_hot_set(config, data, _profile(config, data), [1])[1]
    )[0]
    warnings = compare.check_baselines(config, data, placement)
    assert len(warnings) == 1 and re.search(r"stock-prefetch: a prefetch cache of [45] rows is smaller than the \d+ distinct", warnings[0])
    roomy = new_config(tmp_path, "train.device=cuda", "compare.placements=[stock, stock-prefetch]", "compare.cache=1MiB")
    assert compare.check_baselines(roomy, data, placement) == []


def _profile(config: Any, data: Any) -> Any:
    return compare.make_profile(config, data, compare.placed_tables(config, data))


def test_repeats_of_other_test_samples(tmp_path: Path) -> None:
    for name, labels in (("a", LABELS), ("b", np.roll(LABELS, 1))):
        np.savez(tmp_path / f"{name}.npz", logits=logits("stock", 0), labels=labels)
    paths = {"stock": [tmp_path / "a.npz"], "fae": [tmp_path / "b.npz"]}
    with pytest.raises(ConfigError, match="the baseline stock and a placement were scored on different test samples"):
        all_score_intervals(paths, "stock")
    with pytest.raises(ConfigError, match="two repeats were scored"):
        ScoredRuns.load([tmp_path / "a.npz", tmp_path / "b.npz"])


def test_scores_without_a_class_have_no_interval() -> None:
    labels = np.ones(5, dtype=np.uint8)
    runs = ScoredRuns(labels, [auc_components(np.arange(5.0), labels)], [logloss_terms(np.arange(5.0), labels)])
    made = score_intervals(runs)
    assert made["test_auc_interval"] is None and made["test_logloss_interval"][0] < made["test_logloss_interval"][1]


def cells(markdown: str) -> list[list[str]]:
    """Rows of all tables."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_markdown_has_the_figures(tmp_path: Path, ran: Ran, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["compare", "--config", str(write_experiment(tmp_path)), "--placements", "stock", "stock-host", "--repeats", "2", "--quiet"]
    assert cli.main([*given, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    markdown = (tmp_path / "out" / "report.md").read_text()
    head, stock, host, _, more, more_host = cells(markdown)
    found = dict(zip(head, host, strict=True))
    run = report["runs"][1]
    least, most = run["samples_per_s_spread"]
    assert found["samples/s"] == f"{run['samples_per_s']:,.0f} ({least:,.0f} to {most:,.0f})" == "102 (102 to 103)"
    assert (found["placement"], found["test AUC"], found["train loss"]) == ("stock-host", f"{run['test_auc']:.4f}", "-")
    assert dict(zip(head, stock, strict=True))["test AUC"] == f"{report['runs'][0]['test_auc']:.4f}"
    less = run["less_baseline"]["auc"]
    assert f"{less['value']:+.4f} ({less['low']:+.4f} to {less['high']:+.4f})" in more_host
    assert "allreduce 12, alltoall\\_base 30" in more_host and "1.00 MiB" in more
    assert "**stock-host**, 1 rank: " in markdown and "Each run 2 times, in turns" in markdown


SCRIPT = ["--script", "train.py", "--launch", "launch.json"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "nothing to compare; give --config"),
        (["--launch", "launch.json"], "--launch: given without --script"),
        (["--config", "c.yaml", "--warm-up", "3", "--", "--epochs"], "--warm-up, -- ARGUMENTS: given without --script"),
        (["--script", "train.py"], "--launch: missing with --script"),
        ([*SCRIPT, "--config", "c.yaml"], "--config: received with --script"),
        ([*SCRIPT, "--module", "a.b"], "received both"),
        ([*SCRIPT, "--placements", "stock"], "at least two of stock, fae"),
        ([*SCRIPT, "--placements", "stock", "uvm"], "at least two of stock, fae"),
        ([*SCRIPT, "--ranks", "2", "2"], r"received \[2, 2\]; give none twice"),
        ([*SCRIPT, "--repeats", "0"], "must be at least 1"),
        (SCRIPT, "there is no script 'train.py'"),
    ],
)
def test_options_that_do_not_go_together(
    given: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *given]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and re.search(words, err), err
    assert list(tmp_path.iterdir()) == []
