"""Line and bar charts as SVG text: no plotting library, no script, the same bytes for the same numbers.

Colours are CSS variables, so that one drawing serves light and dark pages. ``CSS`` belongs once on a page that shows
charts inline; `standalone` puts it into the drawing itself, for a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# Contrast with the background is 4.5 or more in either scheme; a dash pattern says the same without colour.
LIGHT = ("#0065a3", "#b34700", "#00734f", "#9b2d7f", "#7a5900", "#5b5b5b", "#b3263a")
DARK = ("#62b5f0", "#ff9c63", "#3fcf9f", "#ef9ad6", "#e3bf4b", "#b5b5b5", "#ff8f96")
DASHES = ("none", "7 3", "2 3", "9 3 2 3")
MAX_SERIES = 12  # more than that nobody can tell apart

WIDTH, LEFT, RIGHT, TOP, PLOT_HEIGHT, LINE = 380, 44, 14, 34, 190, 18
CHARACTER = 7.2  # width of a character of the 12 px type, on the wide side


def _variables(colours: Sequence[str], page: str, ink: str, soft: str, grid: str) -> str:
    series = "".join(f"--series-{i}:{colour};" for i, colour in enumerate(colours))
    return f"--page:{page};--ink:{ink};--soft:{soft};--grid:{grid};{series}"


CSS = (
    f":root{{{_variables(LIGHT, '#ffffff', '#1c1f23', '#53585f', '#dfe2e6')}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(DARK, '#16191d', '#e8eaed', '#a9b0b8', '#3a4048')}}}}}"
    ".chart{font:12px system-ui,sans-serif;fill:var(--ink)}"
    ".chart .title{font-size:14px;font-weight:600}.chart .soft{fill:var(--soft)}"
    ".chart .value{fill:var(--soft);paint-order:stroke;stroke:var(--page);stroke-width:3px}"
    ".chart .grid{stroke:var(--grid);stroke-width:1}"
    ".chart .line{fill:none;stroke-width:1.8;stroke-linejoin:round}"
    ".chart .whisker{stroke:var(--ink);stroke-width:1.4;fill:none}"
    ".chart .mark{stroke:var(--ink);stroke-width:1;stroke-dasharray:4 3}"
)


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
    x_high = max(x for _, line in shown for x in line.x) or 1
    y_values = [y for _, line in shown for y in line.y]
    x_ticks, y_ticks = _ticks(0, x_high), _ticks(min(y_values), max(y_values), enclosing=True)
    if all(float(x).is_integer() for _, line in shown for x in line.x):  # what is counted has no halves
        x_ticks = [tick for tick in x_ticks if tick.is_integer()]
    bottom = TOP + PLOT_HEIGHT

    def px(x: float) -> float:
        return LEFT + x / x_high * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * PLOT_HEIGHT

    parts = [f'<text class="title" x="0" y="14">{escape(title)}</text>']
    for tick, text in zip(y_ticks, _tick_texts(y_ticks), strict=True):
        y = f"{py(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 6}" y="{y}" dy="4" text-anchor="end">{text}</text>')
    for tick, text in zip(x_ticks, _tick_texts(x_ticks), strict=True):
        anchor = "end" if px(tick) + len(text) * CHARACTER / 2 > WIDTH else "middle"
        x = f"{px(tick) if anchor == 'middle' else WIDTH:.1f}"
        parts.append(f'<text class="soft" x="{x}" y="{bottom + LINE}" text-anchor="{anchor}">{text}</text>')
    parts.append(f'<text class="soft" x="{LEFT}" y="{bottom + 2 * LINE}">{escape(x_label)}</text>')
    for number, line in shown:
        parts += _line(line, number, px, py)
    legend, height = [], bottom + 2 * LINE + 8
    if len(series) > 1:
        legend, height = _legend([(line.name, _line_sample(number)) for number, line in shown], bottom + 3 * LINE + 4)
    head = _head(key, title, _description([line for _, line in shown], x_label), height)
    return "\n".join([head, *parts, *legend, "</svg>"])


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
    dashed line at ``mark``. ``key`` and the colours are as in `line_chart`; at least one value is needed."""
    ends = [end for bars in series for found in bars.intervals if found for end in found]
    values = [[bars.values[group] for bars in series] for group in range(len(groups))]
    filled = [number for number, row in enumerate(values) if any(value is not None for value in row)]
    longest = [sum(v or 0 for v in row) if stacked else max(v or 0 for v in row) for row in values]
    ticks = _ticks(0, max([*longest, *ends, mark or 0]) or 1, enclosing=True)
    right = WIDTH - 44  # room for the number behind the longest bar

    def px(x: float) -> float:
        return x / ticks[-1] * right

    marks, y = [], TOP - 6.0
    for number in filled:
        marks.append(f'<text x="0" y="{y + 12:.1f}">{escape(groups[number])}</text>')
        drawn, y = (_stack if stacked else _side_by_side)(series, number, y + 17, px, digits)
        marks += drawn
        y += 9
    for tick, text in zip(ticks, _tick_texts(ticks), strict=True):
        x = f"{px(tick):.1f}"
        anchor = "start" if tick == 0 else "middle"
        marks.insert(0, f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP - 8}" y2="{y:.1f}"/>')
        marks.append(f'<text class="soft" x="{x}" y="{y + LINE - 3:.1f}" text-anchor="{anchor}">{text}</text>')
    if mark is not None:
        marks.append(f'<line class="mark" x1="{px(mark):.1f}" x2="{px(mark):.1f}" y1="{TOP - 8}" y2="{y:.1f}"/>')
    marks.sort(key=lambda part: part.startswith("<text"))  # which the others must not strike through
    marks.append(f'<text class="soft" x="0" y="{y + 2 * LINE - 3:.1f}">{escape(x_label)}</text>')
    names = [(bars.name, _bar_sample(number)) for number, bars in enumerate(series)]
    legend, height = _legend(names, round(y + 3 * LINE)) if len(series) > 1 else ([], round(y + 2 * LINE + 6))
    spoken = "; ".join(
        f"{group}: " + ", ".join(f"{b.name} {v:.{digits}f}" for b, v in zip(series, row, strict=True) if v is not None)
        for group, row in zip(groups, values, strict=True)
    )
    head = _head(key, title, f"{x_label}. {spoken}.", height)
    return "\n".join([head, f'<text class="title" x="0" y="14">{escape(title)}</text>', *marks, *legend, "</svg>"])


