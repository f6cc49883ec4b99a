"""Short, stable names for values: what a saved value is called by its children."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

_DIGITS = 12


def fingerprint(*parts: Any) -> str:
    """Names a value by its content.

    Args:
        *parts: numpy arrays (hashed with dtype and shape) or values that JSON can write; order counts.

    Returns:
        The first 12 hex digits of the SHA-256 of the parts. Equal on every machine of the same byte order.

    Raises:
        TypeError: a part is neither an array nor JSON-serialisable.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(json.dumps(part, sort_keys=True, separators=(",", ":")).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:_DIGITS]
