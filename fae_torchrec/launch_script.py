"""ScriptRun: a Python script or module with its arguments, run in this process as `python` itself would run it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fae_torchrec.core.errors import ConfigError


@dataclass(frozen=True)
class ScriptRun:
    """What to run.

    Attributes:
        target: the path of a script, or the name of a module.
        arguments: its arguments.
        is_module: whether `target` is a module, as after `python -m`.
    """

    target: str
    arguments: tuple[str, ...] = ()
    is_module: bool = False

    @property
    def text(self) -> str:
        """The command as one would type it."""
        return " ".join([*(["-m"] if self.is_module else []), self.target, *self.arguments])

    def check(self) -> str:
        """Finds the script, without running it.

        Returns:
            A digest of its source.

        Raises:
            ConfigError: there is none.
        """
        path = Path(self.target)
        if self.is_module:
            with _importing_from(os.getcwd()):
                try:
                    spec = importlib.util.find_spec(self.target)
                except (ImportError, ValueError):
                    spec = None
            if spec is None:
                raise ConfigError(f"there is no module {self.target!r}; give what follows `python -m`, from the folder where it is found")
            path = Path(spec.origin or "")
        elif not path.is_file():
            raise ConfigError(
                f"there is no script {self.target!r} (from {os.getcwd()}); give the path of a Python file, or -m and a module"
            )
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""

    def run(self) -> None:
        """Runs it as `__main__`, with its own `sys.argv` and `sys.path`; whatever it raises comes out, SystemExit too."""
        argv, sys.argv = sys.argv, [self.target, *self.arguments]
        try:
            with _importing_from(os.getcwd() if self.is_module else str(Path(self.target).resolve().parent)):
                if self.is_module:
                    runpy.run_module(self.target, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(self.target, run_name="__main__")
        finally:
            sys.argv = argv


@contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    """Puts a folder where `python` would have put the script's: first."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
