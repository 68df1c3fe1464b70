"""Matrix products of decoding: a weight is laid out once for the kernels that will read it, then used every round.

Verification reads all weights for a few dozen rows, so a round costs what reading them costs. On a CPU, oneDNN reads a
prepacked weight about twice as fast as a plain one; in int8 there is half as much to read. The plain product,
`torch.nn.functional.linear`, is the reference that both are tested against.

Shapes: K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from confu.rows import rows

QUANTIZATIONS = ("int8",)
USUAL_ROWS = 16  # the layout is chosen for about so many; any number works


class Product(nn.Module):
    """x W^T + b, with W as `torch.nn.Linear` keeps it. Works on every device."""

    def __init__(self, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows N"]:
        return nn.functional.linear(x, self.weight, self.bias)


class PackedProduct(nn.Module):
    """The same with W in oneDNN's own layout (CPU)."""

    def __init__(self, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), USUAL_ROWS), bias

    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows N"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Product(nn.Module):
    """The same with W rounded to int8, one scale for each output, and x to int8, one scale for each row (oneDNN, CPU).

    Every row is scaled by itself alone, so a token's result does not depend on which others share its forward: what
    verifies a tree is the same model as what decodes one token at a time. Sums are exact integers.
    """

    def __init__(self, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> None:
        super().__init__()
        self.dtype, self.bias = weight.dtype, bias
        rounded, self.scales = rows().quantize(weight.detach())
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, [USUAL_ROWS, weight.shape[1]])

    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows N"]:
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], len(self.scales))
        rounded, scales = rows().quantize(x)
        # fmt: off
        out = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, 0, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        # fmt: on
        return rows().rescale(out, scales, self.bias, self.dtype)


def product(
    weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None, quantization: str | None = None
) -> nn.Module:
    """The fastest product for where ``weight`` lies and what it is made of.

    Raises ValueError for int8 where its kernels are missing.
    """
    check_quantization(quantization, weight.device)
    if quantization is not None:
        return Int8Product(weight, bias)
    return PackedProduct(weight, bias) if _can_pack(weight) else Product(weight, bias)


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
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        raise ValueError(f"quantization {quantization} has kernels for the CPU only (oneDNN), not for {device}.")


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
