"""In which order the hot and the cold batches of an epoch are trained on: a pure function of counts and feedback."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, Literal, NamedTuple, get_args

from fae_torchrec.core.errors import ConfigError

Kind = Literal["hot", "cold"]
Policy = Literal["fae", "fixed", "proportional", "stock"]

_MIN_RATE, _MAX_RATE = 1.0, 100.0


class Phase(NamedTuple):
    """A run of batches of one kind.

    Attributes:
        kind: "hot" or "cold".
        count: batches, at least 1.
    """

    kind: Kind
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a phase


class ShuffleSchedule:
    """FAE's Shuffle Scheduler (FAE §4.3): cold and hot phases in turn, shorter when the test loss rises, longer when it falls.

    Policies:
        "fae": a phase takes `rate` per cent of its kind's batches of the epoch; `observe` adapts the rate.
        "fixed": the same without feedback.
        "proportional": the finest interleaving, both kinds spread evenly over the epoch; the rate has no meaning.
        "stock": batches are not segregated at all; there are no phases.

    What decides the phases must be equal on every rank: the counts and the losses given to `observe` are agreed over the ranks
    beforehand, by the callers.

    Attributes:
        policy: one of the above.
        rate: per cent of an epoch's batches of one kind that one phase takes, 1..100. Changes between phases take effect at once.
        patience: falls of the test loss in a row after which the rate doubles.
        segregates: whether hot and cold batches are kept apart (all policies but "stock").

    Raises:
        ConfigError: an unknown policy, a rate outside 1..100 or a patience below 1.
    """

    def __init__(self, policy: Policy = "fae", rate: float = 50.0, patience: int = 4) -> None:
        if policy not in get_args(Policy):
            raise ConfigError(f"schedule policy {policy!r} is unknown; allowed: {', '.join(get_args(Policy))}")
        if not _MIN_RATE <= rate <= _MAX_RATE:
            raise ConfigError(f"schedule rate must be in {_MIN_RATE:g}..{_MAX_RATE:g} per cent, received {rate}")
        if patience < 1:
            raise ConfigError(f"schedule patience must be at least 1, received {patience}")
        self.policy: Policy = policy
        self.rate = float(rate)
        self.patience = patience
        self._last_loss: float | None = None
        self._falls = 0

    @property
    def segregates(self) -> bool:
        """Whether hot and cold batches are kept apart."""
        return self.policy != "stock"

    def phases(self, n_cold: int, n_hot: int) -> Iterator[Phase]:
        """The phases of an epoch (or of a window of one), lazily; kinds alternate and every batch is in exactly one phase.

        Args:
            n_cold: cold batches.
            n_hot: hot batches.

        Returns:
            An iterator of phases, cold first unless there is no cold batch. It reads `rate` when it is asked for the next phase.

        Raises:
            ConfigError: a count is negative, or the policy is "stock".
        """
        if not self.segregates:
            raise ConfigError("the stock schedule has no phases: it takes batches as they come; check `segregates` first")
        if n_cold < 0 or n_hot < 0:
            raise ConfigError(f"batch counts must be at least 0, received n_cold={n_cold}, n_hot={n_hot}")
        return _spread(n_cold, n_hot) if self.policy == "proportional" else self._alternate(n_cold, n_hot)

    # An example, with the rate at 30 for the first two phases and at 60 afterwards:
    #
    #   phases(10, 4)          cold  hot  cold  hot  cold
    #   rate when asked          30   30    60   60    60
    #   ceil(rate% of 10, 4)      3    2     6    3     6
    #   left before              10    4     7    2     1
    #   taken                     3    2     6    2     1
    def _alternate(self, n_cold: int, n_hot: int) -> Iterator[Phase]:
        total: dict[Kind, int] = {"cold": n_cold, "hot": n_hot}
        left = dict(total)
        kind: Kind = "cold"
        other: Kind = "hot"
        while left[kind] or left[other]:
            # When the other kind is used up, what is left follows in one phase.
            share = math.ceil(total[kind] * self.rate / 100) if left[other] else left[kind]
            count = min(share, left[kind])
            left[kind] -= count
            if count:
                yield Phase(kind, count)
            kind, other = other, kind

    def observe(self, test_loss: float) -> None:
        """Adapts the rate to the test loss, between phases; only the policy "fae" listens.

        A rise halves the rate (not below 1), `patience` falls in a row double it (not above 100) and are then forgotten, an equal
        loss changes nothing and ends the run of falls. The first loss is only remembered.

        Args:
            test_loss: the same number on every rank. NaN, a diverged loss, counts as infinitely high.
        """
        if self.policy != "fae":
            return
        loss = math.inf if math.isnan(test_loss) else float(test_loss)
        last, self._last_loss = self._last_loss, loss
        if last is None:
            return
        self._falls = self._falls + 1 if loss < last else 0
        # FAE's Eq. 5 has min and max swapped: as printed, the first change would put the rate to at most 1 or at least 100. The bounds
        # are meant as here.
        if loss > last:
            self.rate = max(self.rate / 2, _MIN_RATE)
        elif self._falls == self.patience:
            self.rate = min(self.rate * 2, _MAX_RATE)
            self._falls = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on: plain values that JSON can write."""
        last = None if self._last_loss is None else float(self._last_loss)
        return {"policy": self.policy, "rate": self.rate, "patience": self.patience, "last_loss": last, "falls": self._falls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned.

        Raises:
            ConfigError: the state is of another policy or patience, or lacks a key.
        """
        if state.keys() != self.state_dict().keys():
            raise ConfigError(f"schedule state has the keys {sorted(state)}, allowed are exactly {sorted(self.state_dict())}")
        if (state["policy"], state["patience"]) != (self.policy, self.patience):
            raise ConfigError(
                f"schedule state is of policy {state['policy']!r} with patience {state['patience']}, this schedule has {self.policy!r} "
                f"with {self.patience}; resume with the schedule that was saved"
            )
        self.rate, self._last_loss, self._falls = float(state["rate"]), state["last_loss"], int(state["falls"])


def _spread(n_cold: int, n_hot: int) -> Iterator[Phase]:
    """Bresenham's line: cold batch k of c stands at place floor(k * n / c) of n, so place i is cold iff ceil(i * c / n) steps there.

    c=2 of n=5: C H C H H.
    """
    n = n_cold + n_hot
    kinds: Iterator[Kind] = ("cold" if -(-(i + 1) * n_cold // n) > -(-i * n_cold // n) else "hot" for i in range(n))
    for kind, run in groupby(kinds):
        yield Phase(kind, sum(1 for _ in run))
