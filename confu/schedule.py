"""Which documents each optimiser step reads: decided by seed and step alone, so a resumed run is the same run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from confu.data import Document, _epoch_plan


def micro_batches(documents: list[Document], *, batch_tokens: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Document numbers of endless batches of at most ``batch_tokens`` padded tokens, a new order every epoch, from
    batch ``start`` on. A document longer than that is a batch of its own."""
    epoch, seen = 0, 0
    while True:
        plan = _epoch_plan(documents, batch_tokens, torch.Generator().manual_seed(seed * 100_003 + epoch))
        yield from plan[max(0, start - seen) :]
        seen += len(plan)
        epoch += 1
