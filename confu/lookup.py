"""Prompt lookup: draft what followed the last occurrence of the current n-gram. Needs no training and no model."""

from __future__ import annotations

from confu.config import TreeConfig
from confu.costs import Budget
from confu.drafter import Accepted
from confu.host import upload
from confu.ngrams import NGrams
from confu.target import Target
from confu.tree import Tree, chains


class LookupState:
    """The tokens of every sequence, where their n-grams ended last, and the root that follows them."""

    def __init__(self, batch_size: int, max_ngram: int) -> None:
        self._sizes = range(1, max_ngram + 1)
        self.texts = [NGrams([], self._sizes) for _ in range(batch_size)]
        self.roots = [0] * batch_size

    @property
    def lengths(self) -> list[int]:
        return [len(ngrams.text) for ngrams in self.texts]

    def truncate(self, lengths: list[int]) -> None:
        for sequence, length in enumerate(lengths):
            if length < len(self.texts[sequence].text):
                self.texts[sequence] = NGrams(self.texts[sequence].text[:length], self._sizes)

    def select(self, sequences: list[int]) -> None:
        self.texts = [self.texts[i] for i in sequences]
        self.roots = [self.roots[i] for i in sequences]


class Lookup:
    """Drafts a chain: the longest n-gram of at most ``max_ngram`` tokens wins, then its latest occurrence."""

    name = "lookup"
    contemplation = None

    def __init__(self, target: Target, *, max_ngram: int = 3) -> None:
        self.device, self.max_ngram = target.device, max_ngram

    def new_state(self, batch_size: int, capacity: int) -> LookupState:
        return LookupState(batch_size, self.max_ngram)

    def commit(self, state: LookupState, accepted: Accepted) -> None:
        for ngrams, row, count in zip(state.texts, accepted.tokens.tolist(), accepted.counts, strict=True):
            ngrams.text += row[:count]
        state.roots = accepted.next_tokens.tolist()

    def grow(self, state: LookupState, config: TreeConfig, budget: Budget | None = None) -> Tree:
        length = min(config.depth, config.nodes - 1)
        pairs = zip(state.texts, state.roots, strict=True)
        drafts = [ngrams.following(ngrams.match(root), root, length) for ngrams, root in pairs]
        return chains(upload(state.roots, self.device), drafts)
