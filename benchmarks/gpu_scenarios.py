"""What benchmarks/gpu.py compares: workloads, placements, and the bytes that each placement takes where. Pure arithmetic, no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from fae_torchrec.data.criteo_shape import SPARSE_NAMES, criteo_shape
from fae_torchrec.data.published_shape import KEEP_ROWS

GIB = 2**30
STATE_BYTES = 4  # row-wise Adagrad's, of a row
SLOT_BYTES = 20  # FBGEMM's bookkeeping of a cached row
MAP_BYTES = 4  # FBGEMM's map from row to table, of every row behind a cache
INDEX_BYTES = 16  # ours, of a hot row
HEADROOM = 0.15  # of the card, for activations, gradients and what the driver keeps
HOST_SHARE = 0.65  # of the host's memory, for tables: batches and what Python keeps of caches lie there too


@dataclass(frozen=True)
class Workload:
    """One-hot samples of Criteo's shape.

    Attributes:
        dim: columns of every table.
        exponent: of the Zipf law that every table's accesses follow, independently; 0 is uniform.
        batch_size: samples.
        budget: fast memory for rows, as a share of all tables' bytes.
        table_bytes: of all tables, weights and optimizer state.
    """

    dim: int = 128
    exponent: float = 1.05
    batch_size: int = 16_384
    budget: float = 0.01
    table_bytes: float = 20e9

    @property
    def name(self) -> str:
        """In words."""
        return f"D={self.dim}, {self.law}, batch {self.batch_size:,}, {self.budget:.1%} in HBM"

    @property
    def law(self) -> str:
        """The law of the accesses, in words."""
        return f"Zipf {self.exponent:g}" if self.exponent else "uniform"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with its optimizer state."""
        return 4 * self.dim + STATE_BYTES

    @property
    def rows(self) -> dict[str, int]:
        """Rows by feature: Criteo Kaggle's, the large tables scaled together so that all take `table_bytes`."""
        published = criteo_shape("kaggle").published_rows
        small = sum(rows for rows in published if rows <= KEEP_ROWS)
        scale = (self.table_bytes / self.row_bytes - small) / (sum(published) - small)
        return {name: rows if rows <= KEEP_ROWS else round(rows * scale) for name, rows in zip(SPARSE_NAMES, published, strict=True)}

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(self.rows.values())

    @property
    def budget_bytes(self) -> int:
        """Fast memory for rows: hot ones, cached ones, whole tables."""
        return round(self.budget * self.num_rows * self.row_bytes)


@dataclass(frozen=True)
class Placement:
    """Where the rows lie, and which pipeline trains.

    Attributes:
        name: for tables and pictures.
        kind: "hbm", "uvm", "caching", "host" (stock TorchRec) or "fae".
        pipeline: "sparse_dist" and "prefetch" are TorchRec's, "fae" ours, "none" a plain loop.
        cold: of "fae": "uvm", "uvm_caching" or "host".
        cache_share: of "fae": the part of the budget for cold rows on their way: the cache of uvm_caching, or with uvm a staging area.
        whole_rows: of "caching": tables of at most so many rows lie whole in HBM, the rest of the budget caches; what is tuned.
        lookahead: of "fae": batches.
        feed: "resident" (batches made before), "stream" or "store".
        split_ahead: of "fae": whether the loader splits ids by tier, or the device does.
    """

    name: str
    kind: str
    pipeline: str = "sparse_dist"
    cold: str = ""
    cache_share: float = 0.0
    whole_rows: int = 0
    lookahead: int = 2
    feed: str = "resident"
    split_ahead: bool = True

    @property
    def staged(self) -> bool:
        """Whether cold rows are copied beside the hot ones for their step."""
        return self.kind == "fae" and self.cold != "uvm_caching" and self.cache_share > 0

    def model_key(self, workload: Workload) -> tuple[object, ...]:
        """What placements on workloads have in common that can be trained by one model."""
        tables: tuple[object, ...] = (self.kind, workload.dim, workload.table_bytes)
        if self.kind == "caching":
            return *tables, self.whole_rows, self.pipeline, workload.budget
        return (*tables, self.cold, self.cache_share, workload.budget, workload.exponent) if self.kind == "fae" else tables

    def whole_bytes(self, workload: Workload) -> int:
        """Bytes of the tables that lie whole in HBM under "caching"."""
        return sum(rows * workload.row_bytes for rows in workload.rows.values() if rows <= self.whole_rows)

    def memory(self, workload: Workload) -> Memory:
        """The bytes of the tables, by where they lie; of "fae" at most, for a hot set may be smaller than its budget.

        FBGEMM keeps the row-wise state of UVM tables in HBM.
        """
        rows, weights = workload.num_rows, 4 * workload.dim
        if self.kind == "hbm":
            return Memory(hbm=rows * workload.row_bytes)
        if self.kind == "uvm":
            return Memory(hbm=rows * STATE_BYTES, managed=rows * weights)
        if self.kind == "host":
            return Memory(host=rows * workload.row_bytes)
        if self.kind == "caching":
            cached = sum(count for count in workload.rows.values() if count > self.whole_rows)
            return Memory(hbm=workload.budget_bytes + cached * (STATE_BYTES + MAP_BYTES), managed=cached * weights)
        index = workload.budget_bytes // workload.row_bytes * INDEX_BYTES
        if self.cold == "host":
            return Memory(hbm=workload.budget_bytes + index, host=rows * workload.row_bytes)
        beside = STATE_BYTES + (MAP_BYTES if self.cold == "uvm_caching" else 0)
        return Memory(hbm=workload.budget_bytes + index + rows * beside, managed=rows * weights)