def standalone(svg: str) -> str:
    """The drawing as a file of its own: it brings its style, size and background."""
    style = f"<style>{CSS}svg{{background:var(--page)}}</style>"
    return svg.replace(' role="img"', f' width="{2 * WIDTH}" role="img"', 1).replace("<title", f"{style}<title", 1)


def _head(key: str, title: str, description: str, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-labelledby="{key}-title {key}-description"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-description">{escape(description)}</desc>'
    )


def _side_by_side(
    series: Sequence[Bars], group: int, y: float, px: Callable[[float], float], digits: int
) -> tuple[list[str], float]:
    """The bars of a group one below the other, and where they end."""
    parts = []
    for number, bars in enumerate(series):
        value = bars.values[group]
        if value is None:
            continue
        parts.append(f'<rect style="fill:{_colour(number)}" x="0" y="{y:.1f}" width="{px(value):.1f}" height="11"/>')
        interval = bars.intervals[group] if bars.intervals else None
        if interval:
            low, high, middle = px(interval[0]), px(interval[1]), y + 5.5
            parts.append(
                f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 3:.1f}v6'
                f'M{high:.1f} {middle - 3:.1f}v6"/>'
            )
        end = max(px(value), px(interval[1]) if interval else 0)
        parts.append(f'<text class="value" x="{end + 5:.1f}" y="{y + 10:.1f}">{value:.{digits}f}</text>')
        y += 14
    return parts, y


