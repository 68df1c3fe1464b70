"""The charts of a benchmark's report."""

from __future__ import annotations

from collections.abc import Sequence

from confu.bench.metrics import Summary
from confu.bench.tables import DEEPEST, Findings, length_groups, length_name, length_shares
from confu.config import SWEEPABLE
from confu.pages.chart import MAX_SERIES, Bars, Series, bar_chart, line_chart

FIELDS = (
    ("speedup", "Speed-up over plain decoding", "tokens per second over plain"),
    ("mean_acceptance_length", "Tau", "tokens per round"),
)


def draw(findings: Findings) -> dict[str, str]:
    """The charts as SVG by name. In a sweep, the charts that are not about it show each draft with its fastest tree."""
    shown = {name: findings.overall[name] for name in _fastest(findings)}
    speculative = {name: found for name, found in shown.items() if found.mean_accepted_drafts}
    charts = {}
    if rates := {name: found.tokens_per_second for name, found in shown.items() if found.tokens_per_second}:
        bars = [Bars("tokens", list(rates.values()))]
        label = "all tokens over all seconds, prompts included"
        charts["speed"] = bar_chart("speed", "Tokens per second", label, list(rates), bars, digits=1)
    for field, title, label in FIELDS:
        if bars := _by_task(findings, [name for name in shown if name in findings.speculative], field):
            key, mark = field.replace("_", "-"), 1.0 if field == "speedup" else None
            charts[key] = bar_chart(key, title, label, _groups(findings), bars, mark=mark)
    if speculative:
        lines = [
            Series(name, range(1, len(found.acceptance_per_depth[:DEEPEST]) + 1), found.acceptance_per_depth[:DEEPEST])
            for name, found in speculative.items()
        ]
        charts["depth"] = line_chart("depth", "Acceptance by depth, given the depth before", "depth", lines)
        charts["lengths"] = _length_chart(speculative)
    timed = {name: found for name, found in shown.items() if found.num_rounds and found.seconds["target"]}
    if timed:
        charts["time"] = bar_chart(
            "time",
            "Where a round's time goes",
            "milliseconds a round",
            list(timed),
            [
                Bars(part, [1000 * found.seconds[part] / found.num_rounds for found in timed.values()])
                for part in ("target", "draft", "other")
            ],
            digits=1,
            stacked=True,
        )
    return charts | _sweep_charts(findings)


def _groups(findings: Findings) -> list[str]:
    """All tasks and each, with how many questions they stand for."""
    found = {"all tasks": findings.overall, **findings.by_task}
    return [f"{name} ({max(one.num_questions for one in summaries.values())})" for name, summaries in found.items()]


def _fastest(findings: Findings) -> list[str]:
    """Every draft, peer and baseline once; of one draft's trees the one of most tokens per second."""
    groups: dict[str, list[str]] = {}
    for name in findings.overall:
        facts = findings.results.run["methods"][name]
        groups.setdefault(facts.get("swept") or name, []).append(name)
    return [max(names, key=lambda name: findings.overall[name].tokens_per_second or 0) for names in groups.values()]


def _by_task(findings: Findings, methods: Sequence[str], field: str) -> list[Bars]:
    columns = [findings.overall, *findings.by_task.values()]
    bars = []
    for name in methods[:MAX_SERIES]:
        found = [column.get(name) for column in columns]
        values = [getattr(summary, field) if summary else None for summary in found]
        intervals = [getattr(summary, f"{field}_interval") if summary else None for summary in found]
        if any(value is not None for value in values):
            bars.append(Bars(name, values, intervals))
    return bars


def _length_chart(found: dict[str, Summary]) -> str:
    groups = length_groups(found)
    bars = [Bars(name, length_shares(summary, groups)) for name, summary in found.items()]
    names = list(map(length_name, groups))
    return bar_chart("lengths", "How many tokens a round adds", "% of rounds", names, bars, digits=1)


def _sweep_charts(findings: Findings) -> dict[str, str]:
    """What was measured over the swept setting of most values; one line for each draft and each other setting."""
    methods = findings.results.run["methods"]
    without = dict.fromkeys(SWEEPABLE)  # of a setting that came later
    trees = {name: without | methods[name]["tree"] for name in findings.overall if methods[name].get("swept")}
    values = {field: {tree[field] for tree in trees.values()} for field in SWEEPABLE}
    axis = max(values, key=lambda field: len(values[field] - {None}))
    others = [field for field in SWEEPABLE if field != axis and len(values[field]) > 1]
    lines: dict[str, list[str]] = {}
    for name, tree in trees.items():
        if tree[axis] is not None:
            settings = [f"{field}={tree[field]}" for field in others if tree[field] is not None]
            line = " ".join([methods[name]["swept"], *settings])
            lines.setdefault(line, []).append(name)
    charts = {}
    for field, title, _ in FIELDS:
        series = []
        for line, names in lines.items():
            points = sorted((trees[name][axis], getattr(findings.overall[name], field)) for name in names)
            known = [(x, y) for x, y in points if y is not None]
            series.append(Series(line, [x for x, _ in known], [y for _, y in known]))
        if len(values[axis]) > 1 and any(line.x for line in series):
            key = f"sweep-{field.replace('_', '-')}"
            charts[key] = line_chart(key, f"{title}, by {axis}", axis, series[:MAX_SERIES])
    return charts
