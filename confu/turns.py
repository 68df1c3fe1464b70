"""cos and sin of positions, by which queries and keys are turned: looked up where a cache says how far positions go.

A model makes them anew in every forward, by some ten operations; here they are made once for all positions.

Shapes: B batch, R rows, W width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from confu.cache import KVCache, PrefixCache

Turn = tuple[Tensor, Tensor]
"""cos and sin of the rows' positions, each [B, R, W], or of one sequence for all."""

FIXED = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings by which a position is turned alike in short texts and long ones."""


class Turns:
    """What ``rotary``, a rotary embedding of transformers, returns."""

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self._tables: tuple[Float[Tensor, "P W"], Float[Tensor, "P W"]] | None = None

    def __call__(
        self, x: Tensor, positions: Int[Tensor, "B R"], cache: KVCache | PrefixCache, ahead: int
    ) -> tuple[Float[Tensor, "B R W"], Float[Tensor, "B R W"]]:
        """In the type of ``x``; positions are less than ``ahead`` beyond what the cache holds of the longest text."""
        tables = self.tables(x, cache, ahead)
        if tables is None:
            return self.rotary(x, positions)
        cos, sin = (torch.nn.functional.embedding(positions, table) for table in tables)
        return cos, sin

    def tables(
        self, x: Tensor, cache: KVCache | PrefixCache, ahead: int
    ) -> tuple[Float[Tensor, "P W"], Float[Tensor, "P W"]] | None:
        """cos and sin of all these positions, one after the other; None where they are to be made for each."""
        if not x.is_cpu or type(cache) is not KVCache or self.rotary.rope_type not in FIXED:
            return None
        end = max(cache.lengths) + ahead
        tables = self._tables
        if tables is None or len(tables[0]) < end or tables[0].dtype != x.dtype:
            known = torch.arange(max(end, cache.capacity), device=x.device)[None]
            cos, sin = self.rotary(x, known)
            tables = self._tables = cos[0].contiguous(), sin[0].contiguous()
        return tables
