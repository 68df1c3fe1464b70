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
from confu.cache import KVCache
from confu.draft import DraftModel, normed_states
from confu.draft_native import NativeDraft
from confu.layers import LayerWeights, serves
from confu.linear import USUAL_ROWS, fast_quantization, fused, product
from confu.rows import rows
from confu.tree import take
from confu.turns import Turn, Turns


class DraftForward:
    """Weights of a draft network for decoding, rounded where ``quantization`` is int8, or where that alone makes them
    faster: they decide only how soon the target's text comes. What ``contemplation`` holds stays the network's own."""

    @torch.no_grad()
    def __init__(self, draft: DraftModel, quantization: str | None = None) -> None:
        layer = draft.midlayer
        self.config, self.target_ids = draft.config, draft.target_ids()
        self.contemplation = draft.contemplation.without_heads() if draft.contemplation is not None else None
        self.turns = Turns(draft.rotary)
        rough = fast_quantization(draft.lm_head.weight)
        quantization = quantization or ("int8" if rough else None)
        self._fc, self._head = fused([draft.fc], quantization), fused([draft.lm_head], rough or quantization)
        self._layer = LayerWeights(
            layer,
            rough or quantization,
            num_heads=self.config.num_attention_heads,
            num_groups=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            eps=self.config.rms_norm_eps,
        )
        self._hidden_norm, self._norm = layer.hidden_norm.weight, draft.norm.weight
        self._future_norm = layer.future_norm.weight if self.config.future_is("input") else None
        self._looks = None
        if draft.contemplation is not None and self.config.future_is("head"):
            self._looks = product(draft.contemplation.future_heads.flatten(0, 1), None, rough or quantization)
        self.native = NativeDraft.of(
            self._layer,
            self._fc,
            self._head,
            self._looks,
            self._hidden_norm,
            self._norm,
            self.target_ids,
            residual_normed=self.config.norm_before_residual,
        )
        """Compiled, where it can be."""

    def fuse(self, features: Float[Tensor, "B R D3"]) -> Float[Tensor, "B R D"]:
        return self._fc(features)

    def third_input(self, future: Float[Tensor, "B R D4"] | None) -> Float[Tensor, "B R D"] | None:
        if future is None or self._future_norm is None or self.contemplation is None:
            return None
        return self.contemplation.future_fc(normed_states(future, self.config.rms_norm_eps))

    def looked_at(self, future: Float[Tensor, "B R D4"] | None) -> Float[Tensor, "B R D3"] | None:
        """What W_j reads of f (`normed_states`)."""
        if future is None or self._looks is None:
            return None
        states = future.unflatten(-1, (4, -1))[..., 1:, :].flatten(1, 2)
        return self._normed(states, torch.ones_like(states[0, 0])).view(*future.shape[:2], -1)

    def project(
        self,
        embedding: Float[Tensor, "B R D"],
        hidden: Float[Tensor, "B R D"],
        third: Float[Tensor, "B R3 D"] | None,
        turn: Turn,
    ) -> tuple[Float[Tensor, "B H R head"], Float[Tensor, "B G R head"], Float[Tensor, "B G R head"]]:
        """Queries, keys and values of rows (`DraftModel.row`, `.queries`, `.keys_values`)."""
        parts = [self._normed(embedding, self._layer.attention_norm), self._normed(hidden, self._hidden_norm)]
        if self._future_norm is not None:
            none = torch.zeros_like(hidden)
            parts.append(none if third is None else self._normed(third, self._future_norm).expand_as(none))
        mixed = self._layer.qkv(torch.cat(parts, dim=-1)).unflatten(-1, (-1, self.config.head_dim))
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

    def layer(
        self,
        embedding: Float[Tensor, "B R D"],
        hidden: Float[Tensor, "B R D"],
        third: Float[Tensor, "B R3 D"] | None,
        turn: Turn,
        mask: Bool[Tensor, "B #R K"],
        cache: KVCache,
        last: Int[Tensor, "B 1"] | None = None,
    ) -> Float[Tensor, "B Rout D"]:
        """Rows through the layer: their keys and values go to the cache's opened rows, what leaves it is recycled as
        the next hidden state. With ``last``, that of one row of each sequence alone, whose mask this is; a few more are
        run to their end for nothing."""
        batch, num_rows, _ = hidden.shape
        whole = last is None or batch * num_rows <= USUAL_ROWS
        attend = self._attention(mask.expand(-1, num_rows, -1) if whole else mask, cache.num_soft_keys)
        if whole and self.native is not None and serves(attend, cache):
            out = self.native.layer(embedding, hidden, turn, attend, cache)
        else:
            queries, keys, values = self.project(embedding, hidden, third, turn)
            if last is not None and not whole:
                queries = queries.gather(2, last[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))
                hidden = take(hidden, last)
            out = self._finish(hidden, attend(queries, *cache.update(keys, values, 0)))
        return take(out, last) if last is not None and whole else out

    def _attention(self, mask: Bool[Tensor, "B R K"], num_soft: int) -> Attention:
        per_group, head_dim = self.config.num_attention_heads // self.config.num_key_value_heads, self.config.head_dim
        return Attention(mask, per_group=per_group, head_dim=head_dim, dtype=self._norm.dtype, num_soft=num_soft)

    def _finish(self, hidden: Float[Tensor, "B R D"], attended: Float[Tensor, "B R Hhead"]) -> Float[Tensor, "B R D"]:
        """As `DraftModel.finish`, of heads side by side."""
        if self.config.norm_before_residual:
            hidden = self._normed(hidden, self._hidden_norm)
        hidden, normed = rows().add_norm(hidden, self._layer.out(attended), self._layer.mlp_norm, self._layer.eps)
        return hidden + self._layer.down(rows().gate(self._layer.gate_up(normed)))

    def places(self, steps: Int[Tensor, "B levels"]) -> Int[Tensor, "B levels"]:
        """Which W_j serves rows that are so many ``steps`` from the anchor."""
        return steps.clamp(max=self.config.future_steps - 1)

    def ahead(
        self, states: Float[Tensor, "B 1 D3"] | None, places: Int[Tensor, "B levels"]
    ) -> Float[Tensor, "B levels D"] | None:
        """W_j f, where f is ``states``, for each level of a tree."""
        if states is None or self._looks is None:
            return None
        return take(self._looks(states).unflatten(-1, (self.config.future_steps, -1))[:, 0], places)

    def logits(self, out: Float[Tensor, "B R D"], ahead: Float[Tensor, "B 1 D"] | None) -> Float[Tensor, "B R U"]:
        """The head on what `DraftModel.read` returns of one level's rows."""
        read = self._normed(out, self._norm)
        return self._head(read if ahead is None else read + ahead)

    def _normed(self, x: Float[Tensor, "B R D"], weight: Float[Tensor, " D"]) -> Float[Tensor, "B R D"]:
        return rows().add_norm(x, None, weight, self.config.rms_norm_eps)[1]
