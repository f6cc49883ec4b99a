"""LaunchRanks: what the ranks of a launcher agree on before the script makes its process group, over the launcher's own store."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fae_torchrec.core.errors import ConfigError, FAEError

_PATIENCE = timedelta(days=7)
"""The others wait while rank 0 profiles; a rank that dies is the launcher's to notice."""
_CHUNK_BYTES = 4 << 20  # a TCPStore (torch 2.13) takes no value above 8 MiB
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_AGENT = "TORCHELASTIC_USE_AGENT_STORE"


class LaunchRanks:
    """The ranks that run one script together.

    A launcher's environment names an address at which the script's process group will meet. Under torchrun its agent keeps a store there
    already, and this is one more client of it. Under other launchers rank 0 keeps a store there for as long as it lives, as torch does, and
    torch's own comes to share it (`multi_tenant`). Without a launcher there is one rank and no store.

    Attributes:
        rank: this rank.
        world_size: ranks.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._round = 0
        self._store: Any = None
        if self.world_size == 1:
            return
        missing = [name for name in _NEEDED if name not in os.environ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {self.world_size}, but {missing} are not in the environment; start the ranks by torchrun, or with all of "
                f"{list(_NEEDED)}"
            )
        keeps = self.rank == 0 and os.environ.get(_AGENT) != "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=keeps, timeout=_PATIENCE, wait_for_workers=False, multi_tenant=True
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"fae_launch_{attempt}", store)  # type: ignore[attr-defined]

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, on every rank; what it raises there is raised on every rank. All ranks call it.

        Args:
            make: called on rank 0 alone; what it returns or raises is pickled.
        """
        if self._store is None:
            return make()
        key = self._next()
        if self.rank == 0:
            self._put(key, _outcome(make))
        outcome, error = self._get(key)
        if self._store.add(f"{key}/read", 1) == self.world_size:  # the last one cleans up
            self._delete(key)
        if error is not None:
            raise error
        return outcome

    def gather(self, make: Callable[[], Any]) -> list[Any]:
        """What `make` returns on each rank, in the order of the ranks, on rank 0; an empty list elsewhere. All ranks call it.

        Args:
            make: called on every rank; what it returns or raises is pickled. The first rank's error is raised on rank 0.
        """
        if self._store is None:
            return [make()]
        key = self._next()
        self._put(f"{key}/{self.rank}", _outcome(make))
        if self.rank:
            return []
        results = []
        for rank in range(self.world_size):
            outcome, error = self._get(f"{key}/{rank}")
            self._delete(f"{key}/{rank}")
            if error is not None:
                raise error
            results.append(outcome)
        return results

    def free_port(self) -> int:
        """A port that was free a moment ago on rank 0's machine; the same on every rank. All ranks call it."""

        def look() -> int:
            with socket.socket() as found:
                found.bind(("", 0))
                return int(found.getsockname()[1])

        return int(self.share(look))

    def _next(self) -> str:
        self._round += 1
        return str(self._round)

    def _put(self, key: str, outcome: tuple[Any, Exception | None]) -> None:
        text = pickle.dumps(outcome)
        for number, begin in enumerate(range(0, len(text), _CHUNK_BYTES)):
            self._store.set(f"{key}/part{number}", text[begin : begin + _CHUNK_BYTES])
        self._store.set(f"{key}/parts", str(-(-len(text) // _CHUNK_BYTES)))

    def _get(self, key: str) -> Any:
        return pickle.loads(b"".join(self._store.get(f"{key}/part{number}") for number in range(self._parts(key))))

    def _parts(self, key: str) -> int:
        return int(self._store.get(f"{key}/parts"))

    def _delete(self, key: str) -> None:
        for number in range(self._parts(key)):
            self._store.delete_key(f"{key}/part{number}")


def _outcome(make: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # whatever pickling raises: the others could not read it
            return None, FAEError(f"{type(error).__name__}: {error}")
        return None, error
