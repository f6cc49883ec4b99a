"""The pages of docs/ and the example configs tell the truth: what they name exists, what they configure loads, their commands parse."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from fae_torchrec.cli import _parser
from fae_torchrec.config import load_config
from fae_torchrec.launch import parser as launch_parser
from fae_torchrec.launch import split_arguments
from fae_torchrec.launch_config import LaunchConfig, load_launch_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
PAGES = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGES["data.md"], flags=re.DOTALL)
SOURCES = {"synthetic", "parquet", "criteo", "criteo_npy", "avazu", "taobao", "csv"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_config_loads(path: Path) -> None:
    if path.stem == "completejourney" and not (ROOT.parent / "shared" / "data" / "completejourney").is_dir():
        pytest.skip("its rows by table are in a file that is not part of a clone")
    assert load_config(path).output == f"runs/{path.stem.removesuffix('_npy')}"


@pytest.mark.parametrize("name", PAGES)
def test_blocks_of_a_config_load(name: str, tmp_path: Path) -> None:
    """Each YAML block of a page; one that says nothing of data gets some."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGES[name], flags=re.DOTALL)
    assert blocks or name != "training.md"
    for block in blocks:
        data = "" if re.search(r"^data:", block, flags=re.MULTILINE) else "data: {synthetic: {dataset: kaggle}}\n"
        (tmp_path / "page.yaml").write_text(data + block)
        load_config(tmp_path / "page.yaml")


@pytest.mark.parametrize("name", PAGES)
def test_code_imports_what_there_is(name: str) -> None:
    for block in re.findall(r"```python\n(.*?)```", PAGES[name], flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fae_torchrec"):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_every_source_has_an_example_and_a_section(tmp_path: Path) -> None:
    page = tmp_path / "page.yaml"
    described = set()
    for block in BLOCKS:
        page.write_text(block)
        described.add(load_config(page).data.source)
    assert described == SOURCES
    examples = {load_config(path).data.source for path in CONFIGS if path.stem != "completejourney"}
    assert examples == SOURCES - {"parquet"}, "completejourney.yaml is the one of parquet"


@pytest.mark.parametrize("name", PAGES)
def test_commands_parse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `fae` line of a page, started by torchrun or not, with its config and overrides."""
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^\$ .*?(?:bin/fae|fae_torchrec\.cli) (.+)$", PAGES[name], flags=re.MULTILINE)
    assert commands or name not in ("checkpoints.md", "data.md", "selection.md", "training.md")
    for command in commands:
        if command.startswith("launch "):
            options, script = split_arguments(shlex.split(command)[1:])
            arguments = launch_parser("fae launch").parse_args(options)
            load_launch_config(arguments.config, arguments.set)
            assert script
            continue
        arguments = _parser().parse_args(shlex.split(command))
        if getattr(arguments, "paper", None):  # reports of runs: they have no config
            continue
        load_config(arguments.config, arguments.set)


@pytest.mark.parametrize("name", PAGES)
def test_linked_files_and_sections_exist(name: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[name]):
        file, _, anchor = target.partition("#")
        assert (ROOT / "docs" / file).exists(), target
        assert not anchor or anchor in _anchors(PAGES[file or name]), target


def test_launch_page_has_every_key() -> None:
    table = PAGES["launch.md"].partition("## The config")[2].partition("## launch.json")[0]
    assert {key for row in re.findall(r"^\| (`.+?`) \|", table, flags=re.MULTILINE) for key in re.findall(r"`(\w+)`", row)} == {
        item.name for item in fields(LaunchConfig)
    }


def _anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_design_names_every_module_once() -> None:
    rows = re.findall(r"^\| \d \| (\S+) \| (.+) \|$", PAGES["design.md"], flags=re.MULTILINE)
    assert len(rows) == 6
    for folder, words in rows:
        where = ROOT / "fae_torchrec" / ("." if folder == "entry" else folder.strip("`/"))
        modules = sorted(path.stem for path in where.glob("*.py") if path.name != "__init__.py")
        assert sorted(re.findall(r"`(\w+)`", words)) == modules, folder
