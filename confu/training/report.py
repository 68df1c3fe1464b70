"""The report of training runs: curves over the supervised tokens seen, several runs over one another.

Reads run folders as `train.py` leaves them, also while a run is still going on: config.json, and metrics.jsonl whose
rows are training reports (they have ``loss``) and evaluations by the real decoder (they have ``tau``).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confu.pages.chart import MAX_SERIES, Series, line_chart, standalone
from confu.pages.page import details, figures, note, number, page, table

Row = dict[str, Any]
MAX_POINTS = 48  # of a line; longer runs show means of neighbouring reports, which are less noisy, too


@dataclass(frozen=True)
class Run:
    name: str
    config: dict[str, Any]
    reports: list[Row]
    evaluations: list[Row]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs, each once, under names that tell them apart."""
    folders = list(dict.fromkeys(folders))
    if len(folders) > MAX_SERIES:
        raise ValueError(f"{len(folders)} runs were given; give at most {MAX_SERIES}, more lines cannot be told apart.")
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str = "") -> Run:
    """A run folder's settings and rows. Raises ValueError when it is none, or has not reported yet."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        reports, evaluations = read_metrics(folder / "metrics.jsonl")
    except (OSError, json.JSONDecodeError):
        config, reports, evaluations = None, [], []
    if not isinstance(config, dict) or not {"method", "steps"} <= config.keys():
        raise ValueError(
            f"{folder} is not a training run (a config.json and a metrics.jsonl); give the out folder of "
            "`confu train`, or one of `confu bench`."
        )
    if not reports:
        raise ValueError(f"{folder} has no report yet; the first comes after log_every steps.")
    return Run(name or folder.resolve().name, config, reports, evaluations)


def read_metrics(path: Path) -> tuple[list[Row], list[Row]]:
    """The training reports and the evaluations of a metrics.jsonl.

    A last line that a running or killed process left half-written is passed over; any other bad line is a ValueError.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    reports: list[Row] = []
    evaluations: list[Row] = []
    for place, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if place == len(lines):
                break
            raise ValueError(f"{path}, line {place} is not valid JSON; remove that line.") from None
        if not isinstance(row, dict) or ("loss" in row) == ("tau" in row):
            raise ValueError(f"{path}, line {place} is neither a training report nor an evaluation; remove that line.")
        (reports if "loss" in row else evaluations).append(row)
    return reports, evaluations


