"""What a rank's machine can do, as the rates that the cost model divides by: presets, and files that `fae measure` writes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

from fae_torchrec.core.errors import ConfigError

GB = 10**9


@dataclass(frozen=True)
class Hardware:
    """One rank's share of a machine. All rates are those of one rank, one direction, as training reaches them, not as printed on the box.

    Attributes:
        name: of the preset, or of the machine that was measured.
        device: "cuda" or "cpu"; on a CPU the fast memory is plain memory, and no link lies between the tiers.
        fast_bytes: memory of the device.
        host_bytes: memory of the host, a rank's share.
        ranks_per_host: ranks that share a host; more ranks than that take several hosts.
        flops: of the dense part in training, per second.
        fast_bandwidth: bytes/s of rows gathered from fast memory, and of what is pooled from them.
        host_bandwidth: bytes/s of rows gathered from the host's memory by the host.
        host_link_bandwidth: bytes/s between device and host (PCIe, NVLink-C2C), as single rows of UVM reach it.
        intra_host_bandwidth: bytes/s that a rank sends to ranks of its host.
        inter_host_bandwidth: bytes/s that a rank sends to other hosts.
        collective_s: seconds of a collective besides its bytes.
        fast_row_s: seconds of a row looked up in fast memory besides its bytes.
        host_row_s: the same in the host's memory.
        split_id_s: seconds to split one id by tier.
        cache_id_s: seconds of FBGEMM's bookkeeping per id that goes through its cache.
        tier_s: seconds that one more sharded collection costs a step.
        step_s: on CUDA the least that a step takes, for the host queues its kernels meanwhile; on a CPU what it takes besides the rest.
        source: where the figures come from.
    """

    name: str
    device: str
    fast_bytes: int
    host_bytes: int
    ranks_per_host: int
    flops: float
    fast_bandwidth: float
    host_bandwidth: float
    host_link_bandwidth: float
    intra_host_bandwidth: float
    inter_host_bandwidth: float
    collective_s: float
    fast_row_s: float
    host_row_s: float
    split_id_s: float
    cache_id_s: float
    tier_s: float
    step_s: float
    source: str

    def __post_init__(self) -> None:
        if self.device not in ("cuda", "cpu"):
            raise ConfigError(f"hardware {self.name!r}: device {self.device!r} is not one of ['cuda', 'cpu']; name one of those")
        for key in (*_POSITIVE, *_SECONDS):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ConfigError(f"hardware {self.name!r}: {key} must be a number, received {value!r}")
        if not float(self.ranks_per_host).is_integer():
            raise ConfigError(f"hardware {self.name!r}: ranks_per_host must be a whole number, received {self.ranks_per_host}")
        for key in _POSITIVE:
            value = getattr(self, key)
            if not value > 0:
                raise ConfigError(f"hardware {self.name!r}: {key} must be above 0, received {value}")
        for key in _SECONDS:
            value = getattr(self, key)
            if not value >= 0:
                raise ConfigError(f"hardware {self.name!r}: {key} must be at least 0, received {value}")

    def on_hosts_of(self, ranks_per_host: int) -> Hardware:
        """The same with another number of ranks on each host."""
        return replace(self, ranks_per_host=ranks_per_host)

    def to_json(self) -> dict[str, Any]:
        """Plain values, read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Hardware:
        """Reads what `to_json` gave; `base`, the name of a preset, stands for all that is not given.

        Raises:
            ConfigError: a key is unknown or missing, or a value is out of range.
        """
        given = dict(values)
        base = given.pop("base", None)
        if base is not None:
            given = {**hardware_preset(str(base)).to_json(), "name": f"{base}, changed", **given}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise ConfigError(f"hardware: unknown keys {unknown}; allowed are {sorted(known)} and 'base', the name of a preset")
        if missing := sorted(known - given.keys()):
            raise ConfigError(f"hardware: {missing} are missing; give them, or 'base', one of {sorted(PRESETS)}, for all that is not given")
        return cls(**given)


_SECONDS = ("collective_s", "fast_row_s", "host_row_s", "split_id_s", "cache_id_s", "tier_s", "step_s")
_POSITIVE = tuple(
    field.name for field in fields(Hardware) if field.name not in ("name", "device", "source") and not field.name.endswith("_s")
)

