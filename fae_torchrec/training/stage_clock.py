"""Where the host's time of a training step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class StageClock:
    """Adds up the seconds of stages. Stages may lie in one another: time belongs to the innermost one alone.

    Args:
        stages: their names.

    Attributes:
        seconds: by stage, so far.
    """

    def __init__(self, stages: Sequence[str]) -> None:
        self.seconds = dict.fromkeys(stages, 0.0)
        self._stage: str | None = None
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str | None) -> Iterator[None]:
        """Within the `with` block, time belongs to `stage`; with None to nobody."""
        outer = self._switch(stage)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, stage: str | None) -> str | None:
        now = time.perf_counter()
        if self._stage is not None:
            self.seconds[self._stage] += now - self._since
        outer, self._stage, self._since = self._stage, stage, now
        return outer
