"""Which placement would be fastest on some ranks, by the cost model: every option with its time and bytes, the winner, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fae_torchrec.core.access_curve import Floats
from fae_torchrec.core.cost_model import CostModel, HotTier, Stock, Work, step_seconds
from fae_torchrec.core.errors import BudgetError, ConfigError

NAMES: Mapping[str, str] = {
    "hbm": "all-HBM",
    "uvm": "UVM",
    "by_table": "tables in HBM or UVM",
    "uvm_caching": "UVM caching",
    "prefetch": "UVM caching + prefetch",
    "host": "host",
    "fae": "FAE",
    "fae_sharded": "FAE, hot rows sharded",
}
PARTS: Mapping[str, str] = {
    "flops": "the dense part",
    "fast_rows": "rows in fast memory",
    "fast_bytes": "rows in fast memory",
    "host_rows": "rows looked up by the host",
    "host_bytes": "rows looked up by the host",
    "link_bytes": "the link between device and host",
    "intra_bytes": "what the ranks of a host send each other",
    "inter_bytes": "what hosts send each other",
    "collectives": "the collectives' latency",
    "split_ids": "splitting ids by tier",
    "cache_ids": "the cache's bookkeeping",
    "tiers": "calls of the sharded collections",
    "steps": "the host, which queues the step",
}
_HEADROOM = 0.15  # of fast memory, for what the allocator and the driver keep
_HOST_SHARE = 0.9
_DENSE_COPIES = 3  # weights, gradients and optimizer state
_ACTIVATIONS = 4  # what the tables give, their gradient and two buffers of collectives
_SAME = 1.01  # times the fastest option's time that is no difference
_PAYS = 1.05  # times as fast as the best stock placement, from which FAE is advised
_ALIKE = 0.7  # of what whole tables of the same bytes leave cold, what hot rows leave cold: above it nothing is popular in a table
_ALL = 0.999  # of the lookups, from which as good as all are hot
_PREFETCH_SHARE = 0.25  # of the budget, for the cache of cold rows where several ranks train


@dataclass(frozen=True)
class Option:
    """One placement under one budget.

    Attributes:
        placement: a key of `NAMES`.
        budget_bytes: fast memory per rank for hot rows and a cache, or a cache; 0 where the placement has no budget.
        work: of the mean step.
        step_s: seconds of a step, the mean.
        parts: seconds of the mean step's parts; on CUDA `steps` runs beside the rest.
        fast_bytes: per rank, tables and the dense part.
        host_bytes: per rank.
        refused: why it cannot be; empty if it can.
        hot_inputs: of FAE.
        coverage: of FAE and of whole tables, share of the lookups that are hot.
    """

    placement: str
    budget_bytes: int
    work: Work
    step_s: float
    parts: Mapping[str, float]
    fast_bytes: float
    host_bytes: float
    refused: str
    hot_inputs: float | None = None
    coverage: float | None = None

    @property
    def name(self) -> str:
        """In words."""
        return NAMES[self.placement]

    @property
    def is_fae(self) -> bool:
        """Whether it has hot and cold rows."""
        return self.placement.startswith("fae")

    @property
    def dominated_by(self) -> str:
        """The part that takes longest, in words; not the host where it runs beside a device that takes longer in all."""
        grouped: dict[str, float] = {}
        device_s = sum(self.parts.values()) - self.parts["steps"]
        hidden = self.parts["steps"] < device_s and self.step_s < 0.999 * (self.parts["steps"] + device_s)
        for part, seconds in self.parts.items():
            if hidden and part == "steps":
                continue
            grouped[PARTS[part]] = grouped.get(PARTS[part], 0.0) + seconds
        return max(grouped, key=lambda words: grouped[words])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {key: value for key, value in vars(self).items() if key not in ("work", "parts")}
        return {**values, "name": self.name, "dominated_by": self.dominated_by, "parts_s": dict(self.parts), "work": vars(self.work)}


@dataclass(frozen=True)
class Outlook:
    """All options on one number of ranks.

    Attributes:
        model: what predicted them.
        options: by placement, then by budget.
        pays: whether FAE is advised.
        advice: in a sentence.
    """

    model: CostModel
    options: tuple[Option, ...]
    pays: bool
    advice: str

    def best(self, *, fae: bool | None = None) -> Option | None:
        """The fastest option that can be; of FAE alone, or of stock alone."""
        return best(self.options, fae=fae)

    @property
    def margin(self) -> float | None:
        """The time of the fastest other placement over the winner's; None if there is no other."""
        first = self.best()
        if first is None:
            return None
        second = best([option for option in self.options if option.placement != first.placement])
        return None if second is None else second.step_s / first.step_s

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        winner = self.best()
        return {
            "hardware": self.model.hardware.to_json(),
            "ranks": self.model.job.ranks,
            "batch_size": self.model.job.batch_size,
            "pays": self.pays,
            "advice": self.advice,
            "winner": None if winner is None else {"placement": winner.placement, "budget_bytes": winner.budget_bytes},
            "margin": self.margin,
            "options": [option.to_json() for option in self.options],
        }


