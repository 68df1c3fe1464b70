"""Exact verification: one draw per node from the target, then a walk down the tree (METHOD 6).

Draft trees are deterministic, so drawing y from the target at a node and stepping into the child equal to y, if there
is one, leaves exactly the target's distribution: every emitted token is a draw of the target itself.

Shapes: B batch, N tree nodes, M accepted nodes of the longest path, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from confu.config import SamplingConfig
from confu.native import on_host
from confu.rows import rows
from confu.tree import Tree

Warper = Callable[[Float[Tensor, "R V"]], Float[Tensor, "R V"]]


@dataclass(frozen=True)
class Walk:
    """The accepted path of each tree and the token drawn behind it, on the device and as the host needs them."""

    path: Int[Tensor, "B M"]
    """Node indices, ascending from the root; padded by unaccepted nodes."""
    last: Int[Tensor, "B 1"]
    """Where on its path the last accepted node is."""
    bonus: Int[Tensor, " B"]
    """The target's own token after the last accepted node."""
    counts: list[int]
    """Accepted nodes, the root included."""
    tokens: list[list[int]]
    """Those of the accepted nodes."""
    drawn: list[list[int]]
    """The token drawn at each accepted node: the next one's, and behind the last the bonus."""
    logprobs: list[list[float]]
    """Log-probabilities of the drawn tokens, and of no meaning behind them; nothing where no logits were given."""
    untaken: list[tuple[int, ...]]
    """Tokens of the draft's best-scored path from the last accepted node, which the target left; empty at a leaf."""
    num_drafted: list[int]
    """Nodes of each tree, without root and padding."""


def walk(tree: Tree, drawn: Int[Tensor, "B N"], logits: Float[Tensor, "B N V"] | None = None) -> Walk:
    """Follow the drawn tokens: a node is accepted when it and all its ancestors equal what their parents drew.

    How many rows the caches keep is decided on the host. All that it wants to know of a round goes there at once, since
    the device stands still while it is asked.
    """
    if (walk_down := on_host("walk_trees", 7, 3, tree.scores)) is not None:
        return _walk_on_host(walk_down, tree, drawn, logits)
    agrees = (tree.tokens == drawn.gather(1, tree.parents)) & tree.valid
    agrees[:, 0] = True
    accepted = (~tree.ancestors | agrees[:, None, :]).all(dim=2) & tree.valid
    num_accepted = accepted.sum(1, keepdim=True)
    last, width = num_accepted - 1, tree.height + 1
    path = _first(accepted)[:, :width]
    end = path.gather(1, last)
    bonus = drawn.gather(1, end)
    told = tree.tokens.gather(1, path).roll(-1, dims=1).scatter(1, last, bonus)
    ahead = _best_ahead(tree, end)
    numbers = [num_accepted, tree.valid.sum(1, keepdim=True) - 1, ahead.sum(1, keepdim=True), tree.tokens[:, :1]]
    parts = [*numbers, told, tree.tokens.gather(1, _first(ahead)[:, :width])]
    if logits is not None:
        parts.append(rows().log_probs(logits, path, told).double().view(torch.int64))

    numbers_there, told_there, ahead_there, logprobs_there = (
        torch.cat(parts, dim=1)
        .cpu()
        .tensor_split([len(numbers), len(numbers) + width, len(numbers) + 2 * width], dim=1)
    )
    counts, num_drafted, num_ahead, roots = (column.tolist() for column in numbers_there.unbind(1))
    ids = [row[:count] for row, count in zip(told_there.tolist(), counts, strict=True)]
    return Walk(
        path[:, : max(counts)],
        last,
        bonus[:, 0],
        counts,
        [[root, *row[:-1]] for root, row in zip(roots, ids, strict=True)],
        ids,
        logprobs_there.contiguous().view(torch.float64).tolist(),
        [tuple(row[:count]) for row, count in zip(ahead_there.tolist(), num_ahead, strict=True)],
        num_drafted,
    )


