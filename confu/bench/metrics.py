"""What the rows of a benchmark say; every number is defined in docs/benchmark.md, and computed here alone.

Rows are grouped by question (all turns and repeats together), since answers to one question are not independent. All
intervals are the middle 95 % over resampled questions, and a method and its baseline are always resampled together.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from confu.bench.results import PLAIN, Results, Row
from confu.stats import Stats

DRAWS = 1000

Interval = tuple[float, float] | None


@dataclass
class Tally:
    """Sums over one question's answers by one method, and by its baseline where both have one."""

    num_tokens: int = 0
    seconds: float = 0.0
    num_round_tokens: int = 0
    num_rounds: int = 0
    paired_tokens: int = 0
    paired_seconds: float = 0.0
    baseline_tokens: int = 0
    baseline_seconds: float = 0.0


@dataclass(frozen=True)
class Summary:
    """One method on one task, or overall."""

    num_questions: int
    num_answers: int
    num_failed: int
    num_tokens: int
    num_rounds: int
    tokens_per_second: float | None
    """All tokens over all seconds, prefill included."""
    decoding_tokens_per_second: float | None
    """All tokens over all seconds but those of prefill. None where an engine does not tell these."""
    tokens_per_second_mean: float | None
    """Spec-Bench's: mean over questions of tokens over seconds."""
    speedup: float | None
    """Tokens per second over the baseline's, on the answers that both have."""
    speedup_interval: Interval
    speedup_mean: float | None
    """Spec-Bench's: the same of the means over questions, on the same answers."""
    mean_acceptance_length: float | None
    """tau: tokens per round, bonus token included, pooled over rounds. None where an engine does not tell."""
    mean_acceptance_length_interval: Interval
    mean_acceptance_length_by_question: float | None
    """Mean over questions of each question's tau."""
    mean_accepted_drafts: float | None
    """tau without the bonus token: accepted drafted tokens per round."""
    acceptance_per_depth: list[float]
    """Share of rounds that accepted depth d, among those that accepted all before."""
    round_length_counts: list[int]
    """How many rounds added 1, 2, ... tokens."""
    seconds: dict[str, float]
    """In all: prefill, target, draft and other."""
    peak_bytes: int | None


def tasks_of(results: Results) -> list[str]:
    """In the order of the rows."""
    return list(dict.fromkeys(row["task"] for row in results.rows))


def baseline_of(results: Results, method: str) -> str | None:
    """The plain decoding of the same engine; None where that was not measured."""
    facts = results.run["methods"]
    same = [name for name in facts if facts[name]["engine"] == facts[method]["engine"]]
    return next((name for name in same if facts[name]["kind"] == PLAIN), None)


def summarise(results: Results, task: str | None = None) -> dict[str, Summary]:
    """Every method's numbers on one task, or on all."""
    rows = [row for row in results.rows if task is None or row["task"] == task]
    by_method: dict[str, list[Row]] = {name: [] for name in results.run["methods"]}
    for row in rows:
        by_method[row["method"]].append(row)
    found = {}
    for method, mine in by_method.items():
        if mine:
            baseline = baseline_of(results, method)
            found[method] = _summary(mine, by_method[baseline] if baseline else [])
    return found


def tau_ratio(results: Results, method: str, over: str) -> tuple[float, Interval] | None:
    """tau over another method's tau, on the questions that both answered in rounds; None where there are none."""
    mine, theirs = (
        {name: tally for name, tally in _tallies([r for r in results.rows if r["method"] == which], []).items()
         if tally.num_rounds}
        for which in (method, over)
    )  # fmt: skip
    common = [question for question in mine if question in theirs]
    if not common:
        return None
    columns = [
        _column([found[question] for question in common], name)
        for found in (mine, theirs)
        for name in ("num_round_tokens", "num_rounds")
    ]
    return ratio_of_ratios(*map(sum, columns)), bootstrap(columns, ratio_of_ratios)


def speed_ratio(results: Results, method: str, over: str) -> tuple[float, Interval] | None:
    """Tokens per second over another method's, on the answers that both have; None where there are none."""
    rows = {name: [row for row in results.rows if row["method"] == name] for name in (method, over)}
    paired = [tally for tally in _tallies(rows[method], rows[over]).values() if tally.baseline_tokens]
    ratio, interval, _ = _speedup(paired)
    return None if ratio is None else (ratio, interval)


def bootstrap(columns: Sequence[Sequence[float]], statistic: Callable[..., float]) -> Interval:
    """Middle 95 % of a statistic of column sums, over resampled rows; None for fewer than two rows."""
    count = len(columns[0])
    if count < 2:
        return None
    source = random.Random(0)
    found = []
    for _ in range(DRAWS):
        picked = itemgetter(*source.choices(range(count), k=count))
        found.append(statistic(*(sum(picked(column)) for column in columns)))
    found = sorted(value for value in found if not math.isnan(value))
    if not found:
        return None
    return found[round(0.025 * len(found))], found[max(0, round(0.975 * len(found)) - 1)]