@dataclass(frozen=True)
class Memory:
    """Bytes of the tables of one placement."""

    hbm: int = 0
    managed: int = 0
    host: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.hbm + other.hbm, self.managed + other.managed, self.host + other.host)

    def fits(self, machine: Machine) -> bool:
        """Whether the card holds what lies in HBM and has as much free as is managed (more can hang it), and the host the rest."""
        on_host = self.managed + self.host
        return self.hbm + self.managed <= (1 - HEADROOM) * machine.card_bytes and on_host <= HOST_SHARE * machine.host_bytes


@dataclass(frozen=True)
class Machine:
    """The memory there is.

    Attributes:
        card_bytes: of the GPU.
        host_bytes: of the host.
    """

    card_bytes: int
    host_bytes: int


HBM = Placement("all-HBM", "hbm")
UVM = Placement("UVM", "uvm")
CACHING = Placement("UVM caching", "caching")
PREFETCH = Placement("UVM caching + prefetch", "caching", "prefetch")
HOST = Placement("host", "host", "none")
FAE = Placement("FAE", "fae", "fae", "uvm", cache_share=0.2)  # `staged` gives the share that a workload needs
FAE_UVM = Placement("FAE, UVM", "fae", "fae", "uvm")
FAE_PREFETCH = Placement("FAE, prefetch", "fae", "fae", "uvm_caching", cache_share=0.25)
FAE_HOST = Placement("FAE, host", "fae", "fae", "host")
FAE_AHEAD = replace(FAE, name="FAE, lookahead 5", lookahead=5)
FAE_STREAM = replace(FAE, name="FAE, streamed", feed="stream")
FAE_STORE = replace(FAE, name="FAE, from a store", feed="store")
FAE_ON_DEVICE = replace(FAE_UVM, name="FAE, UVM, split on the device", split_ahead=False)
FAE_UNFETCHED = replace(FAE_PREFETCH, name="FAE, caching without prefetch", pipeline="sparse_dist")

WHOLE_ROWS = (20_000, 200_000)  # the grid of "UVM caching" beside caching everything: small tables whole in HBM
STAGING_SHARES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 0.85)
STAGING_MARGIN = 1.1


def tuned(workload: Workload) -> list[Placement]:
    """Variants of the rival, of which the best is taken."""
    whole = [replace(PREFETCH, name=f"{PREFETCH.name}, tables of {rows:,} rows whole", whole_rows=rows) for rows in WHOLE_ROWS]
    return [placement for placement in whole if placement.whole_bytes(workload) < 0.8 * workload.budget_bytes]


def staged(placement: Placement, workload: Workload) -> Placement:
    """The placement, its staging area such that each half holds the cold rows of a batch; the rest of the budget is for hot rows."""
    if not placement.staged:
        return placement
    for share in STAGING_SHARES:
        half = share * workload.budget_bytes / 2 / workload.row_bytes
        hot, coverage = hot_samples(workload, (1 - share) * workload.budget_bytes)
        cold_ids = workload.batch_size * len(workload.rows) * (1 - coverage) / (1 - hot)
        if half > STAGING_MARGIN * cold_ids:
            break
    return replace(placement, cache_share=share)


def hot_samples(workload: Workload, hot_bytes: float) -> tuple[float, float]:
    """What the most accessed rows of all tables, as many as the bytes hold, would give: the share of hot samples, and that of hot ids."""
    exponent, rows = workload.exponent, list(workload.rows.values())
    masses = [_mass(count, exponent) for count in rows]

    def hot_rows(chance: float) -> list[float]:
        """By table, rows whose share of its accesses is above `chance`."""
        if not exponent:
            return [count if count < 1 / chance else 0 for count in rows]
        return [min(count, (1 / (mass * chance)) ** (1 / exponent)) for count, mass in zip(rows, masses, strict=True)]

    low, high = 1e-12, 1.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        fits = sum(hot_rows(middle)) * workload.row_bytes <= hot_bytes
        low, high = (low, middle) if fits else (middle, high)  # `high` always fits
    hot = [_mass(count, exponent) / mass for count, mass in zip(hot_rows(high), masses, strict=True)]
    return prod(hot), sum(hot) / len(hot)


