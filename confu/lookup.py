"""Prompt lookup: draft what followed the last occurrence of the current n-gram. Needs no training and no model."""

from __future__ import annotations

import torch

from confu.config import TreeConfig
from confu.costs import Budget
from confu.drafter import Accepted
from confu.target import Target
from confu.tree import Tree, chain


class LookupState:
    """The tokens of every sequence, and the root that follows them."""

    def __init__(self, batch_size: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self.roots = [0] * batch_size

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    def truncate(self, lengths: list[int]) -> None:
        self.tokens = [tokens[:length] for tokens, length in zip(self.tokens, lengths, strict=True)]

    def select(self, sequences: list[int]) -> None:
        self.tokens = [self.tokens[i] for i in sequences]
        self.roots = [self.roots[i] for i in sequences]


class Lookup:
    """Drafts a chain: the longest n-gram of at most ``max_ngram`` tokens wins, then its latest occurrence."""

    name = "lookup"
    contemplation = None

    def __init__(self, target: Target, *, max_ngram: int = 3) -> None:
        self.device, self.max_ngram = target.device, max_ngram

    def new_state(self, batch_size: int, capacity: int) -> LookupState:
        return LookupState(batch_size)

    def commit(self, state: LookupState, accepted: Accepted) -> None:
        for tokens, row, count in zip(state.tokens, accepted.tokens.tolist(), accepted.counts, strict=True):
            tokens += row[:count]
        state.roots = accepted.next_tokens.tolist()

    def grow(self, state: LookupState, config: TreeConfig, budget: Budget | None = None) -> Tree:
        length = min(config.depth, config.nodes - 1)
        drafts = [
            self._following([*tokens, root], length) for tokens, root in zip(state.tokens, state.roots, strict=True)
        ]
        width = max(map(len, drafts))
        padded = torch.tensor([d + [0] * (width - len(d)) for d in drafts], dtype=torch.int64, device=self.device)
        counts = torch.tensor([len(d) for d in drafts], device=self.device)
        return chain(torch.tensor(state.roots, device=self.device), padded, counts)

    def _following(self, tokens: list[int], length: int) -> list[int]:
        for size in range(min(self.max_ngram, len(tokens) - 1), 0, -1):
            tail = tokens[-size:]
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start : start + size] == tail:
                    return tokens[start + size : start + size + length]
        return []
