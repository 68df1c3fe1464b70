"""Matrix products of decoding: a weight is laid out once for the kernels that will read it, then used every round.

Verification reads all weights for a few dozen rows, so a round costs what reading them costs. On a CPU, oneDNN reads a
prepacked weight about twice as fast as a plain one, and AMX tiles of our own are faster still for few rows; weights
that were made of the blocks of a GGUF file stay in them, a third of the bytes, and in int8 there is half as much to
read. Drafts' rows may be rounded, too. The plain product, `torch.nn.functional.linear`, is the reference that all are
tested against.

Shapes: K inputs, N outputs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from confu.native import tiles_function

QUANTIZATIONS = ("int8",)
ROUGH = "rough"  # drafts' own
USUAL_ROWS = 16  # the layout is chosen for about so many; any number works
TILE = 16
BLOCK_BYTES = {4: TILE * TILE + 4 * TILE, 8: 2 * TILE * TILE + 2 * TILE}  # of a tile, by the bits of a weight
PIECE = 256  # rows rounded at a time: float32 copies of a whole head would be most of a process's memory


class Product(nn.Module):
    """x W^T + b, with W as `torch.nn.Linear` keeps it. Works on every device."""

    def __init__(self, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self.num_inputs = weight, bias, weight.shape[1]

    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows N"]:
        return nn.functional.linear(x, self.weight, self.bias)


class PackedProduct(nn.Module):
    """The same with W in oneDNN's own layout (CPU)."""

    def __init__(self, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> None:
        super().__init__()
        self.num_inputs = weight.shape[1]
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), USUAL_ROWS), bias

    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows N"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Product(nn.Module):
    """The same with W rounded to whole numbers from -127 to 127 times one scale for each output (CPU).

    Rows are not rounded. Were they, a last bit of one number would decide how it is rounded, that would move all that
    comes after, and the tree's order of summation would make another model of it than one token at a time does.

    Whole numbers up to 256 are exact in bfloat16. By AMX tiles (`products.cpp`) they are kept in int8 and widened on
    their way; elsewhere they are a packed weight like any other, which is as exact but reads as much as without
    rounding.
    """

    def __init__(self, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> None:
        super().__init__()
        self.num_outputs, self.num_inputs = weight.shape
        rounded, self.scales = quantize(weight.detach())
        self.bias = None if bias is None else bias.detach().float()
        self.by_tiles, self.rounds_rows = _fits_tiles(weight), False
        if self.by_tiles:
            # tiles of outputs, of inputs, outputs, the two of a pair of inputs, pairs
            tiles = rounded.view(len(weight) // TILE, TILE, -1, TILE, 2).permute(0, 2, 1, 4, 3)
            self.weight, self.bits = tiles.contiguous(), 8
        else:
            whole = rounded.to(weight.dtype)
            self._plain = PackedProduct(whole) if _can_pack(whole) else Product(whole)

    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows N"]:
        if self.by_tiles:
            return _multiply_tiles(self, x)
        out = self._plain(x).float() * self.scales
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class RoughProduct(nn.Module):
    """The same with rows rounded, too, each by a scale of its own, so that whole numbers are multiplied: in less time,
    for drafts, which need not say the same in another order (CPU with AMX; K a multiple of 64)."""

    bits, rounds_rows = 8, True

    def __init__(self, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> None:
        super().__init__()
        self.num_outputs, self.num_inputs = weight.shape
        rounded, self.scales = quantize(weight.detach())
        self.weight = rounded.view(len(weight) // TILE, TILE, -1, 4 * TILE).transpose(1, 2).contiguous()
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows N"]:
        return _multiply_tiles(self, x)


class TileProduct(nn.Module):
    """The same with W in bfloat16, laid out in AMX tiles (CPU): as it is, or in blocks of fewer ``bits``."""

    scales, rounds_rows = None, False

    def __init__(self, tiles: Tensor, bits: int, bias: Float[Tensor, " N"] | None) -> None:
        super().__init__()
        self.weight, self.bits = tiles, bits
        self.num_outputs, self.num_inputs = len(tiles) * TILE, tiles.shape[1] * 2 * TILE
        self.bias = None if bias is None else bias.detach().float()

    @classmethod
    def of(cls, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> TileProduct | None:
        """In blocks where W was made of some, else as it is; None where no kernel here reads either."""
        if not _fits_tiles(weight):
            return None
        if (blocks := cls.in_blocks(weight, bias)) is not None:
            return blocks
        tiles = weight.detach().view(len(weight) // TILE, TILE, -1, 2 * TILE).transpose(1, 2)
        return cls(tiles.contiguous(), 16, bias)

    @classmethod
    def in_blocks(cls, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> TileProduct | None:
        """In the blocks of 32 inputs from which a GGUF file's Q4_0, Q4_1 or Q8_0 made it. Nothing is rounded: they are
        found in W itself, and kept only where they give back each of its numbers, bit for bit (but for the sign of
        zero). None where W, which fits tiles, is not made of such blocks."""
        find = tiles_function("find_blocks", [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3, ctypes.c_int64)
        assert find is not None
        weight = weight.detach().contiguous()
        for bits, tile_bytes in BLOCK_BYTES.items():
            blocks = torch.empty(len(weight) // TILE, weight.shape[1] // (2 * TILE), tile_bytes, dtype=torch.uint8)
            if find(weight.data_ptr(), blocks.data_ptr(), *weight.shape, bits):
                return cls(blocks, bits, bias)
        return None

    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows N"]:
        return _multiply_tiles(self, x)


def _multiply_tiles(
    product: Int8Product | RoughProduct | TileProduct, x: Float[Tensor, "*rows K"]
) -> Float[Tensor, "*rows N"]:
    function = _tile_function()
    assert function is not None
    assert x.dtype == torch.bfloat16
    assert x.shape[-1] == product.num_inputs
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], product.num_outputs)
    function(
        x.data_ptr(),
        product.weight.data_ptr(),
        None if product.scales is None else product.scales.data_ptr(),
        None if product.bias is None else product.bias.data_ptr(),
        out.data_ptr(),
        x.numel() // x.shape[-1],
        product.num_inputs,
        product.num_outputs,
        product.bits,
        product.rounds_rows,
    )
    return out


def quantize(weight: Float[Tensor, "N K"]) -> tuple[Int8[Tensor, "N K"], Float[Tensor, " N"]]:
    """Whole numbers from -127 to 127, and each row's scale (float32) that gives it back."""
    scales = weight.abs().amax(dim=1).float().clamp_(min=1e-12) / 127
    whole = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows, row_scales, to in zip(weight.split(PIECE), scales.split(PIECE), whole.split(PIECE), strict=True):
        to.copy_((rows / row_scales[:, None]).round_())
    return whole, scales


def product(
    weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None, quantization: str | None = None
) -> nn.Module:
    """The fastest product for where ``weight`` lies and what it is made of.

    ``ROUGH`` rounds weights and rows where that can be, else weights alone. Raises ValueError for a quantization off
    the CPU.
    """
    if quantization == ROUGH:
        return RoughProduct(weight, bias) if _fits_tiles(weight, 4 * TILE) else product(weight, bias, "int8")
    check_quantization(quantization, weight.device)
    if quantization == "int8":
        return Int8Product(weight, bias)
    if (tiles := TileProduct.of(weight, bias)) is not None:
        return tiles
    return PackedProduct(weight, bias) if _can_pack(weight) else Product(weight, bias)


def fast_quantization(weight: Tensor) -> str | None:
    """The rounding by which a draft's weights like this one are read in least time here, if there is one."""
    return ROUGH if _fits_tiles(weight) else None


def fused(linears: list[Any], quantization: str | None) -> nn.Module:
    """One product for several linear layers that read the same rows."""
    biases = [linear.bias for linear in linears]
    if any(bias is not None for bias in biases):
        biases = [
            torch.zeros_like(linear.weight[:, 0]) if bias is None else bias
            for linear, bias in zip(linears, biases, strict=True)
        ]
    weight = torch.cat([linear.weight for linear in linears])
    return product(weight, torch.cat(biases) if biases[0] is not None else None, quantization)


def pack_linears(module: nn.Module, quantization: str | None = None) -> None:
    """Replace every `torch.nn.Linear` inside ``module`` by its fastest product; their own weights are given up."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, product(child.weight, child.bias, quantization))
        else:
            pack_linears(child, quantization)


def check_quantization(quantization: str | None, device: torch.device | str) -> None:
    """Raise ValueError for a quantization that is unknown or cannot run on ``device``."""
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization is {quantization!r}; give {', '.join(QUANTIZATIONS)}, or leave it out.")
    if torch.device(device).type != "cpu":
        raise ValueError(f"quantization {quantization} has kernels for the CPU only, not for {device}.")


def _fits_tiles(weight: Tensor, inputs: int = 2 * TILE) -> bool:
    """Whether W can lie in tiles of so many ``inputs``, and this machine multiplies by them."""
    fits = weight.shape[0] % TILE == 0 and weight.shape[1] % inputs == 0
    return weight.dtype == torch.bfloat16 and weight.is_cpu and fits and _tile_function() is not None


@functools.cache
def _tile_function() -> Callable[..., None] | None:
    """The compiled product, where it can run."""
    return tiles_function("tile_product", [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 5)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