def _mass(rows: float, exponent: float) -> float:
    """The sum of rank ** -exponent over the first ranks; an integral beyond the first 1,000."""
    first = int(min(rows, 1000))
    exact: float = sum(rank**-exponent for rank in range(1, first + 1))
    power = 1 - exponent
    return exact + (((rows + 0.5) ** power - (first + 0.5) ** power) / power if rows > first + 1 else 0.0)


BASE = Workload()
BUDGETS = (0.1, 0.005, 0.05, 0.02, 0.01)
EXPONENTS = (0.8, 1.05, 1.2, 0.0)
BATCH_SIZES = (4_096, 16_384, 65_536)
DIMS = (64, 128)


@dataclass(frozen=True)
class Comparison:
    """Placements measured side by side on one workload.

    Attributes:
        workload: the samples.
        placements: all-HBM first, what the others are held against.
        part: in words, where there are several comparisons on the workload.
    """

    workload: Workload
    placements: tuple[Placement, ...]
    part: str = ""

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.workload.name}, {self.part}" if self.part else self.workload.name


USUAL = (HBM, UVM, PREFETCH, FAE)
VARIANTS = (HBM, FAE_UVM, FAE_ON_DEVICE, FAE_PREFETCH, FAE_UNFETCHED, CACHING, HOST, FAE_HOST)


def comparisons(*, cross: bool = False, base: Workload = BASE) -> list[Comparison]:
    """The matrix: the base workload, one thing varied at a time, and on the way all other placements; or, with `cross`, all combinations.

    In an order in which one comparison finds as many models as can be from those before.
    """
    if cross:
        crossed = [
            replace(base, dim=dim, exponent=exponent, batch_size=size, budget=budget)
            for dim, exponent, size, budget in product(DIMS, EXPONENTS, BATCH_SIZES, BUDGETS)
        ]
        return [_comparison(workload, USUAL) for workload in crossed]
    sizes = [replace(base, batch_size=size) for size in BATCH_SIZES]
    laws = [replace(base, exponent=exponent) for exponent in EXPONENTS]
    budgets = [replace(base, budget=budget) for budget in BUDGETS]
    dims = [replace(base, dim=dim) for dim in DIMS]
    return [
        _comparison(base, (*USUAL, *tuned(base), FAE_AHEAD, FAE_STREAM, FAE_STORE)),
        *(_comparison(workload, USUAL) for workload in (*sizes, *laws) if workload != base),
        _comparison(base, VARIANTS, "other placements"),
        *(_comparison(workload, (HBM, PREFETCH, FAE)) for workload in budgets if workload != base),
        *(_comparison(workload, USUAL) for workload in dims if workload != base),
    ]


def _comparison(workload: Workload, placements: Sequence[Placement], part: str = "") -> Comparison:
    return Comparison(workload, tuple(staged(placement, workload) for placement in placements), part)


def groups(comparison: Comparison, machine: Machine) -> list[list[Placement]]:
    """The placements cut so that each group's models fit on the machine together; all-HBM, what all are held against, is in every group.

    Raises:
        ValueError: a placement does not fit beside all-HBM.
    """
    first, *others = comparison.placements
    cut: list[list[Placement]] = [[first]]
    for placement in others:
        if not taken([*cut[-1], placement], comparison.workload).fits(machine):
            cut.append([first])
        cut[-1].append(placement)
        memory = taken(cut[-1], comparison.workload)
        if not memory.fits(machine):
            raise ValueError(f"{placement.name} on {comparison.name} takes {memory} beside all-HBM; there is {machine}")
    return cut


def taken(placements: Sequence[Placement], workload: Workload) -> Memory:
    """What the models of these placements take together."""
    models = {placement.model_key(workload): placement.memory(workload) for placement in placements}
    return sum(models.values(), Memory())


def matrix_text(found: Sequence[Comparison], machine: Machine) -> str:
    """The matrix with the bytes of every placement, for people."""
    card, host = machine.card_bytes / GIB, machine.host_bytes / GIB
    lines = [f"GiB of the tables of each placement; the card has {card:.0f} GiB, {HEADROOM:.0%} stay free; the host has {host:.0f} GiB"]
    for comparison in found:
        workload = comparison.workload
        lines += ["", f"{comparison.name} ({workload.num_rows:,} rows, budget {workload.budget_bytes / 2**20:,.0f} MiB)"]
        for number, group in enumerate(groups(comparison, machine)):
            for placement in group if not number else group[1:]:
                memory = placement.memory(workload)
                parts = (f"{part} {value / GIB:6.2f}" for part, value in vars(memory).items())
                lines.append(f"  {placement.name:58}" + "  ".join(parts))
            together = taken(group, workload)
            lines.append(f"  {'measured together':58}" + "  ".join(f"{part} {value / GIB:6.2f}" for part, value in vars(together).items()))
    return "\n".join(lines)
