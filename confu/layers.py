"""All layers of a Llama-like target in one compiled call, where every weight lies in tiles (`linear.py`) and
rows are few: between some two hundred short functions, what Python does would take a third of the time.

`LlamaForward` computes the same, one function after the other, and is what this is tested against, bit for bit.

Shapes: B batch, R rows, D hidden width, A captured layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from confu.attention import Attention, scale
from confu.cache import KVCache
from confu.linear import Int8Product, TileProduct
from confu.native import tiles_function

if TYPE_CHECKING:
    from confu.llama import LlamaLayer


# fmt: off
SIZES = ("layers", "batch", "rows", "width", "heads", "groups", "head_dim", "slots", "num_keys", "num_captured")
# fmt: on


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "bits")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Product) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "head_norms")),
    )


class _Shape(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_int64) for name in SIZES), ("eps", ctypes.c_float), ("scale", ctypes.c_float))


class Layers:
    """The layers of a target and its last norm. Keeps pointers: ``layers`` and ``norm`` have to live as long."""

    def __init__(self, function: Callable[..., None], layers: Sequence[LlamaLayer], norm: Tensor) -> None:
        self._function, self._layers, self._norm = function, layers, norm
        self._packed = (_Layer * len(layers))(*map(_packed, layers))

    @classmethod
    def of(cls, layers: Sequence[LlamaLayer], norm: Tensor, eps: float) -> Layers | None:
        """None where a weight is kept in another way, or layers differ in what is told once for all."""
        products = [part for layer in layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        norms = [part for layer in layers for part in (layer.attention_norm, layer.mlp_norm, layer.head_norms)]
        plain = all(weight is None or weight.dtype == torch.bfloat16 for weight in (norm, *norms))
        alike = all(layer.eps == eps for layer in layers)
        if not (plain and alike and all(map(_by_tiles, products))):
            return None
        function = tiles_function("layers_bf16", [ctypes.c_void_p] * 15)
        assert function is not None
        return cls(function, layers, norm)

    def serves(self, attend: Attention, cache: KVCache) -> bool:
        """Whether these rows are few, and the cache holds what they are made of, layer behind layer."""
        return attend.tiled is not None and cache.dtype == self._norm.dtype and cache.keys.is_contiguous()

    def __call__(
        self,
        embeddings: Float[Tensor, "B R D"],
        turn: tuple[Tensor, Tensor],
        attend: Attention,
        cache: KVCache,
        captured: tuple[int, ...],
    ) -> tuple[Float[Tensor, "B R D"], Float[Tensor, "B R DA"]]:
        """The normed last state, and the states that enter the layers named by ``captured``, side by side (the number
        of layers names the last one)."""
        first, (batch, rows, width) = self._layers[0], embeddings.shape
        embeddings = embeddings.contiguous()
        cos, sin = (x.expand(batch, -1, -1).contiguous() for x in turn)
        final, states = torch.empty_like(embeddings), embeddings.new_empty(batch, rows, len(captured) * width)
        opened = cache.opened(0)
        shape = _Shape(
            len(self._layers), batch, rows, width, first.num_heads, first.num_groups, first.head_dim,
            cache.keys.shape[3], opened[0].shape[2], len(captured), first.eps, scale(first.head_dim),
        )  # fmt: skip
        assert attend.mask is not None
        tensors = (
            self._norm, embeddings, cos, sin, attend.mask, cache.keys, cache.values, *opened, cache.first_slots,
            torch.tensor(captured), states, final,
        )  # fmt: skip
        self._function(self._packed, ctypes.byref(shape), *(tensor.data_ptr() for tensor in tensors))
        return final, states


def _by_tiles(product: Any) -> bool:
    return isinstance(product, TileProduct) or (isinstance(product, Int8Product) and product.by_tiles)


def _packed(layer: LlamaLayer) -> _Layer:
    def packed(product: Any) -> _Product:
        pointers = map(_pointer, (product.weight, product.scales, product.bias))
        return _Product(*pointers, product.num_inputs, product.num_outputs, product.bits)

    return _Layer(
        *map(packed, (layer.qkv, layer.out, layer.gate_up, layer.down)),
        *map(_pointer, (layer.attention_norm, layer.mlp_norm, layer.head_norms)),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
