"""What a round costs on one machine, and how large a tree that pays for.

EAGLE-2's tree has as many nodes and levels as it is told, whatever the text. Here every node and level is weighed: the
draft's own probabilities say how many tokens it will probably bring, the cost model what it takes, and tokens per
millisecond decide. Which tree is verified never changes what is emitted, only how fast.

Shapes: B batch, M candidates, k frontier nodes.
"""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from confu.config import TreeConfig

CHILDREN = 0.5  # of what a frontier is expected to bring, the part that its children bring beyond their own cost
WEIGHT = 0.9  # of the past, in what is remembered from round to round
GRAIN = 4  # rows of a verification come in multiples of it: each number costs milliseconds, and memory, the first time
PRIOR = 4.0  # tokens for which the draft's probabilities are believed before acceptance corrects them
TRIAL = 8  # drafts, of all sequences together, before it is judged whether they pay
BREAKS = 1.5  # a repetition that matched m tokens so far breaks with probability BREAKS / (m + BREAKS)
SEEN = 2.0  # breaks for which that is believed before what happens corrects it
GAIN = 0.9  # of the target's own time for a token, what one with a draft may take at most to be believed to pay
RESTS = (16, 64)  # rounds without a draft where none pays: so many at first, twice as many each time, at most so many


@dataclass(frozen=True)
class Costs:
    """Milliseconds on one machine, measured by `confu tune`. Pairs of a size and a time, ascending; linear between."""

    verify: tuple[tuple[int, float], ...]
    """A round's work on the target, by rows of all sequences together: forward, draw, keeping the accepted path."""
    level: tuple[tuple[int, float], ...]
    """One more level of draft trees, by the number of sequences."""
    commit: tuple[tuple[int, float], ...]
    """The draft's work whatever the tree, by the number of sequences: reading the accepted tokens, the first level."""

    def __post_init__(self) -> None:
        for name in ("verify", "level", "commit"):
            points = getattr(self, name)
            sizes = [size for size, _ in points]
            if not points or sizes != sorted(set(sizes)) or any(not 0 <= ms < float("inf") for _, ms in points):
                raise ValueError(f"{name} is {points!r}; give pairs of a growing size and milliseconds, at least one.")


def between(points: tuple[tuple[int, float], ...], size: int) -> float:
    """Linear interpolation, and the last slope beyond the last point (the first time before the first)."""
    if len(points) == 1 or size <= points[0][0]:
        return points[0][1]
    at = min(bisect.bisect_left([known for known, _ in points], size), len(points) - 1)
    (low, low_ms), (high, high_ms) = points[at - 1], points[at]
    return low_ms + (high_ms - low_ms) * (size - low) / (high - low)


def _goes_on(matched: int, breaks: float) -> float:
    """Probability that a text which repeats so many tokens repeats the next one, too."""
    return matched / (matched + breaks)


def _expected(matched: int, breaks: float, most: int) -> list[float]:
    """Tokens that a chain of 1, 2, ... ``most`` is expected to bring behind a match of so many tokens."""
    chances = (_goes_on(length, breaks) for length in range(matched, matched + most))
    return list(itertools.accumulate(itertools.accumulate(chances, operator.mul)))


