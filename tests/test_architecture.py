"""The floors of the house, checked by reading the source; only the last tests import anything."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fae_torchrec"
FLOORS = {
    "core": 0, "data": 1, "modules": 1, "distributed": 2, "training": 3,
    "schema": 4, "config": 4, "data_config": 4, "experiment": 4, "experiment_data": 4, "experiment_profile": 4,
    "experiment_store": 4, "compare": 4, "paper_report": 4, "popularity_report": 4, "report_parts": 4, "doctor": 4, "launch": 4,
    "launch_config": 4, "launch_parts": 4, "launch_patches": 4, "launch_placement": 4, "launch_profile": 4, "launch_ranks": 4,
    "launch_rebundling": 4, "launch_report": 4, "launch_script": 4, "launch_standins": 4,
    "cli": 4, "commands": 4, "paper_numbers": 4, "experiment_loader": 4, "experiment_measures": 4,
    "compare_script": 4, "compare_scores": 4, "compare_turns": 4,
    "measure": 4, "what_if": 4, "plan": 4, "experiment_plan": 4, "experiment_model": 4, "experiment_placement": 4,
}  # fmt: skip
# What a floor may not name, even from outside the package.
FORBIDDEN = {0: ("torchrec", "torch.distributed"), 1: ("torchrec.distributed", "torch.distributed")}
MAX_LINES = 400
MODULES = {
    ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py"
}
assert MODULES, f"no modules under {PACKAGE}: every test below would pass vacuously"


def _imports(source: str) -> set[str]:
    """Every dotted name a source imports or spells out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):  # `torch.distributed.x` after a plain `import torch`
            names.add(ast.unparse(node))
    return names


def _floor(module: str) -> int:
    return FLOORS[module.split(".")[1]]


def _upward(module: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name in MODULES and _floor(name) > _floor(module)]


def _forbidden(module: str, names: Iterable[str]) -> list[str]:
    return [n for n in names for b in FORBIDDEN.get(_floor(module), ()) if n == b or n.startswith(b + ".")]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert _upward(module, _imports(MODULES[module].read_text())) == []


@pytest.mark.parametrize("module", MODULES)
def test_floor_names_nothing_forbidden(module: str) -> None:
    assert _forbidden(module, _imports(MODULES[module].read_text())) == []


def test_no_import_cycles() -> None:
    graph = {m: _imports(p.read_text()) & MODULES.keys() for m, p in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError and names the cycle


@pytest.mark.parametrize("module", MODULES)
def test_module_is_documented_and_small(module: str) -> None:
    source = MODULES[module].read_text()
    assert ast.get_docstring(ast.parse(source)), "every module says in one line what it is for"
    assert source.count("\n") <= MAX_LINES


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda p: p.parent.name)
def test_inner_packages_export_nothing(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr), "docstring only, no re-exports"


def test_every_folder_is_a_package() -> None:
    folders = {p.parent for p in MODULES.values()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_checks_can_fail() -> None:
    assert _imports("import torch\nfrom a import b\nx = torch.distributed.get_rank()") >= {"a", "a.b", "torch.distributed.get_rank"}
    assert _upward("fae_torchrec.core.made_up", ["fae_torchrec.config", "fae_torchrec.core.errors"]) == ["fae_torchrec.config"]
    assert _forbidden("fae_torchrec.core.made_up", ["torchrec.sparse", "torch"]) == ["torchrec.sparse"]
    assert _forbidden("fae_torchrec.data.made_up", ["torchrec.sparse", "torch.distributed.barrier"]) == ["torch.distributed.barrier"]
    with pytest.raises(AssertionError, match="relative import"):
        _imports("from . import core")
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
    with pytest.raises(KeyError):  # a new drawer beside the floors must be given one
        _floor("fae_torchrec.utils.made_up")


def _public_names() -> tuple[dict[str, str], set[str]]:
    """The top package's names for the type checker (name -> module) and its `__all__`, read from the source."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    exported = next(node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    return {alias.name: node.module or "" for node in imports for alias in node.names}, set(ast.literal_eval(exported))


def test_top_package_is_lazy() -> None:
    code = (
        "import sys, fae_torchrec, fae_torchrec.doctor, fae_torchrec.cli\n"
        "print([m for m in ('torch', 'torchrec', 'fbgemm_gpu', 'matplotlib') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert shown.stdout.strip() == "[]", "`fae doctor` must run where torch or torchrec is missing"


def test_public_names_are_the_same_for_python_and_for_type_checkers() -> None:
    import fae_torchrec

    typed, exported = _public_names()
    assert typed == fae_torchrec._HOMES
    constants = {"__version__", "KIB", "MIB", "GIB"}
    assert exported == set(fae_torchrec.__all__) == typed.keys() | constants
    for name, home in typed.items():
        value = getattr(fae_torchrec, name)
        assert value is getattr(sys.modules[home], name)
    assert not hasattr(fae_torchrec, "made_up")
    assert exported <= set(dir(fae_torchrec))
