"""The numbers of a benchmark run as tables of text: one form for the terminal, for Markdown and for the page."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from confu.bench.equality import Comparison, Difference, failures, gap_name, unanswered
from confu.bench.metrics import Interval, Summary, speed_ratio, summarise, tasks_of, tau_ratio
from confu.bench.results import OURS, PLAIN, REFERENCE, Results, unfinished
from confu.pages.page import NONE, number

SHAPE = ("nodes", "depth", "topk", "lookup")  # the last one came later than some runs
SINGLE = 8  # lengths of rounds that are shown one by one
DEEPEST = 16  # beyond it are chains of lookup, of few rounds
FEW = 3  # sentences that may stand before a table


@dataclass(frozen=True)
class Table:
    caption: str
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        """Columns for a terminal, however narrow: nothing is cut."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        return "\n".join(
            "  ".join(cell.rjust(width) if column else cell.ljust(width)
                      for column, (cell, width) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        )  # fmt: skip

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


@dataclass(frozen=True)
class Findings:
    """All that the tables, the page and the JSON document show, computed once."""

    results: Results
    overall: dict[str, Summary]
    by_task: dict[str, dict[str, Summary]]
    compared: dict[str, Comparison]
    failures: list[str]
    errors: list[str]
    """Why answers failed, of the methods that have others."""
    unfinished: str
    """What an interrupted run still lacks, if it was one."""
    tau_ratios: dict[str, tuple[float, Interval]]
    """By the same tree, under "method / method": ConFu's tau over EAGLE-3's, and ours over the reference's."""
    speed_ratios: dict[str, dict[str, tuple[float, Interval]]]
    """Tokens per second of each of our methods over those of other engines, and of ConFu over those of EAGLE-3."""

    @property
    def speculative(self) -> list[str]:
        """Methods that are not the plain decoding of their engine."""
        return [name for name in self.overall if self.results.run["methods"][name]["kind"] != PLAIN]

    @property
    def differences(self) -> list[Difference]:
        return [difference for found in self.compared.values() for difference in found.differences]


def find(results: Results, compared: dict[str, Comparison]) -> Findings:
    return Findings(
        results,
        overall=summarise(results),
        by_task={task: summarise(results, task) for task in tasks_of(results)},
        compared=compared,
        failures=failures(results, compared),
        errors=unanswered(results, all_of_them=False),
        unfinished=unfinished(results),
        tau_ratios=_tau_ratios(results),
        speed_ratios=_speed_ratios(results),
    )


def document(findings: Findings) -> dict[str, Any]:
    """What ``--json`` prints."""

    def plain(summaries: dict[str, Summary]) -> dict[str, Any]:
        return {name: asdict(summary) for name, summary in summaries.items()}

    methods = plain(findings.overall)
    differences = [asdict(difference) for difference in findings.differences]
    for name, found in findings.compared.items():
        if name in methods:
            methods[name] |= {
                "num_compared": found.num_compared,
                "num_diverged": len(found.differences),
                "num_ties": sum(difference.is_tie for difference in found.differences),
                "first_token_p": found.first_token_p,
                "length_p": found.length_p,
            }
    return {
        "methods": methods,
        "by_task": {task: plain(summaries) for task, summaries in findings.by_task.items()},
        "tau_ratios": {pair: {"ratio": ratio, "interval": span} for pair, (ratio, span) in findings.tau_ratios.items()},
        "speed_ratios": {
            f"{mine} / {theirs}": {"ratio": ratio, "interval": span}
            for mine, found in findings.speed_ratios.items()
            for theirs, (ratio, span) in found.items()
        },
        "differences": [{k: v for k, v in one.items() if k not in ("text", "plain_text")} for one in differences],
        "failures": findings.failures,
        "errors": findings.errors,
        "unfinished": findings.unfinished or None,
    }