def summary(run: Run) -> dict[str, Any]:
    """A run in a few numbers: loss, accuracies and throughput are means over the last tenth of its reports, tau and
    acceptance those of its best evaluation."""
    end = _mean(run.reports[-max(1, len(run.reports) // 10) :])
    best = max(run.evaluations, key=lambda row: row["tau"], default=None)
    settings = {"method": run.config["method"], "init": run.config.get("init"), "planned_steps": run.config["steps"]}
    return {"name": run.name, **settings, **end, "best": best}


def write_report(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write report.html and the SVG files into ``out``; returns their paths, the page first."""
    charts = draw(runs)
    out.mkdir(parents=True, exist_ok=True)
    written = {out / "report.html": _page(runs, list(charts.values()))}
    written |= {out / f"{key}.svg": standalone(svg) + "\n" for key, svg in charts.items()}
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    return list(written)


def draw(runs: Sequence[Run]) -> dict[str, str]:
    """The charts as SVG by name, those without points left out. What goes by depth is one chart for one run, and one
    chart for each depth for several."""
    reports = {run.name: _thin(run.reports) for run in runs}
    evaluations = {run.name: run.evaluations for run in runs}
    charts: dict[str, tuple[str, list[Series]]] = {}

    def over_tokens(key: str, title: str, rows: dict[str, list[Row]]) -> None:
        charts[key.replace("_", "-")] = title, [_series(run, mine, key) for run, mine in rows.items()]

    def by_depth(key: str, title: str, level: str, rows: dict[str, list[Row]]) -> None:
        depths = range(max((len(row[key]) for mine in rows.values() for row in mine), default=0))
        if len(runs) == 1:
            (mine,) = rows.values()
            lines = [_series(f"{level} {depth + 1}", mine, key, depth) for depth in depths]
            charts[key] = f"{title} by {level}", lines
            return
        for depth in depths:
            lines = [_series(run, mine, key, depth) for run, mine in rows.items()]
            charts[f"{key}-{depth + 1}"] = f"{title}, {level} {depth + 1}", lines

    over_tokens("loss", "Loss", reports)
    over_tokens("tau", "Mean acceptance length (tau), tree", evaluations)
    over_tokens("chain_tau", "Mean acceptance length (tau), chain", evaluations)
    by_depth("accuracy", "Accuracy in training", "draft step", reports)
    by_depth("acceptance", "Acceptance in decoding", "depth", evaluations)
    over_tokens("tokens_per_second", "Supervised tokens per second", reports)
    return {
        name: line_chart(name, title, "supervised tokens seen", lines)
        for name, (title, lines) in charts.items()
        if any(line.x for line in lines)
    }


def _series(name: str, rows: Sequence[Row], key: str, depth: int | None = None) -> Series:
    """What was measured of a value, or of a list of values at one depth, which some rows may not have reached."""
    points = []
    for row in rows:
        value = row[key] if depth is None else row[key][depth] if depth < len(row[key]) else None
        if value is not None and math.isfinite(value):
            points.append((row["tokens_seen"], value))
    return Series(name, [x for x, _ in points], [y for _, y in points])


def _thin(reports: Sequence[Row]) -> list[Row]:
    """At most MAX_POINTS rows: means of neighbours, as many in each as can be, placed where the last of them is."""
    count = min(len(reports), MAX_POINTS)
    bounds = [index * len(reports) // count for index in range(count + 1)]
    return [_mean(reports[start:end]) for start, end in itertools.pairwise(bounds)]


def _mean(rows: Sequence[Row]) -> Row:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return {
        "step": rows[-1]["step"],
        "tokens_seen": rows[-1]["tokens_seen"],
        "loss": mean([row["loss"] for row in rows]),
        "accuracy": [mean(column) for column in zip(*(row["accuracy"] for row in rows), strict=True)],
        "tokens_per_second": mean([row["tokens_per_second"] for row in rows]),
    }


# ---------------------------------------------------------------- the page


def _page(runs: Sequence[Run], charts: Sequence[str]) -> str:
    parts = [_summary_table(runs), note(_how_to_read(runs))]
    if differing := _differences(runs):
        parts.append(table("Settings that differ", ["setting", *(run.name for run in runs)], differing))
    parts += ["<h2>Curves</h2>", figures(charts), "<h2>Numbers</h2>"]
    parts += [details(run.name, *_numbers(run)) for run in runs]
    return page(f"Training of {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs", *parts)


def _summary_table(runs: Sequence[Run]) -> str:
    found = [summary(run) for run in runs]
    bests = [one["best"] or {} for one in found]

    def numbers(values: Sequence[float | None], digits: int = 3) -> list[str]:
        return [number(value, digits) for value in values]

    def depth_rows(label: str, lists: Sequence[Sequence[float | None]]) -> list[list[str]]:
        columns = list(itertools.zip_longest(*lists))  # a depth that a run has not is None
        return [[f"{label} {depth}", *numbers(column)] for depth, column in enumerate(columns, 1)]

    rows = [
        ["method", *(one["method"] for one in found)],
        ["steps", *(f"{one['step']:,}/{one['planned_steps']:,}" for one in found)],
        ["supervised tokens", *(f"{one['tokens_seen']:,}" for one in found)],
        ["tokens per second", *numbers([one["tokens_per_second"] for one in found], 0)],
        ["loss", *numbers([one["loss"] for one in found])],
        *depth_rows("accuracy, step", [one["accuracy"] for one in found]),
    ]
    if any(bests):
        rows += [
            ["best tau", *numbers([best.get("tau") for best in bests])],
            ["at step", *numbers([best.get("step") for best in bests], 0)],
            ["chain tau", *numbers([best.get("chain_tau") for best in bests])],
            *depth_rows("acceptance, depth", [best.get("acceptance", []) for best in bests]),
        ]
    return table("Summary", ["", *(one["name"] for one in found)], rows)


def _how_to_read(runs: Sequence[Run]) -> str:
    text = ["Loss, accuracies and (supervised) tokens per second are means over the last tenth of a run's reports."]
    if any(run.evaluations for run in runs):
        text.append(
            "Tau is tokens per verification round of the real decoder, bonus token included, on held-out prompts; "
            "chain tau and acceptance are those of the best evaluation, acceptance given that all depths before were "
            "accepted."
        )
    if any(len(run.reports) > MAX_POINTS for run in runs):
        text.append(f"Curves of more than {MAX_POINTS} reports show means of neighbouring ones.")
    if len({(run.config.get("ttt_steps"), run.config.get("step_decay")) for run in runs}) > 1:
        text.append("The loss sums over draft steps: with other ttt_steps or step_decay, losses do not compare.")
    return " ".join(text)


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "out")
    shown = [[key, *(_setting(run.config.get(key)) for run in runs)] for key in keys]
    return [row for row in shown if len(set(row[1:])) > 1]


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else "unset" if value is None else json.dumps(value)


def _numbers(run: Run) -> Iterator[str]:
    """What the charts show, as tables."""
    if run.evaluations:
        depths = range(max(len(row["acceptance"]) for row in run.evaluations))
        yield table(
            "Evaluations",
            ["step", "tokens", "tau", "chain tau", *(f"depth {d + 1}" for d in depths), "prompts", "seconds"],
            [
                [
                    f"{row['step']:,}",
                    f"{row['tokens_seen']:,}",
                    *(number(row[key], 3) for key in ("tau", "chain_tau")),
                    *(number(row["acceptance"][d] if d < len(row["acceptance"]) else None, 3) for d in depths),
                    f"{row['num_prompts']:,}",
                    number(row["seconds"], 0),
                ]
                for row in run.evaluations
            ],
        )
    steps = range(len(run.reports[0]["accuracy"]))
    yield table(
        "Training" if len(run.reports) <= MAX_POINTS else "Training, means of neighbouring reports",
        ["step", "tokens", "loss", *(f"accuracy {k + 1}" for k in steps), "tokens/s"],
        [
            [
                f"{row['step']:,}",
                f"{row['tokens_seen']:,}",
                *(number(value, 3) for value in (row["loss"], *row["accuracy"])),
                number(row["tokens_per_second"], 0),
            ]
            for row in _thin(run.reports)
        ],
    )
