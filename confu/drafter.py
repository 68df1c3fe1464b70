"""Drafters: what proposes the tree that the target verifies.

A drafter keeps its own state per batch and answers two calls: `commit` an accepted path, `grow` the next tree. The
state shows one list, `lengths`, and can be truncated and narrowed like the target's cache. `Drafting` is what the
decode loop holds of both. `TreeDrafter` runs the EAGLE-3 / ConFu network; `lookup.py` and `assistant.py` hold two
drafters that need no training.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from confu.cache import KVCache
from confu.config import DraftConfig, TreeConfig
from confu.contemplate import Contemplation
from confu.costs import Budget
from confu.draft import DraftModel
from confu.draft_forward import DraftForward
from confu.draft_graphs import GraphGrowth
from confu.graphs import GraphForward
from confu.host import upload
from confu.linear import USUAL_ROWS
from confu.ngrams import NGrams
from confu.rows import MOST_ROWS, rows
from confu.target import Target
from confu.tree import Candidates, Frontier, Tree, chains, root_only, take
from confu.turns import Turn

UNREAD = 1024  # rows at most that a drafter at rest leaves for later: their features take memory


@dataclass(frozen=True)
class Accepted:
    """Rows that entered the target's cache: a stretch of the prompt, or the accepted path of a round."""

    tokens: Int[Tensor, "B M"]
    """Their tokens, padded at the right."""
    counts: list[int]
    """How many of the M rows are real, for each sequence."""
    next_tokens: Int[Tensor, " B"]
    """The token after the last real row, not yet in the cache: the next tree's root."""
    features: Float[Tensor, "B M D3"]
    """Captured target states h of the rows."""
    future: Float[Tensor, "B M D4"] | None = None
    """Future prediction f as each row reads it: its own, or its nearest contemplated ancestor's. None when nothing
    contemplates. The tree that grows from the last real row reads that row's."""
    anchors: Int[Tensor, "B M"] | None = None
    """Index, among the M rows, of the token that f follows."""
    keeps_future: bool = False
    """Nothing contemplated, but the f that the last tree grew from serves these rows, and the next tree, too."""

    def select(self, sequences: list[int]) -> Accepted:
        """Of a round without a draft, the rows of these sequences."""
        counts = [self.counts[i] for i in sequences]
        return Accepted(self.tokens[sequences], counts, self.next_tokens[sequences], self.features[sequences])


def joined(rounds: Sequence[Accepted]) -> Accepted:
    """Rounds that the drafter rested in as one stretch, without f."""
    tokens, features = (torch.cat([getattr(r, name) for r in rounds], dim=1) for name in ("tokens", "features"))
    starts = list(itertools.accumulate((r.tokens.shape[1] for r in rounds), initial=0))
    pairs = list(zip(starts, rounds, strict=False))
    real = [[start + i for start, r in pairs for i in range(r.counts[row])] for row in range(len(rounds[0].counts))]
    counts = [len(places) for places in real]
    if min(counts) < tokens.shape[1]:  # some are padding
        most = max(counts)
        index = upload([[*places, *[0] * (most - len(places))] for places in real], tokens.device)
        tokens, features = tokens.gather(1, index), take(features, index)
    return Accepted(tokens, counts, rounds[-1].next_tokens, features)


@runtime_checkable
class DraftState(Protocol):
    lengths: list[int]

    def truncate(self, lengths: list[int]) -> None: ...
    def select(self, sequences: list[int]) -> None: ...


@runtime_checkable
class Drafter(Protocol):
    """Proposes trees. ``contemplation`` is None for every drafter but ConFu's."""

    name: str
    contemplation: Contemplation | None

    def new_state(self, batch_size: int, capacity: int) -> Any: ...
    def commit(self, state: Any, accepted: Accepted) -> None: ...
    def grow(self, state: Any, config: TreeConfig, budget: Budget | None = None) -> Tree:
        """Trees of at most the shape that ``config`` says; ``budget`` keeps those that score their nodes smaller."""
        ...


def check_fit(config: DraftConfig, target: Target) -> None:
    """Raise ValueError, with both values, when a draft was trained for another target than this one."""
    for what, ours, theirs in (
        ("vocabulary", config.vocab_size, target.vocab_size),
        ("hidden width", config.hidden_size, target.hidden_size),
        ("number of layers", config.num_target_layers, target.num_layers),
        ("feature layers", config.feature_layers, target.feature_layers),
    ):
        if ours != theirs:
            raise ValueError(
                f"This draft was trained for a target with {what} {ours}, but the target has {theirs}; "
                f"use its own target ({config.target}) or train a draft for this one."
            )


