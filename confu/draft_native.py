"""A draft's layer in one compiled call, what it reads of a round in another, and all levels of its trees in a third,
where its weights lie in tiles and rows are few: of a millisecond that these take, Python and short torch operations
would take another half.

`DraftForward.layer` and `TreeDrafter` compute the same in torch, and are what this is tested against, bit for bit.

Shapes: B batch, R rows, D hidden width.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from confu.attention import Attention, scale, tile_function
from confu.cache import KVCache
from confu.host import upload
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

if TYPE_CHECKING:
    from confu.drafter import Accepted


class _Draft(ctypes.Structure):
    _fields_ = (
        ("layer", LayerStruct),
        *((name, ProductStruct) for name in ("fc", "head", "looks")),
        *((name, ctypes.c_void_p) for name in ("hidden_norm", "norm", "ones", "target_ids")),
        ("residual_normed", ctypes.c_int64),
    )


class _Held(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_soft", "with_soft")),
        *((name, ctypes.c_void_p) for name in ("embeddings", "lengths")),
    )


class _Path(ctypes.Structure):
    _fields_ = (
        ("held", _Held),
        *((name, ctypes.c_void_p) for name in ("tokens", "next_tokens", "counts")),
        *((name, ctypes.c_void_p) for name in ("features", "future", "out", "looked_at")),
    )


class _Growth(ctypes.Structure):
    _fields_ = (
        ("held", _Held),
        *((name, ctypes.c_int64) for name in ("depth", "most_steps")),
        *((name, ctypes.c_void_p) for name in ("out", "looked_at", "lag", "tokens", "parents", "scores")),
        ("least", ctypes.c_float),
    )


class NativeDraft:
    """The layer of a draft, whose projections read normed embeddings beside normed hidden states, what fuses features
    into those, and its head. Keeps pointers: what it is made of has to live as long."""

    def __init__(
        self, layer: LayerWeights, fc: Any, head: Any, looks: Any, hidden_norm: Tensor, norm: Tensor,
        target_ids: Int[Tensor, " U"], *, residual_normed: bool,
    ) -> None:  # fmt: skip
        self._layer_function, self._commit_function = compiled("draft_layer_bf16", 6), compiled("commit_bf16", 4)
        self._grow_function = compiled("grow_bf16", 4, ctypes.c_int64)
        tensors = (hidden_norm, norm, torch.ones_like(norm), target_ids)
        self._layer, self._kept = layer, (fc, head, looks, *tensors)
        packed_looks = ProductStruct() if looks is None else packed_product(looks)
        products = packed_product(fc), packed_product(head), packed_looks
        self._packed = _Draft(packed_layer(layer), *products, *map(pointer, tensors), residual_normed)

    @classmethod
    def of(
        cls, layer: LayerWeights, fc: Any, head: Any, looks: Any, hidden_norm: Tensor, norm: Tensor,
        target_ids: Int[Tensor, " U"], *, residual_normed: bool,
    ) -> NativeDraft | None:  # fmt: skip
        """None where a weight is kept in another way, or the projections read still more. ``looks`` are all W_j, if
        there are any."""
        fits = plain(hidden_norm) and plain(norm) and in_tiles(layer) and by_tiles(fc) and by_tiles(head)
        fits = fits and (looks is None or isinstance(looks, RoughProduct))
        fits = fits and tile_function(layer.head_dim) is not None
        if not fits or layer.qkv.num_inputs != 2 * len(hidden_norm):
            return None
        return cls(layer, fc, head, looks, hidden_norm, norm, target_ids, residual_normed=residual_normed)

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

    def commit(
        self,
        embeddings: Float[Tensor, "V D"],
        tables: Turn,
        cache: KVCache,
        accepted: Accepted,
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B 1 D3"] | None]:
        """What leaves the layer of the last real row of each sequence, from which the next tree grows, and what W_j
        reads of its f, if there is one. ``tables`` are cos and sin of all positions. All rows leave keys and values."""
        features, future = accepted.features.contiguous(), accepted.future
        batch, rows, width = *accepted.tokens.shape, embeddings.shape[1]
        cache.open_rows(rows)
        out, looked_at = features.new_empty(batch, width), None
        if future is not None:
            future, looked_at = future.contiguous(), features.new_empty(batch, 1, 3 * width)
        tokens, following = accepted.tokens.contiguous(), accepted.next_tokens.contiguous()
        counts, held = upload(accepted.counts, cache.keys.device), self._held(embeddings, cache, with_soft=False)
        path = _Path(held[0], *map(pointer, (tokens, following, counts, features, future, out, looked_at)))
        self._commit_function(*self._call(tables, cache, batch, rows, width), ctypes.byref(path))
        return out, looked_at

    def grow(
        self,
        embeddings: Float[Tensor, "V D"],
        tables: Turn,
        cache: KVCache,
        out: Float[Tensor, "B D"],
        looked_at: Float[Tensor, "B 1 D3"] | None,
        lag: Int[Tensor, "B 1"],
        *,
        depth: int,
        topk: int,
        most_steps: int,
        with_soft: bool,
        least: float,
    ) -> list[tuple[Int[Tensor, "B _"], Int[Tensor, "B _"], Float[Tensor, "B _"]]]:
        """Token ids, parents and scores of the candidates of each level, as `Candidates` keeps them. ``out`` are the
        root rows' states, which lie ``lag`` behind f's anchor; a frontier that promises ``least`` tokens or fewer has
        no level below it."""
        batch, width = out.shape
        cache.open_rows((depth - 1) * topk)  # so many have room behind the longest sequence
        sizes = [topk] + [topk * topk] * (depth - 1)
        tokens, parents = out.new_empty(2, batch, sum(sizes), dtype=torch.int64)
        scores = out.new_empty(batch, sum(sizes), dtype=torch.float32)
        out, lag = out.contiguous(), lag.contiguous()
        looked_at = looked_at.contiguous() if looked_at is not None else None
        held = self._held(embeddings, cache, with_soft=with_soft)
        tensors = map(pointer, (out, looked_at, lag, tokens, parents, scores))
        growth = _Growth(held[0], depth, most_steps, *tensors, least)
        levels = self._grow_function(*self._call(tables, cache, batch, topk, width), ctypes.byref(growth))
        found = (tensor.split(sizes, dim=1)[:levels] for tensor in (tokens, parents, scores))
        return list(zip(*found, strict=True))

    def _held(self, embeddings: Tensor, cache: KVCache, *, with_soft: bool) -> tuple[_Held, Tensor]:
        """The second has to live as long as the call."""
        lengths = cache.lengths_tensor()
        return _Held(cache.num_soft, with_soft, pointer(embeddings), pointer(lengths)), lengths

    def _call(self, tables: Turn, cache: KVCache, batch: int, rows: int, width: int) -> tuple[Any, Any, Any]:
        layer = self._layer
        shape = ShapeStruct(
            1, batch, rows, width, layer.num_heads, layer.num_groups, layer.head_dim, cache.keys.shape[3], 0, 0, 0,
            layer.eps, scale(layer.head_dim),
        )  # fmt: skip
        place = PlaceStruct(*map(pointer, (*tables, None, cache.keys, cache.values, None, None, None)))
        return ctypes.byref(self._packed), ctypes.byref(shape), ctypes.byref(place)