def _walk_on_host(
    walk_down: Callable[..., None], tree: Tree, drawn: Int[Tensor, "B N"], logits: Float[Tensor, "B N V"] | None
) -> Walk:
    """The same by the compiled function."""
    tensors = tree.tokens, tree.parents, tree.depths, tree.scores, drawn
    assert drawn.dtype == tree.tokens.dtype == torch.int64
    held = [tensor.contiguous() for tensor in tensors]
    (batch, nodes), width = tree.tokens.shape, tree.height + 1
    numbers, lines = drawn.new_empty(batch, 4), drawn.new_empty(batch, 3, width)
    walk_down(*map(Tensor.data_ptr, (*held, numbers, lines)), batch, nodes, width)
    counts, num_drafted, num_ahead, _ = (column.tolist() for column in numbers.unbind(1))
    longest = max(counts)
    path, told = lines[:, 0, :longest].contiguous(), lines[:, 1, :longest].contiguous()
    ids = [row[:count] for row, count in zip(told.tolist(), counts, strict=True)]
    logprobs = rows().log_probs(logits, path, told).tolist() if logits is not None else [[] for _ in counts]
    return Walk(
        path,
        numbers[:, :1] - 1,
        numbers[:, 3],
        counts,
        [[root, *row[:-1]] for root, row in zip(tree.tokens[:, 0].tolist(), ids, strict=True)],
        ids,
        logprobs,
        [tuple(row[:count]) for row, count in zip(lines[:, 2].tolist(), num_ahead, strict=True)],
        num_drafted,
    )