def overall_table(findings: Findings) -> Table:
    header = ["method", "tokens/s", "without prefill", "speed-up", "95 %", "tau", "95 %",
              *equality_header(findings), "failed"]  # fmt: skip
    speculative = findings.speculative
    rows = [
        [
            name,
            number(found.tokens_per_second, 1),
            number(found.decoding_tokens_per_second, 1),
            number(found.speedup, 2),
            span(found.speedup_interval) if name in speculative else NONE,
            number(found.mean_acceptance_length, 2),
            span(found.mean_acceptance_length_interval) if name in speculative else NONE,
            *equality_cells(findings, name),
            str(found.num_failed or NONE),
        ]
        for name, found in findings.overall.items()
    ]
    return Table("All tasks", header, rows)


def by_task_table(findings: Findings, caption: str, value: str) -> Table:
    """Every method by task, with intervals; ``value`` names a field of `Summary` that has one."""
    rows = [
        [name, *(with_interval(summaries.get(name), value) for summaries in findings.by_task.values())]
        for name in findings.speculative
    ]
    return Table(caption, ["method", *findings.by_task], [row for row in rows if set(row[1:]) != {NONE}])


def means_table(findings: Findings) -> Table:
    """Other ways to average, as other benchmarks do it, beside ours."""
    header = ["method", "tokens/s", "mean of questions", "speed-up", "ratio of means", "tau", "mean of questions",
              "without bonus"]  # fmt: skip
    rows = [
        [
            name,
            number(found.tokens_per_second, 1),
            number(found.tokens_per_second_mean, 1),
            number(found.speedup, 3),
            number(found.speedup_mean, 3),
            number(found.mean_acceptance_length, 3),
            number(found.mean_acceptance_length_by_question, 3),
            number(found.mean_accepted_drafts, 3),
        ]
        for name, found in findings.overall.items()
    ]
    return Table("Pooled, and as means over questions", header, rows)


def engines_table(findings: Findings) -> Table:
    """Our methods against all others, answer by answer."""
    columns = list(dict.fromkeys(name for found in findings.speed_ratios.values() for name in found))
    rows = [
        [name, *(f"{found[other][0]:.2f} ({span(found[other][1])})" if other in found else NONE for other in columns)]
        for name, found in findings.speed_ratios.items()
    ]
    return Table("Tokens per second over those of others (95 % interval)", ["method", *columns], rows)


def depth_table(findings: Findings) -> Table:
    deepest = max((len(found.acceptance_per_depth) for found in findings.overall.values()), default=0)
    depths = range(min(deepest, DEEPEST))
    rows = [
        [name, *(number(at(found.acceptance_per_depth, depth), 3) for depth in depths)]
        for name, found in findings.overall.items()
        if found.acceptance_per_depth
    ]
    header = ["method", *(f"depth {depth + 1}" for depth in depths)]
    return Table("Share of rounds that accept a depth, among those that accepted all before", header, rows)


def lengths_table(findings: Findings) -> Table:
    groups = length_groups(findings.overall)
    rows = []
    for name, found in findings.overall.items():
        if counts := found.round_length_counts:
            pairs = zip(length_shares(found, groups), groups, strict=True)
            rows.append([name, *(number(share, 1) if first <= len(counts) else NONE for share, (first, _) in pairs)])
    return Table("How many tokens a round adds, % of rounds", ["method", *map(length_name, groups)], rows)


def length_groups(overall: dict[str, Summary]) -> list[tuple[int, int]]:
    """First and last of the lengths that a table or chart shows together: of eight each one, then twice as many."""
    longest = max((len(found.round_length_counts) for found in overall.values()), default=0)
    groups = [(length, length) for length in range(1, min(longest, SINGLE) + 1)]
    while groups and groups[-1][1] < longest:
        groups.append((groups[-1][1] + 1, 2 * groups[-1][1]))
    return groups


def length_name(group: tuple[int, int]) -> str:
    first, last = group
    return counted(first, "token") if first == last else f"{first} to {last} tokens"


def length_shares(found: Summary, groups: Sequence[tuple[int, int]]) -> list[float]:
    """Of a method's rounds, in per cent."""
    return [100 * sum(found.round_length_counts[first - 1 : last]) / found.num_rounds for first, last in groups]