def _stack(
    series: Sequence[Bars], group: int, y: float, px: Callable[[float], float], digits: int
) -> tuple[list[str], float]:
    """The bars of a group one behind the other, with their sum, and where they end."""
    parts, total = [], 0.0
    for number, bars in enumerate(series):
        value = bars.values[group] or 0.0
        parts.append(
            f'<rect style="fill:{_colour(number)}" x="{px(total):.1f}" y="{y:.1f}" width="{px(value):.1f}" '
            f'height="14"><title>{escape(bars.name)}: {value:.{digits}f}</title></rect>'
        )
        total += value
    parts.append(f'<text class="value" x="{px(total) + 5:.1f}" y="{y + 11:.1f}">{total:.{digits}f}</text>')
    return parts, y + 17


def _line(line: Series, number: int, px: Callable[[float], float], py: Callable[[float], float]) -> list[str]:
    points = [(px(x), py(y)) for x, y in zip(line.x, line.y, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline class="line" style="{_style(number)}" points="{path}"/>']
    if len(points) <= 25:
        dot = f'<circle style="fill:{_colour(number)}" r="3"'
        parts += [
            f'{dot} cx="{x:.1f}" cy="{y:.1f}"><title>{escape(line.name)}: {value:.4g}</title></circle>'
            for (x, y), value in zip(points, line.y, strict=True)
        ]
    return parts


def _colour(number: int) -> str:
    return f"var(--series-{number % len(LIGHT)})"


def _style(number: int) -> str:
    return f"stroke:{_colour(number)};stroke-dasharray:{DASHES[number % len(DASHES)]}"


def _line_sample(number: int) -> Callable[[float, float], str]:
    style = _style(number)
    return lambda x, y: f'<line class="line" style="{style}" x1="{x:.1f}" x2="{x + 28:.1f}" y1="{y}" y2="{y}"/>'


def _bar_sample(number: int) -> Callable[[float, float], str]:
    return lambda x, y: f'<rect style="fill:{_colour(number)}" x="{x:.1f}" y="{y - 6}" width="28" height="11"/>'


def _legend(entries: Sequence[tuple[str, Callable[[float, float], str]]], top: int) -> tuple[list[str], int]:
    """Samples and names in rows that fit the width, and the height of a drawing that ends below them."""
    parts, x, y = [], 0.0, top
    for name, sample in entries:
        name = name if len(name) <= 48 else name[:47] + "…"
        width = 34 + len(name) * CHARACTER + 12
        if x > 0 and x + width > WIDTH:
            x, y = 0.0, y + LINE
        parts.append(sample(x, y))
        parts.append(f'<text x="{x + 34:.1f}" y="{y}" dy="4">{escape(name)}</text>')
        x += width
    return parts, y + 12


def _description(series: Sequence[Series], x_label: str) -> str:
    ends = (
        f"{line.name}: from {line.y[0]:.4g} at {line.x[0]:,.0f} to {line.y[-1]:.4g} at {line.x[-1]:,.0f}"
        for line in series
    )
    return f"Over {x_label}. {'; '.join(ends)}."


def _ticks(low: float, high: float, *, enclosing: bool = False) -> list[float]:
    """Four to eight round numbers between two values; ``enclosing`` adds those that enclose them."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        margin = 0.1 * max(abs(high), 0.5)
        low, high = low - margin, high + margin
    exact = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= exact)
    inner, outer = (math.floor, math.ceil) if enclosing else (math.ceil, math.floor)
    slack = 1e-9 if enclosing else -1e-9  # a bound that is a tick but for rounding is one
    first, last = inner(low / step + slack), outer(high / step - slack)
    return [number * step for number in range(first, last + 1)]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """As many decimals as tell neighbours apart; thousands and millions by letter."""
    units = ((1e6, "M"), (1e3, "k"), (1.0, ""))
    size, letter = next((size, letter) for size, letter in units if size == 1 or abs(ticks[-1]) >= 2 * size)
    step = (ticks[1] - ticks[0]) / size
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick / size:.{decimals}f}{letter}" if tick else "0" for tick in ticks]
