"""What a text said behind an n-gram the last time: prompt lookup's one idea, for the drafter of that name (`lookup.py`)
and for rounds in which another drafter rests (`drafter.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LONGEST = 64  # tokens of a match that are looked at


class Match(NamedTuple):
    """Where a text repeats itself."""

    end: int
    """Of what stood there before: where the tokens are that followed."""
    length: int
    """In tokens, the last one's included; 0 where nothing repeats."""


NONE = Match(0, 0)


class NGrams:
    """Where each n-gram of a growing text ended last, of all lengths in ``sizes`` (ascending)."""

    def __init__(self, text: list[int], sizes: Sequence[int]) -> None:
        self.text, self.sizes = text, sizes
        self._ends: dict[tuple[int, ...], int] = {}
        self._read = 0

    def match(self, root: int) -> Match:
        """Where the longest n-gram that ends the text and its next token, ``root``, stood last."""
        self._catch_up()
        text, length = self.text, len(self.text)
        for size in reversed(self.sizes):
            end = self._ends.get((*text[length - size + 1 :], root)) if size <= length + 1 else None
            if end is not None:
                matched = size
                while matched < min(LONGEST, end) and text[end - matched - 1] == text[length - matched]:
                    matched += 1
                return Match(end, matched)
        return NONE

    def following(self, match: Match, root: int, count: int) -> list[int]:
        """So many tokens that stood behind a match; none behind none. What repeats up to the end goes on repeating."""
        if match is NONE:
            return []
        period = [*self.text[match.end : match.end + count], root]
        return [period[place % len(period)] for place in range(count)]

    def _catch_up(self) -> None:
        for end in range(self._read + 1, len(self.text) + 1):
            for size in self.sizes:
                if size <= end:
                    self._ends[tuple(self.text[end - size : end])] = end
        self._read = len(self.text)
