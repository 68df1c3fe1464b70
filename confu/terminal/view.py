"""What people see: the token view, the summary line, tables. Pure functions; `cli.py` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from confu.stats import Stats

if TYPE_CHECKING:
    from confu.data.regenerate import Summary
    from confu.generate import Token
    from confu.lossless import Report
    from confu.training.rehearse import Throughput
    from confu.tune import Tuning

STYLES = {"accepted": "green", "own": "bold underline", "rejected": "dim strike"}
MARKS = {"accepted": ("«", "»"), "own": ("", ""), "rejected": ("~~", "~~")}
LEGEND = {"accepted": "drafted and accepted", "own": "the target's own", "rejected": "drafted and rejected"}


class TokenView:
    """Turns tokens into marked text, run by run: by style where there is colour, by «marks» where there is none.

    ``decode`` makes text of rejected drafts, which are shown just before the token the target took instead; without
    it they are left out.
    """

    def __init__(self, *, colour: bool, decode: Callable[[Sequence[int]], str] | None = None) -> None:
        self.colour, self.decode = colour, decode
        self._run: str | None = None

    def feed(self, token: Token) -> Text:
        """What this token adds to the view."""
        text = Text()
        if token.rejected and self.decode is not None:
            self._append(text, "rejected", self.decode(token.rejected).replace("\n", "↵"))
        # The mark shows whose a line break is; the break itself keeps the answer's shape.
        self._append(text, "accepted" if token.from_draft else "own", token.text.replace("\n", "↵\n"))
        return text

    def close(self) -> Text:
        """The closing mark of the last run."""
        text = Text()
        self._enter(text, None)
        return text

    def legend(self) -> Text:
        text = Text()
        for kind, meaning in LEGEND.items():
            if kind != "rejected" or self.decode is not None:
                opening, closing = ("", "") if self.colour else MARKS[kind]
                text.append("  " if text else "")
                text.append(opening + meaning + closing, STYLES[kind] if self.colour else "")
        return text

    def _append(self, text: Text, kind: str, piece: str) -> None:
        if piece:
            self._enter(text, kind)
            text.append(piece, STYLES[kind] if self.colour else "")

    def _enter(self, text: Text, kind: str | None) -> None:
        if kind != self._run and not self.colour:
            text.append(MARKS[self._run][1] if self._run else "")
            text.append(MARKS[kind][0] if kind else "")
        self._run = kind


def summary(stats: Stats, seed: int, *, with_prompt: bool = False) -> str:
    """One line: what the draft got right, how fast it was, where the time went."""
    parts = [f"{stats.num_tokens} tokens"]
    if stats.num_draft_tokens:
        parts = [
            f"rounds {stats.num_rounds}",
            f"accepted {stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} drafted",
            f"mean acceptance length {stats.mean_acceptance_length:.2f}",
        ]
    if with_prompt:
        parts.append(f"prompt {stats.prompt_tokens} tokens ({stats.cached_tokens} cached)")
    parts.append(f"{stats.tokens_per_second:.1f} tok/s")
    times = {"target": stats.target_seconds, "draft": stats.draft_seconds, "other": stats.other_seconds}
    total = sum(times.values())
    if total:
        parts.append(" ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in times.items()))
    return ", ".join([*parts, f"seed {seed}"])


def supervised_view(runs: Sequence[tuple[str, bool]], *, colour: bool, most_characters: int = 400) -> Text:
    """One training conversation, its supervised runs in colour or within «marks»; long runs lose their middle."""
    text = Text()
    for run, supervised in runs:
        if len(run) > most_characters:
            half = most_characters // 2
            run = f"{run[:half]} [{len(run) - 2 * half:,} characters] {run[-half:]}"
        opening, closing = MARKS["accepted"] if supervised and not colour else ("", "")
        text.append(opening + run + closing, STYLES["accepted"] if supervised and colour else "")
    return text


def prepared_view(values: dict[str, Any]) -> Group:
    """What a prepared folder holds: counts, then what was skipped and why."""
    table = Table("skipped", "rows", box=None, pad_edge=False)
    for reason, rows in sorted(values["skipped"].items(), key=lambda item: -item[1]):
        table.add_row(reason, f"{rows:,}")
    names = ("num_documents", "num_tokens", "num_supervised", "max_length", "fingerprint")
    share = values["num_supervised"] / values["num_tokens"]
    coverage = {f"{size:,} tokens": f"{part:.1%}" for size, part in values["vocabulary_coverage"].items()}
    text = facts({name: values[name] for name in names} | {"supervised": f"{share:.1%} of the tokens"})
    text.append_text(facts({"draft vocabulary covers": coverage}))
    return Group(text, table) if values["skipped"] else Group(text)


def regenerated_line(done: Summary) -> str:
    """One line: how many rows have an answer now, how many failed, how fast it was."""
    parts = [f"{done.num_answered:,} of {done.num_rows:,} rows answered"]
    if done.num_done_before:
        parts.append(f"{done.num_done_before:,} were before")
    if done.failed:
        parts.append(f"{done.failed.total():,} failed ({', '.join(f'{n:,} {why}' for why, n in done.failed.items())})")
    if done.seconds:
        parts.append(f"{done.num_tokens:,} tokens, {done.num_tokens / done.seconds:.1f} tok/s")
    return ", ".join(parts)


def first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int | None:
    """First position at which two answers differ, the end of the shorter one included; None when they are the same."""
    if list(ours) == list(theirs):
        return None
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def facts(values: dict[str, Any], *, indent: int = 0) -> Text:
    """Nested values, one a line."""
    text = Text()
    width = max(map(len, values), default=0)
    for name, value in values.items():
        text.append(" " * indent + name.replace("_", " "), "bold")
        if isinstance(value, dict):
            text.append("\n").append_text(facts(value, indent=indent + 2))
        else:
            text.append(" " * (width - len(name) + 2) + _fact(name, value) + "\n")
    return text


def lossless_view(report: Report) -> Group:
    """Every prompt's result as a table, then the sampling test's line."""
    table = Table("prompt", "tokens", "tau", "result", box=None, pad_edge=False)
    for check in report.greedy:
        result = check.result
        if check.first_difference is not None:
            result += f" from token {check.first_difference + 1} on, logit gap {check.logit_gap:.1e}"
        table.add_row(check.name, str(check.num_tokens), f"{check.mean_acceptance_length:.2f}", result)
    test = report.sampling
    strays = f", {test.strays} impossible" if test.strays else ""
    numbers = (
        f"{test.samples} samples{strays}, {test.cells} cells, chi-square {test.chi_square:.1f}, p {test.p_value:.3g}"
    )
    verdict = "lossless" if report.lossless else "NOT lossless"
    return Group(table, Text(f"sampling: {test.result} ({numbers})"), Text(verdict, "bold"))


def tuning_view(found: Tuning) -> Group:
    """What rounds cost, how each tree did, and the limits chosen."""
    costs = found.costs
    cost_table = Table(box=None, pad_edge=False)
    for name in ("rows, sequences", "ms to verify", "to draft a level", "to read a round"):
        cost_table.add_column(name, justify="right")
    kinds = [dict(points) for points in (costs.verify, costs.level, costs.commit)]
    for size in sorted(set().union(*kinds)):
        cost_table.add_row(str(size), *(f"{known[size]:.1f}" if size in known else "" for known in kinds))
    trials = Table("tree", box=None, pad_edge=False)
    for name in ("tok/s", "speed-up", "tau", "nodes per round"):
        trials.add_column(name, justify="right")
    for trial in found.trials:
        trials.add_row(
            trial.name,
            f"{trial.tokens_per_second:.1f}",
            f"{trial.speedup:.2f}x",
            f"{trial.mean_acceptance_length:.2f}",
            f"{trial.nodes_per_round:.1f}",
        )
    tree = found.tree
    chosen = f"chosen: at most {tree.nodes} nodes, depth {tree.depth}, top-k {tree.topk}"
    for name, value in (("contemplate", tree.contemplate), ("lookup", tree.lookup)):
        chosen += "" if value is None else f", {name} {value}"
    shares = next(trial.conditional_acceptance for trial in reversed(found.trials) if trial.tree == tree)
    accepted = " ".join(f"{share:.2f}" for share in shares[: tree.depth])  # beyond it are chains of lookup
    depths = f"accepted at depth 1, 2, ... where all above were: {accepted}"
    return Group(cost_table, Text(""), trials, Text(""), Text(depths), Text(chosen, "bold"))


def throughput_view(rows: list[Throughput]) -> Table:
    """Training speed by the length of the conversations."""
    table = Table(box=None, pad_edge=False)
    for name in ("length", "tok/s", "supervised tok/s", "ms/token", "GFLOP/token", "of matmul rate", "peak memory"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.length),
            f"{row.tokens_per_second:.0f}",
            f"{row.supervised_per_second:.0f}",
            f"{row.milliseconds_per_token:.3f}",
            f"{row.gflops_per_token:.2f}",
            f"{row.share_of_matmul:.0%}",
            _fact("peak_bytes", row.peak_bytes),
        )
    return table


def _fact(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB" if value < 1e9 else f"{value / 1e9:,.1f} GB"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and name.startswith("num_") else str(value)