def _first(chosen: Bool[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """Indices of the chosen nodes, ascending, before those of the others."""
    return (~chosen).to(torch.uint8).sort(dim=1, stable=True).indices


def _best_ahead(tree: Tree, end: Int[Tensor, "B 1"]) -> Bool[Tensor, "B N"]:
    """Nodes of the draft's best path below the node ``end``: of its deepest continuations, the one it believed most."""
    below = tree.ancestors.gather(2, end[:, None].expand(-1, tree.tokens.shape[1], -1))[:, :, 0] & tree.valid
    below = below.scatter(1, end, False)
    best = (tree.depths * 1e4 + tree.scores).masked_fill(~below, -torch.inf).argmax(1, keepdim=True)
    return tree.ancestors.gather(1, best[:, :, None].expand(-1, -1, below.shape[1]))[:, 0] & below


class Sampler:
    """Draws from the target's warped distribution; argmax at temperature 0. One generator for each sequence, and one of
    its numbers for each token, which all nodes share that may become this token: whatever trees are drafted, and in
    whatever batch, a seed gives the same text, as far as logits are the same numbers. (Which tree is verified must not
    depend on numbers of tokens to come; no drafter sees them.)"""

    def __init__(self, config: SamplingConfig, num_sequences: int) -> None:
        self.config = config
        self.warpers = _warpers(config)
        self.generators = [torch.Generator().manual_seed(config.seed + i) for i in range(num_sequences)]
        self._ahead = [torch.empty(0, dtype=torch.float64) for _ in self.generators]  # of tokens to come

    def select(self, sequences: list[int]) -> None:
        self.generators = [self.generators[i] for i in sequences]
        self._ahead = [self._ahead[i] for i in sequences]

    def advance(self, counts: list[int]) -> None:
        """So many tokens of each sequence were drawn for good."""
        self._ahead = [ahead[count:] for ahead, count in zip(self._ahead, counts, strict=True)]

    def draw(
        self, logits: Float[Tensor, "B N V"], tree: Tree, seen: Bool[Tensor, "B V"] | None = None
    ) -> Int[Tensor, "B N"]:
        """One token for every node that `walk` can come to; others hold any token, or -1. ``seen`` marks the tokens of
        each prefix, for the repetition penalty; every node adds its own ancestors to it.

        On a CPU a node draws when its turn comes, which for most it never does; elsewhere all draw at once, without
        waiting for the device."""
        if seen is not None:
            logits = penalise(logits.float(), tree, seen, self.config.repetition_penalty)
        if self.config.temperature == 0:
            return rows().argmax(logits)
        uniform = self._uniform(tree.height + 1).to(logits.device).gather(1, tree.depths)
        if logits.device.type == "cpu":
            return self._draw_on_path(logits, tree, uniform)
        return invert_cdf(self.probabilities(logits), uniform)

    def _uniform(self, count: int) -> Float[Tensor, "B count"]:
        """The numbers of so many tokens of each sequence, from the next one on."""
        for row, (ahead, generator) in enumerate(zip(self._ahead, self.generators, strict=True)):
            more = torch.rand(max(0, count - len(ahead)), generator=generator, dtype=torch.float64)
            self._ahead[row] = torch.cat([ahead, more])
        return torch.stack([ahead[:count] for ahead in self._ahead])

    def _draw_on_path(
        self, logits: Float[Tensor, "B N V"], tree: Tree, uniform: Float[Tensor, "B N"]
    ) -> Int[Tensor, "B N"]:
        drawn = torch.full_like(tree.tokens, -1)
        edges = zip(tree.parents.tolist(), tree.tokens.tolist(), tree.valid.tolist(), strict=True)
        for row, (parents, tokens, valid) in enumerate(edges):
            children = {
                edge: node for node, edge in enumerate(zip(parents, tokens, strict=True)) if node and valid[node]
            }
            node: int | None = 0
            while node is not None:
                at = slice(row, row + 1), slice(node, node + 1)
                token = int(invert_cdf(self.probabilities(logits[at]), uniform[at]))
                drawn[row, node] = token
                node = children.get((node, token))
        return drawn

    def margins(self, logits: Float[Tensor, "1 N V"], drawn: Int[Tensor, "1 N"]) -> list[float]:
        """How far the numbers of the next N tokens, which were drawn, lie within their tokens' shares of the
        probability: what a share's bounds would have to move by for another token. These tokens count as drawn then."""
        cdf = self.probabilities(logits).double().cumsum(dim=-1)
        uniform = self._uniform(drawn.shape[1]).to(cdf.device) * cdf[..., -1]
        self.advance([drawn.shape[1]])
        above = cdf.gather(2, drawn[..., None])[..., 0]
        below = torch.where(drawn > 0, cdf.gather(2, (drawn - 1).clamp(min=0)[..., None])[..., 0], 0.0)
        return torch.minimum(uniform - below, above - uniform).clamp(min=0)[0].tolist()

    def probabilities(self, logits: Float[Tensor, "B N V"]) -> Float[Tensor, "B N V"]:
        """The warped distribution p: temperature, top-k, top-p, min-p, in transformers' order."""
        scores = logits.float().flatten(0, 1)
        for warp in self.warpers:
            scores = warp(scores)
        return scores.softmax(dim=-1).view_as(logits)


def invert_cdf(probs: Float[Tensor, "B N V"], uniform: Float[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """Tokens at which the cumulative distribution first exceeds ``uniform``, in float64: exact to 1e-16, and a token
    of probability zero is never drawn."""
    cdf = probs.double().cumsum(dim=-1)
    return torch.searchsorted(cdf, uniform[..., None] * cdf[..., -1:], right=True)[..., 0]


def penalise(
    logits: Float[Tensor, "B N V"], tree: Tree, seen: Bool[Tensor, "B V"], penalty: float
) -> Float[Tensor, "B N V"]:
    """Repetition penalty as in transformers, with each node's own prefix: the sequence's tokens and its ancestors."""
    own = torch.where(tree.ancestors, tree.tokens[:, None, :], tree.tokens[:, :1, None])  # root where not an ancestor
    marked = seen[:, None].expand(-1, tree.tokens.shape[1], -1).clone().scatter_(2, own, True)
    return torch.where(marked, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _warpers(config: SamplingConfig) -> list[Warper]:
    """transformers' own warpers; none of its hidden defaults (top_k=50)."""
    from transformers import (
        LogitsProcessor,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chosen: list[LogitsProcessor] = []
    if config.temperature not in (0, 1):
        chosen.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k > 0:
        chosen.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        chosen.append(TopPLogitsWarper(config.top_p))
    if config.min_p > 0:
        chosen.append(MinPLogitsWarper(config.min_p))
    return [lambda scores, warper=warper: warper(None, scores) for warper in chosen]
