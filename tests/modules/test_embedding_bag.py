"""FAEEmbeddingBagCollection gives what the stock EmbeddingBagCollection gives, trains as it does, and saves as it does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from fae_torchrec.core.errors import FingerprintError
from fae_torchrec.modules.embedding_bag import FAEEmbeddingBagCollection
from fae_torchrec.modules.model_tables import model_tables
from tests.modules.small_tables import ALL_COLD, ALL_HOT, HOT, batch, collection, configs, placed, random_bags

PLACEMENTS = {"split": HOT, "all hot": ALL_HOT, "all cold": ALL_COLD}
POOLINGS = {"sum": (PoolingType.SUM, False), "mean": (PoolingType.MEAN, False), "weighted": (PoolingType.SUM, True)}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}


def stock(pooling: str = "sum", seed: int = 1) -> EmbeddingBagCollection:
    torch.manual_seed(seed)
    kind, weighted = POOLINGS[pooling]
    return collection(configs(kind), weighted=weighted)


def ours(ebc: EmbeddingBagCollection, hot: Mapping[str, list[int]] = HOT) -> FAEEmbeddingBagCollection:
    return FAEEmbeddingBagCollection(ebc, placed(model_tables(ebc), hot))


def new_batch(step: int, *, weighted: bool, size: int = 5) -> KeyedJaggedTensor:
    rng = np.random.default_rng(step)
    kjt = batch(random_bags(rng, size))
    weights = torch.from_numpy(rng.random(kjt.values().numel(), dtype=np.float32)) if weighted else None
    return KeyedJaggedTensor(kjt.keys(), kjt.values(), weights, lengths=kjt.lengths())


def loss(module: EmbeddingBagCollection | FAEEmbeddingBagCollection, kjt: KeyedJaggedTensor) -> torch.Tensor:
    """Another gradient for every output column and sample."""
    pooled = module(kjt).to_dict()
    return sum(
        ((i + 1) * pooled[name].square() * torch.arange(1, 1 + kjt.stride()).unsqueeze(1)).sum() for i, name in enumerate(sorted(pooled))
    )


@pytest.mark.parametrize("hot", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_forward_equals_stock(pooling: str, hot: Mapping[str, list[int]]) -> None:
    plain = stock(pooling)
    module = ours(plain, hot)
    for step, size in enumerate((5, 2, 1)):
        kjt = new_batch(step, weighted=plain.is_weighted(), size=size)
        expected, given = plain(kjt), module(kjt)
        assert sorted(given.keys()) == sorted(expected.keys()) == ["a", "b", "c@big", "c@other", "d"]
        torch.testing.assert_close(given.to_dict(), {key: expected[key] for key in given.keys()})  # noqa: SIM118 (a KeyedTensor)
    assert module.is_weighted() == plain.is_weighted()
    assert module.embedding_bag_configs() == plain.embedding_bag_configs()
    assert module.device == plain.device


@pytest.mark.parametrize("hot", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_equals_stock(optimizer: str, pooling: str, hot: Mapping[str, list[int]]) -> None:
    plain = stock(pooling)
    start = {key: value.clone() for key, value in plain.state_dict().items()}
    module = ours(plain, hot)
    for model in (plain, module):
        steps = OPTIMIZERS[optimizer](model.parameters(), lr=0.01)
        for step in range(8):
            steps.zero_grad()
            loss(model, new_batch(step, weighted=plain.is_weighted())).backward()
            steps.step()
    trained = plain.state_dict()
    torch.testing.assert_close(dict(module.state_dict()), dict(trained), rtol=1e-5, atol=1e-6)
    for key, value in start.items():
        assert not torch.allclose(trained[key], value, rtol=1e-2), f"control: {key} was trained"


@pytest.mark.parametrize("hot", PLACEMENTS.values(), ids=PLACEMENTS)
def test_state_dict_is_the_stock_one_both_ways(hot: Mapping[str, list[int]]) -> None:
    plain, other = stock(seed=1), stock(seed=2)
    module = ours(plain, hot)

    def same(ebc: EmbeddingBagCollection) -> None:
        given, expected = module.state_dict(), ebc.state_dict()
        assert list(given) == list(expected), "keys, in the same order"
        assert all(torch.equal(given[key], expected[key]) for key in expected)

    same(plain)
    result = module.load_state_dict(other.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    same(other)
    back = stock(seed=3)
    back.load_state_dict(module.state_dict())
    same(back)
    kjt = new_batch(0, weighted=False)
    assert torch.allclose(module(kjt)["c@big"], other(kjt)["c@big"]), "what was loaded is what is looked up"


def test_state_dict_inside_a_model() -> None:
    plain = stock()
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(1, 1), "sparse": ours(plain)})
    assert set(model.state_dict()) == {"first.weight", "first.bias", *(f"sparse.{key}" for key in plain.state_dict())}
    zeros = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(zeros)
    assert all(not value.any() for value in model.state_dict().values())
    assert not any(parameter.any() for parameter in model.parameters()), "both tiers, not the homes alone"


@pytest.mark.parametrize("hot", PLACEMENTS.values(), ids=PLACEMENTS)
def test_another_state_is_an_error(hot: Mapping[str, list[int]]) -> None:
    module = ours(stock(), hot)
    for table, change in (("tiny", 2), ("tiny", -1), ("big", 2), ("big", -3)):
        state = stock().state_dict()
        rows = state[f"embedding_bags.{table}.weight"]
        state[f"embedding_bags.{table}.weight"] = torch.zeros(len(rows) + change, rows.shape[1])
        with pytest.raises(RuntimeError, match=f"(?s)size mismatch.*{table}"):
            module.load_state_dict(state)
    state = stock().state_dict()
    del state["embedding_bags.big.weight"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*big"):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*embedding_bags.made_up.weight"):
        module.load_state_dict({**stock().state_dict(), "embedding_bags.made_up.weight": torch.zeros(1)})


def test_a_collection_on_the_meta_device_starts_from_a_state_dict() -> None:
    plain, unmade = stock(), collection(configs(), device="meta")
    module = FAEEmbeddingBagCollection(unmade, placed(model_tables(unmade)), torch.device("cpu"), torch.device("cpu"))
    module.load_state_dict(plain.state_dict())
    kjt = new_batch(0, weighted=False)
    torch.testing.assert_close(module(kjt)["b"], plain(kjt)["b"])


def test_the_placement_must_hold_the_tables() -> None:
    tables = configs()
    placement = placed(model_tables(collection(tables)))
    part = collection(tables[1:3])  # a placement may hold the tables of more than one collection
    assert list(FAEEmbeddingBagCollection(part, placement).state_dict()) == list(part.state_dict())
    new = EmbeddingBagConfig(name="new", num_embeddings=3, embedding_dim=2, feature_names=["n"])
    with pytest.raises(FingerprintError, match="first difference: saved no table, given table 'new' with 3 rows"):
        FAEEmbeddingBagCollection(collection([*tables, new]), placement)
    grown = configs()
    grown[0].num_embeddings += 1
    with pytest.raises(
        FingerprintError, match=f"row placement {placement.fingerprint} .* saved table 'big' with 12 rows.* given table 'big' with 13"
    ):
        FAEEmbeddingBagCollection(collection(grown), placement)
