"""Which conversations each optimiser step reads: decided by seed and step alone, so a resumed run is the same run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from confu.data.corpus import epoch_plan
from confu.data.documents import Document


def step_plan(
    documents: Sequence[Document], *, batch_tokens: int, accumulate: int, seed: int, start: int = 0
) -> Iterator[list[list[int]]]:
    """Document numbers of the ``accumulate`` micro-batches of each step, endless, from step ``start`` on.

    A micro-batch has at most ``batch_tokens`` padded tokens; a longer document is one of its own. Every epoch has a
    new order.
    """
    plan = _micro_batches(documents, batch_tokens, seed, start * accumulate)
    while True:
        yield list(islice(plan, accumulate))


def micro_batches_per_epoch(documents: Sequence[Document], *, batch_tokens: int, seed: int) -> int:
    """How many micro-batches the first epoch has; others differ a little, as documents fall together otherwise."""
    return len(_epoch(documents, batch_tokens, seed, 0))


def _micro_batches(documents: Sequence[Document], batch_tokens: int, seed: int, start: int) -> Iterator[list[int]]:
    epoch, seen = 0, 0
    while True:
        plan = _epoch(documents, batch_tokens, seed, epoch)
        yield from plan[max(0, start - seen) :]
        seen += len(plan)
        epoch += 1


def _epoch(documents: Sequence[Document], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return epoch_plan(documents, batch_tokens, generator)