class Drafting:
    """A drafter at work: its state, and the rounds that it has not read yet, since it rests where a budget says that
    drafts do not pay, and where ``texts``, the tokens of the target's cache, go on as they did before. It reads them
    all at once when it is to draft again."""

    def __init__(
        self,
        drafter: Drafter,
        state: DraftState,
        tree: TreeConfig,
        budget: Budget | None,
        texts: Sequence[list[int]],
    ) -> None:
        self.drafter, self.state, self.tree, self.budget = drafter, state, tree, budget
        self.rests = False
        self._unread: list[Accepted] = []
        self._looks = bool(tree.lookup) and drafter.name != "lookup"  # which does nothing else anyway
        self._ngrams = [NGrams(text, (tree.lookup or 0,)) for text in texts]
        self._matches: list[int] = []  # of the chains of this round, how many tokens matched, and how many were drafted
        self._drafted = 0

    def commit(self, accepted: Accepted) -> None:
        drafted = [count - 1 for count in accepted.counts]  # and accepted
        if self.rests:
            self._unread.append(accepted)
            if sum(unread.tokens.shape[1] for unread in self._unread) >= UNREAD:
                self.read()
        else:
            self.drafter.commit(self.state, accepted)
        if self.budget is None:
            return
        if self._matches:
            self.budget.note_chains(self._matches, self._drafted, drafted)
        elif not self.rests:
            self.budget.note(sum(drafted))

    def select(self, sequences: list[int]) -> None:
        """Go on with these sequences of the batch."""
        self.state.select(sequences)
        self._unread = [accepted.select(sequences) for accepted in self._unread]
        self._ngrams = [self._ngrams[i] for i in sequences]
        if self.budget is not None:
            self.budget.resize(len(sequences))

    def grow(self, roots: Int[Tensor, " B"], ids: list[int]) -> Tree:
        """The next trees, of roots whose tokens the host knows, too: chains where texts repeat themselves and these
        promise more; the roots alone while the drafter rests."""
        repeats = self._repeats(ids) if self._looks else []
        self.rests = bool(repeats) or (self.budget is not None and self.budget.rests())
        if repeats:
            return chains(roots, repeats)
        if self.rests:
            return root_only(roots)
        self.read()
        return self.drafter.grow(self.state, self.tree, self.budget)

    def read(self) -> None:
        """Catch up with the target."""
        if self._unread:
            self.drafter.commit(self.state, joined(self._unread))
            self._unread = []

    def _repeats(self, ids: list[int]) -> list[list[int]]:
        """What each text would go on with if it did as before; nothing if a tree promises more, or, without a budget
        that could tell, if not all would."""
        matches = [ngrams.match(root) for ngrams, root in zip(self._ngrams, ids, strict=True)]
        lengths = [match.length for match in matches]
        without_costs = self.tree.nodes if all(lengths) else 0
        nodes = without_costs if self.budget is None else self.budget.chain_nodes(lengths)
        self._drafted = max(0, nodes - 1)
        self._matches = lengths if self._drafted else []
        if not self._drafted:
            return []
        found = zip(self._ngrams, matches, ids, strict=True)
        return [ngrams.following(match, root, self._drafted) for ngrams, match, root in found]


class TreeState:
    """KV cache of the draft layer (soft slot 0 holds what f adds there), the root row's output, from which trees grow,
    what all rows of the tree read of f, and how far f's anchor lies before the root row."""

    def __init__(self, cache: KVCache, root: Tensor, out: Tensor) -> None:
        self.cache, self.root, self.out = cache, root, out
        self.third: Tensor | None = None  # [B, 1, D]
        self.looked_at: Tensor | None = None  # [B, 1, 3 D]
        self.lag = torch.zeros_like(root)[:, None]  # [B, 1]
        self.has_slot = False

    @property
    def lengths(self) -> list[int]:
        return self.cache.lengths

    def truncate(self, lengths: list[int]) -> None:
        self.cache.truncate(lengths)

    def select(self, sequences: list[int]) -> None:
        self.cache.select(sequences)
        self.root, self.out = self.root[sequences], self.out[sequences]
        self.third = self.third[sequences] if self.third is not None else None
        self.looked_at = self.looked_at[sequences] if self.looked_at is not None else None
        self.lag = self.lag[sequences]


