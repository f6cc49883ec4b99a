"""A model of somebody else's: its factory found, what it made checked, and tried on a few samples."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedTensor

from fae_torchrec.core.errors import ConfigError, DataError
from fae_torchrec.core.tables import Optimizer
from fae_torchrec.modules.model_tables import model_tables
from fae_torchrec.training.model_factory import load_factory
from fae_torchrec.training.model_spec import ModelSpec, build_model
from fae_torchrec.training.model_trial import try_model
from tests.training.small_run import Samples

ROWS = {"a": 6, "b": 300, "c": 120, "d": 60}  # of Samples
SPEC = ModelSpec(ROWS, num_dense=3, embedding_dim=8, options={"hidden": 5})
SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn

@dataclass(frozen=True)
class Widths:
    hidden: int = 3

def build(spec):
    return (Widths, spec)

def broken(spec):
    return spec.rows["nowhere"]
"""


class Summed(nn.Module):
    """The logit is a layer over the dense features, plus the sum of all rows of a sample, which `wrong` spoils."""

    def __init__(self, spec: ModelSpec, wrong: Callable[..., Any] | None = None) -> None:
        super().__init__()
        tables = [
            EmbeddingConfig(name=f"t_{name}", num_embeddings=count, embedding_dim=8, feature_names=[name])
            for name, count in spec.rows.items()
        ]
        self.collection = EmbeddingCollection(tables=tables, device=spec.device)
        self.over = nn.Sequential(nn.Linear(spec.num_dense, spec.options["hidden"]), nn.Linear(spec.options["hidden"], 1))
        self.wrong = wrong

    def forward(self, batch: Batch) -> Any:
        logits = self.over(batch.dense_features).squeeze(1)
        for rows in self.collection(batch.sparse_features).values():
            samples = torch.arange(logits.numel()).repeat_interleave(rows.lengths().long())
            logits = logits.index_add(0, samples, rows.values().sum(1))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        given = loss, (loss.detach(), logits.detach(), batch.labels)
        return given if self.wrong is None else self.wrong(*given)


def _build(factory: Callable[[ModelSpec], Any] = Summed, spec: ModelSpec = SPEC) -> nn.Module:
    return build_model(factory, spec, Optimizer.ROWWISE_ADAGRAD, 0.25, seed=3)


def test_seed_before_and_mark_after() -> None:
    torch.manual_seed(9)
    first = _build().state_dict()
    torch.rand(3)
    model = _build()
    assert all(torch.equal(first[key], value) for key, value in model.state_dict().items())
    tables = model_tables(model)
    assert [(table.name, table.rows, table.dim, table.optimizer, table.pooled) for table in tables] == [
        (f"t_{name}", rows, 8, Optimizer.ROWWISE_ADAGRAD, False) for name, rows in ROWS.items()
    ]
    for name, parameter in model.named_parameters():
        assert getattr(parameter, "_optimizer_kwargs", None) == (None if "over" in name else [{"lr": 0.25}])


def test_a_factory_of_a_file_and_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    widths, spec = load_factory(f"{path}:build")(SPEC)  # type: ignore[misc]
    assert spec is SPEC and widths() == widths(3) and load_factory(f"{path}:build") is load_factory(f"{path}:build")
    assert sys.modules[widths.__module__].Widths is widths
    path.write_text(SOURCE.replace("hidden: int = 3", "hidden: int = 4"))
    assert load_factory(f"{path}:build")(SPEC)[0]().hidden == 4, "the file has changed"  # type: ignore[index]
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_factory("mine:build")(SPEC)[1] is SPEC  # type: ignore[index]
    assert load_factory("fae_torchrec.training.dlrm:dlrm").__name__ == "dlrm"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere.py:build", r"no such file .*nowhere\.py; give path/to/file\.py:function"),
        ("mine.py:bulid", r"has no function 'bulid'; did you mean 'build'\? It has \['Widths', 'broken', 'build'\]"),
        ("no_such_package.models:build", "no module 'no_such_package' could be imported; .*PYTHONPATH"),
        ("fails.py:build", r"could not be imported with ZeroDivisionError: division by zero \(fails\.py, line 2\)"),
    ],
)
def test_factories_that_are_not_there(name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SOURCE)
    Path("fails.py").write_text("\n1 / 0\n")
    with pytest.raises(ConfigError, match=told):
        load_factory(name)
    assert not [module for module in sys.modules if module.startswith("fae_model_fails")], "half a module is not kept"


def test_the_page_s_model_trains(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "comparing.md").read_text().partition("## A model of your own")[2]
    path = tmp_path / "my_model.py"
    path.write_text(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0])
    spec = ModelSpec(ROWS, 3, 8, options={"hidden": [5, 4]})
    model = build_model(load_factory(f"{path}:build"), spec, Optimizer.SGD, 0.1, seed=0)
    assert try_model(model, next(Samples(9).batches(9))) == (3 + 4 * 8) * 5 + 5 * 4 + 4


