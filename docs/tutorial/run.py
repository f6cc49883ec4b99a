"""Runs the blocks of the tutorial's pages in their order, and holds what they print against what the pages show.

The blocks of a page that begin with ```python share a namespace, ```bash is run by `bash -euo pipefail`; all of them in one folder. A
```text block after one is what it printed: words must be the same and numbers within 2 %. A ```text varies block is of one machine and
one run, and is not compared. The first failure ends the run and is named by page and line. --update writes what was printed and drawn to
the pages and to images/.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

# Sybil: pure Python without requirements of its own; nbclient with jupytext would bring a Jupyter kernel and some thirty packages to CI.
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

HERE = Path(__file__).resolve().parent
PAGES = tuple(sorted(HERE.glob("[0-9]_*.md")))
TOLERANCE = 0.02
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_LANGUAGES = ("python", "bash", "text", "text varies")


class Failure(Exception):
    """A block did not do what its page says; the message begins with page and line."""


def run_page(page: Path) -> dict[tuple[int, int], str]:
    """Runs one page's blocks in the current folder.

    Args:
        page: a Markdown file.

    Returns:
        (start, end) of each ```text block in the page -> the block as it should be.

    Raises:
        Failure: a block failed.
    """
    parsers = [CodeBlockParser(language, _none) for language in _LANGUAGES]
    document, printed, shown = Document.parse(str(page), *parsers), None, {}
    for example in document.examples():
        language = example.region.lexemes["arguments"]
        if language.startswith("text"):
            if printed is None:
                raise Failure(f"{page}:{example.line}: a ```text block that stands after no code; give it another language, or none")
            shown[example.start, example.end] = f"```{language}\n{printed}```"
            printed = None
            continue
        try:
            printed = (_run_python if language == "python" else _run_bash)(example)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise Failure(f"{page}:{example.line}: the {language} block that begins here failed: {type(error).__name__}: {error}") from None
    return shown


def difference(shown: str, printed: str) -> str | None:
    """How a ```text block differs from what was printed, both as blocks; None if it does not."""
    if shown.startswith("```text varies"):
        return None
    if _words(shown) != _words(printed):
        return "other words"
    for one, other in zip(_numbers(shown), _numbers(printed), strict=True):
        if abs(one - other) > TOLERANCE * max(abs(one), abs(other)):
            return f"{one:g} is shown, {other:g} was printed"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the pages; returns 0, or 1 if a block failed or prints what its page does not show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, help="Markdown files, in order (default: all steps of the tutorial)")
    parser.add_argument("--folder", type=Path, help="where to run, a new folder or an empty one, which is kept (default: a temporary one)")
    parser.add_argument("--update", action="store_true", help="write what was printed to the pages, and the pictures to their images/")
    arguments = parser.parse_args(argv)
    pages = [page.resolve() for page in arguments.pages]
    if missing := [str(page) for page in pages if not page.is_file()]:
        parser.error(f"{', '.join(missing)}: no such file; give Markdown files")
    if arguments.folder is not None and arguments.folder.exists() and (not arguments.folder.is_dir() or any(arguments.folder.iterdir())):
        parser.error(f"--folder: {arguments.folder} is not empty; give a new one")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: threads would wait for each other more than they compute
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # where `fae` is
    with contextlib.ExitStack() as stack:
        folder = (arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_inside(folder))
        began = time.perf_counter()
        for page in pages:
            page_began = time.perf_counter()
            try:
                _check(page, run_page(page), arguments.update)
            except Failure as failure:
                print(failure, file=sys.stderr)
                return 1
            print(f"{page.name}: done in {time.perf_counter() - page_began:.0f} s", file=sys.stderr)
        print(f"{len(pages)} page(s) in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


def _check(page: Path, shown: dict[tuple[int, int], str], update: bool) -> None:
    """Compares or rewrites a page, and the pictures that it shows."""
    text = page.read_text(encoding="utf-8")
    for (start, end), block in sorted(shown.items(), reverse=update):
        if update:
            text = text[:start] + block + text[end:]
        elif how := difference(text[start:end], block):
            line = text.count("\n", 0, start) + 1
            raise Failure(f"{page}:{line}: the output shown is not what is printed ({how}); run with --update if it should be:\n{block}")
    if update:
        page.write_text(text, encoding="utf-8")
    for name in re.findall(r"\]\((images/[^)]+)\)", text):
        if not Path(name).is_file():
            raise Failure(f"{page}: no block made {name}, which the page shows")
        if update:
            (page.parent / "images").mkdir(exist_ok=True)
            shutil.copyfile(name, page.parent / name)
        if not (page.parent / name).is_file():
            raise Failure(f"{page}: there is no {name}; --update writes it")


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """What contextlib.chdir is from Python 3.11 on."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _none(example: Example) -> None:
    """Sybil asks for an evaluator; the runner needs what was printed, and evaluates itself."""


def _run_python(example: Example) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        PythonEvaluator()(example)
    return output.getvalue()


def _run_bash(example: Example) -> str:
    command = ["bash", "-euo", "pipefail", "-c", example.parsed]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"bash ended with code {done.returncode}")
    return done.stdout


def _words(block: str) -> list[str]:
    """Everything but numbers, rules of tables and spaces."""
    return re.sub(r"-{2,}", "-", _NUMBER.sub("#", block)).split()


def _numbers(block: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(block)]


if __name__ == "__main__":
    sys.exit(main())
