"""A file that is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(content: str | bytes, path: Path) -> Path:
    """Writes a file under a temporary name and renames it; text as UTF-8.

    Args:
        content: what it holds.
        path: where to; its folder is made if it is missing, an existing file is replaced.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(draft, path)
    return path