def _summary(rows: Sequence[Row], baseline: Sequence[Row]) -> Summary:
    answered = [row for row in rows if row["error"] is None]
    tallies = list(_tallies(answered, baseline).values())
    rounds = Stats(
        round_lengths=[row["round_lengths"] for row in answered],
        round_accepted=[row["round_accepted"] for row in answered],
    )
    lengths = [length for row in answered for length in row["round_lengths"]]
    speedup, speedup_interval, speedup_mean = _speedup([tally for tally in tallies if tally.baseline_tokens])
    tau = tau_interval = tau_by_question = accepted = None
    if lengths:
        per_question = [(t.num_round_tokens, t.num_rounds) for t in tallies]
        tau = rounds.mean_acceptance_length
        tau_interval = bootstrap(list(zip(*per_question, strict=True)), over)
        tau_by_question = _mean([over(*sums) for sums in per_question if sums[1]])
        accepted = rounds.num_accepted_draft_tokens / rounds.num_rounds
    num_tokens, seconds = (sum(_column(tallies, name)) for name in ("num_tokens", "seconds"))
    parts = _seconds(answered)
    decoding = seconds - parts["prefill"]
    return Summary(
        num_questions=len({row["question"] for row in rows}),
        num_answers=len(answered),
        num_failed=len(rows) - len(answered),
        num_tokens=round(num_tokens),
        num_rounds=rounds.num_rounds,
        tokens_per_second=num_tokens / seconds if seconds else None,
        decoding_tokens_per_second=num_tokens / decoding if 0 < decoding < seconds else None,
        tokens_per_second_mean=_mean([over(t.num_tokens, t.seconds) for t in tallies]) if seconds else None,
        speedup=speedup,
        speedup_interval=speedup_interval,
        speedup_mean=speedup_mean,
        mean_acceptance_length=tau,
        mean_acceptance_length_interval=tau_interval,
        mean_acceptance_length_by_question=tau_by_question,
        mean_accepted_drafts=accepted,
        acceptance_per_depth=rounds.conditional_acceptance,
        round_length_counts=[lengths.count(n) for n in range(1, max(lengths, default=0) + 1)],
        seconds=parts,
        peak_bytes=max((row["peak_bytes"] for row in answered if row["peak_bytes"] is not None), default=None),
    )


def _speedup(paired: Sequence[Tally]) -> tuple[float | None, Interval, float | None]:
    """Ratio of the totals with its interval, and ratio of the means over questions."""
    if not paired:
        return None, None, None
    names = ("paired_tokens", "paired_seconds", "baseline_tokens", "baseline_seconds")
    columns = [_column(paired, name) for name in names]
    mine = _mean([over(t.paired_tokens, t.paired_seconds) for t in paired])
    theirs = _mean([over(t.baseline_tokens, t.baseline_seconds) for t in paired])
    return ratio_of_ratios(*map(sum, columns)), bootstrap(columns, ratio_of_ratios), over(mine, theirs)


def _tallies(rows: Sequence[Row], baseline: Sequence[Row]) -> dict[str, Tally]:
    """Sums by question. An answer is paired with the baseline's of the same question, turn and repeat."""
    partners = {(r["question"], r["turn"], r["repeat"]): r for r in baseline if r["error"] is None}
    tallies: dict[str, Tally] = defaultdict(Tally)
    for row in rows:
        if row["error"] is not None:
            continue
        tally = tallies[row["question"]]
        tally.num_tokens += row["num_tokens"]
        tally.seconds += row["wall_seconds"]
        tally.num_round_tokens += sum(row["round_lengths"])
        tally.num_rounds += len(row["round_lengths"])
        if partner := partners.get((row["question"], row["turn"], row["repeat"])):
            tally.paired_tokens += row["num_tokens"]
            tally.paired_seconds += row["wall_seconds"]
            tally.baseline_tokens += partner["num_tokens"]
            tally.baseline_seconds += partner["wall_seconds"]
    return dict(tallies)


def _seconds(rows: Sequence[Row]) -> dict[str, float]:
    parts = {name: sum(row[f"{name}_seconds"] for row in rows) for name in ("prefill", "target", "draft")}
    return parts | {"other": sum(row["wall_seconds"] for row in rows) - sum(parts.values())}


def ratio_of_ratios(above: float, below: float, other_above: float, other_below: float) -> float:
    return over(over(above, below), over(other_above, other_below))


def _column(tallies: Sequence[Tally], name: str) -> list[float]:
    return [getattr(tally, name) for tally in tallies]


def over(above: float, below: float) -> float:
    return above / below if below else math.nan


def _mean(values: Sequence[float]) -> float:
    return over(sum(values), len(values))
