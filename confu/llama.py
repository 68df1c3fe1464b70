"""A forward for Llama-like targets that costs little more than its matrix products.

The same arithmetic as the model's own code in transformers, which it is tested against: products fused and prepacked
(`linear.py`), rotations and masks made once for all layers, keys and values written in place. What it does not know
(mixtures of experts, sliding windows, other norms) runs through the model's own code.

Shapes: B batch, R rows, D hidden width, H query heads, G key-value heads, K keys.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from confu.attention import Attention
from confu.cache import KVCache, PrefixCache
from confu.layers import Layers, LayerWeights, serves
from confu.linear import product
from confu.memory import forget_mapped
from confu.rows import rows
from confu.turns import Turn, Turns

READ_AT_ONCE = 256  # rows of a prompt: what is made of them stays in the second cache
FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def is_llama_like(model: PreTrainedModel) -> bool:
    """Whether `LlamaForward` computes what this model computes."""
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and not hasattr(config, "layer_types")
    return (
        type(model) in FAMILIES
        and kinds == {"full_attention"}
        and not windowed
        and config.hidden_act == "silu"
        and getattr(config, "pretraining_tp", 1) == 1
    )


class LlamaForward:
    """Weights of a Llama-like model, laid out for decoding. Built from a Hugging Face model, whose own layers and head
    are emptied with ``release``: it keeps its embedding and its configuration, but no longer runs."""

    def __init__(self, model: PreTrainedModel, quantization: str | None = None, *, release: bool = False) -> None:
        decoder: Any = model.get_decoder()
        config: Any = model.config
        self.quantization = quantization
        self.num_heads: int = config.num_attention_heads
        self.num_groups: int = config.num_key_value_heads
        self.turns = Turns(decoder.rotary_emb)
        self.norm, self.eps = decoder.norm.weight, decoder.norm.variance_epsilon
        head: Any = model.get_output_embeddings()
        embedding: Any = model.get_input_embeddings()
        self.vocab_size = len(head.weight)
        self.head = product(head.weight, head.bias, quantization)
        if release and head.weight is embedding.weight:
            forget_mapped([embedding.weight])  # which stays in its file
        elif release:
            _empty(head)
        self.layers = []
        for layer in decoder.layers:
            self.layers.append(
                LlamaLayer(
                    layer,
                    quantization,
                    num_heads=self.num_heads,
                    num_groups=self.num_groups,
                    head_dim=layer.self_attn.head_dim,
                    eps=layer.input_layernorm.variance_epsilon,
                )
            )
            if release:
                _empty(layer)
        self.in_blocks = quantization is None and getattr(self.layers[0].qkv, "bits", 16) < 16
        self._at_once = Layers.of(self.layers, self.norm, self.eps)
        self.most_rows = READ_AT_ONCE if self._at_once is not None else None

    def __call__(
        self,
        embeddings: Float[Tensor, "B R D"],
        positions: Int[Tensor, "B R"],
        mask: Bool[Tensor, "B R K"] | None,
        cache: KVCache | PrefixCache,
        layers: tuple[int, ...],
        *,
        num_logits: int,
    ) -> tuple[Float[Tensor, "B num_logits V"], Float[Tensor, "B R Dlayers"]]:
        turn = self.turns(embeddings, positions, cache, embeddings.shape[1])
        per_group, head_dim = self.num_heads // self.num_groups, self.layers[0].head_dim
        num_soft = cache.num_soft_keys
        attend = Attention(mask, per_group=per_group, head_dim=head_dim, dtype=embeddings.dtype, num_soft=num_soft)
        if self._at_once is not None and isinstance(cache, KVCache) and serves(attend, cache):
            final, captured = self._at_once(embeddings, turn, attend, cache, layers)
        else:
            final, captured = self._one_by_one(embeddings, turn, attend, cache, layers)
        if num_logits == 0:
            return embeddings.new_empty(len(embeddings), 0, self.vocab_size), captured
        return self.head(final[:, :num_logits]), captured

    def _one_by_one(
        self,
        embeddings: Float[Tensor, "B R D"],
        turn: Turn,
        attend: Attention,
        cache: KVCache | PrefixCache,
        layers: tuple[int, ...],
    ) -> tuple[Float[Tensor, "B R D"], Float[Tensor, "B R Dlayers"]]:
        """The normed last state, and the states that enter ``layers``, side by side."""
        states: dict[int, Tensor] = {}
        hidden, delta = embeddings, None
        for index, layer in enumerate(self.layers):
            entering, hidden, delta = layer(hidden, delta, turn, attend, cache, index)
            if index in layers:
                states[index] = entering
        _, final = rows().add_norm(hidden, delta, self.norm, self.eps)
        states[len(self.layers)] = final
        return final, torch.cat([states[index] for index in layers], dim=-1)


class LlamaLayer(LayerWeights):
    """One decoder layer, one function after the other."""

    def __call__(
        self,
        hidden: Float[Tensor, "B R D"],
        delta: Float[Tensor, "B R D"] | None,
        turn: Turn,
        attend: Attention,
        cache: KVCache | PrefixCache,
        index: int,
    ) -> tuple[Float[Tensor, "B R D"], Float[Tensor, "B R D"], Float[Tensor, "B R D"]]:
        """``hidden + delta`` enter the layer; returns them, and the two summands of what leaves it."""
        batch, num_rows, _ = hidden.shape
        hidden, normed = rows().add_norm(hidden, delta, self.attention_norm, self.eps)
        mixed = self.qkv(normed).view(batch, num_rows, -1, self.head_dim)
        turned = rows().rotate(mixed, *turn, self.num_heads, self.head_norms, self.eps, (cache, index))
        attended = self.out(attend(*turned))
        between, normed = rows().add_norm(hidden, attended, self.mlp_norm, self.eps)
        return hidden, between, self.down(rows().gate(self.gate_up(normed)))


def _empty(module: nn.Module) -> None:
    """Give up the weights of the linear layers inside."""
    given_up = []
    for child in module.modules():
        if isinstance(child, nn.Linear):
            for name, weight in child.named_parameters():
                given_up.append(weight)
                setattr(child, name, nn.Parameter(weight.new_empty(0), requires_grad=False))
    forget_mapped(given_up)