def time_table(findings: Findings) -> Table:
    rows = []
    for name, found in findings.overall.items():
        tells = found.num_rounds > 0 and found.seconds["target"] > 0
        parts = [found.seconds[part] for part in ("target", "draft", "other")]
        cells = [number(1000 * seconds / found.num_rounds if tells else None, 1) for seconds in parts]
        peak = number(found.peak_bytes / 2**20 if found.peak_bytes else None, 0)
        prefill = found.seconds["prefill"]
        rows.append([name, *cells, number(prefill / found.num_answers if prefill else None, 2), peak])
    header = ["method", "target, ms a round", "draft", "other", "prefill, s an answer", "peak memory, MiB"]
    return Table("Where the time goes", header, rows)


def differences_table(findings: Findings, most: int = 30) -> Table:
    """The first of each method, and how many more it has."""
    header = ["method", "question", "task", "turn", "repeat", "token", gap_name(findings.results.run), ""]
    rows = []
    for name, found in findings.compared.items():
        for difference in found.differences[:most]:
            places = (difference.turn, difference.repeat, difference.position)
            cells = [name, difference.question, difference.task, *(str(place + 1) for place in places)]
            gap = NONE if difference.gap is None else f"{difference.gap:.2g}"
            rows.append([*cells, gap, verdict(findings.results, difference)])
        if left_out := len(found.differences[most:]):
            rows.append([name, *[NONE] * (len(header) - 2), f"and {left_out:,} more"])
    return Table("Answers that differ from the plain target's", header, rows)


def ratio_table(findings: Findings) -> Table:
    """What `ratio_lines` says, where it would be many lines."""
    ratios = findings.tau_ratios if len(findings.tau_ratios) > FEW else {}
    rows = [[*pair.split(" / "), f"{ratio:.3f}", span(found)] for pair, (ratio, found) in ratios.items()]
    return Table("Tau over tau, same tree", ["tau of", "over that of", "ratio", "95 %"], rows)


def ratio_lines(findings: Findings) -> list[str]:
    if len(findings.tau_ratios) > FEW:
        return []
    return [
        f"tau of {pair.replace(' / ', ' over tau of ')}, same tree: {ratio:.3f}{f' ({span(found)})' if found else ''}"
        for pair, (ratio, found) in findings.tau_ratios.items()
    ]


def conditions(results: Results) -> str:
    """One sentence: how and on what it was measured."""
    run = results.run
    machine = run["machine"]
    trees = [facts for facts in run["methods"].values() if "tree" in facts]
    shapes = {_shape(facts) for facts in trees if "costs" not in facts}
    adaptive = [facts["tree"].get("lookup") for facts in trees if "costs" in facts]
    tree = f"adaptive trees{' with lookup' if any(adaptive) else ''}, " if adaptive else ""
    if len(shapes) > 1:
        tree += "trees as named, "
    elif any(facts["kind"] not in (PLAIN, "lookup") for facts in trees if "costs" not in facts):
        for nodes, depth, topk, lookup in shapes:
            tree += f"{nodes} nodes, depth {depth}, top-k {topk}, {f'lookup {lookup}, ' if lookup else ''}"
    rounded = f" rounded to {run['quantization']}" if run.get("quantization") else ""
    rounded += ", compiled" if run.get("compile") else ""
    repeats = f", {run['repeats']} repeats" if run["repeats"] > 1 else ""
    turns = len({(row["question"], row["turn"]) for row in results.rows})
    dates = dict.fromkeys([run.get("begun", run["date"]), run["date"]])
    return (
        f"{counted(len({row['question'] for row in results.rows}), 'question')} ({counted(turns, 'turn')}) of "
        f"{run['suite']}{repeats}, "
        f"{run['target']} in {run['dtype']}{rounded}, temperature {run['temperature']:g}, at most "
        f"{counted(run['max_new_tokens'], 'new token')}, {tree}batch {run['batch_size']}, seed {run['seed']}; "
        f"{machine['cpu']}, {counted(machine['threads'], 'thread')}, {run['device']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, {versions(run)}, {' to '.join(dates)}."
    )


