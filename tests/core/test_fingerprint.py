"""Fingerprints: equal for equal content, different for every difference that matters."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fae_torchrec.core.fingerprint import fingerprint

IDS = np.arange(6, dtype=np.int64)


def test_is_the_sha256_of_dtype_shape_and_bytes() -> None:
    expected = hashlib.sha256(b'{"a":1}\0' + b"<i8(6,)" + IDS.tobytes() + b"\0").hexdigest()[:12]
    assert fingerprint({"a": 1}, IDS) == expected


def test_equal_content_in_another_layout_is_equal() -> None:
    spread = np.zeros(12, dtype=np.int64)
    spread[::2] = IDS
    assert fingerprint(spread[::2]) == fingerprint(IDS)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_every_difference_counts() -> None:
    changed = IDS.copy()
    changed[3] += 1
    names = [
        fingerprint(),
        fingerprint(IDS),
        fingerprint(changed),
        fingerprint(IDS.astype(np.int32)),
        fingerprint(IDS.reshape(2, 3)),
        fingerprint(IDS.reshape(3, 2)),
        fingerprint(IDS[:2], IDS[2:]),
        fingerprint(IDS[:3], IDS[3:]),
        fingerprint(IDS[3:], IDS[:3]),
        fingerprint(IDS.tolist()),
        fingerprint("a", "b"),
        fingerprint("b", "a"),
        fingerprint("ab"),
        fingerprint(["a", "b"]),
        fingerprint(1),
        fingerprint("1"),
    ]
    assert len(set(names)) == len(names)
    assert all(len(name) == 12 and set(name) <= set("0123456789abcdef") for name in names)


def test_what_has_no_content_of_its_own_is_refused() -> None:
    with pytest.raises(TypeError):
        fingerprint(object())
