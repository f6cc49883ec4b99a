"""The report of a run, rendered from one plain dictionary and written so that report.json is there only if all of it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fae_torchrec.training.report_markdown import markdown_report
from fae_torchrec.training.report_page import html_report
from fae_torchrec.training.report_table import text_table
from fae_torchrec.training.whole_file import write_whole

__all__ = ["html_report", "markdown_report", "text_table", "write_json", "write_report"]


def write_report(report: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path, Path]:
    """Writes report.html and report.md, then report.json, each under a temporary name first.

    Args:
        report: the report; numbers that are not finite are written as null.
        folder: where to; made if it is missing.

    Returns:
        The paths of report.json, report.html and report.md.
    """
    finite = _finite(report)
    texts = html_report(finite), markdown_report(finite)
    page, markdown = (write_whole(text, Path(folder, name)) for text, name in zip(texts, ("report.html", "report.md"), strict=True))
    return write_json(report, Path(folder, "report.json")), page, markdown


def write_json(values: Mapping[str, Any], path: Path) -> Path:
    """Writes plain values as JSON, whole or not at all; numbers that are not finite become null."""
    return write_whole(json.dumps(_finite(values), indent=1, allow_nan=False) + "\n", path)


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: text keys, and null for every number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
