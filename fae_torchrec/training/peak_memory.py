"""PeakMemory: the most memory that each rank's process had resident, and took of its GPU, since a given moment."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Begins to watch when it is made.

    Linux keeps the peak of a process's resident memory and forgets it on request. Where it cannot be forgotten the peak is that of the
    whole process, start-up included.

    Args:
        device: where the model lies.

    Attributes:
        since_made: whether the host's peak is one since this was made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.since_made = True
        try:
            _CLEAR.write_text("5")  # resets the peak, since Linux 4.0
        except OSError:
            self.since_made = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def host_bytes(self) -> int:
        """The peak of this process's resident memory."""
        try:
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        except (OSError, StopIteration):  # no Linux; the unit is KiB on all others that torchrec runs on
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def of_ranks(self, group: dist.ProcessGroup) -> dict[str, Any]:
        """The peaks of all ranks, in rank order; the same on every rank. Collective.

        Returns:
            "host_bytes" (list), "device_bytes" (allocated by torch) and "device_reserved_bytes" (lists, None without a GPU) and
            "since_start_of_training".
        """
        cuda = self._device.type == "cuda"
        mine = (
            self.host_bytes(),
            torch.cuda.max_memory_allocated(self._device) if cuda else None,
            torch.cuda.max_memory_reserved(self._device) if cuda else None,
            self.since_made,
        )
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, mine, group=group)
        host, allocated, reserved, since = (list(values) for values in zip(*everyone, strict=True))
        return {
            "host_bytes": host,
            "device_bytes": allocated if cuda else None,
            "device_reserved_bytes": reserved if cuda else None,
            "since_start_of_training": all(since),
        }
