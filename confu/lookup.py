"""Prompt lookup: draft what followed the last occurrence of the current n-gram. Needs no training and no model."""

from __future__ import annotations

from confu.config import TreeConfig
from confu.costs import Budget
from confu.drafter import Accepted
from confu.host import upload
from confu.target import Target
from confu.tree import Tree, chain


class LookupState:
    """The tokens of every sequence, where each of their n-grams ended last, and the root that follows them."""

    def __init__(self, batch_size: int, max_ngram: int) -> None:
        self.max_ngram = max_ngram
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self.ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(batch_size)]
        self.roots = [0] * batch_size

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    def add(self, sequence: int, new: list[int]) -> None:
        tokens, ends = self.tokens[sequence], self.ends[sequence]
        for token in new:
            tokens.append(token)
            for size in range(1, min(self.max_ngram, len(tokens)) + 1):
                ends[tuple(tokens[-size:])] = len(tokens)

    def truncate(self, lengths: list[int]) -> None:
        for sequence, length in enumerate(lengths):
            if length < len(self.tokens[sequence]):
                kept = self.tokens[sequence][:length]
                self.tokens[sequence], self.ends[sequence] = [], {}
                self.add(sequence, kept)

    def select(self, sequences: list[int]) -> None:
        self.tokens = [self.tokens[i] for i in sequences]
        self.ends = [self.ends[i] for i in sequences]
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
        for sequence, (row, count) in enumerate(zip(accepted.tokens.tolist(), accepted.counts, strict=True)):
            state.add(sequence, row[:count])
        state.roots = accepted.next_tokens.tolist()

    def grow(self, state: LookupState, config: TreeConfig, budget: Budget | None = None) -> Tree:
        length = min(config.depth, config.nodes - 1)
        drafts = [self._following(state, sequence, length) for sequence in range(len(state.roots))]
        width = max(map(len, drafts))
        padded = upload([d + [0] * (width - len(d)) for d in drafts], self.device)
        counts = upload([len(d) for d in drafts], self.device)
        return chain(upload(state.roots, self.device), padded, counts)

    def _following(self, state: LookupState, sequence: int, length: int) -> list[int]:
        tokens, ends, root = state.tokens[sequence], state.ends[sequence], state.roots[sequence]
        for size in range(min(self.max_ngram, len(tokens)), 0, -1):
            end = ends.get((*tokens[len(tokens) - size + 1 :], root))
            if end is not None:
                return [*tokens[end : end + length], root][:length]
        return []
