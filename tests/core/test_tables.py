"""Tables as sizes: bytes by hand, names that decide where a row is, and the check of a saved value's tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fae_torchrec.core.errors import ConfigError, FingerprintError
from fae_torchrec.core.tables import Optimizer, TableSet, TableSpec

USER = TableSpec("user", 1000, 16, ("u", "friend"))
ITEM = TableSpec("item", 50, 8, ("i", "u"), dtype="fp16", optimizer=Optimizer.ADAM)
TABLES = TableSet((USER, ITEM))


@pytest.mark.parametrize(
    ("optimizer", "dtype", "expected"),
    [
        (Optimizer.SGD, "fp32", 16 * 4),
        (Optimizer.SGD, "bf16", 16 * 2),
        (Optimizer.ROWWISE_ADAGRAD, "fp32", 16 * 4 + 4),
        (Optimizer.ADAGRAD, "fp32", 16 * 4 + 16 * 4),
        (Optimizer.ADAGRAD, "fp16", 16 * 2 + 16 * 4),
        (Optimizer.ADAM, "fp32", 16 * 4 + 2 * 16 * 4),
    ],
)
def test_row_bytes_are_weights_and_state(optimizer: Optimizer, dtype: str, expected: int) -> None:
    table = replace(USER, optimizer=optimizer, dtype=dtype)
    assert table.row_bytes == expected
    assert table.total_bytes == 1000 * expected


def test_a_set_sums_its_tables_and_finds_them_by_name() -> None:
    assert TABLES.total_bytes == 1000 * (16 * 4 + 4) + 50 * (8 * 2 + 2 * 8 * 4)
    assert TABLES.names == ("user", "item") and len(TABLES) == 2 and TABLES["item"] is ITEM and list(TABLES) == [USER, ITEM]
    assert TABLES.lookups == (("user", "u"), ("user", "friend"), ("item", "i"), ("item", "u"))


@pytest.mark.parametrize("change", [{"rows": 0}, {"dim": 0}, {"dtype": "fp8"}, {"feature_names": ()}])
def test_impossible_tables_are_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="'user'"):
        replace(USER, **change)


def test_repeated_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\['user'\]"):
        TableSet((USER, ITEM, USER))


@pytest.mark.parametrize("change", [{"dim": 32}, {"dtype": "bf16"}, {"optimizer": Optimizer.SGD}])
def test_fingerprint_ignores_what_does_not_move_a_row(change: dict[str, object]) -> None:
    other = TableSet((replace(USER, **change), ITEM))
    assert other.fingerprint == TABLES.fingerprint
    TABLES.check_same(other, "a placement")


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (TableSet((replace(USER, rows=999), ITEM)), "saved table 'user' with 1000 rows .*given table 'user' with 999 rows"),
        (TableSet((replace(USER, name="users"), ITEM)), "given table 'users'"),
        (TableSet((replace(USER, feature_names=("u",)), ITEM)), r"given table 'user' with 1000 rows and features \['u'\]"),
        (TableSet((ITEM, USER)), "saved table 'user'.*given table 'item'"),
        (TableSet((USER,)), "saved table 'item'.*given no table"),
        (TableSet((USER, ITEM, replace(ITEM, name="extra"))), "saved no table, given table 'extra'"),
    ],
)
def test_other_tables_are_told_apart(other: TableSet, difference: str) -> None:
    assert other.fingerprint != TABLES.fingerprint
    with pytest.raises(FingerprintError, match=difference) as caught:
        TABLES.check_same(other, "row placement 3f2a")
    assert all(part in str(caught.value) for part in ("row placement 3f2a", TABLES.fingerprint, other.fingerprint))


def test_json_brings_everything_back() -> None:
    back = TableSet.from_json(json.loads(json.dumps(TABLES.to_json())))
    assert back == TABLES and back.total_bytes == TABLES.total_bytes
