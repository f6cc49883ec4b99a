"""The malformed lines that several readers of one source skipped, added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fae_torchrec.core.errors import DataError


@dataclass(frozen=True)
class SkippedLines:
    """Malformed lines of one source, by file.

    Attributes:
        known: lines that the source had skipped before, in an earlier pass over all its data: every reader knows the same ones.
        new: lines that were met since, in the shards that were read: every reader has its own.
        allowed: lines that all readers together may skip; None if the source sees to that by itself.
    """

    known: Mapping[str, int] = field(default_factory=dict)
    new: Mapping[str, int] = field(default_factory=dict)
    allowed: int | None = None

    @classmethod
    def since(cls, known: Mapping[str, int], now: Mapping[str, int], allowed: int | None) -> SkippedLines:
        """What one reader skipped, from its source's counts before and after."""
        return cls(dict(known), dict(Counter(now) - Counter(known)), allowed)

    def plus(self, other: SkippedLines) -> SkippedLines:
        """What both skipped; they read different shards of the same source."""
        allowed = other.allowed if self.allowed is None else self.allowed
        return SkippedLines(dict(Counter(self.known) | Counter(other.known)), dict(Counter(self.new) + Counter(other.new)), allowed)

    def by_file(self) -> dict[str, int]:
        """File -> lines skipped, for files that had some.

        Raises:
            DataError: they are more than allowed. One reader stops at the allowance; the sum of several may exceed it.
        """
        lines = Counter(self.known) + Counter(self.new)
        if self.allowed is not None and lines.total() > self.allowed:
            raise DataError(
                f"{lines.total()} malformed lines were skipped by all workers ({dict(lines)}), {self.allowed} are allowed; correct or "
                "remove them, or raise max_bad_lines"
            )
        return dict(lines)
