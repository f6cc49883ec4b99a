"""The pages of docs/ and the example configs tell the truth: what they name exists, what they configure loads, their commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fae_torchrec.cli import _parser
from fae_torchrec.config import load_config

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
    assert commands or name not in ("data.md", "selection.md")
    for command in commands:
        arguments = _parser().parse_args(shlex.split(command))
        load_config(arguments.config, arguments.set)


@pytest.mark.parametrize("name", PAGES)
def test_linked_files_and_sections_exist(name: str) -> None:
    titles = re.findall(r"^#+ (.+)$", PAGES[name], flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[name]):
        file, _, anchor = target.partition("#")
        assert (ROOT / "docs" / file).exists(), target
        assert file or anchor in anchors, target


def test_design_names_every_module_once() -> None:
    rows = re.findall(r"^\| \d \| (\S+) \| (.+) \|$", PAGES["design.md"], flags=re.MULTILINE)
    assert len(rows) == 6
    for folder, words in rows:
        where = ROOT / "fae_torchrec" / ("." if folder == "entry" else folder.strip("`/"))
        modules = sorted(path.stem for path in where.glob("*.py") if path.name != "__init__.py")
        assert sorted(re.findall(r"`(\w+)`", words)) == modules, folder
