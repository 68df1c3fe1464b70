"""Attention of the unrolled draft steps: a causal stretch that all rows share, and a few keys that each has alone.

The causal part runs in the fused kernel, which never forms the [rows, keys] scores; the extra keys are dot products.
Both are joined by their log-sum-exp, so memory grows with the length, not with its square. METHOD 4 (TTT attention).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def attend_merged(
    queries: Float[Tensor, "1 H R head"],
    keys: Float[Tensor, "B G T head"],
    values: Float[Tensor, "B G T head"],
    places: Int[Tensor, " R"],
    own: list[tuple[Float[Tensor, "1 G R head"], Float[Tensor, "1 G R head"], Bool[Tensor, "1 R"] | None]],
) -> Float[Tensor, "1 H R head"]:
    """Row r, which lies at ``places[r]`` = b T + i, attends to the shared keys 0 .. i of sequence b and to its own key
    and value of each ``own`` entry, where that is visible. All places differ."""
    if queries.device.type not in FUSED:
        return attend_masked(queries, keys, values, places, own)
    if not own:
        empty = keys.new_zeros(0, 1, keys.shape[1], *queries.shape[2:])
        return _Merged.apply(queries, keys, values, places, empty, empty, None)
    visible = [torch.ones_like(places, dtype=torch.bool)[None] if seen is None else seen for _, _, seen in own]
    own_keys, own_values = torch.stack([k for k, _, _ in own]), torch.stack([v for _, v, _ in own])
    return _Merged.apply(queries, keys, values, places, own_keys, own_values, torch.stack(visible))


def attend_masked(
    queries: Float[Tensor, "1 H R head"],
    keys: Float[Tensor, "B G T head"],
    values: Float[Tensor, "B G T head"],
    places: Int[Tensor, " R"],
    own: list[tuple[Float[Tensor, "1 G R head"], Float[Tensor, "1 G R head"], Bool[Tensor, "1 R"] | None]],
) -> Float[Tensor, "1 H R head"]:
    """The same by plain differentiable operations that form all scores: for devices without a fused kernel, and the
    reference of the tests."""
    _, heads, num_rows, head_dim = queries.shape
    batch, groups, length, _ = keys.shape
    query = queries.unflatten(1, (groups, heads // groups)) * head_dim**-0.5  # [1, G, rep, R, head]
    everyone = torch.arange(batch * length, device=keys.device)
    visible = (everyone // length == places[:, None] // length) & (everyone <= places[:, None])  # [R, B T]
    wide_keys, wide_values = (x.transpose(0, 1).flatten(1, 2)[None] for x in (keys, values))  # [1, G, B T, head]
    shared = query.flatten(2, 3) @ wide_keys.transpose(-1, -2)
    scores = [shared.unflatten(2, (-1, num_rows)).float().masked_fill(~visible, -torch.inf)]
    for key, _, seen in own:
        score = (query * key[:, :, None]).sum(-1, keepdim=True).float()
        scores.append(score if seen is None else score.masked_fill(~seen[:, None, None, :, None], -torch.inf))
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).to(values.dtype)
    width = len(everyone)
    out = (weights[..., :width].flatten(2, 3) @ wide_values).unflatten(2, (-1, num_rows))
    for place, (_, value, _) in enumerate(own):
        out = out + weights[..., width + place, None] * value[:, :, None]
    return out.flatten(1, 2)


class _Merged(torch.autograd.Function):
    """The fused kernel's backward needs only the output and the log-sum-exp of the softmax it belongs to: given those
    of the joined softmax, it returns the gradients of the shared part of the joined attention."""

    @staticmethod
    def forward(ctx, queries, keys, values, places, own_keys, own_values, visible):  # type: ignore[override]
        shape = _Shape(queries, keys, places)
        wide_keys, wide_values = shape.repeat(keys), shape.repeat(values)
        causal = FUSED[queries.device.type]()
        out, total = causal.forward(shape.spread(queries), wide_keys, wide_values)
        out, total = shape.gather(out), shape.gather(total)  # [1, H, R, head], [1, H, R]
        scores = None
        if len(own_keys):
            grouped = queries.unflatten(1, (shape.groups, -1))  # [1, G, rep, R, head]
            scores = torch.stack([(grouped * key[:, :, None]).sum(-1).float() for key in own_keys])
            scores = (scores * shape.scale).masked_fill_(~visible[:, :, None, None], -torch.inf).flatten(2, 3)
            joined = torch.logaddexp(total, scores.logsumexp(0))
            weights = (scores - joined).exp_()  # [J, 1, H, R]
            out = out * (total - joined).exp_()[..., None].to(out.dtype)
            for weight, value in zip(weights, own_values, strict=True):
                grouped = weight.unflatten(1, (shape.groups, -1))[..., None].to(out.dtype) * value[:, :, None]
                out += grouped.flatten(1, 2)
            total = joined
        else:
            weights = total.new_zeros(0)
        ctx.save_for_backward(queries, keys, values, places, own_keys, own_values, out, total, weights)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[override]
        queries, keys, values, places, own_keys, own_values, out, total, weights = ctx.saved_tensors
        shape = _Shape(queries, keys, places)
        grad_out = grad_out.to(out.dtype)
        grad_q, grad_k, grad_v = ctx.causal.backward(
            shape.spread(grad_out),
            shape.spread(queries),
            shape.repeat(keys),
            shape.repeat(values),
            shape.spread(out),
            shape.spread(total),
        )
        grad_q = shape.gather(grad_q)
        grad_k, grad_v = (g.unflatten(1, (shape.groups, -1)).sum(2) for g in (grad_k, grad_v))
        grad_own_keys, grad_own_values = torch.empty_like(own_keys), torch.empty_like(own_values)
        common = (grad_out.float() * out.float()).sum(-1)  # [1, H, R]
        grouped_grad = grad_out.unflatten(1, (shape.groups, -1))  # [1, G, rep, R, head]
        grouped_q = queries.unflatten(1, (shape.groups, -1))
        for place, (key, value, weight) in enumerate(zip(own_keys, own_values, weights, strict=True)):
            wide = weight.unflatten(1, (shape.groups, -1))
            grad_own_values[place] = (wide[..., None].to(out.dtype) * grouped_grad).sum(2)
            agreement = (grouped_grad * value[:, :, None]).sum(-1).float()
            grad_score = wide * (agreement - common.unflatten(1, (shape.groups, -1))) * shape.scale
            grad_score = grad_score[..., None].to(out.dtype)
            grad_own_keys[place] = (grad_score * grouped_q).sum(2)
            grad_q += (grad_score * key[:, :, None]).flatten(1, 2)
        return grad_q, grad_k, grad_v, None, grad_own_keys, grad_own_values, None


class _CpuKernel:
    """Causal attention that returns its log-sum-exp, and the gradients that belong to a given one."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, 0.0, True)

    def backward(
        self, grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, queries, keys, values, out, total, 0.0, True
        )


