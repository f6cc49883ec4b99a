"""Saved values: whole or not at all, and only what was saved comes back."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fae_torchrec.core.archive import load_archive, save_archive
from fae_torchrec.core.errors import ConfigError, DataError, FingerprintError
from fae_torchrec.core.fingerprint import fingerprint


@dataclass(frozen=True, eq=False)
class _Value:
    note: str
    arrays: dict[str, dict[str, np.ndarray]]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.note, *(array for group in self.arrays.values() for array in group.values()))

    def save(self, path: Path, **changes: Any) -> None:
        said = {"kind": "value", "fingerprint": self.fingerprint, "parent": "0", "fields": {"note": self.note}, "arrays": self.arrays}
        save_archive(path, **{**said, **changes})


def _load(path: Path, kind: str = "value") -> _Value:
    return load_archive(path, kind, lambda fields, arrays: _Value(fields["note"], arrays))


def _value(note: str = "n") -> _Value:
    return _Value(note, {"ids": {"a": np.arange(5, dtype=np.int64), "b": np.array([-3, 2**40])}, "empty": {"c": np.zeros(0, np.int64)}})


def _members(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return dict(archive)


def _edit_metadata(path: Path, **changes: Any) -> None:
    members = _members(path)
    members["metadata"] = np.array(json.dumps({**json.loads(str(members["metadata"])), **changes}))
    np.savez(path, **members)


def test_what_was_saved_comes_back_as_int64(tmp_path: Path) -> None:
    value = _value("näme")
    value.save(tmp_path / "v.npz")
    back = _load(tmp_path / "v.npz")
    assert back.note == "näme" and back.fingerprint == value.fingerprint
    for group, arrays in value.arrays.items():
        for name, array in arrays.items():
            assert back.arrays[group][name].dtype == np.int64
            np.testing.assert_array_equal(back.arrays[group][name], array)


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    _value().save(tmp_path / "v.npz", parent="91bc")
    metadata = json.loads(str(_members(tmp_path / "v.npz")["metadata"]))
    assert metadata["format"] == "fae_torchrec" and metadata["schema"] == 1 and metadata["kind"] == "value"
    assert metadata["fingerprint"] == _value().fingerprint and metadata["parent"] == "91bc"


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 255, "u1"), (9, 256, "u2"), (0, 2**32 - 1, "u4"), (0, 2**63 - 1, "u8"), (-1, 5, "i8"), (-(2**63), 2**63 - 1, "i8")],
)
def test_integers_take_the_bytes_they_need(tmp_path: Path, low: int, high: int, dtype: str) -> None:
    value = _Value("n", {"ids": {"a": np.array([low, high], dtype=np.int64)}})
    value.save(tmp_path / "v.npz")
    assert _members(tmp_path / "v.npz")["ids.0"].dtype == np.dtype(dtype)
    assert _load(tmp_path / "v.npz").arrays["ids"]["a"].tolist() == [low, high]


def test_names_may_be_anything(tmp_path: Path) -> None:
    names = ["file", "a", "a.npy", "a/b", "../x", "", "tab\tle", "ü"]
    value = _Value("n", {"ids": {name: np.array([n]) for n, name in enumerate(names)}})
    value.save(tmp_path / "v.npz")
    back = _load(tmp_path / "v.npz").arrays["ids"]
    assert [(name, int(array[0])) for name, array in back.items()] == [(name, n) for n, name in enumerate(names)]


def test_a_broken_off_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.npz"
    _value("old").save(path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(ConfigError, match="No space left"):
        _value("new").save(path)
    assert os.listdir(tmp_path) == ["v.npz"] and _load(path).note == "old"


def test_a_save_replaces_and_obeys_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    _value("old").save(path)
    _value("new").save(path)
    assert os.listdir(tmp_path) == ["v.npz"] and _load(path).note == "new"
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_relative_path_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _value().save(Path("v.npz"))
    assert _load(Path("v.npz")).note == "n"


def test_a_uri_goes_through_iopath(tmp_path: Path) -> None:
    from iopath.common.file_io import PathHandler, g_pathmgr

    class Store(PathHandler):
        def _get_supported_prefixes(self) -> list[str]:
            return ["store://"]

        def _open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
            return open(tmp_path / path.removeprefix("store://"), mode)

        def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
            return str(tmp_path / path.removeprefix("store://"))

    g_pathmgr.register_handler(Store())
    value = _value()
    save_archive("store://v.npz", "value", value.fingerprint, "0", {"note": "n"}, value.arrays)
    assert load_archive("store://v.npz", "value", lambda fields, arrays: _Value(fields["note"], arrays)).fingerprint == value.fingerprint
    assert os.listdir(tmp_path) == ["v.npz"]


def test_no_such_file_or_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*v\.npz to read a value"):
        _load(tmp_path / "v.npz")
    with pytest.raises(ConfigError, match="no file"):
        _load(tmp_path)
    with pytest.raises(ConfigError, match="cannot write the value"):
        _value().save(tmp_path / "missing" / "v.npz")


def test_other_files_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    for content in (b"", b"not a zip at all", b"PK\x03\x04 nearly"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged or not ours"):
            _load(path)
    np.save(tmp_path / "plain.npy", np.arange(3))
    with pytest.raises(DataError, match="damaged or not ours"):
        _load(tmp_path / "plain.npy")
    np.savez(path, weights=np.arange(3))
    with pytest.raises(DataError, match="damaged or not ours"):
        _load(path)
    for metadata in ("[1]", "{}", "{", '{"format": "other", "schema": 1, "kind": "value"}'):
        np.savez(path, metadata=np.array(metadata))
        with pytest.raises(DataError, match="damaged or not ours"):
            _load(path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", metadata=np.array([{"format": "fae_torchrec"}], dtype=object))
    with pytest.raises(DataError, match="damaged or not ours"):
        _load(tmp_path / "v.npz")


def test_another_kind_or_schema_is_named(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    _value().save(path)
    with pytest.raises(DataError, match="holds a value, not a row placement"):
        _load(path, "row placement")
    _edit_metadata(path, schema=2)
    with pytest.raises(DataError, match="schema 2 received, 1 allowed"):
        _load(path)


def test_missing_parts_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    _value().save(path)
    _edit_metadata(path, fields={})
    with pytest.raises(DataError, match="damaged or not ours"):
        _load(path)
    _value().save(path)
    members = _members(path)
    del members["ids.1"]
    np.savez(path, **members)
    with pytest.raises(DataError, match="damaged or not ours"):
        _load(path)


def test_altered_content_is_not_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    _value().save(path)
    members = _members(path)
    np.savez(path, **members)  # the control: written again unaltered, it still loads
    _load(path)
    members["ids.0"][2] += 1
    np.savez(path, **members)
    with pytest.raises(FingerprintError, match=_value().fingerprint):
        _load(path)


def test_flipped_and_missing_bytes_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    _value().save(path)
    whole = path.read_bytes()
    payload = _payload_positions(whole)
    assert len(payload) > 100
    for position in payload[::3]:
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        with pytest.raises((DataError, FingerprintError)):
            _load(path)
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            _load(path)


def _payload_positions(whole: bytes) -> list[int]:
    """Bytes of the members themselves; between them are zip fields that nobody reads (times, attributes)."""
    with zipfile.ZipFile(BytesIO(whole)) as archive:
        contents = [archive.read(info) for info in archive.infolist()]
    starts = [whole.index(content) for content in contents]
    return [position for start, content in zip(starts, contents, strict=True) for position in range(start, start + len(content))]
