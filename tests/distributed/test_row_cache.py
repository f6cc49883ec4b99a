"""RowCache without a GPU: in which order it makes streams wait, and which rows it lets go. On one, tests/training/test_pipeline_gpu.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from fae_torchrec.distributed import row_cache
from fae_torchrec.distributed.row_cache import RowCache


class _Stream:
    """A stream that writes down what it is told to wait for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def wait_stream(self, other: _Stream) -> None:
        self._log.append(f"{self._name} waits for stream {other._name}")

    def wait_event(self, event: Any) -> None:
        self._log.append(f"{self._name} waits for use")


class _Kernel(nn.Module):
    """As much of FBGEMM's kernel as a cache is asked about."""

    def __init__(self, *, prefetch_pipeline: bool = True, slots: int = 4) -> None:
        super().__init__()
        self.prefetch_pipeline, self.lxu_cache_weights = prefetch_pipeline, torch.zeros(slots, 2)
        self.prefetch_stream: Any = None
        self.lxu_cache_locking_counter = torch.ones(slots, dtype=torch.int32)
        self.lxu_cache_locations = torch.tensor([0])
        self.lxu_cache_locations_list: list[torch.Tensor] = []
        self.timesteps_prefetched: list[int] = []


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What streams wait for and which cached rows are let go; the current stream is `main` until a test says otherwise."""
    told: list[str] = []
    monkeypatch.setattr(row_cache, "SplitTableBatchedEmbeddingBagsCodegen", _Kernel)
    monkeypatch.setattr(RowCache, "_unlock", staticmethod(lambda kernel, locations: told.append(f"unlock {locations.tolist()}")))
    event = mock.Mock()
    event.record.side_effect = lambda: told.append("use")
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    _current(monkeypatch, _Stream("main", told))
    yield told


def _current(monkeypatch: pytest.MonkeyPatch, stream: _Stream) -> _Stream:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return stream


def test_only_caches_that_are_prefetched_into(log: list[str]) -> None:
    for kernels in ([], [_Kernel(slots=0)], [_Kernel(prefetch_pipeline=False)]):
        cache = RowCache(kernels)
        assert not cache.prefetches
        cache.used(), cache.looked_up(), cache.forget()
    assert RowCache([nn.ModuleList([_Kernel(slots=0), _Kernel()])]).prefetches
    assert log == []


def test_a_prefetch_waits_for_the_forward_and_for_another_pipelines_stream(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel()
    cache = RowCache([kernel])
    cache.looked_up()
    side = _current(monkeypatch, _Stream("side", log))
    cache.before_prefetch()
    assert kernel.prefetch_stream is side
    cache.before_prefetch()
    other = _current(monkeypatch, _Stream("other", log))
    cache.before_prefetch()
    assert kernel.prefetch_stream is other
    assert log == ["use", *["side waits for use"] * 2, "other waits for use", "other waits for stream side"]


def test_a_forward_without_backward_lets_its_rows_go(log: list[str]) -> None:
    cache = RowCache([_Kernel()])
    cache.looked_up()
    assert log == ["use"]
    with torch.no_grad():
        cache.looked_up()
    assert log == ["use", "unlock [0]", "use"]


def test_what_was_prefetched_is_forgotten(log: list[str]) -> None:
    kernel = _Kernel()
    cache = RowCache([kernel])
    kernel.prefetch_stream = _Stream("side", log)
    kernel.lxu_cache_locations_list, kernel.timesteps_prefetched = [torch.tensor([1]), torch.tensor([2, 3])], [7, 8]
    cache.forget()
    assert log == ["main waits for stream side", "unlock [1]", "unlock [2, 3]", "use"]
    assert (kernel.lxu_cache_locations_list, kernel.timesteps_prefetched) == ([], [])
    log.clear()
    cache.forget()
    assert log == ["use"]