# What of the published rates training reaches, by benchmarks/results/gpu.json of one H200: rows gathered and pooled 0.3 of HBM's
# bandwidth, single rows of UVM 0.6 of PCIe's, 5 ns of FBGEMM's cache per id, 0.7 us per row that FBGEMM looks up or updates on the host,
# 6 ms of host per DLRM step.
_GATHER, _UVM, _COPY = 0.3, 0.6, 0.8
_CACHE_NS_AT_4800 = 5e-9


def _gpu(
    name: str, gib: int, hbm: float, link: float, nvlink: float, nic: float, tflops: float, *, host_gib: int = 128, ranks: int = 8
) -> Hardware:
    """A preset from published GB/s (one direction), and from the TFLOP/s that a DLRM's dense part reaches."""
    return Hardware(
        name=name,
        device="cuda",
        fast_bytes=gib * 2**30,
        host_bytes=host_gib * 2**30,
        ranks_per_host=ranks,
        flops=tflops * 1e12,
        fast_bandwidth=_GATHER * hbm * GB,
        host_bandwidth=10 * GB,
        host_link_bandwidth=_UVM * link * GB,
        intra_host_bandwidth=_COPY * nvlink * GB,
        inter_host_bandwidth=_COPY * nic * GB,
        collective_s=30e-6,
        fast_row_s=0.0,
        host_row_s=700e-9,
        split_id_s=0.3e-9 * 4800 / hbm,
        cache_id_s=_CACHE_NS_AT_4800 * 4800 / hbm,
        tier_s=0.2e-3,
        step_s=6e-3,
        source="published bandwidths, times what benchmarks/results/gpu.json reaches of an H200's",
    )


PRESETS: Mapping[str, Hardware] = {
    preset.name: preset
    for preset in (
        # name, GiB, HBM, host link, NVLink or PCIe to the next GPU, network per GPU (all GB/s), TFLOP/s
        _gpu("v100", 16, 900, 15.75, 150, 6.25, 8),
        _gpu("t4", 16, 320, 15.75, 15.75, 3.1, 4, ranks=4),
        _gpu("a10", 24, 600, 31.5, 31.5, 6.25, 12),
        _gpu("a100", 80, 2039, 31.5, 300, 25, 25),
        _gpu("h100", 80, 3350, 63, 450, 50, 45),
        _gpu("h200", 141, 4800, 63, 450, 50, 50),
        _gpu("gh200", 96, 4000, 450, 450, 50, 50, host_gib=480, ranks=1),
        Hardware(
            name="cpu",
            device="cpu",
            fast_bytes=16 * 2**30,
            host_bytes=16 * 2**30,
            ranks_per_host=2,
            flops=4e10,
            fast_bandwidth=6 * GB,
            host_bandwidth=6 * GB,
            host_link_bandwidth=6 * GB,
            intra_host_bandwidth=1.5 * GB,
            inter_host_bandwidth=0.1 * GB,
            collective_s=300e-6,
            fast_row_s=50e-9,
            host_row_s=50e-9,
            split_id_s=30e-9,
            cache_id_s=100e-9,
            tier_s=2e-3,
            step_s=5e-3,
            source="a core of a server; `fae measure` gives this machine's",
        ),
    )
}


def hardware_preset(name: str) -> Hardware:
    """A preset by name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in PRESETS:
        raise ConfigError(f"hardware {name!r} is not one of {sorted(PRESETS)}; name one of those, or a JSON file that `fae measure` wrote")
    return PRESETS[name]


def load_hardware(name_or_path: str | os.PathLike[str]) -> Hardware:
    """A preset, or a JSON file that `fae measure` wrote (or a person, with "base" for what is not given).

    Raises:
        ConfigError: there is no such preset or file, or what it says is wrong.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        return hardware_preset(str(name_or_path))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as hardware ({error}); `fae measure --output {path}` writes such a file") from None
    if isinstance(values, dict):
        values = values.get("hardware", values)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: received a {type(values).__name__}, a JSON object is needed; `fae measure` writes one")
    try:
        return Hardware.from_json(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
