"""Draft trees: grown level by level by EAGLE-2's rule, pruned to a node budget, laid out parents first (METHOD 5).

All functions are batched and level-parallel. Nodes of a tree are rows: node 0 is the root (the last token the target
drew itself), every parent comes before its children, and `ancestors` is the attention mask among the rows.

Shapes: B batch, N nodes, k top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from confu.costs import Budget
from confu.host import upload
from confu.native import on_host


@dataclass(frozen=True)
class Tree:
    """A batch of trees of N nodes. Short trees are padded with invalid nodes that see only themselves."""

    tokens: Int[Tensor, "B N"]
    """Target token id of every node; node 0 is the root."""
    parents: Int[Tensor, "B N"]
    """Index of the parent; 0 for the root itself."""
    depths: Int[Tensor, "B N"]
    """Distance from the root."""
    ancestors: Bool[Tensor, "B N N"]
    """``[b, i, j]``: j is i or an ancestor of i."""
    scores: Float[Tensor, "B N"]
    """Sum of the draft's log-probabilities from the root; 0 at the root, -inf for padding."""
    height: int
    """Levels below the root at most, as the host knows it."""

    @property
    def valid(self) -> Bool[Tensor, "B N"]:
        return self.scores > -torch.inf

    def most_probable(self, count: int) -> Int[Tensor, "B C"]:
        """Indices, ascending, of the ``count`` nodes of highest score; the root is always among them."""
        count = min(count, self.tokens.shape[1])
        order = self.scores.sort(dim=1, descending=True, stable=True).indices  # stable: root and parents win ties
        return order[:, :count].sort(dim=1).values


def take(rows: Float[Tensor, "B R W"], index: Int[Tensor, "B I"]) -> Float[Tensor, "B I W"]:
    """Rows of each sequence by index."""
    if len(rows) == 1:  # whole rows, where gather reads an index for each number
        return rows[0].index_select(0, index[0])[None]
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))


def from_parents(
    tokens: Int[Tensor, "B N"], parents: Int[Tensor, "B N"], scores: Float[Tensor, "B N"], height: int | None = None
) -> Tree:
    """Depths and ancestor mask from parent pointers (parents before children). One small step per level. Without a
    known ``height`` it is taken for the largest possible."""
    num_nodes = tokens.shape[1]
    height = num_nodes - 1 if height is None else min(height, num_nodes - 1)
    if (see := on_host("see_ancestors", 4, 2, scores)) is not None:
        parents, scores = parents.contiguous(), scores.contiguous()
        depths, ancestors = torch.empty_like(parents), scores.new_empty(*parents.shape, num_nodes, dtype=torch.bool)
        see(*map(Tensor.data_ptr, (parents, scores, depths, ancestors)), *parents.shape)
        return Tree(tokens, parents, depths, ancestors, scores, height)
    ancestors = torch.eye(num_nodes, dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1)
    valid = scores > -torch.inf
    # A node sees its parent, the parent's parent, ...: doubling the reach needs log2(N) steps.
    reach = torch.zeros_like(ancestors).scatter(2, parents[:, :, None], valid[:, :, None]) | ancestors
    for _ in range(max(num_nodes - 1, 1).bit_length()):
        reach = (reach.float() @ reach.float()) > 0
    return Tree(tokens, parents, reach.sum(2) - 1, reach, scores, height)


def root_only(tokens: Int[Tensor, " B"]) -> Tree:
    """Trees of one node: nothing drafted yet, or nothing to draft."""
    column = tokens[:, None]
    return from_parents(column, torch.zeros_like(column), torch.zeros(column.shape, device=tokens.device))


def chain(root: Int[Tensor, " B"], drafted: Int[Tensor, "B M"], counts: Int[Tensor, " B"]) -> Tree:
    """Trees that are one path: the first ``counts[b]`` of ``drafted[b]``, each the child of the one before."""
    batch, length = drafted.shape
    steps = torch.arange(length, device=drafted.device)
    real = steps < counts[:, None]
    zero = torch.zeros(batch, 1, device=drafted.device)
    scores = torch.cat([zero, torch.where(real, -(steps + 1.0) * 1e-3, -torch.inf)], dim=1)
    parents = torch.cat([zero.long(), torch.where(real, steps, 0)], dim=1)
    return from_parents(torch.cat([root[:, None], drafted], dim=1), parents, scores)


def chains(roots: Int[Tensor, " B"], drafted: Sequence[Sequence[int]]) -> Tree:
    """The same of tokens on the host, as many for each sequence as there are."""
    width = max(map(len, drafted))
    padded = upload([[*tokens, *[0] * (width - len(tokens))] for tokens in drafted], roots.device)
    return chain(roots, padded, upload([len(tokens) for tokens in drafted], roots.device))


