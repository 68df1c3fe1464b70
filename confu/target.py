"""The frozen target: a Hugging Face causal LM.

One batched forward reads tree nodes and contemplate rows together, with explicit positions and a mask; it returns
logits of the nodes, the captured low/mid/high states of nodes (h) and contemplate rows (f), and leaves all keys and
values in a `KVCache`, from which `keep` retains the accepted path. METHOD 3 (features) and 4 (target side).

Shapes: B batch, T tokens, N tree nodes, C contemplate rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from confu.attention import any_shape
from confu.cache import KVCache
from confu.contemplate import Contemplation, tree_rows_mask
from confu.forward import Forward, ModelForward
from confu.graphs import GraphForward
from confu.native import on_host
from confu.tree import Tree, take

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
"""Rotary embeddings that a draft's layer can have."""


@dataclass(frozen=True)
class Verified:
    """What one verification forward returns."""

    logits: Float[Tensor, "B N V"]
    """Target logits at every node, in the target's type."""
    features: Float[Tensor, "B N D3"]
    """Captured states h of every node."""
    future: Float[Tensor, "B C D4"] | None
    """Captured states f of the contemplate rows, and their final one."""
    con_nodes: Int[Tensor, "B C"] | None
    """The node each contemplate row follows."""


class Target:
    """A frozen causal LM that verifies trees. It never changes the model's weights or configuration.

    Rows run through ``forward``, by default the model's own code. Raises ValueError for a model whose layers cannot
    take a tree mask (encoder-decoder, recurrent, chunked, compressed keys).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        feature_layers: tuple[int, int, int] | None = None,
        *,
        forward: Forward | None = None,
    ) -> None:
        config: Any = model.config.get_text_config()
        _refuse_unsupported(model, config)
        self.model = model.eval().requires_grad_(False)
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = model.get_input_embeddings().num_embeddings  # type: ignore[union-attr, assignment]
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads, self.head_dim = key_value_shape(config)
        self.max_positions: int = config.max_position_embeddings
        self.feature_layers = feature_layers or default_feature_layers(self.num_layers)
        self.forward_rows: Forward = forward or ModelForward(model)

    @property
    def future_layers(self) -> tuple[int, int, int, int]:
        """The feature layers, and the last one's output: what a future prediction is made of."""
        return (*self.feature_layers, self.num_layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def quantization(self) -> str | None:
        """How the weights are rounded, if they are."""
        return self.forward_rows.quantization

    @property
    def compiled(self) -> bool:
        """Whether forwards over few rows are replayed as CUDA graphs."""
        return isinstance(self.forward_rows, GraphForward)

    @property
    def eos_ids(self) -> frozenset[int]:
        """End-of-sequence ids of the generation config, as `generate` uses them."""
        generation = self.model.generation_config
        ids = generation.eos_token_id if generation is not None else None
        if ids is None:
            ids = self.model.config.get_text_config().eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or [])

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rotary settings for a draft's layer: those of the target's full attention where a Llama layer can follow
        them, else their theta alone (partial or long rotations; targets with other positions)."""
        config: Any = self.model.config.get_text_config()
        found = getattr(config, "rope_parameters", None) or {}
        found = dict(found.get("full_attention", found))
        theta = found.get("rope_theta", 10000.0)
        if found.get("rope_type") not in ROPE_TYPES or found.pop("partial_rotary_factor", 1.0) != 1.0:
            return {"rope_type": "default", "rope_theta": theta}
        return found

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        head: Any = self.model.get_output_embeddings()
        return head.weight

    def embed(self, tokens: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows D"]:
        """The target's input embeddings, shared with the draft."""
        return self.model.get_input_embeddings()(tokens)

    def new_cache(self, batch_size: int, capacity: int, contemplation: Contemplation | None = None) -> KVCache:
        cache = KVCache(
            self.num_layers,
            batch_size,
            self.num_kv_heads,
            capacity,
            self.head_dim,
            dtype=self.dtype,
            device=self.device,
            num_soft=contemplation.soft_keys.shape[2] if contemplation else 0,
        )
        if contemplation:
            cache.write_soft(contemplation.soft_keys[:, None], contemplation.soft_values[:, None])
        return cache

    def prefill(self, cache: KVCache, tokens: Int[Tensor, "B T"], counts: list[int]) -> Float[Tensor, "B T D3"]:
        """Run ordinary tokens behind what the cache holds and keep ``counts[b]`` of them; returns their features.

        Sequences shorter than T are padded at the right with any token.
        """
        most, (batch, num_rows) = self.forward_rows.most_rows, tokens.shape
        width = num_rows if most is None else max(1, most // batch)
        features = []
        for first in range(0, num_rows, width):
            piece = tokens[:, first : first + width]
            features.append(self._causal(cache, piece, num_logits=0)[1])
            cache.advance([min(max(count - first, 0), piece.shape[1]) for count in counts])
        return torch.cat(features, dim=1) if len(features) > 1 else features[0]

    def logits(self, tokens: Int[Tensor, "B T"], last: int) -> Float[Tensor, "B last V"]:
        """Logits (float32) of the ``last`` positions of whole sequences, by themselves and from nothing."""
        batch, length = tokens.shape
        cache = self.new_cache(batch, length)
        if length > last:
            self.prefill(cache, tokens[:, : length - last], [length - last] * batch)
        return self._causal(cache, tokens[:, length - last :], num_logits=last)[0].float()

    def top2_gaps(self, tokens: list[int], last: int) -> list[float]:
        """By how much the target prefers its best next token to the second, at the ``last`` positions of a text."""
        best, second = self.logits(torch.tensor([tokens], device=self.device), last)[0].topk(2).values.unbind(1)
        return (best - second).tolist()

    def _causal(
        self, cache: KVCache, tokens: Int[Tensor, "B T"], *, num_logits: int
    ) -> tuple[Float[Tensor, "B num_logits V"], Float[Tensor, "B T D3"]]:
        """Run tokens behind what the cache holds, each seeing those before it; not kept yet."""
        batch, num_rows = tokens.shape
        cache.open_rows(num_rows)
        mask = None  # an empty cache: plain causal attention, with torch's fast kernels that have no mask
        if max(cache.lengths) > 0 or self.forward_rows.most_rows is not None:
            causal = torch.ones(num_rows, num_rows, dtype=torch.bool, device=self.device).tril()
            mask = cache.row_mask(causal.expand(batch, -1, -1), with_soft=False)
        positions = cache.lengths_tensor()[:, None] + torch.arange(num_rows, device=self.device)
        return self.forward_rows(self.embed(tokens), positions, mask, cache, self.feature_layers, num_logits=num_logits)

    def verify(
        self,
        cache: KVCache,
        tree: Tree,
        contemplation: Contemplation | None = None,
        *,
        num_con: int = 0,
        router_state: Float[Tensor, "B D3"] | None = None,
    ) -> Verified:
        """One forward over the tree and the contemplate rows of its ``num_con`` most probable nodes.

        ``router_state`` is h of the latest accepted token; it chooses the experts of [con].
        """
        num_nodes = tree.tokens.shape[1]
        embeddings = self.embed(tree.tokens)
        if contemplation is None or num_con == 0:
            _, positions, mask = self._rows(cache, tree, 0)
            logits, features = self.forward_rows(
                embeddings, positions, mask, cache, self.feature_layers, num_logits=num_nodes
            )
            return Verified(logits, features, None, None)

        assert router_state is not None
        con_nodes, positions, mask = self._rows(cache, tree, min(num_con, num_nodes))
        con = contemplation.con_rows(router_state[:, None], take(embeddings, con_nodes))
        embeddings = torch.cat([embeddings, con.expand(-1, con_nodes.shape[1], -1)], dim=1)
        logits, states = self.forward_rows(embeddings, positions, mask, cache, self.future_layers, num_logits=num_nodes)
        features = states[:, :num_nodes, : 3 * self.hidden_size]
        return Verified(logits, features, states[:, num_nodes:], con_nodes)

    def _rows(
        self, cache: KVCache, tree: Tree, num_con: int
    ) -> tuple[Int[Tensor, "B C"], Int[Tensor, "B R"], Bool[Tensor, "B R K"]]:
        """Open the rows of nodes and of the ``num_con`` most probable ones' contemplate rows, which alone see soft
        prompts: which nodes these follow, where each row stands, and whom it sees."""
        batch, num_nodes = tree.tokens.shape
        num_rows, last_position = num_nodes + num_con, self.max_positions - 1
        cache.open_rows(num_rows, with_soft=num_con > 0)
        if (lay_out := on_host("lay_out_rows", 7, 6, tree.scores)) is not None:
            sizes = batch, num_nodes, num_con, cache.num_soft_keys, max(cache.lengths)
            con_nodes, positions = tree.depths.new_empty(batch, num_con), tree.depths.new_empty(batch, num_rows)
            mask = tree.ancestors.new_empty(batch, num_rows, sum(sizes[1:]))
            tensors = tree.ancestors, tree.scores, tree.depths, cache.lengths_tensor(), con_nodes, positions, mask
            held = [tensor.contiguous() for tensor in tensors]
            lay_out(*map(Tensor.data_ptr, held), *sizes, last_position)
            return con_nodes, positions, mask
        # Nodes past the end of the context can never be emitted; they only must not break position tables.
        positions = (cache.lengths_tensor()[:, None] + tree.depths).clamp(max=last_position)
        con_nodes = tree.most_probable(num_con)
        if num_con == 0:
            return con_nodes, positions, cache.row_mask(tree.ancestors, with_soft=False)
        con_positions = (positions.gather(1, con_nodes) + 1).clamp(max=last_position)
        rows = tree_rows_mask(tree.ancestors, con_nodes)
        is_con = torch.arange(num_rows, device=self.device).expand(batch, -1) >= num_nodes
        return con_nodes, torch.cat([positions, con_positions], dim=1), cache.row_mask(rows, with_soft=is_con)

    def teach(
        self, tokens: Int[Tensor, "B T"], cache: KVCache | None
    ) -> tuple[Float[Tensor, "B T D3"], Float[Tensor, "B T D"]]:
        """Training: features and final states of whole sequences, without gradient; fills an empty ``cache``."""
        layers = self.future_layers
        if cache is not None:
            cache.open_rows(tokens.shape[1])
        with torch.no_grad(), any_shape(tokens.device):
            out = self.model(
                input_ids=tokens,
                past_key_values=cache,
                use_cache=cache is not None,
                output_hidden_states=list(layers),
                logits_to_keep=torch.arange(0, device=tokens.device),
            )
        if cache is not None:
            cache.advance([tokens.shape[1]] * len(tokens))
        *features, final = (out.hidden_states[layer] for layer in layers)
        return torch.cat(features, dim=-1), final

    def head_over(self, token_ids: Int[Tensor, " U"]) -> Callable[[Float[Tensor, "R D"]], Float[Tensor, "R U"]]:
        """What gives the logits of these tokens only, from final states."""
        head: Any = self.model.get_output_embeddings()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        weight, bias = head.weight[token_ids], head.bias[token_ids] if head.bias is not None else None

        @torch.no_grad()
        def logits_of(final: Float[Tensor, "R D"]) -> Float[Tensor, "R U"]:
            logits = torch.nn.functional.linear(final, weight, bias)
            return cap * torch.tanh(logits / cap) if cap else logits

        return logits_of

    @torch.no_grad()
    def check_head(self) -> None:
        """Raise ValueError when the model does more to its logits than `head_over`, which teaches drafts, knows of."""
        out = self.model(
            input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device),
            use_cache=False,
            output_hidden_states=[self.num_layers],
        )
        theirs = out.logits[0].float()
        ours = self.head_over(torch.arange(theirs.shape[1], device=self.device))(out.hidden_states[self.num_layers][0])
        if not torch.allclose(ours.float(), theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item()):
            raise ValueError(
                f"{type(self.model).__name__} scales its logits in a way that training does not know; it can be "
                "decoded with, but no draft can be trained for it."
            )


