"""Line and bar charts by matplotlib, as SVG text for a page: no script, the same bytes for the same numbers.

matplotlib draws in stand-in colours, which become CSS variables, so that one drawing serves light and dark pages; its
text stays text. ``palette.CSS`` belongs once on a page that shows charts inline; `standalone` puts it into the drawing
itself, for a file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

from confu.pages.palette import CSS, LIGHT

DASHES: tuple[Any, ...] = ("solid", (0, (4, 2)), (0, (1, 2)), (0, (5, 2, 1, 2)))
MAX_SERIES = 12  # more than that nobody can tell apart

WIDTH, LEFT, RIGHT, TOP, PLOT_HEIGHT, LINE = 380, 44, 14, 30, 190, 18  # pixels
CHARACTER = 7.2  # width of a character of the 12 px type, on the wide side
NUMBER = 44  # room for the numbers behind bars
BAR, STACK, HEADING, BETWEEN = 11, 14, 17, 9  # heights in a bar chart
LONGEST_NAME = 48  # characters in a legend
DOTTED = 25  # points of a line that are shown one by one

# Stand-ins: colours that become variables.
INK, SOFT, GRID, PAGE = "#010101", "#020202", "#030303", "#040404"
COLOURS = [f"#0501{number:02x}" for number in range(len(LIGHT))]  # of the series
VARIABLES = {INK: "--ink", SOFT: "--soft", GRID: "--grid", PAGE: "--page"}
VARIABLES |= {colour: f"--series-{number}" for number, colour in enumerate(COLOURS)}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "text.color": INK,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 0,
    "xtick.major.pad": 7,
    "ytick.major.size": 0,
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Series:
    """One line; points in order of x. A line of few points shows each as a dot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(key: str, title: str, x_label: str, series: Sequence[Series]) -> str:
    """An ``<svg>`` of one or more lines over a common x axis that starts at zero.

    ``key`` is unique on the page and names the title and the description, which says where every line begins and ends.
    A series keeps its colour from chart to chart by its place among ``series``; one without points is not shown. At
    least one point is needed.
    """
    shown = [(number, line) for number, line in enumerate(series) if line.x]
    names = [(number, line.name) for number, line in shown] if len(series) > 1 else []
    with style.context(["default", STYLE]):  # whatever the user's own style is
        figure, axes = _drawing(title, x_label, left=LEFT, right=RIGHT, height=PLOT_HEIGHT, names=names, bars=False)
        for number, line in shown:
            (drawn,) = axes.plot(
                list(line.x),
                list(line.y),
                color=_colour(number),
                linestyle=DASHES[number % len(DASHES)],
                marker="o" if len(line.x) <= DOTTED else None,
                markersize=5.5,
                clip_on=False,
            )
            drawn.set_gid(f"line-{number}")
        x_values = [x for _, line in shown for x in line.x]
        y_values = [y for _, line in shown for y in line.y]
        whole = all(float(x).is_integer() for x in x_values)  # what is counted has no halves
        axes.set_xlim(0, max(x_values) or 1)
        axes.xaxis.set_major_locator(_round_numbers(integer=whole))
        low, high = min(y_values), max(y_values)
        margin = 0 if high - low > 1e-9 * abs(high) else 0.1 * max(abs(high), 0.5)  # a flat line lies in the middle
        ticks = _round_numbers().tick_values(low - margin, high + margin)
        axes.set_ylim(ticks[0], ticks[-1])
        axes.set_yticks(ticks)
        _write_numbers(axes.xaxis, max(x_values))
        _write_numbers(axes.yaxis, max(abs(low), abs(high)))
        axes.grid(axis="y")
        return _svg(figure, key, title, _description([line for _, line in shown], x_label))


@dataclass(frozen=True)
class Bars:
    """One bar in every group; None where there is none. Intervals are drawn as whiskers."""

    name: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] = ()


def bar_chart(
    key: str,
    title: str,
    x_label: str,
    groups: Sequence[str],
    series: Sequence[Bars],
    *,
    digits: int = 2,
    stacked: bool = False,
    mark: float | None = None,
) -> str:
    """An ``<svg>`` of horizontal bars from zero, side by side or ``stacked``, under the name of their group, with a
    dashed line at ``mark`` and the numbers in a column at the right. ``key`` and the colours are as in `line_chart`; at
    least one value is needed."""
    values = [[bars.values[group] for bars in series] for group in range(len(groups))]
    filled = [number for number, row in enumerate(values) if any(value is not None for value in row)]
    counts = [sum(value is not None for value in values[group]) for group in filled]
    tall = [HEADING + (STACK + 3 if stacked else count * (BAR + 3)) + BETWEEN for count in counts]
    longest = [sum(v or 0 for v in row) if stacked else max(v or 0 for v in row) for row in values]
    ends = [end for bars in series for found in bars.intervals if found for end in found]
    ticks = _round_numbers().tick_values(0, max([*longest, *ends, mark or 0]) or 1)
    high = ticks[-1]
    names = [(number, bars.name) for number, bars in enumerate(series)] if len(series) > 1 else []
    with style.context(["default", STYLE]):  # whatever the user's own style is
        figure, axes = _drawing(title, x_label, left=0, right=NUMBER, height=sum(tall), names=names, bars=True)
        axes.set_xlim(0, high)
        axes.set_ylim(sum(tall), 0)  # pixels, downwards
        top = 0.0
        for group, height in zip(filled, tall, strict=True):
            heading = axes.text(0, top + HEADING / 2, groups[group], va="center")
            heading.set_bbox({"facecolor": PAGE, "edgecolor": "none", "pad": 1})  # no line strikes it through
            _draw_group(axes, series, group, top + HEADING, high, digits, stacked)
            top += height
        if mark is not None:
            axes.axvline(mark, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5).set_gid("mark")
        axes.set_yticks([])
        axes.set_xticks(ticks)
        axes.get_xticklabels()[0].set_horizontalalignment("left")  # at the edge of the drawing
        _write_numbers(axes.xaxis, high)
        axes.grid(axis="x")
        spoken = "; ".join(
            f"{group}: "
            + ", ".join(f"{b.name} {v:.{digits}f}" for b, v in zip(series, row, strict=True) if v is not None)
            for group, row in zip(groups, values, strict=True)
        )
        return _svg(figure, key, title, f"{x_label}. {spoken}.")


