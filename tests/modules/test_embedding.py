"""FAEEmbeddingCollection gives what the stock EmbeddingCollection gives, trains as it does, and saves as it does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import ConfigError, FingerprintError
from fae_torchrec.modules.embedding import FAEEmbeddingCollection
from fae_torchrec.modules.model_tables import model_tables
from tests.modules.small_tables import ALL_COLD, ALL_HOT, HOT, batch, placed, random_bags
from tests.modules.test_sequence_split import sequence_configs

PLACEMENTS = {"split": HOT, "all hot": ALL_HOT, "all cold": ALL_COLD}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
NAMES = ["b", "c@big", "a", "d", "c@other"]


def stock(seed: int = 1, *, fp16: tuple[str, ...] = ()) -> EmbeddingCollection:
    torch.manual_seed(seed)
    tables = sequence_configs()
    for table in tables:
        table.data_type = DataType.FP16 if table.name in fp16 else DataType.FP32
    return EmbeddingCollection(tables)


def ours(ec: EmbeddingCollection, hot: Mapping[str, list[int]] = HOT) -> FAEEmbeddingCollection:
    return FAEEmbeddingCollection(ec, placed(model_tables(ec), hot))


def new_batch(step: int, size: int = 5) -> KeyedJaggedTensor:
    return batch(random_bags(np.random.default_rng(step), size))


def loss(module: EmbeddingCollection | FAEEmbeddingCollection, kjt: KeyedJaggedTensor) -> torch.Tensor:
    """Another gradient for every id and column of the output."""
    rows = module(kjt)
    return sum(
        ((i + 1) * rows[name].values().square() * torch.arange(1, 1 + rows[name].values().numel()).view(-1, 3)).sum()
        for i, name in enumerate(NAMES)
    )


@pytest.mark.parametrize("fp16", [(), ("other",), ("big", "tiny", "frozen", "other")], ids=["fp32", "mixed", "fp16"])
@pytest.mark.parametrize("hot", PLACEMENTS.values(), ids=PLACEMENTS)
def test_forward_equals_stock(hot: Mapping[str, list[int]], fp16: tuple[str, ...]) -> None:
    plain = stock(fp16=fp16)
    module = ours(plain, hot)
    for step, size in enumerate((5, 2, 1)):
        expected, given = plain(new_batch(step, size)), module(new_batch(step, size))
        assert list(given) == list(expected) == NAMES
        for name, rows in given.items():
            assert torch.equal(rows.values(), expected[name].values())
            assert torch.equal(rows.lengths(), expected[name].lengths())
            assert rows.weights_or_none() is None
    assert module.embedding_configs() == plain.embedding_configs()
    assert module.embedding_names_by_table() == plain.embedding_names_by_table()
    assert module.embedding_dim() == plain.embedding_dim()
    assert module.need_indices() == plain.need_indices()
    assert module.device == plain.device


@pytest.mark.parametrize("hot", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_equals_stock(optimizer: str, hot: Mapping[str, list[int]]) -> None:
    plain = stock()
    start = {key: value.clone() for key, value in plain.state_dict().items()}
    module = ours(plain, hot)
    for model in (plain, module):
        steps = OPTIMIZERS[optimizer](model.parameters(), lr=0.001)
        for step in range(8):
            steps.zero_grad()
            loss(model, new_batch(step)).backward()
            steps.step()
    trained = plain.state_dict()
    torch.testing.assert_close(dict(module.state_dict()), dict(trained), rtol=1e-5, atol=1e-6)
    for key, value in start.items():
        assert not torch.allclose(trained[key], value, rtol=1e-3), f"control: {key} was trained"


@pytest.mark.parametrize("hot", PLACEMENTS.values(), ids=PLACEMENTS)
def test_state_dict_is_the_stock_one_both_ways(hot: Mapping[str, list[int]]) -> None:
    plain, other = stock(seed=1), stock(seed=2)
    module = ours(plain, hot)

    def same(ec: EmbeddingCollection) -> None:
        given, expected = module.state_dict(), ec.state_dict()
        assert list(given) == list(expected), "keys, in the same order"
        assert all(torch.equal(given[key], expected[key]) for key in expected)

    same(plain)
    result = module.load_state_dict(other.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    same(other)
    back = stock(seed=3)
    back.load_state_dict(module.state_dict())
    same(back)
    assert torch.equal(module(new_batch(0))["c@big"].values(), other(new_batch(0))["c@big"].values()), "it is what is looked up"


def test_another_state_is_an_error() -> None:
    module = ours(stock())
    state = stock().state_dict()
    state["embeddings.big.weight"] = state["embeddings.big.weight"][:-1]
    with pytest.raises(RuntimeError, match=r"(?s)size mismatch.*big"):
        module.load_state_dict(state)
    del state["embeddings.big.weight"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*big"):
        module.load_state_dict(state)


def test_the_placement_must_hold_the_tables() -> None:
    placement = placed(model_tables(stock()))
    grown = sequence_configs()
    grown[0].num_embeddings += 1
    with pytest.raises(FingerprintError, match=r"saved table 'big' with 12 rows.* given table 'big' with 13"):
        FAEEmbeddingCollection(EmbeddingCollection(grown), placement)


def test_indices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'big'.*has need_indices=True.*make it with need_indices=False"):
        ours(EmbeddingCollection(sequence_configs(), need_indices=True))