def key_value_shape(config: Any) -> tuple[int, int]:
    """Key-value heads of a layer and the width of one, by a model's text configuration."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, width


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """Inputs of layers 2, L//2 and L-3 (METHOD 3; index into HF ``output_hidden_states``)."""
    if num_layers < 6:
        raise ValueError(
            f"The target has {num_layers} layers; EAGLE-3's three feature layers 2, L//2, L-3 need at least 6. "
            "Name three layers with feature_layers."
        )
    return 2, num_layers // 2, num_layers - 3


def _refuse_unsupported(model: PreTrainedModel, config: Any) -> None:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; only decoder-only models can be a target.")
    if getattr(model, "_is_stateful", False):
        raise ValueError(f"{name} keeps a recurrent state, which cannot branch as a tree does; use another target.")
    if odd := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"{name} has layers of type {', '.join(odd)}; only full and sliding attention can read a tree at once."
        )
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{name} keeps compressed keys and values (kv_lora_rank), which this cache has no place for.")
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(f"{name} shares keys and values between layers, which this cache has no place for.")
    if len(devices := set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            f"{name} is spread over devices {', '.join(sorted(map(str, devices)))}, but the cache lies on one; load it "
            "onto one device."
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} takes no position_ids; a tree needs explicit positions for its nodes.")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"{name} is loaded with attention {config._attn_implementation!r}, which takes no tree mask; "
            "load it with attn_implementation='sdpa' or 'eager'."
        )