def best(options: Sequence[Option], *, fae: bool | None = None) -> Option | None:
    """The fastest option that can be; among those within a hundredth of it the plainest: stock before FAE, and the smallest budget."""
    able = [option for option in options if not option.refused and fae in (None, option.is_fae)]
    near = [option for option in able if option.step_s <= _SAME * min(o.step_s for o in able)]
    return min(near, key=lambda option: (option.is_fae, option.budget_bytes, sum(option.parts.values())), default=None)


def look_out(model: CostModel, budgets: Sequence[int], pinned_max_rows: int = 1024) -> Outlook:
    """Predicts every placement.

    Args:
        model: the job, its accesses and the hardware.
        budgets: bytes of fast memory per rank, for hot rows, caches or whole tables.
        pinned_max_rows: tables of at most so many rows are always hot.

    Raises:
        BudgetError: the pinned tables alone exceed a budget.
        ConfigError: there are no budgets.
    """
    if not budgets:
        raise ConfigError("a what-if needs at least one budget, received none; give shares of the tables' bytes such as 1%")
    budgets = sorted(set(budgets))
    least = sum(table.total_bytes for table in model.job.tables if table.rows <= pinned_max_rows)
    if budgets[0] < least:
        raise BudgetError(
            f"the smallest budget is {budgets[0]} bytes, tables of at most {pinned_max_rows} rows, which are always hot, take {least}; "
            "give at least that, or pin fewer tables"
        )
    options = (*_stock(model, budgets), *_fae(model, budgets, pinned_max_rows))
    pays, advice = _advice(model, options)
    return Outlook(model, options, pays, advice)


def fae_cold_tier(model: CostModel) -> str:
    """What `cold_tier="auto"` of FAEShardingPlanner gives there."""
    if model.hardware.device == "cpu":
        return "host"
    return "uvm" if model.job.ranks == 1 else "uvm_caching"


def _stock(model: CostModel, budgets: Sequence[int]) -> Iterator[Option]:
    total = model.job.tables.total_bytes / model.job.ranks
    if model.hardware.device == "cpu":
        yield _option(model, "host", 0, model.stock("host"), total)
        return
    whole: tuple[Stock, ...] = ("hbm", "uvm", "host")
    for placement in whole:
        yield _option(model, placement, 0, model.stock(placement), 0.0 if placement == "hbm" else total)
    under: tuple[Stock, ...] = ("by_table", "uvm_caching", "prefetch")
    for placement in under:
        for budget in budgets:
            more = {"coverage": _lookups_of(model, model.whole_tables(budget))} if placement == "by_table" else {}
            yield _option(model, placement, budget, model.stock(placement, budget), total, **more)


def _fae(model: CostModel, budgets: Sequence[int], pinned_max_rows: int) -> Iterator[Option]:
    """Of a budget, a cache of cold rows takes a part where several ranks train; sharded hot rows may be as many as all ranks hold."""
    cold, ranks, tables = fae_cold_tier(model), model.job.ranks, model.job.tables
    ahead = model.hardware.device == "cuda" and ranks == 1
    hot_part = 1 - _PREFETCH_SHARE if cold == "uvm_caching" else 1.0
    for placement, copies in (("fae", 1), ("fae_sharded", ranks)):
        tier: HotTier = "replicated" if placement == "fae" else "sharded"
        for budget in budgets if placement == "fae" or ranks > 1 else ():
            hot_bytes = min(round(hot_part * budget) * copies, tables.total_bytes)
            least = sum(table.total_bytes for table in tables if table.rows <= pinned_max_rows)
            share = model.access.share(max(hot_bytes, least), pinned_max_rows)
            option = _option(
                model,
                placement,
                budget,
                model.epoch(share, cold, split_ahead=ahead, hot_tier=tier),
                tables.total_bytes / ranks,
                hot_inputs=share.hot_inputs,
                coverage=_lookups_of(model, share.coverage),
            )
            yield replace(option, step_s=model.epoch_seconds(share, cold, split_ahead=ahead, hot_tier=tier))


def _lookups_of(model: CostModel, shares: Floats) -> float:
    """The share of all lookups, from that of each table."""
    lookups = [curve.lookups for curve in model.access.curves]
    return float(shares @ lookups) / max(sum(lookups), 1e-12)


