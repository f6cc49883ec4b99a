"""fae measure: times this machine's ranks and writes what they can do as hardware for `fae plan`."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from tqdm import tqdm

from fae_torchrec.core.errors import ConfigError
from fae_torchrec.core.hardware import Hardware, hardware_preset
from fae_torchrec.distributed.local_ranks import run_on_local_ranks, world_size_of_environment
from fae_torchrec.doctor import collect
from fae_torchrec.report_parts import describe_environment
from fae_torchrec.training.machine_rates import cache_id_seconds, collective_rates, dense_flops, rank_device, row_rates, step_rates
from fae_torchrec.training.report import write_json


def measure(device: str, ranks: int, command: Sequence[str], *, show_progress: bool = False) -> dict[str, Any]:
    """Times this machine with all ranks at work at once, as in training: they share its cores and its memory.

    Args:
        device: "cpu" or "cuda".
        ranks: that train on this machine.
        command: the command line, for the record.
        show_progress: a progress bar on standard error.

    Returns:
        Plain values: schema, kind "hardware", created, command, versions, machine, and hardware, which `load_hardware` reads.

    Raises:
        ConfigError: there is no such device, or there are fewer than ranks.
    """
    if (launched := world_size_of_environment()) > 1:
        raise ConfigError(f"fae measure starts its own ranks; received a torchrun environment of {launched}; start it as one process")
    if ranks < 1:
        raise ConfigError(f"--ranks: received {ranks}; give at least 1")
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise ConfigError(
            f"--ranks: received {ranks}, this machine has {torch.cuda.device_count()} CUDA devices; give at most that, or cpu"
        )
    with tqdm(total=2, desc="measuring", unit=" runs", disable=None if show_progress else True) as bar:
        found = _slowest(run_on_local_ranks(_rates, ranks, device, device_type=device))
        bar.update()
        found |= run_on_local_ranks(step_rates, 1, device, device_type=device)[0]  # alone: nothing waits for another rank
        bar.update()
    environment = describe_environment(collect())
    return {
        "schema": 1,
        "kind": "hardware",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "versions": environment.get("versions"),
        "machine": environment.get("hardware"),
        "hardware": _hardware(device, ranks, found).to_json(),
    }


def run_measure(arguments: Namespace) -> int:
    """Measures, writes the file and prints it."""
    record = measure(arguments.device, arguments.ranks, arguments.command_line, show_progress=not arguments.quiet)
    path = write_json(record, Path(arguments.output))
    if arguments.json:
        print(path.read_text(encoding="utf-8").rstrip())
        return 0
    for key, value in record["hardware"].items():
        print(f"  {key:<22} {value:.3g}" if isinstance(value, float) else f"  {key:<22} {value}")
    print(f"{path}\nnext: fae plan --what-if --hardware {path} --config ...")
    return 0


def _rates(rank: int, device_type: str) -> dict[str, float]:
    """What one rank can do while the others do the same."""
    device = rank_device(rank, device_type)
    latency, bandwidth = collective_rates(rank, device_type)
    fast = row_rates(device, EmbeddingLocation.HOST if device_type == "cpu" else EmbeddingLocation.DEVICE)
    host = fast if device_type == "cpu" else row_rates(torch.device("cpu"), EmbeddingLocation.HOST)
    link = fast if device_type == "cpu" else row_rates(device, EmbeddingLocation.MANAGED)
    return {
        "flops": dense_flops(device),
        "fast_row_s": fast[0],
        "fast_bandwidth": fast[1],
        "host_row_s": host[0],
        "host_bandwidth": host[1],
        "host_link_bandwidth": link[1],
        "collective_s": latency,
        "intra_host_bandwidth": bandwidth,
        "cache_id_s": cache_id_seconds(device),
    }


def _slowest(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """The rates of the slowest rank, which the others wait for."""
    return {key: max(r[key] for r in ranks) if key.endswith("_s") else min(r[key] for r in ranks) for key in ranks[0]}


def _hardware(device: str, ranks: int, found: dict[str, float]) -> Hardware:
    base = hardware_preset("cpu" if device == "cpu" else "h100").to_json()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    fast = total if device == "cpu" else torch.cuda.get_device_properties(0).total_memory
    if ranks == 1:  # nothing was sent
        found = {key: value for key, value in found.items() if key not in ("collective_s", "intra_host_bandwidth")}
    sent = "" if ranks > 1 else ", but for what ranks send each other"
    return Hardware.from_json(
        {
            **base,
            **found,
            "name": f"{ranks} rank(s) of {os.uname().nodename}",
            "fast_bytes": fast,
            "host_bytes": total,
            "ranks_per_host": ranks,
            "source": f"fae measure --device {device} --ranks {ranks}{sent}; the network between hosts is the preset's",
        }
    )
