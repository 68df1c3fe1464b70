"""What stands between the matrix products of a decoder layer: norms, rotations and the gate; and what
rows of logits say: which tokens a draft likes best, how probable the target finds one; and mixtures of experts.

A verification reads a few dozen rows, so these cost little arithmetic but, as torch operations, some fifteen calls a
layer. `NativeRows` does each in one pass, by `rows.cpp`; `Rows`, in torch, is the reference it must equal and does the
rest: other devices and types, and long prompts.

Shapes: B batch, R rows, W width of a row, H query heads, G key-value heads, V vocabulary, M rows picked of R.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from confu.cache import KVCache, PrefixCache
from confu.native import library
from confu.tree import take

SUFFIXES = {torch.float32: "float", torch.bfloat16: "bf16"}
MOST_ROWS = 128  # from here on torch's threads win
WIDEST_HEAD = 1024


class Rows:
    """The operations in torch."""

    def add_norm(
        self, x: Float[Tensor, "B R W"], delta: Float[Tensor, "B R W"] | None, weight: Float[Tensor, " W"], eps: float
    ) -> tuple[Float[Tensor, "B R W"], Float[Tensor, "B R W"]]:
        """x + delta, and its RMS norm."""
        total = x if delta is None else x + delta
        return total, rms_norm(total, (total.shape[-1],), weight, eps)

    def rotate(
        self,
        mixed: Float[Tensor, "B R heads W"],
        cos: Float[Tensor, "#B R W"],
        sin: Float[Tensor, "#B R W"],
        num_heads: int,
        norms: Float[Tensor, "HG W"] | None = None,
        eps: float = 0.0,
        into: tuple[KVCache | PrefixCache, int] | None = None,
    ) -> tuple[Float[Tensor, "B H R W"], Float[Tensor, "B G K W"], Float[Tensor, "B G K W"]]:
        """Queries, keys and values out of one product: H, G and G heads side by side. Queries and keys are turned to
        their positions, after a norm of every head by ``norms`` where there are any. ``into`` a cache and one of its
        layers, keys and values are written to the opened rows, and all that it holds of them is returned."""
        num_turned = (mixed.shape[2] + num_heads) // 2
        turned = mixed[:, :, :num_turned]
        if norms is not None:
            turned = rms_norm(turned, (turned.shape[-1],), eps=eps) * norms
        left, right = turned.chunk(2, dim=-1)
        turned = turned * cos[:, :, None] + torch.cat([-right, left], dim=-1) * sin[:, :, None]
        queries, keys = turned.split([num_heads, num_turned - num_heads], dim=2)
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, mixed[:, :, num_turned:]))
        return (queries, keys, values) if into is None else (queries, *into[0].update(keys, values, into[1]))

    def gate(self, gate_up: Float[Tensor, "B R W2"]) -> Float[Tensor, "B R W"]:
        """silu(first half) times second half."""
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up

    def mix(
        self,
        state: Float[Tensor, "*rows width_in"],
        router: Float[Tensor, "E width_in"],
        experts: Float[Tensor, "E W"],
        top: int,
    ) -> Float[Tensor, "*rows W"]:
        """The ``top`` of E embeddings that each state is routed to, weighed by softmax over those."""
        # The router reads directions: feature norms differ by orders of magnitude between layers and positions.
        state = state.float() * torch.rsqrt(state.float().square().mean(-1, keepdim=True) + 1e-6)
        scores = linear(state, router.float())
        best, index = scores.topk(top, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, index, best.softmax(dim=-1).to(scores.dtype))
        return (weights @ experts.float()).to(experts.dtype)

    def best(
        self, logits: Float[Tensor, "B R U"], count: int
    ) -> tuple[Float[Tensor, "B R count"], Int[Tensor, "B R count"]]:
        """The ``count`` largest log-probabilities (float32) of each row, largest first, and where they are."""
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        values, places = log_probs.topk(count, dim=-1)
        return values, places

    def argmax(self, logits: Float[Tensor, "B R V"]) -> Int[Tensor, "B R"]:
        """Where the largest of each row is; of equal ones the first."""
        return logits.max(dim=-1).indices  # a third of argmax's time on a CPU

    def log_probs(
        self, logits: Float[Tensor, "B R V"], picked: Int[Tensor, "B M"], tokens: Int[Tensor, "B M"]
    ) -> Float[Tensor, "B M"]:
        """Log-probability (float32) of one token in each of the picked rows."""
        return take(logits, picked).float().log_softmax(dim=-1).gather(2, tokens[:, :, None])[:, :, 0]


class NativeRows(Rows):
    """The same by the compiled functions, for few rows on a CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        kinds = {
            "add_norm": [pointer] * 5 + [count] * 2 + [number],
            "rotate": [pointer] * 8 + [count] * 6 + [number],
            "gate": [pointer] * 2 + [count] * 2,
            "mix": [pointer] * 4 + [count] * 5,
            "best": [pointer] * 3 + [count] * 3,
            "argmax": [pointer] * 2 + [count] * 2,
            "log_probs": [pointer] * 4 + [count] * 4,
        }
        self._functions = {}
        for dtype, suffix in SUFFIXES.items():
            for name, types in kinds.items():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = types, None
                self._functions[name, dtype] = function

    def _serves(self, x: Tensor) -> bool:
        width = x.shape[-1]
        return x.dtype in SUFFIXES and x.is_contiguous() and x.is_cpu and 0 < x.numel() <= MOST_ROWS * width

    def add_norm(
        self, x: Float[Tensor, "B R W"], delta: Float[Tensor, "B R W"] | None, weight: Float[Tensor, " W"], eps: float
    ) -> tuple[Float[Tensor, "B R W"], Float[Tensor, "B R W"]]:
        if not self._serves(x) or weight.dtype != x.dtype or (delta is not None and delta.dtype != x.dtype):
            return super().add_norm(x, delta, weight, eps)
        width = x.shape[-1]
        normed, total = torch.empty_like(x), x
        there = added = None
        if delta is not None:
            total, delta = torch.empty_like(x), delta.contiguous()  # a copy has to live until the call
            added, there = delta.data_ptr(), total.data_ptr()
        self._functions["add_norm", x.dtype](
            x.data_ptr(), added, weight.data_ptr(), there, normed.data_ptr(), x.numel() // width, width, eps
        )
        return total, normed

    def rotate(
        self,
        mixed: Float[Tensor, "B R heads W"],
        cos: Float[Tensor, "#B R W"],
        sin: Float[Tensor, "#B R W"],
        num_heads: int,
        norms: Float[Tensor, "HG W"] | None = None,
        eps: float = 0.0,
        into: tuple[KVCache | PrefixCache, int] | None = None,
    ) -> tuple[Float[Tensor, "B H R W"], Float[Tensor, "B G K W"], Float[Tensor, "B G K W"]]:
        cache, layer = into or (None, 0)
        if cache is not None and not (isinstance(cache, KVCache) and cache.dtype == mixed.dtype):
            queries, keys, values = self.rotate(mixed, cos, sin, num_heads, norms, eps)
            return queries, *cache.update(keys, values, layer)
        batch, rows, heads, width = mixed.shape
        few = batch * rows <= MOST_ROWS and width <= WIDEST_HEAD and mixed.dtype in SUFFIXES and mixed.is_cpu
        alike = all(t is None or t.dtype == mixed.dtype for t in (cos, sin, norms))
        if not (few and alike and mixed.is_contiguous()):
            return super().rotate(mixed, cos, sin, num_heads, norms, eps, into)
        num_groups = (heads - num_heads) // 2
        queries = mixed.new_empty(batch, num_heads, rows, width)
        if cache is None:
            keys, values = found = mixed.new_empty(2, batch, num_groups, rows, width).unbind()
            first_slots = torch.zeros(batch, dtype=torch.int64)
        else:
            keys, values, found = cache.keys[layer], cache.values[layer], cache.opened(layer)
            first_slots = cache.first_slots
        cos, sin = cos.expand(batch, -1, -1).contiguous(), sin.expand(batch, -1, -1).contiguous()
        # fmt: off
        self._functions["rotate", mixed.dtype](
            mixed.data_ptr(), cos.data_ptr(), sin.data_ptr(), None if norms is None else norms.data_ptr(),
            queries.data_ptr(), keys.data_ptr(), values.data_ptr(), first_slots.data_ptr(), keys.shape[2], batch, rows,
            num_heads, num_groups, width, eps,
        )
        # fmt: on
        return queries, found[0], found[1]

    def gate(self, gate_up: Float[Tensor, "B R W2"]) -> Float[Tensor, "B R W"]:
        if not self._serves(gate_up):
            return super().gate(gate_up)
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        self._functions["gate", out.dtype](gate_up.data_ptr(), out.data_ptr(), out.numel() // width, width)
        return out

    def mix(
        self,
        state: Float[Tensor, "*rows width_in"],
        router: Float[Tensor, "E width_in"],
        experts: Float[Tensor, "E W"],
        top: int,
    ) -> Float[Tensor, "*rows W"]:
        alike = state.dtype == router.dtype == experts.dtype and router.is_contiguous() and experts.is_contiguous()
        state = state.contiguous()
        if not (self._serves(state) and alike) or torch.is_grad_enabled():
            return super().mix(state, router, experts, top)
        width_in, (count, width) = state.shape[-1], experts.shape
        out = state.new_empty(*state.shape[:-1], width)
        pointers = map(Tensor.data_ptr, (state, router, experts, out))
        self._functions["mix", state.dtype](*pointers, state.numel() // width_in, width_in, width, count, top)
        return out

    def best(
        self, logits: Float[Tensor, "B R U"], count: int
    ) -> tuple[Float[Tensor, "B R count"], Int[Tensor, "B R count"]]:
        if not self._serves(logits):
            return super().best(logits, count)
        values = logits.new_empty(*logits.shape[:-1], count, dtype=torch.float32)
        places = logits.new_empty(values.shape, dtype=torch.int64)
        width = logits.shape[-1]
        self._functions["best", logits.dtype](
            logits.data_ptr(), values.data_ptr(), places.data_ptr(), logits.numel() // width, width, count
        )
        return values, places

    def argmax(self, logits: Float[Tensor, "B R V"]) -> Int[Tensor, "B R"]:
        if not self._serves(logits):
            return super().argmax(logits)
        places = logits.new_empty(logits.shape[:-1], dtype=torch.int64)
        width = logits.shape[-1]
        self._functions["argmax", logits.dtype](logits.data_ptr(), places.data_ptr(), logits.numel() // width, width)
        return places

    def log_probs(
        self, logits: Float[Tensor, "B R V"], picked: Int[Tensor, "B M"], tokens: Int[Tensor, "B M"]
    ) -> Float[Tensor, "B M"]:
        if not (logits.dtype in SUFFIXES and logits.is_contiguous() and logits.is_cpu):
            return super().log_probs(logits, picked, tokens)
        picked, tokens = picked.contiguous(), tokens.contiguous()
        found = logits.new_empty(picked.shape, dtype=torch.float32)
        self._functions["log_probs", logits.dtype](
            logits.data_ptr(),
            picked.data_ptr(),
            tokens.data_ptr(),
            found.data_ptr(),
            *logits.shape[:2],
            picked.shape[1],
            logits.shape[2],
        )
        return found


@functools.cache
def rows() -> Rows:
    """The fastest of the two that this machine can have."""
    functions = library()
    return Rows() if functions is None else NativeRows(functions)
