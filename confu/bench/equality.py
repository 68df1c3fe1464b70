"""Is every answer the plain target's? Token for token where it must be: at temperature 0, and above it where both were
drawn with the same random numbers. Any other sample is judged by a two-sample test.

All is told from the rows: a plain row holds how surely the target chose each of its tokens, so that a tie, which
rounding decides, is told from a mistake where another answer first differs.
"""

from __future__ import annotations

import random
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from confu.bench.results import OURS, PLAIN, Results, Row, answered
from confu.terminal.view import first_difference

ROUNDING_GAP = 1e-3  # float32 logits (and so probabilities) of two computation orders differ by less
SMALLEST_P = 1e-3
PERMUTATIONS, ENOUGH = 2000, 20
REASON = 160  # characters of an error


@dataclass(frozen=True)
class Difference:
    """One answer that is not the plain target's, though it must be."""

    question: str
    task: str
    turn: int
    method: str
    repeat: int
    position: int
    """Of the first token that differs, counted from 0."""
    gap: float | None
    """There, by how much the plain target prefers its best token to the second (in logits); above temperature 0, how
    far the random number lies within the share of the token that it drew (`Sampler.margins`). None past the end of its
    answer."""
    plain_text: str
    text: str

    @property
    def is_tie(self) -> bool:
        """Whether float32 rounding can decide for another token."""
        return self.gap is not None and self.gap <= ROUNDING_GAP


@dataclass(frozen=True)
class Comparison:
    """One method's answers against the plain target's."""

    num_compared: int
    """Token by token: answers to the same prompt, above temperature 0 by the same random numbers. A later turn behind
    an answer that differs has another prompt."""
    differences: list[Difference]
    first_token_p: float | None = None
    """Above temperature 0: p-value of the two-sample test on first tokens, and on lengths in tokens. Samples by the
    same random numbers can only be more alike than it assumes."""
    length_p: float | None = None

    @property
    def is_tested(self) -> bool:
        """Whether samples are compared that are not the same, token for token, anyway."""
        return self.first_token_p is not None and (self.num_compared == 0 or bool(self.differences))

    @property
    def is_other_distribution(self) -> bool:
        return any(p is not None and p < SMALLEST_P for p in (self.first_token_p, self.length_p))


def compare(results: Results) -> dict[str, Comparison]:
    """Every method against the plain target; the plain target at temperature 0 against its own first repeat."""
    rows, methods, greedy = results.rows, results.run["methods"], results.run["temperature"] == 0
    able = [row for row in answered(rows, PLAIN) if (row["repeat"] == 0 if greedy else "seed" in row)]
    plain = {_drawn_from(row, greedy): row for row in able}
    return {
        name: Comparison(*_compare_tokens(rows, name, plain, greedy), *(() if greedy else _compare_samples(rows, name)))
        for name in methods
        if greedy or name != PLAIN
    }


def unanswered(results: Results, *, all_of_them: bool) -> list[str]:
    """The first reason of each method that failed at all of its answers, or else at some."""
    sentences = []
    for name in results.run["methods"]:
        errors = [row["error"] for row in results.rows if row["method"] == name]
        reasons = [error for error in errors if error is not None]
        if reasons and (len(reasons) == len(errors)) == all_of_them:
            first = textwrap.shorten(reasons[0], REASON, placeholder=" …")
            sentences.append(f"{name}: {len(reasons)} of {len(errors)} answers failed (the first: {first}).")
    return sentences


def failures(results: Results, compared: dict[str, Comparison]) -> list[str]:
    """Why a run has failed, one sentence for each method; empty for a good one. Peers compute otherwise: they may
    differ. So may bfloat16, where neighbouring logits are further apart than any rounding bound."""
    sentences = unanswered(results, all_of_them=True)
    for name, found in compared.items():
        if results.run["methods"][name]["engine"] != OURS:
            continue
        wrong = [difference for difference in found.differences if not difference.is_tie]
        if wrong and results.run["dtype"] == "float32":
            first = wrong[0]
            gap = f"the {gap_name(results.run)} is {first.gap:.2g}" if first.gap is not None else "it had ended"
            sentences.append(
                f"{name}: {len(wrong)} of {found.num_compared} answers differ from the plain target's beyond rounding; "
                f"the first is question {first.question}, turn {first.turn + 1}, from token {first.position + 1} on, "
                f"where {gap}."
            )
        if found.is_other_distribution:
            sentences.append(
                f"{name}: samples follow another distribution than the plain target's (p {found.first_token_p:.2g} by "
                f"first tokens, {found.length_p:.2g} by lengths)."
            )
    return sentences


