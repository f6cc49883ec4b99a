"""TorchRec's Topology of given hardware, or of the machine that this process runs on."""

from __future__ import annotations

import torch
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner import Topology

from fae_torchrec.core.hardware import Hardware
from fae_torchrec.distributed.input_error import input_error


def hardware_topology(hardware: Hardware, ranks: int) -> Topology:
    """A topology that nobody needs to have.

    Args:
        hardware: one rank's share of a machine. Its rates, bytes/s as training reaches them, become TorchRec's bandwidths in bytes/ms.
        ranks: at least 1. A host has as many as the hardware says, or the largest number below that divides the ranks: TorchRec wants
            hosts of one size.

    Raises:
        PlannerError: fewer than 1 rank.
    """
    if ranks < 1:
        raise input_error(f"ranks: received {ranks}; give at least 1")
    local = max(number for number in range(1, min(hardware.ranks_per_host, ranks) + 1) if ranks % number == 0)
    return Topology(
        world_size=ranks,
        local_world_size=local,
        compute_device=hardware.device,
        hbm_cap=hardware.fast_bytes if hardware.device == "cuda" else None,
        ddr_cap=hardware.host_bytes,
        hbm_mem_bw=hardware.fast_bandwidth / 1e3,
        ddr_mem_bw=hardware.host_bandwidth / 1e3,
        hbm_to_ddr_mem_bw=hardware.host_link_bandwidth / 1e3,
        intra_host_bw=hardware.intra_host_bandwidth / 1e3,
        inter_host_bw=hardware.inter_host_bandwidth / 1e3,
    )


def machine_topology(ranks: int, device_type: str) -> Topology:
    """The topology of ranks on machines like this one: the memory of its GPU where there is one, TorchRec's defaults for all else."""
    hbm = torch.cuda.get_device_properties(0).total_memory if device_type == "cuda" and torch.cuda.is_available() else None
    return Topology(world_size=ranks, local_world_size=get_local_size(ranks), compute_device=device_type, hbm_cap=hbm)