class Candidates:
    """All nodes scored while a tree grows; `prune` keeps the best of them as a `Tree`.

    Level 1 holds the k children of the root, every further level the k children of each of its k frontier nodes.
    """

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.num = 0

    @classmethod
    def of(cls, levels: Sequence[tuple[Int[Tensor, "B _"], Int[Tensor, "B _"], Float[Tensor, "B _"]]]) -> Candidates:
        """Found elsewhere: token ids, parents and scores of each level."""
        candidates = cls()
        for tokens, parents, scores in levels:
            candidates.tokens.append(tokens)
            candidates.parents.append(parents)
            candidates.scores.append(scores)
        return candidates

    def add_level(
        self,
        children: tuple[Float[Tensor, "B F k"], Int[Tensor, "B F k"]],
        scores: Float[Tensor, "B F"],
        parents: Int[Tensor, "B F"],
    ) -> Frontier:
        """Add the k best children of each of F frontier nodes, log-probabilities and token ids; returns the best k of
        them all, the next frontier.

        ``scores`` and ``parents`` are the frontier nodes' own path scores and candidate indices (-1: the root).
        """
        best, tokens = children
        topk = best.shape[2]
        path_scores = (scores[:, :, None] + best).flatten(1)
        tokens = tokens.flatten(1)
        self.tokens.append(tokens)
        self.scores.append(path_scores)
        self.parents.append(parents.repeat_interleave(topk, dim=1))
        order = path_scores.sort(dim=1, descending=True, stable=True)  # of equal ones the first
        kept, where = order.values[:, :topk], order.indices[:, :topk]
        frontier = Frontier(tokens.gather(1, where), kept, where // topk, where + self.num)
        self.num += tokens.shape[1]
        return frontier

    def prune(self, root: Int[Tensor, " B"], num_nodes: int, budget: Budget | None = None) -> Tree:
        """Root plus the best ``num_nodes - 1`` candidates, or as many of them as ``budget`` pays for. A child never
        scores above its parent, and the stable sort lets the earlier one win a tie, so parents always survive and come
        first."""
        tokens, scores = torch.cat(self.tokens, 1), torch.cat(self.scores, 1)
        parents = torch.cat(self.parents, 1)
        count, levels = min(num_nodes - 1, tokens.shape[1]), len(self.tokens)
        if (choose := on_host("best_candidates", 3, 3, scores)) is not None:
            batch, all_count = scores.shape
            order, sorted_scores = tokens.new_empty(batch, count), scores.new_empty(batch, count)
            choose(*map(Tensor.data_ptr, (scores, order, sorted_scores)), batch, all_count, count)
            nodes = count + 1 if budget is None else budget.nodes(sorted_scores, levels)
            return _planted(root, tokens, parents, scores, order, nodes, levels)
        order = scores.sort(dim=1, descending=True, stable=True)
        if budget is not None:
            count = budget.nodes(order.values[:, :count], levels) - 1
        best = order.indices[:, :count].sort(dim=1).values
        # Candidate index -> node index, by rank among the kept; the root (-1) is node 0.
        rank = torch.zeros_like(parents).scatter(1, best, 1).cumsum(1)
        chosen = parents.gather(1, best)
        nodes = torch.where(chosen < 0, 0, rank.gather(1, chosen.clamp(min=0)))
        zero = torch.zeros_like(root)[:, None]
        return from_parents(
            torch.cat([root[:, None], tokens.gather(1, best)], dim=1),
            torch.cat([zero, nodes], dim=1),
            torch.cat([zero.to(scores.dtype), scores.gather(1, best)], dim=1),
            levels,
        )


def _planted(
    root: Int[Tensor, " B"],
    tokens: Int[Tensor, "B M"],
    parents: Int[Tensor, "B M"],
    scores: Float[Tensor, "B M"],
    order: Int[Tensor, "B kept"],
    nodes: int,
    levels: int,
) -> Tree:
    """Trees of the roots and the first ``nodes`` - 1 candidates in ``order``, by the compiled function."""
    plant = on_host("plant_trees", 8, 4, scores)
    assert plant is not None
    batch, count = tokens.shape
    found, kept_scores = tokens.new_empty(3, batch, nodes), scores.new_empty(batch, nodes)
    ancestors = scores.new_empty(batch, nodes, nodes, dtype=torch.bool)
    tensors = (tokens, parents, scores, root.contiguous(), order, found, kept_scores, ancestors)
    plant(*map(Tensor.data_ptr, tensors), batch, count, order.shape[1], nodes)
    return Tree(found[0], found[1], found[2], ancestors, kept_scores, min(levels, nodes - 1))


@dataclass(frozen=True)
class Frontier:
    """The k nodes whose children are drafted next."""

    tokens: Int[Tensor, "B k"]
    scores: Float[Tensor, "B k"]
    origin: Int[Tensor, "B k"]
    """Row, within the level above, of each node's parent."""
    candidates: Int[Tensor, "B k"]
    """Index of each node among all candidates."""
