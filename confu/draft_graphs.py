"""`--compile` for the draft: all levels of its trees by one CUDA graph.

Levels of some forty tiny kernels each cost nothing but launches. So the function that scores the candidates is recorded
as it stands, over a state whose tensors stay where they are (`graphs.py`), and pruning them with it, unless a `Budget`
has to be asked how many pay. Whether another level pays is not asked: recorded, it hardly costs anything.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, inference_mode

from confu.config import TreeConfig
from confu.costs import Budget
from confu.graphs import Record, Recorded, Recordings, Store
from confu.tree import Candidates, Tree

if TYPE_CHECKING:
    from confu.drafter import TreeState

READ = ("root", "out", "third", "looked_at", "lag")
"""What growing reads of a state beside its cache."""


class GraphGrowth:
    """Grows trees of the candidates that ``score`` finds, by recordings of it."""

    def __init__(self, score: Callable[[TreeState, TreeConfig], Candidates], record: Record) -> None:
        self.score, self.record = score, record
        self.recordings = Recordings()

    def __call__(self, state: TreeState, config: TreeConfig, budget: Budget | None) -> Tree:
        cache, drafted, batch = state.cache, (config.depth - 1) * config.topk, len(state.lengths)
        cache.open_rows(drafted)
        store = self.recordings.store(cache, cache.num_soft + max(cache.lengths) + drafted)
        given = tuple(name for name in READ if getattr(state, name) is not None)
        shape = config, budget is None, state.has_slot, given
        make = lambda: _RecordedTree(self, store, state, config, pruned=budget is None)  # noqa: E731
        graph = self.recordings.graph(store, shape, make)
        for name in given:
            getattr(graph.state, name)[:batch] = getattr(state, name)
        cache.copy_first_slots(store.kv.starts[:batch])
        found = [tensor[:batch] for tensor in graph.recorded()]
        if budget is None:
            kept = (tensor.clone() for tensor in found)  # the next replay writes the same tensors
            return Tree(*kept, height=min(config.depth, config.nodes - 1))
        candidates = Candidates.of([tuple(found[at : at + 3]) for at in range(0, len(found), 3)])
        return candidates.prune(state.root, config.nodes, budget)


class _RecordedTree:
    """One recorded tree, or its candidates, and the state that it grows from."""

    def __init__(self, owner: GraphGrowth, store: Store, like: TreeState, config: TreeConfig, *, pruned: bool) -> None:
        self.state = copy.copy(like)
        self.state.cache = store.kv
        with inference_mode(False):
            for name in READ:
                tensor = getattr(like, name)
                if tensor is not None:
                    setattr(self.state, name, tensor.new_zeros(store.shape[0], *tensor.shape[1:]))

        def run() -> tuple[Tensor, ...]:
            found = owner.score(self.state, config)
            if not pruned:
                levels = zip(found.tokens, found.parents, found.scores, strict=True)
                return tuple(tensor for level in levels for tensor in level)
            tree = found.prune(self.state.root, config.nodes)
            return tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.scores

        self.recorded = Recorded(run, owner.record)
