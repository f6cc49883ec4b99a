"""Saved values: one .npz that says what it holds and proves it on the way back."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any, Protocol, TypeVar

import numpy as np
from iopath.common.file_io import g_pathmgr

from fae_torchrec.core.errors import ConfigError, DataError, FAEError, FingerprintError

_FORMAT = "fae_torchrec"
_SCHEMA = 1

Fields = dict[str, Any]
"""Plain values that JSON can write, by name."""
Arrays = dict[str, dict[str, np.ndarray]]
"""Groups of int64 arrays: group -> name (a table, a feature) -> array."""


class _Saved(Protocol):
    @property
    def fingerprint(self) -> str: ...


_T = TypeVar("_T", bound=_Saved)


def save_archive(
    path: str | os.PathLike[str], kind: str, fingerprint: str, parent: str, fields: Fields, arrays: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Writes a value to one .npz file, whole or not at all.

    A local file is written under a temporary name in the same folder and renamed. A URI ("s3://...") is written through iopath's
    `g_pathmgr`, where the caller registers its handlers. Integers are stored in the narrowest type that holds them (sampled counts
    of 266 M rows mostly take one or two bytes, not eight), one array at a time: extra memory is one narrowed array.

    Args:
        path: where to; an existing file is replaced.
        kind: what the value is, in words; `load_archive` demands the same.
        fingerprint: the value's own.
        parent: the fingerprint of the value that it was made from.
        fields: its plain values.
        arrays: its int64 arrays in groups. Names are free text: they are kept in the metadata, not as names in the zip.

    Raises:
        ConfigError: the file cannot be written (no such folder, no permission).
    """
    metadata = {
        "format": _FORMAT, "schema": _SCHEMA, "kind": kind, "fingerprint": fingerprint, "parent": parent, "fields": fields,
        "arrays": {group: list(named) for group, named in arrays.items()},
    }  # fmt: skip
    members = {f"{group}.{n}": array for group, named in arrays.items() for n, array in enumerate(named.values())}

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in {"metadata": np.array(json.dumps(metadata)), **members}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, _narrowed(array), allow_pickle=False)

    try:
        _write_whole(os.fspath(path), write)
    except OSError as error:
        raise ConfigError(f"cannot write the {kind} to {path}: {error}; give a path in a folder that exists and is writable") from error


def load_archive(path: str | os.PathLike[str], kind: str, build: Callable[[Fields, Arrays], _T]) -> _T:
    """Reads what `save_archive` wrote.

    Args:
        path: a local file, or a URI that iopath's `g_pathmgr` knows.
        kind: what the file must hold.
        build: makes the value from its fields and int64 arrays.

    Returns:
        The value, its content proved by its fingerprint.

    Raises:
        ConfigError: there is no such file.
        DataError: the file is damaged, is not ours, is of another schema, or holds another kind of value.
        FingerprintError: the content is not what was saved.
    """
    try:
        with open(g_pathmgr.get_local_path(os.fspath(path)), "rb") as file, np.load(file, allow_pickle=False) as members:
            metadata = json.loads(str(members["metadata"]))
            if metadata["format"] != _FORMAT:
                raise KeyError(_FORMAT)
            _check_kind(path, metadata, kind)
            arrays = {
                group: {name: members[f"{group}.{n}"].astype(np.int64) for n, name in enumerate(names)}
                for group, names in metadata["arrays"].items()
            }
        value = build(metadata["fields"], arrays)
        stored, actual = metadata["fingerprint"], value.fingerprint
    except FAEError as error:
        raise type(error)(f"{path}: {error}") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"there is no file {path} to read a {kind} from; make one, or correct the path") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or not ours ({error!r}); it should hold a {kind}: make it again") from error
    if stored != actual:
        raise FingerprintError(f"{path}: the {kind} was saved as {stored}, but its content is {actual}: it was altered; make it again")
    return value


def _check_kind(path: str | os.PathLike[str], metadata: Fields, kind: str) -> None:
    if metadata["schema"] != _SCHEMA:
        raise DataError(f"schema {metadata['schema']} received, {_SCHEMA} allowed: written by another version; make it again with this one")
    if metadata["kind"] != kind:
        raise DataError(f"holds a {metadata['kind']}, not a {kind}; pass the file of the {kind}")


def _narrowed(array: np.ndarray) -> np.ndarray:
    """The same values in the narrowest unsigned type, if they are int64 and none is negative (ids, counts and lengths never are)."""
    if array.dtype != np.int64 or not array.size or int(array.min()) < 0:
        return array
    return array.astype(np.min_scalar_type(int(array.max())))


def _write_whole(path: str, write: Callable[[IO[bytes]], None]) -> None:
    if "://" in path:  # an object store shows a file only when it is closed, and has no rename
        with g_pathmgr.open(path, "wb") as file:
            write(file)
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
