"""All layers of a Llama-like target in one compiled call, where every weight lies in tiles (`linear.py`) and
rows are few: between some two hundred short functions, what Python does would take a third of the time.

`LlamaForward` computes the same, one function after the other, and is what this is tested against, bit for bit. A
draft's layer and trees are compiled from the same parts (`draft_native.py`).

Shapes: B batch, R rows, D hidden width, A captured layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from confu.attention import Attention, scale
from confu.cache import KVCache
from confu.linear import Int8Product, RoughProduct, TileProduct, fused
from confu.native import tiles_function
from confu.turns import Turn

# fmt: off
SIZES = ("layers", "batch", "rows", "width", "heads", "groups", "head_dim", "slots", "num_keys", "lead", "num_captured")
PLACE = ("cos", "sin", "mask", "keys", "values", "read_keys", "read_values", "first_slots")
# fmt: on


class ProductStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "bits", "rounds_rows")),
    )


class LayerStruct(ctypes.Structure):
    _fields_ = (
        *((name, ProductStruct) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "head_norms")),
    )


class ShapeStruct(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_int64) for name in SIZES), ("eps", ctypes.c_float), ("scale", ctypes.c_float))


class PlaceStruct(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in PLACE)


class LayerWeights:
    """Of one decoder layer, laid out for decoding: queries, keys and values in one product, gate and up in another. The
    layer's modules are named as in Llama, which a draft's are, too."""

    def __init__(
        self, layer: Any, quantization: str | None, *, num_heads: int, num_groups: int, head_dim: int, eps: float
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.num_heads, self.num_groups, self.head_dim, self.eps = num_heads, num_groups, head_dim, eps
        self.qkv = fused([attention.q_proj, attention.k_proj, attention.v_proj], quantization)
        self.out = fused([attention.o_proj], quantization)
        self.gate_up = fused([mlp.gate_proj, mlp.up_proj], quantization)
        self.down = fused([mlp.down_proj], quantization)
        self.attention_norm: Tensor = layer.input_layernorm.weight
        self.mlp_norm: Tensor = layer.post_attention_layernorm.weight
        self.head_norms: Tensor | None = None
        if hasattr(attention, "q_norm"):  # Qwen3
            self.head_norms = torch.stack(
                [attention.q_norm.weight] * num_heads + [attention.k_norm.weight] * num_groups
            )


class Layers:
    """The layers of a target and its last norm. Keeps pointers: ``layers`` and ``norm`` have to live as long."""

    def __init__(self, layers: Sequence[LayerWeights], norm: Tensor) -> None:
        self._function, self._layers, self._norm = compiled("layers_bf16", 8), layers, norm
        self._packed = (LayerStruct * len(layers))(*map(packed_layer, layers))

    @classmethod
    def of(cls, layers: Sequence[LayerWeights], norm: Tensor, eps: float) -> Layers | None:
        """None where a weight is kept in another way, or layers differ in what is told once for all."""
        alike = all(layer.eps == eps for layer in layers)
        return cls(layers, norm) if alike and plain(norm) and all(map(in_tiles, layers)) else None

    def __call__(
        self,
        embeddings: Float[Tensor, "B R D"],
        turn: Turn,
        attend: Attention,
        cache: KVCache,
        captured: tuple[int, ...],
    ) -> tuple[Float[Tensor, "B R D"], Float[Tensor, "B R DA"]]:
        """The normed last state, and the states that enter the layers named by ``captured``, side by side (the number
        of layers names the last one)."""
        batch, rows, width = embeddings.shape
        embeddings, named = embeddings.contiguous(), torch.tensor(captured)
        final, states = torch.empty_like(embeddings), embeddings.new_empty(batch, rows, len(captured) * width)
        call = Call(self._layers[0], embeddings, turn, attend, cache, len(self._layers), len(captured))
        tensors = (self._norm, embeddings, named, states, final)
        self._function(self._packed, *call.pointers, *map(pointer, tensors))
        return final, states


def serves(attend: Attention, cache: KVCache) -> bool:
    """Whether these rows are few, and the cache holds what they are made of, layer behind layer."""
    return attend.tiled is not None and cache.dtype == torch.bfloat16 and cache.keys.is_contiguous()


class Call:
    """What a call is told of its rows beside their states; it keeps the tensors that ``pointers`` lead to."""

    def __init__(
        self,
        like: LayerWeights,
        states: Float[Tensor, "B R D"],
        turn: Turn,
        attend: Attention,
        cache: KVCache,
        num_layers: int = 1,
        num_captured: int = 0,
    ) -> None:
        batch, rows, width = states.shape
        opened = cache.opened(0)
        turn = turn[0].expand(batch, -1, -1).contiguous(), turn[1].expand(batch, -1, -1).contiguous()
        self._tensors = (*turn, attend.mask, cache.keys, cache.values, *opened, cache.first_slots)
        shape = ShapeStruct(
            num_layers, batch, rows, width, like.num_heads, like.num_groups, like.head_dim, cache.keys.shape[3],
            opened[0].shape[2], cache.num_soft_keys, num_captured, like.eps, scale(like.head_dim),
        )  # fmt: skip
        self.pointers = ctypes.byref(shape), ctypes.byref(PlaceStruct(*map(pointer, self._tensors)))


def compiled(name: str, num_pointers: int, returns: type | None = None) -> Callable[..., Any]:
    function = tiles_function(name, [ctypes.c_void_p] * num_pointers, returns)
    assert function is not None
    return function


def in_tiles(layer: LayerWeights) -> bool:
    norms = (layer.attention_norm, layer.mlp_norm, layer.head_norms)
    products = (layer.qkv, layer.out, layer.gate_up, layer.down)
    return all(map(plain, norms)) and all(map(by_tiles, products))


def plain(norm: Tensor | None) -> bool:
    return norm is None or norm.dtype == torch.bfloat16


def by_tiles(product: Any) -> bool:
    return isinstance(product, TileProduct | RoughProduct) or (isinstance(product, Int8Product) and product.by_tiles)


def packed_layer(layer: LayerWeights) -> LayerStruct:
    return LayerStruct(
        *map(packed_product, (layer.qkv, layer.out, layer.gate_up, layer.down)),
        *map(pointer, (layer.attention_norm, layer.mlp_norm, layer.head_norms)),
    )


def packed_product(product: Any) -> ProductStruct:
    pointers = map(pointer, (product.weight, product.scales, product.bias))
    sizes = (product.num_inputs, product.num_outputs, product.bits, product.rounds_rows)
    return ProductStruct(*pointers, *sizes)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
