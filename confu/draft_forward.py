"""The draft's arithmetic when it decodes: the network of `draft.py`, its weights laid out for few rows.

Products are fused and packed (`linear.py`), and what stands between them is one pass (`rows.py`); that it computes what
`DraftModel` computes, with which drafts are trained, is tested form by form.

Shapes: B batch, R rows, D hidden width, U draft vocabulary, H query heads, G key-value heads.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from confu.attention import Attention
from confu.draft import DraftModel, normed_states
from confu.linear import fast_quantization, fused, product
from confu.rows import rows
from confu.tree import take

Turn = tuple[Tensor, Tensor]


class DraftForward:
    """Weights of a draft network for decoding, rounded where ``quantization`` is int8, or where that alone makes them
    faster: they decide only how soon the target's text comes. What ``contemplation`` holds stays the network's own."""

    @torch.no_grad()
    def __init__(self, draft: DraftModel, quantization: str | None = None) -> None:
        layer, attention, mlp = draft.midlayer, draft.midlayer.self_attn, draft.midlayer.mlp
        self.config, self.target_ids = draft.config, draft.target_ids()
        self.contemplation = draft.contemplation.without_heads() if draft.contemplation is not None else None
        self._rotary = draft.rotary
        if quantization != "int8":
            quantization = fast_quantization(draft.lm_head.weight)
        linears = {
            "fc": [draft.fc],
            "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "out": [attention.o_proj],
            "gate_up": [mlp.gate_proj, mlp.up_proj],
            "down": [mlp.down_proj],
            "head": [draft.lm_head],
        }
        self._products = {name: fused(layers, quantization) for name, layers in linears.items()}
        if draft.contemplation is not None and self.config.future_is("head"):
            heads = draft.contemplation.future_heads.flatten(0, 1)
            self._products["looks"] = product(heads, quantization=quantization)
        self._embedding_norm, self._hidden_norm = layer.input_layernorm.weight, layer.hidden_norm.weight
        self._mlp_norm, self._norm = layer.post_attention_layernorm.weight, draft.norm.weight
        self._future_norm = layer.future_norm.weight if self.config.future_is("input") else None

    def fuse(self, features: Float[Tensor, "B R D3"]) -> Float[Tensor, "B R D"]:
        return self._products["fc"](features)

    def turn(self, x: Tensor, positions: Int[Tensor, "B R"]) -> Turn:
        """cos and sin of positions, in the type of ``x``; `project` turns queries and keys by them."""
        return self._rotary(x, positions)

    def third_input(self, future: Float[Tensor, "B R D4"] | None) -> Float[Tensor, "B R D"] | None:
        if future is None or self._future_norm is None or self.contemplation is None:
            return None
        return self.contemplation.future_fc(normed_states(future, self.config.rms_norm_eps))

    def look(self, future: Float[Tensor, "B R D4"] | None) -> Float[Tensor, "B R SD"] | None:
        if future is None or "looks" not in self._products:
            return None
        return self._products["looks"](normed_states(future, self.config.rms_norm_eps))

    def project(
        self,
        embedding: Float[Tensor, "B R D"],
        hidden: Float[Tensor, "B R D"],
        third: Float[Tensor, "B R3 D"] | None,
        turn: Turn,
    ) -> tuple[Float[Tensor, "B H R head"], Float[Tensor, "B G R head"], Float[Tensor, "B G R head"]]:
        """Queries, keys and values of rows (`DraftModel.row`, `.queries`, `.keys_values`)."""
        parts = [self._normed(embedding, self._embedding_norm), self._normed(hidden, self._hidden_norm)]
        if self._future_norm is not None:
            none = torch.zeros_like(hidden)
            parts.append(none if third is None else self._normed(third, self._future_norm).expand_as(none))
        mixed = self._products["qkv"](torch.cat(parts, dim=-1)).unflatten(-1, (-1, self.config.head_dim))
        return rows().rotate(mixed, *turn, self.config.num_attention_heads)

    def future_slot(
        self, future: Float[Tensor, "B 1 D4"], states: Float[Tensor, "B 1 D"], turn: Turn
    ) -> tuple[Float[Tensor, "B G 1 head"], Float[Tensor, "B G 1 head"]]:
        """As `DraftModel.future_slot`; ``turn`` is that of the position one past the anchor."""
        assert self.contemplation is not None
        width = self.config.hidden_size
        if self.config.future_is("kv"):
            mixed = self.contemplation.future_kv(future[..., width:]).unflatten(-1, (-1, self.config.head_dim))
            return rows().rotate(mixed, *turn, 0)[1:]
        return self.project(
            self.contemplation.future(states).to(states.dtype), self.fuse(future[..., :-width]), None, turn
        )[1:]

    def attend(
        self,
        queries: Float[Tensor, "B H R head"],
        keys: Float[Tensor, "B G K head"],
        values: Float[Tensor, "B G K head"],
        mask: Bool[Tensor, "B R K"],
    ) -> Float[Tensor, "B R Hhead"]:
        per_group = self.config.num_attention_heads // self.config.num_key_value_heads
        attention = Attention(mask, per_group=per_group, head_dim=self.config.head_dim, dtype=queries.dtype)
        return attention(queries, keys, values)

    def finish(self, hidden: Float[Tensor, "B R D"], attended: Float[Tensor, "B R Hhead"]) -> Float[Tensor, "B R D"]:
        """As `DraftModel.finish`, of heads side by side: the layer's output, recycled as the next hidden state."""
        if self.config.norm_before_residual:
            hidden = self._normed(hidden, self._hidden_norm)
        attended = self._products["out"](attended)
        hidden, normed = rows().add_norm(hidden, attended, self._mlp_norm, self.config.rms_norm_eps)
        return hidden + self._products["down"](rows().gate(self._products["gate_up"](normed)))

    def ahead(
        self, looked: Float[Tensor, "B 1 SD"] | None, steps: Int[Tensor, "B levels"]
    ) -> Float[Tensor, "B levels D"] | None:
        """What `look` returned for each level of a tree, whose rows are all as many ``steps`` from the anchor."""
        if looked is None:
            return None
        by_place = looked.unflatten(-1, (self.config.future_steps, -1))[:, 0]  # [B, S, D]
        return take(by_place, steps.clamp(max=self.config.future_steps - 1))

    def logits(self, out: Float[Tensor, "B R D"], ahead: Float[Tensor, "B 1 D"] | None) -> Float[Tensor, "B R U"]:
        """The head on what `DraftModel.read` returns of one level's rows."""
        read = self._normed(out, self._norm)
        return self._products["head"](read if ahead is None else read + ahead)

    def _normed(self, x: Float[Tensor, "B R D"], weight: Float[Tensor, " D"]) -> Float[Tensor, "B R D"]:
        return rows().add_norm(x, None, weight, self.config.rms_norm_eps)[1]
