"""Colours of pages and charts, light and dark, as CSS variables."""

from __future__ import annotations

from collections.abc import Sequence

# Contrast with the background is 4.5 or more in either scheme; a dash pattern says the same without colour.
LIGHT = ("#0065a3", "#b34700", "#00734f", "#9b2d7f", "#7a5900", "#5b5b5b", "#b3263a")
DARK = ("#62b5f0", "#ff9c63", "#3fcf9f", "#ef9ad6", "#e3bf4b", "#b5b5b5", "#ff8f96")


def _variables(colours: Sequence[str], page: str, ink: str, soft: str, grid: str) -> str:
    series = "".join(f"--series-{i}:{colour};" for i, colour in enumerate(colours))
    return f"--page:{page};--ink:{ink};--soft:{soft};--grid:{grid};{series}"


CSS = (
    f":root{{{_variables(LIGHT, '#ffffff', '#1c1f23', '#53585f', '#dfe2e6')}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(DARK, '#16191d', '#e8eaed', '#a9b0b8', '#3a4048')}}}}}"
    ".chart{font-family:system-ui,sans-serif}.chart *{stroke-linejoin:round;stroke-linecap:butt}"
)