def standalone(svg: str) -> str:
    """The drawing as a file of its own: it brings its style, size and background."""
    style = f"<style>{CSS}svg{{background:var(--page)}}</style>"
    return svg.replace(' role="img"', f' width="{2 * WIDTH}" role="img"', 1).replace("<title", f"{style}<title", 1)


def _drawing(
    title: str, x_label: str, *, left: int, right: int, height: float, names: Sequence[tuple[int, str]], bars: bool
) -> tuple[Figure, Axes]:
    """A figure of one pair of axes that many pixels high, with room for their labels, and a legend of these series."""
    columns = 1
    if names:
        names = [(number, _shortened(name)) for number, name in names]
        widest = max(len(name) for _, name in names)
        columns = max(1, min(len(names), int(WIDTH / (46 + widest * CHARACTER))))
    legend = LINE * -(-len(names) // columns)
    total = TOP + height + 2 * LINE + 6 + legend
    figure = Figure(figsize=(WIDTH / 72, total / 72), dpi=72)  # a point is a pixel
    figure.patch.set_visible(False)
    below = total - TOP - height
    axes = figure.add_axes((left / WIDTH, below / total, (WIDTH - left - right) / WIDTH, height / total))
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    figure.text(0, (total - 14) / total, title, fontsize=14, fontweight=700)
    figure.text(left / WIDTH, (legend + 8) / total, x_label, color=SOFT)
    for place, (number, name) in enumerate(names):
        x = place % columns * WIDTH / columns
        y = legend - LINE * (place // columns) - LINE / 2
        if bars:
            sample: Any = Rectangle((x / WIDTH, (y - 5) / total), 28 / WIDTH, 11 / total, facecolor=_colour(number))
        else:
            sample = Line2D([x / WIDTH, (x + 28) / WIDTH], [y / total] * 2, color=_colour(number))
            sample.set_linestyle(DASHES[number % len(DASHES)])
        figure.add_artist(sample)
        figure.text((x + 34) / WIDTH, y / total, name, va="center").set_gid(f"legend-{place}")
    return figure, axes


def _draw_group(
    axes: Axes, series: Sequence[Bars], group: int, y: float, high: float, digits: int, stacked: bool
) -> None:
    """The bars of a group one below the other, or one behind the other with their sum."""
    total, height = 0.0, STACK if stacked else BAR
    numbers = {"x": high * WIDTH / (WIDTH - NUMBER), "ha": "right", "va": "center", "color": SOFT}
    for number, bars in enumerate(series):
        value = bars.values[group]
        if value is None:
            continue
        (bar,) = axes.barh(y, value, height, left=total, align="edge", color=_colour(number))
        bar.set_gid(f"bar-{number}-{group}")
        if stacked:
            total += value
            continue
        if bars.intervals and (interval := bars.intervals[group]):
            low, top = interval
            axes.hlines(y + height / 2, low, top, colors=INK, linewidths=1.4).set_gid(f"whisker-{number}-{group}")
            axes.vlines([low, top], y + 2, y + height - 2, colors=INK, linewidths=1.4)
        axes.text(y=y + height / 2, s=f"{value:.{digits}f}", **numbers)
        y += height + 3
    if stacked:
        axes.text(y=y + height / 2, s=f"{total:.{digits}f}", **numbers)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _round_numbers(*, integer: bool = False) -> MaxNLocator:
    return MaxNLocator(6, steps=[1, 2, 5, 10], integer=integer)


def _write_numbers(axis: Any, largest: float) -> None:
    """Thousands and millions by letter, all else as it is."""
    plain = ScalarFormatter(useOffset=False)
    plain.set_scientific(False)
    axis.set_major_formatter(EngFormatter(sep="") if largest >= 2000 else plain)


def _description(series: Sequence[Series], x_label: str) -> str:
    ends = (
        f"{line.name}: from {line.y[0]:.4g} at {line.x[0]:,.0f} to {line.y[-1]:.4g} at {line.x[-1]:,.0f}"
        for line in series
    )
    return f"Over {x_label}. {'; '.join(ends)}."


def _svg(figure: Figure, key: str, title: str, description: str) -> str:
    """The drawing for a page: colours by variable, the page's own type, ids of its own, and a head that is read out."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    height = round(figure.get_figheight() * 72)
    body = file.getvalue().partition("<svg")[2].partition(">")[2]
    body = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub("|".join(VARIABLES), lambda found: f"var({VARIABLES[found[0]]})", body)
    body = re.sub(r" font-family: [^;\"]*;", "", body)  # that of the page
    body = re.sub(r' transform="rotate\(-?0 [^"]*"', "", body)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{key}-", body)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="chart" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{key}-title {key}-description">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-description">{escape(description)}</desc>'
    )
    return head + body.strip()
