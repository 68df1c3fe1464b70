"""Classic speculative decoding: a smaller Hugging Face model of the same vocabulary grows the tree."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from confu.cache import KVCache
from confu.config import TreeConfig
from confu.costs import Budget
from confu.drafter import Accepted
from confu.rows import rows
from confu.target import Target
from confu.tree import Candidates, Tree


class AssistantState:
    """The small model's KV cache and the roots behind it."""

    def __init__(self, cache: KVCache, roots: Int[Tensor, " B"]) -> None:
        self.cache, self.roots = cache, roots

    @property
    def lengths(self) -> list[int]:
        return self.cache.lengths

    def truncate(self, lengths: list[int]) -> None:
        self.cache.truncate(lengths)

    def select(self, sequences: list[int]) -> None:
        self.cache.select(sequences)
        self.roots = self.roots[sequences]


class Assistant:
    """Drafts by EAGLE-2's rule with the log-probabilities of ``model``. Raises ValueError for another vocabulary."""

    name = "draft-model"
    contemplation = None

    def __init__(self, target: Target, model: Target) -> None:
        if model.vocab_size != target.vocab_size:
            raise ValueError(
                f"The draft model has {model.vocab_size} tokens, the target {target.vocab_size}; "
                "both must share one vocabulary."
            )
        self.model = model

    def new_state(self, batch_size: int, capacity: int) -> AssistantState:
        roots = torch.zeros(batch_size, dtype=torch.int64, device=self.model.device)
        return AssistantState(self.model.new_cache(batch_size, capacity), roots)

    def commit(self, state: AssistantState, accepted: Accepted) -> None:
        """The accepted rows run once more, now in sequence order; the root waits for `grow`."""
        self.model.prefill(state.cache, accepted.tokens, accepted.counts)
        state.roots = accepted.next_tokens

    def grow(self, state: AssistantState, config: TreeConfig, budget: Budget | None = None) -> Tree:
        batch, device = len(state.roots), state.roots.device
        candidates = Candidates()
        zeros = torch.zeros(batch, 1, device=device)
        reach = torch.ones(batch, 1, 1, dtype=torch.bool, device=device)
        children = self._step(state.cache, state.roots[:, None], reach, 0, config.topk)
        frontier = candidates.add_level(children, zeros, zeros.long() - 1)
        itself = torch.eye(frontier.tokens.shape[1], dtype=torch.bool, device=device).expand(batch, -1, -1)
        for level in range(1, config.depth):
            if budget is not None and not budget.deeper(frontier.scores):
                break
            seen = reach.gather(1, frontier.origin[:, :, None].expand(-1, -1, reach.shape[2]))
            reach = torch.cat([seen, itself], dim=2)
            children = self._step(state.cache, frontier.tokens, reach, level, config.topk)
            frontier = candidates.add_level(children, frontier.scores, frontier.candidates)
        return candidates.prune(state.roots, config.nodes, budget)

    def _step(
        self, cache: KVCache, tokens: Int[Tensor, "B F"], reach: Bool[Tensor, "B F W"], level: int, topk: int
    ) -> tuple[Float[Tensor, "B F k"], Int[Tensor, "B F k"]]:
        """Log-probabilities and ids of the best children of F nodes of one level, which see the prefix and what
        ``reach`` allows of the tree."""
        num_rows = tokens.shape[1]
        positions = (cache.lengths_tensor()[:, None] + level).clamp(max=self.model.max_positions - 1)
        cache.open_rows(num_rows, offset=reach.shape[2] - num_rows)
        logits, _ = self.model.forward_rows(
            self.model.embed(tokens),
            positions.expand(-1, num_rows),
            cache.row_mask(reach, with_soft=False),
            cache,
            self.model.feature_layers,
            num_logits=num_rows,
        )
        return rows().best(logits, min(topk, logits.shape[2]))
