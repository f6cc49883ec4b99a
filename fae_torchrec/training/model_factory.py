"""Finds the model factory that a config names: a function in a Python file, or in a module that can be imported."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.training.model_spec import ModelFactory, failed


def load_factory(name: str) -> ModelFactory:
    """Loads a model factory; once in each process, again if the file has changed.

    Args:
        name: "path/to/file.py:function", or "package.module:function" of what Python finds on its path.

    Raises:
        ConfigError: there is no such file, module or function, or the file's own code fails.
    """
    where, _, function = name.rpartition(":")
    try:
        module = _module_of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or where
        raise ConfigError(
            f"no module {missing!r} could be imported; give path/to/file.py:function, or install the package of {missing!r} (or name its "
            "folder in PYTHONPATH)"
        ) from error
    except Exception as error:  # whatever somebody else's code may raise
        raise failed(error, f"{where} could not be imported") from error
    found = getattr(module, function, None)
    if not callable(found):
        functions = sorted(
            key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__
        )
        near = difflib.get_close_matches(function, functions, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{where} has no function {function!r}; {hint}It has {functions}")
    return found  # type: ignore[no-any-return]


def _module_of_file(path: Path) -> ModuleType:
    """A Python file as a module, named by its path and content: the same file is one module of a process."""
    if not path.is_file():
        raise ConfigError(f"no such file {path}; give path/to/file.py:function (relative to the config file), or package.module:function")
    digest = hashlib.blake2b(str(path.resolve()).encode() + b"\0" + path.read_bytes(), digest_size=8).hexdigest()
    name = f"fae_model_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