def gap_name(run: dict[str, Any]) -> str:
    """What `Difference.gap` is in this run."""
    return "top-2 gap" if run["temperature"] == 0 else "margin of the draw"


def _drawn_from(row: Row, greedy: bool) -> tuple[str, int, int | None]:
    """What makes an answer's tokens, its prompt aside."""
    return row["question"], row["turn"], None if greedy else row.get("seed")


def _compare_tokens(
    rows: Sequence[Row], method: str, plain: dict[tuple[str, int, int | None], Row], greedy: bool
) -> tuple[int, list[Difference]]:
    differences = []
    num_compared = 0
    conversations: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in answered(rows, method):
        if not (method == PLAIN and row["repeat"] == 0):
            conversations[row["question"], row["repeat"]].append(row)
    for turns in conversations.values():
        for row in sorted(turns, key=lambda row: row["turn"]):
            theirs = plain.get(_drawn_from(row, greedy))
            if theirs is None:
                break
            num_compared += 1
            at = first_difference(row["token_ids"], theirs["token_ids"])
            if at is not None:
                differences.append(_difference(row, theirs, at))
                break  # the next turn's prompt is another one
    return num_compared, differences


def _difference(row: Row, plain: Row, at: int) -> Difference:
    gaps = plain["top2_gaps"] if "top2_gaps" in plain else plain["margins"]
    return Difference(
        **{name: row[name] for name in ("question", "task", "turn", "method", "repeat", "text")},
        position=at,
        gap=gaps[at] if at < len(gaps) else None,
        plain_text=plain["text"],
    )


def _compare_samples(rows: Sequence[Row], method: str) -> tuple[float, float] | tuple[None, None]:
    """Two-sample permutation tests on the first turns. Within a question it is a matter of chance, if the
    distributions are the same, which samples are called the method's: that is what is permuted."""
    groups: dict[str, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for which, name in enumerate((method, PLAIN)):
        for row in answered(rows, name):
            if row["turn"] == 0:
                groups[row["question"]][which].append(row)
    pairs = [(mine, theirs) for mine, theirs in groups.values() if mine and theirs]
    if not pairs:
        return None, None
    first = permutation_test(pairs, lambda row: row["token_ids"][0], _token_distance)
    length = permutation_test(pairs, lambda row: row["num_tokens"], _mean_distance)
    return first, length


def permutation_test(
    pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]],
    value: Callable[[Any], int],
    distance: Callable[[list[int], list[int]], float],
) -> float:
    """p-value: how often samples, exchanged at random within each pair of groups, lie as far apart as they do. It ends
    early when ``ENOUGH`` have: then p is not small (sequential Monte Carlo, Besag and Clifford 1991)."""
    source = random.Random(0)
    groups = [([value(row) for row in mine], [value(row) for row in theirs]) for mine, theirs in pairs]
    mine, theirs = ([x for group in groups for x in group[which]] for which in (0, 1))
    observed, as_far = distance(mine, theirs), 0
    for number in range(1, PERMUTATIONS + 1):
        mine, theirs = [], []
        for ours, others in groups:
            mixed = source.sample([*ours, *others], len(ours) + len(others))
            mine += mixed[: len(ours)]
            theirs += mixed[len(ours) :]
        as_far += distance(mine, theirs) >= observed - 1e-9
        if as_far == ENOUGH:
            return ENOUGH / number
    return (1 + as_far) / (1 + PERMUTATIONS)


def _token_distance(mine: list[int], theirs: list[int]) -> float:
    """Chi-square of two samples of tokens, up to what permuting does not change."""
    a, b = Counter(mine), Counter(theirs)
    scale = len(theirs) / len(mine)
    return sum((a[token] * scale - b[token]) ** 2 / (a[token] + b[token]) for token in a | b)


def _mean_distance(mine: list[int], theirs: list[int]) -> float:
    return abs(sum(mine) / len(mine) - sum(theirs) / len(theirs))
