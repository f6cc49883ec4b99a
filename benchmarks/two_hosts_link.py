"""Two network namespaces of this machine, joined by one cable whose rate is limited both ways: they stand for two machines."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "fae0"
ADDRESSES = ("10.213.7.1", "10.213.7.2")


class NoLinkError(RuntimeError):
    """The namespaces cannot be made here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Link:
    """Two hosts and their cable.

    Attributes:
        hosts: the namespaces' names.
        mbit: rate of each direction in 10^6 bits per second; 0 for no limit.
    """

    hosts: tuple[str, str]
    mbit: int

    def on(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a host."""
        return ["ip", "netns", "exec", self.hosts[host], *command]

    @property
    def limit(self) -> list[str]:
        """The `tc` command that limits what leaves through INTERFACE, to be run on each host."""
        # The bucket holds 1 ms of traffic and at least two of the kernel's largest packets (64 KiB); packets wait for up to 100 ms.
        burst = max(128 * 1024, self.mbit * 125)
        rate = ["tbf", "rate", f"{self.mbit}mbit", "burst", str(burst), "latency", "100ms"]
        return ["tc", "qdisc", "add", "dev", INTERFACE, "root", *rate]


@contextmanager
def two_hosts(mbit: int) -> Iterator[Link]:
    """Two hosts for as long as the block lasts; afterwards nothing is left of them.

    Args:
        mbit: rate of each direction in 10^6 bits per second; 0 for no limit.

    Raises:
        NoLinkError: this is not root, or `ip` or `tc` is missing, or the kernel refuses.
    """
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        raise NoLinkError(f"{' and '.join(missing)} not found, which make the namespaces and limit the rate; install iproute2")
    if os.geteuid() != 0:
        raise NoLinkError(f"network namespaces take root, this is user {os.geteuid()}; run it with sudo, or in a virtual machine")
    link = Link((f"fae{os.getpid()}a", f"fae{os.getpid()}b"), mbit)
    first, second = link.hosts
    try:
        for host in link.hosts:
            _done(["ip", "netns", "add", host])
            _done(["ip", "-n", host, "link", "set", "lo", "up"])
        cable = ["ip", "link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second]
        _done(cable)
        for number, host in enumerate(link.hosts):
            _done(["ip", "-n", host, "address", "add", f"{ADDRESSES[number]}/24", "dev", INTERFACE])
            _done(["ip", "-n", host, "link", "set", INTERFACE, "up"])
            if mbit:
                _done(link.on(number, link.limit))
        yield link
    finally:
        for host in link.hosts:  # the cable goes with its ends
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)


def sent_bytes() -> int:
    """Bytes that this host, a namespace, has sent through INTERFACE; headers are counted once for each packet, of up to 64 KiB."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def _done(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise NoLinkError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}; it takes root with the capabilities NET_ADMIN and SYS_ADMIN (which a "
            "container lacks unless it is told to give them), and a kernel with network namespaces, veth and sch_tbf"
        )
