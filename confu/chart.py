"""Line charts as SVG text: no plotting library, no script, the same bytes for the same numbers.

Colours are CSS variables, so that one drawing serves light and dark pages. ``CSS`` belongs once on a page that shows
charts inline; `standalone` puts it into the drawing itself, for a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# Contrast with the background is 4.5 or more in either scheme; a dash pattern says the same without colour.
LIGHT = ("#0065a3", "#b34700", "#00734f", "#9b2d7f", "#7a5900", "#5b5b5b")
DARK = ("#62b5f0", "#ff9c63", "#3fcf9f", "#ef9ad6", "#e3bf4b", "#b5b5b5")
DASHES = ("none", "7 3", "2 3", "9 3 2 3")
MAX_SERIES = 12  # from here on colour and dash repeat together

WIDTH, LEFT, RIGHT, TOP, PLOT_HEIGHT, LINE = 380, 44, 14, 34, 190, 18
CHARACTER = 7.2  # width of a character of the 12 px type, on the wide side


def _variables(colours: Sequence[str], ink: str, soft: str, grid: str) -> str:
    series = "".join(f"--series-{i}:{colour};" for i, colour in enumerate(colours))
    return f"--ink:{ink};--soft:{soft};--grid:{grid};{series}"


CSS = (
    f":root{{{_variables(LIGHT, '#1c1f23', '#53585f', '#dfe2e6')}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(DARK, '#e8eaed', '#a9b0b8', '#3a4048')}}}}}"
    ".chart{font:12px system-ui,sans-serif;fill:var(--ink)}"
    ".chart .title{font-size:14px;font-weight:600}.chart .soft{fill:var(--soft)}"
    ".chart .grid{stroke:var(--grid);stroke-width:1}"
    ".chart .line{fill:none;stroke-width:1.8;stroke-linejoin:round}"
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
    legend, height = _legend(shown, bottom + 3 * LINE + 4) if len(series) > 1 else ([], bottom + 2 * LINE + 8)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-labelledby="{key}-title {key}-description"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-description">{escape(_description([line for _, line in shown], x_label))}</desc>'
    )
    return "\n".join([head, *parts, *legend, "</svg>"])


def standalone(svg: str) -> str:
    """The drawing as a file of its own: it brings its style, size and background."""
    style = f"<style>{CSS}svg{{background:#fff}}@media(prefers-color-scheme:dark){{svg{{background:#16191d}}}}</style>"
    return svg.replace(' role="img"', f' width="{2 * WIDTH}" role="img"', 1).replace("<title", f"{style}<title", 1)


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


def _legend(shown: Sequence[tuple[int, Series]], top: int) -> tuple[list[str], int]:
    """Samples and names in rows that fit the width, and the height of a drawing that ends below them."""
    parts, x, y = [], 0.0, top
    for number, line in shown:
        name = line.name if len(line.name) <= 48 else line.name[:47] + "…"
        width = 34 + len(name) * CHARACTER + 12
        if x > 0 and x + width > WIDTH:
            x, y = 0.0, y + LINE
        parts.append(f'<line class="line" style="{_style(number)}" x1="{x:.1f}" x2="{x + 28:.1f}" y1="{y}" y2="{y}"/>')
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