def _marked(spec: ModelSpec) -> nn.Module:
    model = Summed(spec)
    apply_optimizer_in_backward(RowWiseAdagrad, model.collection.parameters(), {"lr": 1.0})
    return model


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (lambda spec: nn.Linear(3, 1), "without embedding tables; at least one EmbeddingBagCollection"),
        (lambda spec: "a model", "it returned str; a torch.nn.Module is needed"),
        (lambda spec: spec.rows["nowhere"], r"it failed with KeyError: 'nowhere' \(test_model_factory\.py, line \d+\)"),
        (lambda spec: Summed(ModelSpec({**ROWS, "e": 3}, 3, 8, options=SPEC.options)), r"for the features \['e'\], which the data lack"),
        (lambda spec: Summed(ModelSpec({"b": 299}, 3, 8, options=SPEC.options)), "'t_b' has 299 rows, .* need 300"),
        (_marked, "'t_a' has a fused optimizer already"),
    ],
)
def test_models_that_cannot_be_trained(factory: Callable[[ModelSpec], Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _build(factory)


def test_tables_must_lie_where_they_are_asked_for() -> None:
    meta = ModelSpec(ROWS, 3, 8, options=SPEC.options, device=torch.device("meta"))
    assert {weight.device.type for weight in _build(spec=meta).collection.parameters()} == {"meta"}
    with pytest.raises(ConfigError, match=r"lies on 'cpu', asked was 'meta'; give the collection device=spec\.device"):
        _build(lambda spec: Summed(SPEC), meta)


def test_a_trial_counts_multiplications_and_needs_one_row_a_table() -> None:
    batch = next(Samples(7).batches(7))
    small = ModelSpec(dict.fromkeys(ROWS, 1), 3, 8, options=SPEC.options)
    assert try_model(_build(spec=small), batch) == 3 * 5 + 5, "of the two layers"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda loss, outputs: loss, r"gave a tensor \[\]; it must give \(loss, \(loss, logits, labels\)\)"),
        (lambda loss, outputs: (loss, outputs[1:]), r"gave \(a tensor \[\], \(.*\)\)"),
        (lambda loss, outputs: (loss.detach(), outputs), r"gave \(a tensor \[\] without gradient, "),
        (lambda loss, outputs: (loss, (loss, outputs[1].unsqueeze(1), outputs[2])), r"a tensor \[7, 1\].*of shape \[7\]"),
        (lambda loss, outputs: (loss, (loss, outputs[1], 5)), "int"),
        (lambda loss, outputs: outputs[9], "its forward failed on 7 samples with IndexError: .*line"),
    ],
)
def test_outputs_of_another_shape(wrong: Callable[..., Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        try_model(_build(lambda spec: Summed(spec, wrong)), next(Samples(7).batches(7)))


class Pooled(nn.Module):
    """A layer over what the bags give, as `joined` puts it together from the KeyedTensor; with a dropout, which is random."""

    def __init__(self, joined: Callable[[KeyedTensor], torch.Tensor]) -> None:
        super().__init__()
        tables = [EmbeddingBagConfig(name=f"t_{name}", num_embeddings=1, embedding_dim=8, feature_names=[name]) for name in ROWS]
        self.bags, self.joined = EmbeddingBagCollection(tables=tables), joined
        self.over = nn.Sequential(nn.Dropout(0.5), nn.Linear(8 * len(ROWS), 1))

    def forward(self, batch: Batch) -> Any:
        logits = self.over(self.joined(self.bags(batch.sparse_features))).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels)


def test_a_model_must_take_features_by_name() -> None:
    batch = next(Samples(7).batches(7))
    torch.manual_seed(1)
    try_model(Pooled(lambda pooled: torch.cat([pooled[name] for name in ROWS], dim=1)), batch)
    for joined in (KeyedTensor.values, lambda pooled: torch.cat(list(pooled.to_dict().values()), dim=1)):
        with pytest.raises(ConfigError, match="depend on the order in which a collection gives its features"):
            try_model(Pooled(joined), batch)
    unsteady = Pooled(lambda pooled: pooled.values() * next(numbers))
    numbers = iter(range(9))
    try_model(unsteady, batch)  # nothing can be told of it


def test_an_unpooled_model_must_too() -> None:
    class Firsts(Summed):
        def forward(self, batch: Batch) -> Any:
            given = super().forward(batch)
            (first, *_) = self.collection(batch.sparse_features).values()
            return given[0], (given[1][0], given[1][1] + first.values().sum().detach(), given[1][2])

    with pytest.raises(ConfigError, match="depend on the order"):
        try_model(_build(Firsts), next(Samples(7).batches(7)))


def test_an_error_of_ours_stays_as_it_is() -> None:
    def refuses(*_: Any) -> Any:
        raise DataError("no such thing")

    with pytest.raises(DataError, match=r"^no such thing$"):
        try_model(_build(lambda spec: Summed(spec, refuses)), next(Samples(7).batches(7)))
