"""What a text said behind an n-gram the last time: prompt lookup's one idea, for the drafter of that name (`lookup.py`)
and for rounds in which another drafter rests (`drafter.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LONGEST = 64  # tokens of a match that are looked at


class Repeat(NamedTuple):
    """What a text would go on with if it went on as it did before."""

    tokens: list[int]
    matched: int
    """Tokens, the last one's included, that stood before those and stand here; 0 where nothing repeats."""


class NGrams:
    """Where each n-gram of a growing text ended last, of all lengths in ``sizes`` (ascending)."""

    def __init__(self, text: list[int], sizes: Sequence[int]) -> None:
        self.text, self.sizes = text, sizes
        self._ends: dict[tuple[int, ...], int] = {}
        self._read = 0

    def following(self, root: int, most: int) -> Repeat:
        """``most`` tokens that stood behind the longest n-gram which ends the text and its next token, ``root``, when
        it stood there last; none where none did. What repeats up to the end goes on repeating."""
        self._catch_up()
        text, length = self.text, len(self.text)
        for size in reversed(self.sizes):
            end = self._ends.get((*text[length - size + 1 :], root)) if size <= length + 1 else None
            if end is not None:
                period = [*text[end : end + most], root]
                tokens = [period[place % len(period)] for place in range(most)]
                matched = size
                while matched < min(LONGEST, end) and text[end - matched - 1] == text[length - matched]:
                    matched += 1
                return Repeat(tokens, matched)
        return Repeat([], 0)

    def _catch_up(self) -> None:
        for end in range(self._read + 1, len(self.text) + 1):
            for size in self.sizes:
                if size <= end:
                    self._ends[tuple(self.text[end - size : end])] = end
        self._read = len(self.text)