class Budget:
    """Decides, round by round, how deep a tree grows and how many of its nodes are verified, and where for a while no
    tree is grown at all.

    It remembers how many of the expected tokens came true, the milliseconds a token takes, and how often repetitions
    broke.
    """

    def __init__(self, costs: Costs, tree: TreeConfig, batch_size: int, *, contemplates: bool) -> None:
        self.costs, self.tree, self.contemplates = costs, tree, contemplates
        self._came = self._expected = PRIOR
        self._promised = 0.0
        self._broke = self._would_break = 0.0
        self._tried, self._left, self._rest = 0, 0, RESTS[0]
        self._pace, self._plain = GAIN, 1.0
        self.resize(batch_size)

    def resize(self, batch_size: int) -> None:
        """So many sequences go on, for which a draft may pay more."""
        self.batch_size = batch_size
        self._level = between(self.costs.level, batch_size)
        self._commit = between(self.costs.commit, batch_size)
        plain = between(self.costs.verify, batch_size) / batch_size
        self._pace, self._plain = self._pace * plain / self._plain, plain
        self._left, self._rest = min(self._left, RESTS[0]), RESTS[0]
        self._verify = [
            (n, between(self.costs.verify, self.rows(n)))
            for n in range(1, self.tree.nodes + 1)
            if n in (1, self.tree.nodes) or self.rows(n) % GRAIN == 0
        ]
        self._verify_chain = [
            (n, between(self.costs.verify, batch_size * n))
            for n in range(2, self.tree.nodes + 1)
            if n == self.tree.nodes or batch_size * n % GRAIN == 0
        ]

    def rows(self, nodes: int) -> int:
        """Rows of a verification with ``nodes`` in each tree."""
        num_con = self.tree.num_con(nodes) if self.contemplates and nodes > 1 else 0  # roots alone contemplate rarely
        return self.batch_size * (nodes + num_con)

    @property
    def trust(self) -> float:
        """Accepted tokens for each one that the draft's probabilities promised."""
        return self._came / self._expected

    def rests(self) -> bool:
        """Whether the next round goes without a draft. Asked once in every round that no repetition drafts for: where
        drafts gain too little over the target alone, none comes for a while, then a few are tried again."""
        if self._left == 0 and self._tried >= TRIAL:
            if self._pace > GAIN * self._plain:
                self._tried, self._pace = 0, GAIN * self._plain
                self._left, self._rest = self._rest, min(2 * self._rest, RESTS[1])
            else:
                self._rest = RESTS[0]
        if self._left > 0:
            self._left -= 1
            return True
        self._tried += self.batch_size
        return False

    @property
    def least(self) -> float:
        """Tokens that a frontier has to promise for a level below it to be worth its time."""
        each = self.trust * CHILDREN * self._pace
        return self._level / each if each > 0 else math.inf

    def deeper(self, scores: Float[Tensor, "B k"]) -> bool:
        """Whether a level below this frontier (log-probabilities from the root) is worth its time."""
        return scores.exp().sum().item() > self.least

    def nodes(self, scores: Float[Tensor, "B M"], depth: int) -> int:
        """Nodes to verify, the root included, of trees ``depth`` levels deep whose candidates have these scores, best
        first: the number that promises most tokens per millisecond, of those that come in multiples of `GRAIN` rows.
        The root alone and the largest tree are such numbers, too."""
        promised = [0.0, *scores.exp().sum(0).cumsum(0).tolist()]
        spent, trust = self._commit + (depth - 1) * self._level, self.trust
        pace, nodes = min(
            ((milliseconds + spent) / (self.batch_size + trust * promised[n - 1]), n)
            for n, milliseconds in self._verify
            if n <= len(promised)
        )
        self._promised = promised[nodes - 1]
        self._pace = WEIGHT * self._pace + (1 - WEIGHT) * pace
        return nodes

    @property
    def breaks(self) -> float:
        """`BREAKS`, as this text has it."""
        return BREAKS * (SEEN + self._broke) / (SEEN + self._would_break)

    def chain_nodes(self, matches: Sequence[int]) -> int:
        """Nodes, the root included, of chains that repeat what followed matches of so many tokens (0: none), in a
        verification without contemplate rows: the number that gives most tokens per millisecond, or 0 where the
        draft's trees, or in a rest the target alone, do better."""
        known = Counter(length for length in matches if length)
        if not known or not self._verify_chain:
            return 0
        each = [[count * n for n in _expected(m, self.breaks, self.tree.nodes - 1)] for m, count in known.items()]
        promised = [0.0, *map(sum, zip(*each, strict=True))]
        pace, nodes = min((ms / (self.batch_size + promised[n - 1]), n) for n, ms in self._verify_chain)
        return nodes if pace < (min(self._pace, self._plain) if self._left == 0 else self._plain) else 0

    def note_chains(self, matches: Sequence[int], drafted: int, accepted: Sequence[int]) -> None:
        """So many of the ``drafted`` tokens of each chain were accepted."""
        broke = would_break = 0.0
        for length, count in zip(matches, accepted, strict=True):
            tried = min(count + 1, drafted) if length else 0
            broke += tried > count
            would_break += sum(1 - _goes_on(length + place, BREAKS) for place in range(tried))
        self._broke = WEIGHT * self._broke + broke
        self._would_break = WEIGHT * self._would_break + would_break

    def note(self, accepted: int) -> None:
        """So many drafted tokens of the round were accepted, in all sequences."""
        self._came = WEIGHT * self._came + accepted
        self._expected = WEIGHT * self._expected + self._promised
        self._promised = 0.0