class _CudaKernel:
    """The same on CUDA, in all types. Its log-sum-exp has more places than there are rows; what fills them must be kept
    for the backward kernel, which also takes it for granted that heads lie inside rows in the memory of ``out``."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        out, self.total, *self.random = torch.ops.aten._scaled_dot_product_efficient_attention(
            queries, keys, values, None, True, 0.0, True
        )
        return out, self.total[..., : queries.shape[2]]

    def backward(
        self, grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        padded = self.total.clone()
        padded[..., : queries.shape[2]] = total
        wanted = [True, True, True, False]
        grad_out, out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad_out, out))
        grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad_out, queries, keys, values, None, out, padded, *self.random, 0.0, wanted, True
        )
        return grads[:3]


FUSED = {"cpu": _CpuKernel, "cuda": _CudaKernel}


class _Shape:
    """Rows to the places of their tokens and back (the kernel's causal mask counts places), heads to groups."""

    def __init__(self, queries: Tensor, keys: Tensor, places: Tensor) -> None:
        self.places = places
        self.batch, self.groups, self.length, _ = keys.shape
        self.repeats = queries.shape[1] // self.groups
        self.scale = queries.shape[3] ** -0.5

    def spread(self, x: Tensor) -> Tensor:
        """[1, H, R, ...] to [B, H, T, ...], zero elsewhere; in memory, heads lie inside rows."""
        wide = x.new_zeros(self.batch * self.length, x.shape[1], *x.shape[3:])
        wide.index_copy_(0, self.places, x[0].transpose(0, 1))
        return wide.unflatten(0, (self.batch, self.length)).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """[B, H, T, ...] to [1, H, R, ...]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places).transpose(0, 1)[None]

    def repeat(self, x: Tensor) -> Tensor:
        """[B, G, T, head] to [B, H, T, head]: the kernel wants as many key heads as query heads."""
        return x.repeat_interleave(self.repeats, dim=1)
