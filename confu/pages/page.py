"""The shell of a report: one HTML file, no script, no network, light and dark, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from confu.pages.palette import CSS as PALETTE

NONE = "–"  # stands for a number that there is none of
CSS = (
    PALETTE
    + ":root{color-scheme:light dark}"
    + "body{margin:0 auto;max-width:76rem;padding:1rem;font:1rem/1.5 system-ui,sans-serif;"
    + "background:var(--page);color:var(--ink)}h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}"
    + ".charts{display:grid;gap:2rem 2.5rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}"
    + "figure{margin:0}.chart{display:block;width:100%;max-width:34rem;height:auto}"
    # A table that goes on beyond the window throws a shadow there.
    + ".wide{overflow-x:auto;max-width:max-content;margin-bottom:1.5rem;background-repeat:no-repeat;"
    + "background-attachment:local,local,scroll,scroll;background-size:2rem 100%,2rem 100%,.7rem 100%,.7rem 100%;"
    + "background-position:left,right,left,right;background-image:linear-gradient(90deg,var(--page) 30%,transparent),"
    + "linear-gradient(270deg,var(--page) 30%,transparent),linear-gradient(90deg,var(--soft),transparent),"
    + "linear-gradient(270deg,var(--soft),transparent)}table{border-collapse:collapse;font-size:.9rem}"
    + "caption{text-align:left;color:var(--soft);padding-bottom:.3rem}"
    + "th,td{padding:.25rem .8rem .25rem 0;border-bottom:1px solid var(--grid);text-align:right;"
    + "font-variant-numeric:tabular-nums}tbody th{font-weight:400}"
    + "td{white-space:nowrap}th:first-child,td:first-child{text-align:left}"
    + ".note{color:var(--soft);font-size:.9rem;max-width:46rem}"
    + "@media(max-width:30rem){table{font-size:.8rem}}"
    + "summary{cursor:pointer;padding:.5rem 0}"
    + ".tokens{white-space:pre-wrap;overflow-wrap:anywhere;max-width:46rem;margin:.3rem 0 1rem}"
    + ".accepted{color:var(--series-2)}.own{font-weight:600;text-decoration:underline}"
    + ".rejected{color:var(--soft);text-decoration:line-through}mark{background:var(--grid);color:inherit}"
)


def page(title: str, *parts: str) -> str:
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>",
            *parts,
            "</main>\n</body>\n</html>\n",
        ]
    )


def figures(charts: Sequence[str]) -> str:
    return '<div class="charts">\n' + "\n".join(f"<figure>{chart}</figure>" for chart in charts) + "\n</div>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is wider than the page; the first cell of a row names it."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def details(summary: str, *parts: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(parts) + "\n</details>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def number(value: float | None, digits: int) -> str:
    """A number as tables show it, and a dash where there is none."""
    return NONE if value is None or math.isnan(value) else f"{value:,.{digits}f}"
