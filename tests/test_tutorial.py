"""The tutorial's runner stops where a page is wrong, and its pages have the form that they promise; `make tutorial` runs them."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from fae_torchrec.config import load_config

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "docs" / "tutorial"
STEPS = sorted(TUTORIAL.glob("[0-9]_*.md"))
PAGES = [TUTORIAL / "README.md", *STEPS]

GOOD = """# A page
```python
numbers = [1, 2]
```
```bash
mkdir -p images && printf png >images/a.png
echo "made by bash:     1,000.5 rows" | tee made.txt
```
```text
made by bash: 1,001 rows
```
![a](images/a.png)
```python
from pathlib import Path
print(Path("made.txt").read_text().strip(), numbers)
```
```text varies
another machine printed 7
```
"""


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TUTORIAL))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # main adds to it
    return import_module("run")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("an old one")
    path = tmp_path / "page.md"
    path.write_text(GOOD)
    return path


def test_blocks_run_in_order_in_one_folder(runner: ModuleType, page: Path, tmp_path: Path) -> None:
    before = Path.cwd()
    assert runner.main([str(page), "--folder", str(tmp_path / "run")]) == 0
    assert Path.cwd() == before and (tmp_path / "run" / "made.txt").read_text() == "made by bash:     1,000.5 rows\n"
    assert page.read_text() == GOOD and (tmp_path / "images" / "a.png").read_text() == "an old one", "only --update writes"


@pytest.mark.parametrize(
    ("right", "wrong", "line", "said"),
    [
        ("numbers = [1, 2]", "numbers = []\nnumbers[3]", 2, "IndexError"),
        ("mkdir -p images &&", "false;", 5, "bash ended with code 1"),
        ("mkdir -p images &&", "echo $unset &&", 5, "bash ended with code"),
        ("mkdir -p images &&", "false | true; mkdir -p images &&", 5, "bash ended with code 1"),
        ("1,001 rows", "1,030 rows", 9, "1030 is shown, 1000.5 was printed"),
        ("1,001 rows", "1,001 columns", 9, "other words"),
        ("numbers)", "numbers) or 1 / 0", 13, "ZeroDivisionError"),
        ("```python\nnumbers", "```text\n```\n```python\nnumbers", 2, "after no code"),
        ("(images/a.png)", "(images/b.png)", None, "no block made images/b.png"),
    ],
)
def test_the_first_failure_is_named_by_page_and_line(
    runner: ModuleType, page: Path, capsys: pytest.CaptureFixture[str], right: str, wrong: str, line: int | None, said: str
) -> None:
    assert GOOD.count(right) == 1
    page.write_text(GOOD.replace(right, wrong))
    assert runner.main([str(page)]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert f"{page}:" + (f"{line}:" if line else "") in error, error


def test_nothing_runs_after_a_failure(runner: ModuleType, page: Path, tmp_path: Path) -> None:
    page.write_text(GOOD.replace("numbers = [1, 2]", "raise SystemExit(0)"))
    assert runner.main([str(page), str(page), "--folder", str(tmp_path / "run")]) == 1
    assert not (tmp_path / "run" / "made.txt").exists()
    with pytest.raises(SystemExit, match="2"):
        runner.main([str(page), "--folder", str(page.parent)])


def test_update_writes_output_and_pictures(runner: ModuleType, page: Path, tmp_path: Path) -> None:
    assert runner.main([str(page), "--update"]) == 0
    text = page.read_text()
    assert "```text\nmade by bash:     1,000.5 rows\n```\n" in text
    assert "```text varies\nmade by bash:     1,000.5 rows [1, 2]\n```\n" in text
    assert (tmp_path / "images" / "a.png").read_text() == "png"
    assert runner.main([str(page)]) == 0


def test_loose_comparison(runner: ModuleType) -> None:
    def differs(shown: str, printed: str) -> bool:
        return runner.difference(f"```text\n{shown}```", f"```text\n{printed}```") is not None

    assert not differs("a  1.00 ---- x_2", "a 1.019 --------- x_2") and differs("a 1.00", "a 1.03")
    assert differs("x_2 1", "x_3 1"), "a number in a name is part of the name"
    assert differs("a 1", "a 1 2") and differs("-0.5", "0.5") and not differs("0.0 % of 0", "0.0 % of 0")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for words, picture in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", text):
        assert words and (picture.startswith("../") or "synthetic" in words), f"{picture}: what it shows, and of which data"


@pytest.mark.parametrize("page", STEPS, ids=lambda page: page.stem)
def test_each_step_ends_with_own_data_and_what_is_next(page: Path) -> None:
    text = page.read_text()
    following = [*STEPS, PAGES[0]][STEPS.index(page) + 1]
    own = text.partition("## With your own data")[2]
    assert f"]({following.name})" in own.splitlines()[-1]
    assert f"]({page.name})" in PAGES[0].read_text()
    assert re.findall(r"!\[[^]]*\]\((images/[^)]+)\)", text) and "\n```text" in text, "pictures, and key output as text"


@pytest.mark.parametrize("page", STEPS, ids=lambda page: page.stem)
def test_configs_shown_load(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL) + re.findall(r"<<'END'\n(.*?)END\n", text, flags=re.DOTALL)
    assert blocks or page != STEPS[0]
    for block in blocks:
        (tmp_path / "page.yaml").write_text(block)
        load_config(tmp_path / "page.yaml")


def test_pictures_are_those_of_the_pages() -> None:
    shown = {picture for page in STEPS for picture in re.findall(r"\]\(images/([^)]+)\)", page.read_text())}
    assert {path.name for path in (TUTORIAL / "images").iterdir()} == shown
