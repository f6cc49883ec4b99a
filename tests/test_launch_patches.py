"""The names of TorchRec that are replaced: where they are, that they all are, and that they come back."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from types import SimpleNamespace

import pytest
import torchrec
import torchrec.distributed
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from fae_torchrec.launch_config import LaunchConfig
from fae_torchrec.launch_parts import Session
from fae_torchrec.launch_patches import HOMES, LEFT_ALONE, replaced

_SKIPPED = (".test", ".benchmark", ".inference", ".fb")


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Name -> every module of torchrec that has TorchRec's object under it."""
    originals = {name: getattr(importlib.import_module(homes[0]), name) for name, homes in HOMES.items()}
    found: dict[str, set[str]] = {name: set() for name in HOMES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in pkgutil.walk_packages(torchrec.__path__, "torchrec.", onerror=lambda name: None):
            if any(part in info.name for part in _SKIPPED):
                continue
            try:
                module = importlib.import_module(info.name)
            except ImportError:  # what needs packages that nobody has here
                continue
            for name, original in originals.items():
                if vars(module).get(name) is original:
                    found[name].add(info.name)
    return found


@pytest.mark.parametrize("name", HOMES)
def test_every_module_that_has_a_name_is_known(name: str, exposed: dict[str, set[str]]) -> None:
    """Fails when TorchRec moves a name, or exposes it in one more module."""
    assert exposed[name] == {*HOMES[name], *LEFT_ALONE.get(name, ())}


def test_left_alone_is_about_known_names() -> None:
    assert LEFT_ALONE.keys() <= HOMES.keys()
    assert all(set(HOMES[name]).isdisjoint(modules) for name, modules in LEFT_ALONE.items())


@pytest.mark.parametrize("name", HOMES)
def test_replaced_everywhere_and_put_back(name: str) -> None:
    modules = [importlib.import_module(home) for home in HOMES[name]]
    before, instead = getattr(modules[0], name), object()
    with replaced({name: instead}):
        assert all(getattr(module, name) is instead for module in modules)
    assert all(getattr(module, name) is before for module in modules)


def test_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), replaced({"TrainPipelineSparseDist": object()}):
        raise KeyError
    assert torchrec.distributed.TrainPipelineSparseDist is TrainPipelineSparseDist


def test_a_name_that_was_moved_is_an_error_and_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = importlib.import_module("torchrec.distributed.shard")
    monkeypatch.setattr(shard, "get_default_sharders", object())
    with (
        pytest.raises(RuntimeError, match=r"torchrec\.distributed\.shard has another get_default_sharders"),
        replaced({"TrainPipelineSparseDist": object(), "get_default_sharders": object()}),
    ):
        pass
    assert torchrec.distributed.TrainPipelineSparseDist is TrainPipelineSparseDist


def test_stand_ins_are_what_they_stand_in_for() -> None:
    """A script may ask `isinstance`, or make a subclass."""
    config = LaunchConfig(hbm_budget="1MiB")
    for placement in (None, SimpleNamespace()):
        for name, instead in Session(config, placement).replacements().items():  # type: ignore[arg-type]
            original = getattr(importlib.import_module(HOMES[name][0]), name)
            assert instead.__name__ in (name, f"FAE{name}", "get_fae_sharders")
            if isinstance(original, type):
                assert issubclass(instead, original)
    assert list(Session(config, None).replacements()) == ["TrainPipelineSparseDist"], "a stock run is watched and nothing else"
