"""A draft's layer in one compiled call, and all levels of its trees in another, where its weights lie in tiles and
rows are few: a level is a millisecond, of which Python and short torch operations would take a third.

`DraftForward.layer` and `TreeDrafter` compute the same in torch, and are what this is tested against, bit for bit.

Shapes: B batch, R rows, D hidden width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from confu.attention import Attention, scale
from confu.cache import KVCache
from confu.layers import (
    Call,
    LayerStruct,
    LayerWeights,
    PlaceStruct,
    ProductStruct,
    ShapeStruct,
    by_tiles,
    compiled,
    in_tiles,
    packed_layer,
    packed_product,
    plain,
    pointer,
)
from confu.linear import RoughProduct
from confu.turns import Turn


class _Draft(ctypes.Structure):
    _fields_ = (
        ("layer", LayerStruct),
        ("head", ProductStruct),
        ("looks", ProductStruct),
        *((name, ctypes.c_void_p) for name in ("hidden_norm", "norm", "target_ids")),
        ("residual_normed", ctypes.c_int64),
    )


class _Growth(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("depth", "num_soft", "with_soft")),
        *((name, ctypes.c_void_p) for name in ("embeddings", "lengths", "out", "future", "steps")),
        *((name, ctypes.c_void_p) for name in ("tokens", "parents", "scores")),
        ("least", ctypes.c_float),
    )


class NativeDraft:
    """The layer of a draft, whose projections read normed embeddings beside normed hidden states, and its head. Keeps
    pointers: what it is made of has to live as long."""

    def __init__(
        self, layer: LayerWeights, head: Any, looks: Any, hidden_norm: Tensor, norm: Tensor,
        target_ids: Int[Tensor, " U"], *, residual_normed: bool,
    ) -> None:  # fmt: skip
        self._layer_function, self._grow_function = (
            compiled("draft_layer_bf16", 6),
            compiled("grow_bf16", 4, ctypes.c_int64),
        )
        self._layer, self._kept = layer, (head, looks, hidden_norm, norm, target_ids)
        pointers = map(pointer, (hidden_norm, norm, target_ids))
        packed_looks = ProductStruct() if looks is None else packed_product(looks)
        self._packed = _Draft(packed_layer(layer), packed_product(head), packed_looks, *pointers, residual_normed)

    @classmethod
    def of(
        cls, layer: LayerWeights, head: Any, looks: Any, hidden_norm: Tensor, norm: Tensor,
        target_ids: Int[Tensor, " U"], *, residual_normed: bool,
    ) -> NativeDraft | None:  # fmt: skip
        """None where a weight is kept in another way, or the projections read still more. ``looks`` are all W_j, if
        there are any."""
        fits = plain(hidden_norm) and plain(norm) and in_tiles(layer) and by_tiles(head)
        fits = fits and (looks is None or isinstance(looks, RoughProduct))
        if not fits or layer.qkv.num_inputs != 2 * len(hidden_norm):
            return None
        return cls(layer, head, looks, hidden_norm, norm, target_ids, residual_normed=residual_normed)

    def layer(
        self,
        embeddings: Float[Tensor, "B R D"],
        hidden: Float[Tensor, "B R D"],
        turn: Turn,
        attend: Attention,
        cache: KVCache,
    ) -> Float[Tensor, "B R D"]:
        """What leaves the layer."""
        embeddings, hidden = embeddings.contiguous(), hidden.contiguous()
        out = torch.empty_like(hidden)
        call = Call(self._layer, hidden, turn, attend, cache)
        self._layer_function(ctypes.byref(self._packed), *call.pointers, *map(pointer, (embeddings, hidden, out)))
        return out

    def grow(
        self,
        embeddings: Float[Tensor, "V D"],
        cache: KVCache,
        out: Float[Tensor, "B D"],
        future: Float[Tensor, "B 1 D3"] | None,
        steps: Int[Tensor, "B depth"],
        turn: Turn,
        *,
        topk: int,
        with_soft: bool,
        least: float,
    ) -> list[tuple[Int[Tensor, "B _"], Int[Tensor, "B _"], Float[Tensor, "B _"]]]:
        """Token ids, parents and scores of the candidates of each level, as `Candidates` keeps them. ``out`` are the
        root rows' states, ``turn`` that of all levels; a frontier that promises ``least`` tokens or fewer has no level
        below it."""
        layer, (batch, width), depth = self._layer, out.shape, turn[0].shape[1]
        cache.open_rows((depth - 1) * topk)  # so many have room behind the longest sequence
        cos, sin = (x.expand(batch, -1, -1).contiguous() for x in turn)
        sizes = [topk] + [topk * topk] * (depth - 1)
        tokens, parents = out.new_empty(2, batch, sum(sizes), dtype=torch.int64)
        scores, lengths = out.new_empty(batch, sum(sizes), dtype=torch.float32), cache.lengths_tensor()
        shape = ShapeStruct(
            1, batch, topk, width, layer.num_heads, layer.num_groups, layer.head_dim, cache.keys.shape[3], 0, 0, 0,
            layer.eps, scale(layer.head_dim),
        )  # fmt: skip
        place = PlaceStruct(*map(pointer, (cos, sin, None, cache.keys, cache.values, None, None, None)))
        out, steps = out.contiguous(), steps.contiguous()
        future = future.contiguous() if future is not None else None
        tensors = (embeddings, lengths, out, future, steps, tokens, parents, scores)
        growth = _Growth(depth, cache.num_soft, with_soft, *map(pointer, tensors), least)
        levels = self._grow_function(*map(ctypes.byref, (self._packed, shape, place, growth)))
        found = (tensor.split(sizes, dim=1)[:levels] for tensor in (tokens, parents, scores))
        return list(zip(*found, strict=True))