class TreeDrafter:
    """The EAGLE-3 network, or ConFu's when the draft contemplates: one code path, f is its only branch."""

    def __init__(self, draft: DraftModel, target: Target) -> None:
        check_fit(draft.config, target)
        self.name, self.config = draft.config.method, draft.config
        self.forward, self.target = DraftForward(draft, target.quantization), target
        self.contemplation = self.forward.contemplation
        embedding: Any = target.model.get_input_embeddings()
        self._embeddings: Tensor = embedding.weight
        self.native = self.forward.native if _is_table(target) else None
        """Grows trees in one compiled call, where that can be."""
        self._recorded: GraphGrowth | None = None
        if isinstance(target.forward_rows, GraphForward) and draft.config.rope_parameters["rope_type"] != "dynamic":
            self._recorded = GraphGrowth(self._candidates, target.forward_rows.record)

    def new_state(self, batch_size: int, capacity: int) -> TreeState:
        config, target = self.config, self.target
        cache = KVCache(
            1,
            batch_size,
            config.num_key_value_heads,
            capacity,
            config.head_dim,
            dtype=target.dtype,
            device=target.device,
            num_soft=1,
        )
        root = torch.zeros(batch_size, dtype=torch.int64, device=target.device)
        return TreeState(
            cache, root, torch.zeros(batch_size, config.hidden_size, dtype=target.dtype, device=target.device)
        )

    def commit(self, state: TreeState, accepted: Accepted) -> None:
        """Row i takes h[i] and the embedding of token i+1 (METHOD 3). All rows leave keys and values; only the last
        one, from which the next tree grows, is run to its output."""
        if self._commit_at_once(state, accepted):
            return
        draft, cache, counts = self.forward, state.cache, accepted.counts
        device = accepted.tokens.device
        last = (upload(counts, device) - 1).clamp(min=0)[:, None]
        num_rows = accepted.tokens.shape[1]

        following = accepted.tokens.roll(-1, dims=1).scatter(1, last, accepted.next_tokens[:, None])
        positions = cache.lengths_tensor()[:, None] + torch.arange(num_rows, device=device)
        fused = draft.fuse(accepted.features)  # [B, M, D]
        if accepted.keeps_future:
            state.lag, third = state.lag + last + 1, state.third
        else:
            third = self._read_future(state, accepted, fused, positions, last)
        turn = draft.turns(fused, positions, cache, num_rows)
        cache.open_rows(num_rows, with_soft=state.has_slot)
        visible = torch.arange(num_rows, device=device) <= last[:, :, None]  # [B, 1, M]
        mask = self._mask(state, visible)
        state.out = draft.layer(self.target.embed(following), fused, third, turn, mask, cache, last)[:, 0]
        state.root = accepted.next_tokens
        cache.advance(counts)

    def _commit_at_once(self, state: TreeState, accepted: Accepted) -> bool:
        """In one compiled call, where that can be."""
        tables = self._tables(state, accepted.tokens.shape[1])
        few = accepted.tokens.numel() <= USUAL_ROWS
        if self.native is None or tables is None or not few or self.config.future_is("row", "kv"):
            return False
        counts = accepted.counts
        state.out, looked_at = self.native.commit(self._embeddings, tables, state.cache, accepted)
        if accepted.keeps_future:
            state.lag = state.lag + upload(counts, state.lag.device)[:, None]
        else:
            state.looked_at = looked_at
        if accepted.anchors is not None:
            pairs = zip(counts, accepted.anchors.tolist(), strict=True)
            state.lag = upload([[count - 1 - anchors[count - 1]] for count, anchors in pairs], state.lag.device)
        state.root = accepted.next_tokens
        state.cache.advance(counts)
        return True

    def _tables(self, state: TreeState, ahead: int) -> Turn | None:
        return None if self.native is None else self.forward.turns.tables(state.out, state.cache, ahead)

    def _read_future(
        self, state: TreeState, accepted: Accepted, fused: Tensor, positions: Tensor, last: Int[Tensor, "B 1"]
    ) -> Float[Tensor, "B M D"] | None:
        """The rows' third input; the state holds what the next tree takes from the last row's f, if there is one."""
        draft = self.forward
        if accepted.anchors is not None:
            state.lag = last - accepted.anchors.gather(1, last)
        state.has_slot = accepted.future is not None and self.config.future_is("row", "kv")
        if state.has_slot and accepted.future is not None and accepted.anchors is not None:
            anchor = accepted.anchors.gather(1, last)
            turn = draft.turns(fused, positions.gather(1, anchor) + 1, state.cache, fused.shape[1] + 1)
            slot = draft.future_slot(take(accepted.future, last), take(fused, anchor), turn)
            state.cache.write_soft(slot[0][None], slot[1][None])
        state.looked_at = draft.looked_at(take(accepted.future, last) if accepted.future is not None else None)
        third = draft.third_input(accepted.future)
        state.third = take(third, last) if third is not None else None
        return third

    def grow(self, state: TreeState, config: TreeConfig, budget: Budget | None = None) -> Tree:
        """EAGLE-2's tree: ``depth`` levels, the best ``topk`` nodes of each expanded, the best N nodes kept."""
        if self._recorded is not None:
            return self._recorded(state, config, budget)
        return self._candidates(state, config, budget).prune(state.root, config.nodes, budget)

    def _candidates(self, state: TreeState, config: TreeConfig, budget: Budget | None = None) -> Candidates:
        cache = state.cache
        batch, device = len(state.lengths), state.root.device
        candidates, topk = Candidates(), min(config.topk, self.config.draft_vocab_size)
        tables = self._tables(state, config.depth)
        if self.native is not None and tables is not None and batch * topk <= MOST_ROWS:
            levels = self.native.grow(
                self._embeddings,
                tables,
                cache,
                state.out,
                state.looked_at,
                state.lag,
                depth=config.depth,
                topk=topk,
                most_steps=self.config.future_steps - 1,
                with_soft=state.has_slot,
                least=-1.0 if budget is None else budget.least,
            )
            return Candidates.of(levels)
        zeros = torch.zeros(batch, 1, device=device)
        out = state.out[:, None]  # [B, 1, Df]
        levels = torch.arange(config.depth, device=device)
        places = self.forward.places(state.lag + levels)
        positions = cache.lengths_tensor()[:, None] + levels
        turn = self.forward.turns(out, positions, cache, config.depth)  # [B, depth, head]
        ahead, (cos, sin) = self.forward.ahead(state.looked_at, places), turn
        frontier = candidates.add_level(self._children(out, ahead, 0, topk), zeros, zeros.long() - 1)
        width = frontier.tokens.shape[1]
        itself = torch.eye(width, dtype=torch.bool, device=device).expand(batch, -1, -1)
        reach = itself[:, :, :0]  # which drafted rows each frontier row sees; grows by one level a step

        for level in range(config.depth - 1):
            if budget is not None and not budget.deeper(frontier.scores):
                break
            if level > 0:
                reach = reach.gather(1, frontier.origin[:, :, None].expand(-1, -1, reach.shape[2]))
            reach = torch.cat([reach, itself], dim=2)
            hidden = take(out, frontier.origin)
            turn = (cos[:, level : level + 1].expand(-1, width, -1), sin[:, level : level + 1].expand(-1, width, -1))
            out = self._step(state, frontier, hidden, turn, reach)
            children = self._children(out, ahead, level + 1, topk)
            frontier = candidates.add_level(children, frontier.scores, frontier.candidates)
        return candidates

    def _step(
        self,
        state: TreeState,
        frontier: Frontier,
        hidden: Float[Tensor, "B k D"],
        turn: Turn,
        reach: Tensor,
    ) -> Float[Tensor, "B k D"]:
        """One draft forward over the frontier: its rows see the prefix, their own ancestors, themselves and f."""
        width = hidden.shape[1]
        state.cache.open_rows(width, offset=reach.shape[2] - width, with_soft=state.has_slot)
        embedding, mask = self.target.embed(frontier.tokens), self._mask(state, reach)
        return self.forward.layer(embedding, hidden, state.third, turn, mask, state.cache)

    def _mask(self, state: TreeState, reach: Tensor) -> Tensor:
        everyone = torch.ones(reach.shape[:2], dtype=torch.bool, device=reach.device)
        return state.cache.row_mask(reach, with_soft=everyone if state.has_slot else False)

    def _children(
        self, out: Float[Tensor, "B R D"], ahead: Float[Tensor, "B depth D"] | None, level: int, topk: int
    ) -> tuple[Float[Tensor, "B R k"], Int[Tensor, "B R k"]]:
        """Log-probabilities and token ids of the best children of each row of a level."""
        logits = self.forward.logits(out, None if ahead is None else ahead[:, level : level + 1])
        best, ids = rows().best(logits, topk)
        return best, self.forward.target_ids[ids]


def _is_table(target: Target) -> bool:
    """Whether the target's input embeddings are rows of a matrix, and nothing is done to them."""
    embedding = target.model.get_input_embeddings()
    weight: Any = embedding.weight
    return type(embedding) is nn.Embedding and weight.dtype == torch.bfloat16 and weight.is_contiguous()
