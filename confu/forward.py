"""One forward over rows with explicit positions and a mask, through the model's own code.

It serves every supported architecture, and training. `llama.py` holds a faster one for Llama-like models.

Shapes: B batch, R rows, D hidden width, V vocabulary, K keys.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from confu.attention import any_shape
from confu.cache import KVCache, PrefixCache


@runtime_checkable
class Forward(Protocol):
    """What `Target` runs its rows through."""

    quantization: str | None
    most_rows: int | None
    """Of all sequences together, as many of a prompt's rows as are best read at a time; None: all of them."""

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
        """Logits of the first ``num_logits`` rows, and the states of all rows as they enter ``layers``, side
        by side (the number of layers: the final states). Keys and values go into ``cache``. Without a mask, rows attend
        causally to each other, and the cache is empty."""
        ...


class ModelForward:
    """The model as transformers runs it. Layers of sliding attention get a mask of their own.

    ``quantization`` only says what was done to the model's linear layers.
    """

    def __init__(self, model: PreTrainedModel, quantization: str | None = None) -> None:
        config: Any = model.config.get_text_config()
        self.model, self.quantization = model, quantization
        self.most_rows: int | None = None
        self.window, self.has_full_layers = _sliding_window(config)
        self.eager = config._attn_implementation == "eager"

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
        with any_shape(embeddings.device):
            out = self.model(
                inputs_embeds=embeddings,
                position_ids=positions,
                attention_mask=self._attention_mask(mask, cache) if mask is not None else None,
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=list(layers),
                logits_to_keep=torch.arange(num_logits, device=embeddings.device),
            )
        return out.logits, torch.cat([out.hidden_states[layer] for layer in layers], dim=-1)

    def _attention_mask(self, mask: Bool[Tensor, "B R K"], cache: KVCache | PrefixCache) -> Tensor | dict[str, Tensor]:
        """The mask as the model takes it: one tensor, or one for each kind of its layers."""
        full = self._as_attended(mask)
        if self.window is None:
            return full
        sliding = self._as_attended(within_window(mask, self.window, cache.num_soft_keys))
        return {"full_attention": full, "sliding_attention": sliding} if self.has_full_layers else sliding

    def _as_attended(self, mask: Bool[Tensor, "B R K"]) -> Tensor:
        mask = mask[:, None]
        if not self.eager:
            return mask
        # Eager attention adds its mask.
        dtype = self.model.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def within_window(mask: Bool[Tensor, "B R K"], window: int, num_soft: int) -> Bool[Tensor, "B R K"]:
    """What a layer of sliding attention leaves of a mask: the last ``window`` of the tokens that a row sees, and all of
    the ``num_soft`` soft prompts before them. A row sees one key for each position, in order."""
    tokens = mask[..., num_soft:]
    near = tokens.flip(-1).cumsum(-1).flip(-1) <= window
    return torch.cat([mask[..., :num_soft], tokens & near], dim=-1)


def _sliding_window(config: Any) -> tuple[int | None, bool]:
    """The window of the layers that have one, and whether others see everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    if window is None or window >= config.max_position_embeddings or "sliding_attention" not in kinds:
        return None, True
    return window, "full_attention" in kinds
