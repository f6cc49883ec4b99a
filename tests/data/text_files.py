"""Awkward text files for the readers' tests, a store behind a URI, and batches taken apart."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from iopath.common.file_io import PathHandler, g_pathmgr
from torchrec.datasets.utils import Batch

BOM = b"\xef\xbb\xbf"


def write_text(folder: Path, content: bytes, name: str = "data.txt") -> Path:
    """Writes a file; one whose name ends in .gz is packed, in two members (as tools that append write it)."""
    path = folder / name
    half = len(content) // 2
    path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]) if name.endswith(".gz") else content)
    return path


def crlf(content: bytes) -> bytes:
    """The same lines with Windows' ends."""
    return content.replace(b"\n", b"\r\n")


class Awkward(NamedTuple):
    """Content made awkward, and what a reader is to say of it.

    Attributes:
        content: bytes of the file.
        says: regular expression of the error; None if the file must be read as if it were not awkward.
    """

    content: bytes
    says: str | None


def awkward_files(content: bytes) -> dict[str, Awkward]:
    """Variants of a well-formed file of at least 3 lines without a header; an error must name the file's line."""
    lines = content.splitlines(keepends=True)
    last = len(lines)
    return {
        "as it is": Awkward(content, None),
        "crlf": Awkward(crlf(content), None),
        "no final newline": Awkward(content.rstrip(b"\n"), None),
        "crlf, no final newline": Awkward(crlf(content).removesuffix(b"\r\n"), None),
        "byte order mark": Awkward(BOM + content, None),
        "truncated last line": Awkward(content[: -len(lines[-1]) * 2 // 3], rf"line {last}: .*last line and has no line end"),
        "blank line": Awkward(b"".join([*lines[:2], b"\n", *lines[2:]]), "line 3: it is blank"),
        "blank last line": Awkward(content + b"\n", rf"line {last + 1}: it is blank"),
        "non-ascii byte": Awkward(b"".join([*lines[:2], b"\xe9" + lines[2][1:], *lines[3:]]), r"line 3: column "),
        "another byte order mark": Awkward(b"".join([*lines[:1], BOM, *lines[1:]]), r"line 2: column "),
        "carriage return": Awkward(b"".join([lines[0], lines[1][:-1], b"\r", *lines[2:]]), r"line 2: .*carriage return"),
        "a field too many": Awkward(b"".join([lines[0], lines[1][:-1], b"\t\n", *lines[2:]]), r"line 2: expected \d+ fields, received \d+"),
        "empty": Awkward(b"", "empty"),
    }  # fmt: skip


def one_hot_samples(batches: Iterable[Batch]) -> list[tuple[float, tuple[float, ...], tuple[int, ...]]]:
    """(label, dense, ids) of every sample of batches in which every bag has one id."""
    samples = []
    for batch in batches:
        kjt = batch.sparse_features
        assert kjt.lengths().tolist() == [1] * (len(kjt.keys()) * kjt.stride())
        ids = kjt.values().view(len(kjt.keys()), -1).T.tolist()
        dense = batch.dense_features.tolist()
        samples += [(y, tuple(x), tuple(i)) for y, x, i in zip(batch.labels.tolist(), dense, ids, strict=True)]
    return samples


def mount(folder: Path, prefix: str) -> None:
    """Shows a folder to iopath as a store: `prefix` + name."""

    class Store(PathHandler):  # type: ignore[misc]
        def _get_supported_prefixes(self) -> list[str]:
            return [prefix]

        def _open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
            return open(folder / path.removeprefix(prefix), mode)

        def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
            return str(folder / path.removeprefix(prefix))

    g_pathmgr.register_handler(Store(), allow_override=True)
