"""The frame of all pictures: one drawing, two formats; its axes and short numbers."""

from __future__ import annotations

import io

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from fae_torchrec.training.picture import COLOURS_ON_WHITE, INK, LINE, SERIES, SOFT, Picture, log_shares, short_count, short_percent


def filled(colour: str) -> Picture:
    """A picture that is mostly one colour."""

    def fill(axes: list[Axes]) -> None:
        axes[0].bar([0], [1], width=1, color=colour)
        axes[0].axis("off")

    return Picture(fill, (1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "colour"), [("s0", SERIES[0]), ("s7", SERIES[7]), ("ink", INK), ("soft", SOFT), ("line", LINE)])
def test_a_colour_is_the_pages_or_the_one_on_white(name: str, colour: str) -> None:
    picture = filled(colour)
    assert f"var(--{name})" in picture.svg()
    pixels = imread(io.BytesIO(picture.png()), format="png")
    middle, corner = pixels[len(pixels) // 2, len(pixels) // 2, :3], pixels[0, 0, :3]
    assert "#" + "".join(f"{round(part * 255):02x}" for part in middle.tolist()) == COLOURS_ON_WHITE[name]
    assert corner.tolist() == [1, 1, 1]


@pytest.mark.parametrize("shares", [[0.03], [1.0], [0.02, 0.021], [0.001, 0.04], [1e-6, 1.0]])
def test_a_log_axis_has_ticks_and_holds_its_shares(shares: list[float]) -> None:
    axis = Figure().add_subplot()
    axis.plot(shares, shares, marker="o")
    log_shares(axis, shares)
    low, high = axis.get_xlim()
    assert low < min(shares) and max(shares) < high
    assert sum(low <= tick <= high for tick in axis.xaxis.get_majorticklocs()) >= 1


def test_short_numbers() -> None:
    assert [short_count(value) for value in (0, 0.123, 7, 1500, 33_800_000, 2.5e9)] == ["0", "0.12", "7", "1,500", "33.8 M", "2.5 G"]
    assert [short_percent(share) for share in (0.002, 0.5, 0.994, 0.999, 1.0)] == ["0.2%", "50%", "99%", "100%", "100%"]


def test_a_title_lies_above_all_and_takes_room_of_its_own() -> None:
    drawn: list[Axes] = []

    def fill(axes: list[Axes]) -> None:
        drawn.append(axes[0])
        axes[0].plot([0, 1], [0, 1], label="a line")
        axes[0].figure.legend(loc="outside upper left")

    plain = Picture(fill, (4, 3))  # type: ignore[arg-type]
    titled = plain.titled("synthetic samples")
    sizes = [imread(io.BytesIO(picture.png()), format="png").shape for picture in (plain, titled)]
    assert sizes[1][0] > sizes[0][0] and sizes[1][1] == sizes[0][1]
    panel = drawn[1]
    figure = panel.get_figure(root=True)
    (title,), (legend,) = figure.subfigs[0].texts, figure.subfigs[1].legends
    assert title.get_text() == "synthetic samples" and "synthetic samples" in titled.svg() and "synthetic samples" not in plain.svg()
    lines = title.get_window_extent(), legend.get_window_extent(), panel.get_window_extent()
    assert lines[0].y0 > lines[1].y1 > lines[1].y0 > lines[2].y1
    assert titled._repr_png_() == titled.png(), "a notebook shows the picture that a page has"