def _option(model: CostModel, placement: Any, budget: int, work: Work, host_bytes: float, **more: float) -> Option:
    job, hardware = model.job, model.hardware
    tables_and_curves = zip(job.tables, model.access.curves, strict=True)
    columns = sum(table.dim * (len(table.feature_names) if table.pooled else curve.lookups) for table, curve in tables_and_curves)
    tables = model.fast_bytes("fae" if placement == "fae_sharded" else placement, budget, fae_cold_tier(model))
    fast = tables + 4 * _DENSE_COPIES * job.dense_parameters + _ACTIVATIONS * 4 * job.batch_size * columns
    refused = ""
    if fast > (1 - _HEADROOM) * hardware.fast_bytes:
        refused = f"takes {_gib(fast)} of fast memory per rank, {_gib((1 - _HEADROOM) * hardware.fast_bytes)} can be used"
    elif hardware.device == "cuda" and host_bytes > _HOST_SHARE * hardware.host_bytes:
        refused = f"takes {_gib(host_bytes)} of the host's memory per rank, {_gib(_HOST_SHARE * hardware.host_bytes)} can be used"
    parts = work.seconds(hardware)
    return Option(placement, budget, work, step_seconds(work, hardware), parts, fast, host_bytes, refused, **more)


def _advice(model: CostModel, options: Sequence[Option]) -> tuple[bool, str]:
    """Whether FAE pays, and the sentence that says why or why not."""
    ours, stock = best(options, fae=True), best(options, fae=False)
    total = model.job.tables.total_bytes
    if ours is None:
        refused = next(option.refused for option in options if option.is_fae)
        return False, f"FAE does not fit here: the smallest budget {refused}; take more ranks, or smaller budgets."
    assert ours.coverage is not None and ours.hot_inputs is not None
    budget = f"{_gib(ours.budget_bytes)} per rank ({ours.budget_bytes / total:.1%} of the tables)"
    if stock is None:
        return True, f"No stock placement fits here; FAE does, with {budget} of fast memory: {_ms(ours)} a step."
    gain = stock.step_s / ours.step_s
    compared = f"the best it would do is {_ms(ours)} a step with {budget}, {stock.name} takes {_ms(stock)}"
    # Of as many bytes as all hot rows have together; copied to every rank they would save the same exchange.
    whole = _lookups_of(model, model.whole_tables(ours.budget_bytes / (model.job.ranks if ours.placement == "fae" else 1)))
    some_cold, one_memory = ours.coverage < _ALL, stock.placement == "hbm" or model.hardware.device == "cpu"
    if 1 - ours.coverage >= _ALIKE * (1 - whole) and (gain >= _PAYS or (some_cold and not one_memory)):
        why = "a table's rows are accessed nearly alike" if some_cold else "whole tables fit where hot rows do"
        return False, (
            f"FAE does not pay here, because {why}: hot rows take {ours.coverage:.1%} of the lookups, "
            f"whole tables of the same bytes {whole:.1%}, which TorchRec's own planner places ({compared})."
        )
    if gain >= _PAYS:
        return True, (
            f"FAE pays here: {gain:.2f} times as fast as {stock.name}, {_ms(ours)} against {_ms(stock)} a step, with {budget}; "
            f"{ours.hot_inputs:.1%} of the inputs and {ours.coverage:.1%} of the lookups are hot. A step is dominated by "
            f"{ours.dominated_by}."
        )
    if one_memory:
        why = "all tables fit into fast memory" if stock.placement == "hbm" else "the memory of a CPU is as fast for all rows"
    elif (most := _largest(options)).coverage >= 0.8 and most.hot_inputs < 0.05:
        lookups = sum(curve.lookups for curve in model.access.curves)
        hot = f"all are hot for {most.hot_inputs:.2%} of the samples only, though {most.coverage:.1%} of the ids are"
        why = f"a sample looks up {lookups:.0f} ids, and {hot}"
    else:
        why = f"a step is dominated by {ours.dominated_by}"
    return False, f"FAE does not pay here, because {why}; {compared}."


class _Hot(NamedTuple):
    """What a budget makes hot."""

    hot_inputs: float
    coverage: float


def _largest(options: Sequence[Option]) -> _Hot:
    """Of the largest budget of FAE that can be."""
    option = max((option for option in options if option.is_fae and not option.refused), key=lambda option: option.budget_bytes)
    return _Hot(option.hot_inputs or 0.0, option.coverage or 0.0)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _ms(option: Option) -> str:
    return f"{1000 * option.step_s:.2f} ms"


def budgets_of(total_bytes: int, shares: Sequence[float], least_bytes: int) -> list[int]:
    """Budgets in bytes from shares of all tables' bytes; those below `least_bytes`, which pinned tables take, are left out.

    Raises:
        BudgetError: none is left.
    """
    found = sorted({round(share * total_bytes) for share in shares}) or [0]
    kept = [budget for budget in found if budget >= least_bytes]
    if not kept:
        raise BudgetError(f"the largest budget is {found[-1]} bytes, tables that are always hot take {least_bytes}; give a larger one")
    return kept
