"""What `fae plan --what-if` shows: a text for the terminal, one picture, and a page with every option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes

from fae_torchrec.core.outlook import NAMES, Option, Outlook, best
from fae_torchrec.training.page import Cell, document, facts, figure, notes, section, sentences, table, tiles
from fae_torchrec.training.picture import INK, LINE, SERIES, Picture, log_shares
from fae_torchrec.training.report_table import bytes_text, percent_text

_COLOURS = {
    "fae": SERIES[1],
    "fae_sharded": SERIES[6],
    "uvm_caching": SERIES[2],
    "prefetch": SERIES[5],
    "by_table": SERIES[4],
    "hbm": SERIES[0],
    "uvm": SERIES[3],
    "host": SERIES[7],
}
_COLUMNS = 3  # panels beside each other
_LATE = 4.0  # times the winner's step, above which a level line is left out


def outlook_text(outlooks: Sequence[Outlook]) -> list[str]:
    """Lines for a terminal: of each number of ranks the best of every placement, and the advice."""
    lines: list[str] = []
    for outlook in outlooks:
        lines += ["", _title(outlook)]
        lines.append(
            f"  {'placement':<24} {'budget':>10} {'ms/step':>9} {'samples/s':>12} {'hot':>7} {'sent':>10} {'link':>10}  dominated by"
        )
        winner = outlook.best()
        for option in _bests(outlook):
            samples = outlook.model.job.batch_size * outlook.model.job.ranks / option.step_s
            hot = "" if option.hot_inputs is None else f"{percent_text(option.hot_inputs)} %"
            mark, budget = "*" if option is winner else " ", bytes_text(option.budget_bytes) if option.budget_bytes else ""
            told = f"does not fit: {option.refused}" if option.refused else option.dominated_by
            sent, link = bytes_text(option.work.sent_bytes), bytes_text(option.work.link_bytes)
            figures = f"{budget:>10} {1000 * option.step_s:>9.2f} {samples:>12,.0f} {hot:>7} {sent:>10} {link:>10}"
            lines.append(f"{mark} {option.name:<24} {figures}  {told}")
        lines.append(f"  {outlook.advice}")
    return lines[1:]


def outlook_picture(outlooks: Sequence[Outlook]) -> Picture:
    """Step time against the budget, a panel for each hardware and number of ranks; what does not fit is drawn hollow."""
    columns = min(_COLUMNS, len(outlooks))
    rows = -(-len(outlooks) // columns)

    def fill(axes: Sequence[Axes]) -> None:
        for axis, outlook in zip(axes, outlooks, strict=False):
            _panel(axis, outlook)
        for axis in axes[len(outlooks) :]:
            axis.set_visible(False)
        handles = {label: handle for axis in axes[: len(outlooks)] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        axes[0].figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)

    return Picture(fill, (4.1 * columns + 0.4, 3.2 * rows + 0.7), (rows, columns))


def outlook_page(outlooks: Sequence[Outlook], values: Mapping[str, Any]) -> str:
    """The page.

    Args:
        outlooks: what was predicted.
        values: created, command, access, tables, table_bytes.
    """
    said = [f"{escape(_title(outlook))}: {escape(outlook.advice)}" for outlook in outlooks]
    about = {
        "tables": f"{values['tables']:,}",
        "all rows": bytes_text(values["table_bytes"]),
        "batch per rank": f"{outlooks[0].model.job.batch_size:,}",
        "advised for": f"{sum(outlook.pays for outlook in outlooks)} of {len(outlooks)}",
    }
    sections = [
        section("In words", sentences(said)),
        section(
            "Step time against the budget",
            figure(
                outlook_picture(outlooks),
                "Predicted milliseconds of a step, the mean over an epoch's hot and cold batches. The budget is fast memory per rank for "
                "hot rows, whole tables or a cache, as a share of all tables' bytes. Hollow: does not fit. Dashed: no budget. On CUDA the "
                "device's time: in the shaded area the host, which queues the step meanwhile, takes longer.",
            ),
        ),
        *(section(_title(outlook), _options_table(outlook)) for outlook in outlooks),
        section(
            "How it is predicted",
            notes(
                {
                    "Work": "Rows, bytes by memory and link, ids and floating-point operations of a step are counted from the access "
                    "curves, by what TorchRec's and this package's code moves, and divided by the hardware's rates. Nothing overlaps but, "
                    "on CUDA, the host with the device.",
                    "Hot inputs": "The share of samples whose ids are all hot, which makes as large a share of the batches hot.",
                    "UVM caching": "An LRU cache of the budget's bytes; misses by Che's approximation.",
                    "Measured": "fae measure times this machine; --calibration takes measured steps.",
                }
            ),
        ),
        section("Made by", facts({key: " ".join(map(str, v)) if isinstance(v, list) else str(v) for key, v in _made(values).items()})),
    ]
    return document("What if: placements of embedding tables", "fae plan --what-if", tiles(about), sections)


def _made(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in ("created", "command", "access")}


def _title(outlook: Outlook) -> str:
    ranks = outlook.model.job.ranks
    return f"{ranks:,} x {outlook.model.hardware.name}" if ranks > 1 else outlook.model.hardware.name


def _bests(outlook: Outlook) -> list[Option]:
    """The fastest option of each placement, of those that fit if one does."""
    found = []
    for placement in NAMES:
        options = [option for option in outlook.options if option.placement == placement]
        if options:
            found.append(best(options) or min(options, key=lambda option: option.fast_bytes))
    return found


def _panel(axis: Axes, outlook: Outlook) -> None:
    total, winner = outlook.model.job.tables.total_bytes, outlook.best()
    shares = [option.budget_bytes / total for option in outlook.options if option.budget_bytes]
    latest = _LATE * min(_device_ms(outlook, option) for option in outlook.options if option.budget_bytes)
    for placement, name in NAMES.items():
        options = [option for option in outlook.options if option.placement == placement]
        colour = _COLOURS[placement]
        if len(options) == 1 and not options[0].budget_bytes:
            if _device_ms(outlook, options[0]) < latest:
                axis.axhline(_device_ms(outlook, options[0]), color=colour, linestyle="--", linewidth=1.2, label=name)
        elif options:
            points = [(option.budget_bytes / total, _device_ms(outlook, option)) for option in options]
            axis.plot(*zip(*points, strict=True), color=colour, label=name, linewidth=1.4)
            for refused in (True, False):
                some = [point for point, option in zip(points, options, strict=True) if bool(option.refused) == refused]
                if some:
                    axis.plot(
                        *zip(*some, strict=True),
                        color=colour,
                        linestyle="",
                        marker="o",
                        markersize=4,
                        fillstyle="none" if refused else "full",
                    )
    if winner is not None and winner.budget_bytes:
        axis.plot(winner.budget_bytes / total, _device_ms(outlook, winner), marker="o", markersize=10, fillstyle="none", color=INK)
    if outlook.model.hardware.device == "cuda":
        axis.axhspan(0, 1000 * outlook.model.hardware.step_s, color=LINE, alpha=0.5, linewidth=0, label="the host takes as long")
    log_shares(axis, shares)
    axis.set_ylim(bottom=0)
    axis.set_title(_title(outlook))
    axis.set_xlabel("budget per rank, of all tables' bytes")
    axis.set_ylabel("ms a step")


def _device_ms(outlook: Outlook, option: Option) -> float:
    """On CUDA without the host, which works beside the device: where it is the longer of both, the step takes as long as it."""
    if outlook.model.hardware.device == "cpu":
        return 1000 * option.step_s
    return 1000 * (sum(option.parts.values()) - option.parts["steps"])


def _options_table(outlook: Outlook) -> str:
    words = (
        "placement",
        "budget",
        "ms a step",
        "samples/s",
        "hot inputs",
        "hot lookups",
        "sent a step",
        "over the link",
        "fast memory",
        "",
    )
    head = [Cell(word, words=word in ("placement", "")) for word in words]
    winner, rows = outlook.best(), []
    job = outlook.model.job
    for option in outlook.options:
        told = f"does not fit: {option.refused}" if option.refused else option.dominated_by
        cells = [
            Cell(f"<b>{escape(option.name)}</b>" if option is winner else escape(option.name), words=True),
            Cell(bytes_text(option.budget_bytes) if option.budget_bytes else ""),
            Cell(f"{1000 * option.step_s:.2f}"),
            Cell(f"{job.batch_size * job.ranks / option.step_s:,.0f}"),
            Cell("" if option.hot_inputs is None else f"{percent_text(option.hot_inputs)} %"),
            Cell("" if option.coverage is None else f"{percent_text(option.coverage)} %"),
            Cell(bytes_text(option.work.sent_bytes)),
            Cell(bytes_text(option.work.link_bytes)),
            Cell(bytes_text(option.fast_bytes)),
            Cell(escape(told), words=True),
        ]
        rows.append((cells, ""))
    return table(head, rows)