def versions(run: dict[str, Any]) -> str:
    """Every commit that it was run at."""
    commits = [
        f"{one['commit'][:10] if one['commit'] else 'version ' + run['machine']['confu']}"
        f"{' (modified)' if one['modified'] else ''}"
        for one in run["commits"]
    ]
    kind = ("commits " if len(commits) > 1 else "commit ") if run["commits"][0]["commit"] else ""
    return kind + ", ".join(commits)


def equality_header(findings: Findings) -> list[str]:
    """With a column for two-sample tests where there are any."""
    tested = any(found.is_tested for found in findings.compared.values())
    return ["differ", "p: token, length"] if tested else ["differ"]


def equality_cells(findings: Findings, method: str) -> list[str]:
    found = findings.compared.get(method, Comparison(0, []))
    ties = sum(difference.is_tie for difference in found.differences)
    rest = f" ({ties} at a tie)" if ties else ""
    differ = f"{len(found.differences)} of {found.num_compared}{rest}" if found.num_compared else NONE
    if len(equality_header(findings)) == 1:
        return [differ]
    return [differ, f"{found.first_token_p:.2g}, {found.length_p:.2g}" if found.is_tested else NONE]


def verdict(results: Results, difference: Difference) -> str:
    if difference.is_tie:
        return "rounding tie"
    if results.run["methods"][difference.method]["engine"] != OURS:
        return "another engine"
    return "MISTAKE" if results.run["dtype"] == "float32" else f"beyond a tie of float32; {results.run['dtype']} rounds"


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def span(interval: Interval) -> str:
    return NONE if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def at(values: Sequence[float], index: int) -> float | None:
    return values[index] if index < len(values) else None


def with_interval(found: Summary | None, value: str) -> str:
    if found is None or getattr(found, value) is None:
        return NONE
    interval = getattr(found, f"{value}_interval")
    return f"{getattr(found, value):.2f}{f' ({span(interval)})' if interval else ''}"


def _tau_ratios(results: Results) -> dict[str, tuple[float, Interval]]:
    facts = results.run["methods"]
    found = {}
    for mine, theirs in itertools.permutations(facts, 2):
        kinds = facts[mine]["kind"], facts[theirs]["kind"], facts[theirs]["engine"]
        weights = facts[mine].get("sha256")
        same_draft = kinds == ("eagle3", "eagle3", REFERENCE) and facts[theirs].get("sha256", weights) == weights
        pair = same_draft or kinds == ("confu", "eagle3", OURS)
        if pair and _same_tree(facts[mine], facts[theirs]) and (ratio := tau_ratio(results, mine, theirs)):
            found[f"{mine} / {theirs}"] = ratio
    return found


def _speed_ratios(results: Results) -> dict[str, dict[str, tuple[float, Interval]]]:
    facts = results.run["methods"]
    found: dict[str, dict[str, tuple[float, Interval]]] = {}
    for mine, theirs in itertools.permutations(facts, 2):
        if facts[mine]["engine"] != OURS or facts[theirs]["engine"] == REFERENCE:
            continue
        alike = _same_tree(facts[mine], facts[theirs]) or all("costs" in facts[name] for name in (mine, theirs))
        pair = (facts[mine]["kind"], facts[theirs]["kind"]) == ("confu", "eagle3") and alike
        if (facts[theirs]["engine"] != OURS or pair) and (ratio := speed_ratio(results, mine, theirs)):
            found.setdefault(mine, {})[theirs] = ratio
    return found


def _same_tree(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether both have a fixed tree, of one shape."""
    fixed = all("tree" in facts and "costs" not in facts for facts in (mine, theirs))
    return fixed and _shape(mine) == _shape(theirs)


def _shape(facts: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(facts["tree"].get(field) or None for field in SHAPE)
