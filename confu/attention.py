"""Attention of the rows of one forward over the cached keys: made once, called in every layer.

On a processor with AMX tiles up to a thousand rows in bfloat16 go through `attention.cpp`, where a row comes out by the
same bits whatever rows and keys are beside those it sees; everything else goes through torch, which is the reference
that it is tested against.

Shapes: B batch, R rows, H query heads, G key-value heads, W width of a head, K keys.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from confu.native import tiles_function

MOST_ROWS, MOST_SOFT = 1024, 128  # for which tiles are tried (attention.cpp: a piece)
LANES, WIDEST = 32, 256  # a head's width in bfloat16: a multiple, and at most so much (attention.cpp)
SHAPELESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def any_shape(device: torch.device) -> AbstractContextManager[object]:
    """Within it torch's attention uses no kernel of cuDNN, which torch prefers on Hopper GPUs but which plans anew,
    for tens of milliseconds, whenever a shape is new: here most rounds and batches have new ones."""
    return sdpa_kernel(SHAPELESS) if device.type == "cuda" else nullcontext()


class Attention:
    """Grouped-query attention under one mask; without a mask, rows attend causally to each other and to nothing else.

    ``per_group`` is the number of query heads for each key-value head, H / G; the first ``num_soft`` keys are soft
    prompts, which rows that do not see them must not notice.
    """

    def __init__(
        self,
        mask: Bool[Tensor, "B R K"] | None,
        *,
        per_group: int,
        head_dim: int,
        dtype: torch.dtype,
        num_soft: int = 0,
    ) -> None:
        self.mask, self.bias, self.tiled, self.num_soft = mask, None, None, num_soft
        if mask is None:
            return
        few = mask.shape[0] * mask.shape[1] <= MOST_ROWS and num_soft <= MOST_SOFT
        if dtype == torch.bfloat16 and mask.is_cpu and few:
            self.tiled = tile_function(head_dim)
        if self.tiled is not None:
            self.mask = mask.contiguous()
        else:  # the query heads of a group become rows, so that keys and values are never repeated
            bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
            self.bias = bias[:, None].repeat(1, 1, per_group, 1)

    def __call__(
        self,
        queries: Float[Tensor, "B H R W"],
        keys: Float[Tensor, "B G K W"],
        values: Float[Tensor, "B G K W"],
    ) -> Float[Tensor, "B R HW"]:
        if self.tiled is not None:
            return self._by_tiles(self.tiled, queries.contiguous(), keys, values)
        with any_shape(queries.device):
            if self.mask is None:
                out = scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            else:
                folded = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[3])
                out = scaled_dot_product_attention(folded, keys, values, attn_mask=self.bias).reshape(queries.shape)
        return out.transpose(1, 2).flatten(2)

    def _by_tiles(self, function: Callable[..., None], queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        assert self.mask is not None
        batch, heads, rows, width = queries.shape
        groups, num_keys = keys.shape[1:3]
        if not keys.stride() == values.stride() == (*keys.stride()[:2], width, 1):
            keys, values = keys.contiguous(), values.contiguous()
        out = queries.new_empty(batch, rows, heads * width)
        # fmt: off
        function(
            queries.data_ptr(), keys.data_ptr(), values.data_ptr(), self.mask.data_ptr(), out.data_ptr(), batch, heads,
            groups, rows, num_keys, self.num_soft, width, keys.stride(0), keys.stride(1), scale(width),
        )
        # fmt: on
        return out


def scale(width: int) -> float:
    """Of the scores, for softmax by powers of two."""
    return math.log2(math.e) / math.sqrt(width)


@functools.cache
def tile_function(head_dim: int) -> Callable[..., None] | None:
    """The compiled function, where it can run and takes heads so wide."""
    if head_dim % LANES or head_dim > WIDEST:
        return None
    return tiles_function("attention_bf16", [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 9 + [ctypes.c_float])
