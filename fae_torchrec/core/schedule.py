"""In which order the hot and the cold batches of an epoch are trained on: a pure function of counts and feedback."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from fae_torchrec.core.errors import ConfigError

Kind = Literal["hot", "cold", "mixed"]
"""Kind of a batch: every id of every sample is hot; no sample is all hot; nobody looked (the policy "stock")."""
Policy = Literal["fae", "fixed", "proportional", "stock"]
GuardMetric = Literal["logloss", "auc", "accuracy"]

_MIN_RATE, _MAX_RATE = 1.0, 100.0


class Phase(NamedTuple):
    """A run of batches of one kind.

    Attributes:
        kind: of the batches.
        count: batches, at least 1.
    """

    kind: Kind
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a phase


class Cursor(NamedTuple):
    """Where an epoch (or a window of one) stands between two batches; plain values, so any step can be saved.

    Attributes:
        of_cold: cold batches that rates and spreads refer to: those of the window.
        of_hot: hot ones.
        left_cold: cold batches that belong to no phase yet.
        left_hot: hot ones.
        kind: of the open phase; None before the first.
        left: batches of the open phase that are not taken yet.
        spread: whether the guard spread what was left over the window; `of_cold` and `of_hot` are what was left then.
    """

    of_cold: int
    of_hot: int
    left_cold: int
    left_hot: int
    kind: Kind | None = None
    left: int = 0
    spread: bool = False

    @property
    def done(self) -> bool:
        """Whether every batch was taken."""
        return not (self.left or self.left_cold or self.left_hot)

    def step(self) -> Cursor:
        """The cursor after the next batch of the open phase."""
        return self._replace(left=self.left - 1)


@dataclass(frozen=True)
class Guard:
    """When to stop reordering: an evaluation metric falls behind its best value by more than a band.

    Attributes:
        metric: "logloss" (lower is better), "auc" or "accuracy".
        band: largest allowed distance from the best value seen, above 0.
    """

    metric: GuardMetric = "auc"
    band: float = 0.01

    def __post_init__(self) -> None:
        if self.metric not in get_args(GuardMetric) or not self.band > 0:
            raise ConfigError(
                f"schedule guard: received metric {self.metric!r} with a band of {self.band}; allowed are a band above 0 and one of "
                f"{', '.join(get_args(GuardMetric))}"
            )


class ShuffleSchedule:
    """FAE's Shuffle Scheduler (FAE §4.3): cold and hot phases in turn, shorter when the test loss rises, longer when it falls.

    Policies:
        "fae": a phase takes `rate` per cent of its kind's batches of the epoch; `observe` adapts the rate.
        "fixed": the same without feedback.
        "proportional": the finest interleaving, both kinds spread evenly over the epoch, the least reordering; the rate has no meaning.
        "stock": batches are not segregated at all; they are "mixed", one phase of them.

    What decides the phases must be equal on every rank: the counts and the losses given to `observe` are agreed over the ranks
    beforehand, by the callers.

    Attributes:
        policy: one of the above.
        rate: per cent of an epoch's batches of one kind that one phase takes, 1..100. Changes take effect with the next phase.
        patience: falls of the test loss in a row after which the rate doubles (FAE's u).
        guard: when to spread what is left as "proportional" does, for good; None: never. Not for "proportional" and "stock", which have
            nothing to fall back from.
        fell_back: whether the guard did so.
        segregates: whether hot and cold batches are kept apart (all policies but "stock").

    Raises:
        ConfigError: an unknown policy, a rate outside 1..100 or a patience below 1.
    """

    def __init__(self, policy: Policy = "fae", rate: float = 50.0, patience: int = 4, guard: Guard | None = None) -> None:
        if policy not in get_args(Policy):
            raise ConfigError(f"schedule policy {policy!r} is unknown; allowed: {', '.join(get_args(Policy))}")
        if not _MIN_RATE <= rate <= _MAX_RATE:
            raise ConfigError(f"schedule rate must be in {_MIN_RATE:g}..{_MAX_RATE:g} per cent, received {rate}")
        if patience < 1:
            raise ConfigError(f"schedule patience must be at least 1, received {patience}")
        self.policy: Policy = policy
        self.rate = float(rate)
        self.patience = patience
        self.guard = guard
        self.fell_back = False
        self._last_loss: float | None = None
        self._falls = 0
        self._best: float | None = None  # of the guard's metric, negated where higher is better

    @property
    def segregates(self) -> bool:
        """Whether hot and cold batches are kept apart."""
        return self.policy != "stock"

    @property
    def listens(self) -> bool:
        """Whether `observe` can change anything: a run whose schedule does not listen needs no evaluation at swaps."""
        return self.policy == "fae" or (self.policy == "fixed" and self.guard is not None)

    def start(self, n_cold: int, n_hot: int) -> Cursor:
        """A cursor before the first phase of an epoch (or of a window of one).

        Args:
            n_cold: cold batches.
            n_hot: hot batches; with "stock" the sum of both counts.

        Raises:
            ConfigError: a count is negative.
        """
        if n_cold < 0 or n_hot < 0:
            raise ConfigError(f"batch counts must be at least 0, received n_cold={n_cold}, n_hot={n_hot}")
        return Cursor(n_cold, n_hot, n_cold, n_hot)

    # An example, with the rate at 30 for the first two phases and at 60 afterwards:
    #
    #   start(10, 4)           cold  hot  cold  hot  cold
    #   rate when opened         30   30    60   60    60
    #   ceil(rate% of 10, 4)      3    2     6    3     6
    #   left before              10    4     7    2     1
    #   taken                     3    2     6    2     1
    def next_phase(self, cursor: Cursor) -> Cursor:
        """Opens the next phase, with the rate of this moment.

        Args:
            cursor: at the end of a phase (`left` is 0), and not `done`.

        Returns:
            The cursor before the first batch of the next phase: cold first unless there is no cold batch, then kinds alternate.
        """
        if self.policy == "stock":
            return cursor._replace(left_cold=0, left_hot=0, kind="mixed", left=cursor.left_cold + cursor.left_hot)
        if self.fell_back and not cursor.spread:
            cursor = cursor._replace(of_cold=cursor.left_cold, of_hot=cursor.left_hot, spread=True)
        kind, count = _next_run(cursor) if self.policy == "proportional" or cursor.spread else self._next_share(cursor)
        if kind == "cold":
            return cursor._replace(kind=kind, left=count, left_cold=cursor.left_cold - count)
        return cursor._replace(kind=kind, left=count, left_hot=cursor.left_hot - count)

    def _next_share(self, cursor: Cursor) -> tuple[Kind, int]:
        kind: Kind = "hot" if cursor.kind == "cold" else "cold"
        if not (cursor.left_cold if kind == "cold" else cursor.left_hot):
            kind = "hot" if kind == "cold" else "cold"
        total, left, other = cursor.of_cold, cursor.left_cold, cursor.left_hot
        if kind == "hot":
            total, left, other = cursor.of_hot, cursor.left_hot, cursor.left_cold
        # When the other kind is used up, what is left follows in one phase.
        return kind, min(math.ceil(total * self.rate / 100), left) if other else left

    def phases(self, n_cold: int, n_hot: int) -> Iterator[Phase]:
        """The phases of an epoch (or of a window of one), lazily; every batch is in exactly one phase.

        Args:
            n_cold: cold batches.
            n_hot: hot batches.

        Returns:
            An iterator of phases. It reads `rate` when it is asked for the next phase.

        Raises:
            ConfigError: a count is negative.
        """
        return self._phases(self.start(n_cold, n_hot))

    def _phases(self, cursor: Cursor) -> Iterator[Phase]:
        while not cursor.done:
            cursor = self.next_phase(cursor)
            assert cursor.kind is not None
            yield Phase(cursor.kind, cursor.left)
            cursor = cursor._replace(left=0)

    def observe(self, test_loss: float, metrics: Mapping[str, float] | None = None) -> None:
        """Adapts the rate to the test loss, after a swap; only the policy "fae" listens, and the guard.

        A rise halves the rate (not below 1), `patience` falls in a row double it (not above 100) and are then forgotten, an equal
        loss changes nothing and ends the run of falls. The first loss is only remembered.

        Args:
            test_loss: the same number on every rank. NaN, a diverged loss, counts as infinitely high.
            metrics: "auc" and "accuracy" of the same evaluation; the guard's must be there.

        Raises:
            ConfigError: the guard's metric is not in `metrics`.
        """
        if not self.listens:
            return
        loss = math.inf if math.isnan(test_loss) else float(test_loss)
        self._watch({**(metrics or {}), "logloss": loss})
        last, self._last_loss = self._last_loss, loss
        if last is None or self.policy != "fae":
            return
        self._falls = self._falls + 1 if loss < last else 0
        # FAE's Eq. 5 has min and max swapped: as printed, the first change would put the rate to at most 1 or at least 100. The bounds
        # are meant as here.
        if loss > last:
            self.rate = max(self.rate / 2, _MIN_RATE)
        elif self._falls == self.patience:
            self.rate = min(self.rate * 2, _MAX_RATE)
            self._falls = 0

    def _watch(self, metrics: Mapping[str, float]) -> None:
        if self.guard is None:
            return
        if self.guard.metric not in metrics:
            raise ConfigError(f"the schedule's guard watches {self.guard.metric!r}; received only {sorted(metrics)}; give it to observe()")
        value = metrics[self.guard.metric]
        value = math.inf if math.isnan(value) else value if self.guard.metric == "logloss" else -value
        self._best = value if self._best is None else min(self._best, value)
        # A loss that has always been infinite is no worse than its best.
        self.fell_back |= value > self._best + self.guard.band

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on: plain values that JSON can write. The place in the epoch is a `Cursor`, kept by the loader."""
        return {
            "policy": self.policy,
            "rate": self.rate,
            "patience": self.patience,
            "guard": None if self.guard is None else asdict(self.guard),
            "fell_back": self.fell_back,
            "last_loss": self._last_loss,
            "falls": self._falls,
            "best": self._best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned.

        Raises:
            ConfigError: the state is of another policy, patience or guard, or lacks a key.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise ConfigError(f"schedule state has the keys {sorted(state)}, allowed are exactly {sorted(mine)}")
        for name in ("policy", "patience", "guard"):
            if state[name] != mine[name]:
                raise ConfigError(
                    f"schedule state is of {name} {state[name]!r}, this one has {mine[name]!r}; resume with the schedule that was saved"
                )
        self.rate, self.fell_back = float(state["rate"]), bool(state["fell_back"])
        self._last_loss, self._falls, self._best = state["last_loss"], int(state["falls"]), state["best"]


# Bresenham's line: cold batch k of c stands at place floor(k * n / c) of n, so place i is cold iff ceil(i * c / n) steps there.
# c=2 of n=5: C H C H H.
def _next_run(cursor: Cursor) -> tuple[Kind, int]:
    """The next run of one kind where both are spread evenly."""
    c, n = cursor.of_cold, cursor.of_cold + cursor.of_hot
    first = n - cursor.left_cold - cursor.left_hot

    def cold_before(i: int) -> int:
        return -(-i * c // n)

    is_cold, i = cold_before(first + 1) > cold_before(first), first + 1
    while i < n and (cold_before(i + 1) > cold_before(i)) == is_cold:
        i += 1
    return "cold" if is_cold else "hot", i - first
