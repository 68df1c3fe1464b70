"""The draft network: one EAGLE-3 decoder layer (METHOD 3), and for ConFu the contemplation weights (METHOD 4).

This file is arithmetic on rows only, as training needs it; who attends to whom is decided by `training/objective.py`.
Decoding lays the same weights out anew (`draft_forward.py`).

Shapes: B batch, R rows, D hidden width, U draft vocabulary, V target vocabulary, H query heads, G key-value heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from confu.config import DraftConfig, from_dict, to_json
from confu.contemplate import Contemplation


class Norm(nn.Module):
    """RMS norm in float32, as Llama computes it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Projections of the draft's attention; queries, keys and values read rows of width 2D, or 3D with f as input."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        row = 3 * width if config.future_is("input") else 2 * width
        self.q_proj = nn.Linear(row, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(row, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(row, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)


class Mlp(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """The one decoder layer; names are those of EAGLE-3 checkpoints."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Norm(width, eps)
        self.hidden_norm = Norm(width, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(width, eps)
        self.mlp = Mlp(config)
        if config.future_is("input"):
            self.future_norm = Norm(width, eps)


class DraftModel(nn.Module):
    """EAGLE-3 draft; with ``config.method == "confu"`` it also owns the target-side and draft-side future weights.

    The future prediction f of an anchor is the low, mid, high and final state of its contemplate row. It enters in one
    of four forms (METHOD 4 and 8, docs/training.md). ``row`` and ``kv`` give every row that the anchor serves one more
    key and value: those of a row (expert embedding, W_fc of low to high), or projected from mid to final. ``input``
    and ``head`` read mid to final, each normed, and keep them over the draft's steps: as a third input of queries, keys
    and values, or added to what the head reads: by W_j where it predicts the token j places behind the first that f
    knows nothing of but f itself, x[a+2]. Zero f in these two is EAGLE-3.

    Token embeddings are the target's and are passed in. ``d2t`` is an offset: target id = draft id + d2t[draft id].
    """

    d2t: Int[Tensor, " U"]
    t2d: Tensor

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = Layer(config)
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.contemplation = Contemplation(config) if config.method == "confu" else None
        self._rotary = (_rotary(config),)  # in a tuple: .to(bfloat16) must not round its frequencies

    @property
    def rotary(self) -> nn.Module:
        """cos and sin of positions, in the type of what is to be turned."""
        return self._rotary[0].to(self.norm.weight.device)

    def fuse(self, features: Float[Tensor, "... D3"]) -> Float[Tensor, "... D"]:
        """g = W_fc h: target features to draft width. Never applied to the draft's own recycled state."""
        return self.fc(features)

    def third_input(self, future: Float[Tensor, "... D4"] | None) -> Float[Tensor, "... D"] | None:
        """W_f f of the rows that f serves (0 where it serves none); None but in form ``input``."""
        if future is None or self.contemplation is None or not self.config.future_is("input"):
            return None
        return self.contemplation.future_fc(normed_states(future, self.config.rms_norm_eps))

    def look(self, future: Float[Tensor, "... D4"] | None) -> Float[Tensor, "... SD"] | None:
        """All W_j f side by side, of the rows that f serves (0 where it serves none); None but in form ``head``."""
        if future is None or self.contemplation is None or not self.config.future_is("head"):
            return None
        states = normed_states(future, self.config.rms_norm_eps)
        return nn.functional.linear(states, self.contemplation.future_heads.flatten(0, 1))

    def row(
        self,
        embedding: Float[Tensor, "... D"],
        hidden: Float[Tensor, "... D"],
        third: Float[Tensor, "... D"] | None = None,
    ) -> Float[Tensor, "... Dn"]:
        """Input of the attention projections: normed embedding first, normed hidden second, in form ``input`` the
        normed W_f f third (zero when there is none)."""
        layer = self.midlayer
        parts = [layer.input_layernorm(embedding), layer.hidden_norm(hidden)]
        if self.config.future_is("input"):
            none = torch.zeros_like(parts[1])
            parts.append(none if third is None else layer.future_norm(third).expand_as(none))
        return torch.cat(parts, dim=-1)

    def queries(self, row: Float[Tensor, "B R Dn"], positions: Int[Tensor, "B R"]) -> Float[Tensor, "B H R head"]:
        return self._rotate(self._heads(self.midlayer.self_attn.q_proj(row)), positions)

    def keys_values(
        self, row: Float[Tensor, "B R Dn"], positions: Int[Tensor, "B R"]
    ) -> tuple[Float[Tensor, "B G R head"], Float[Tensor, "B G R head"]]:
        attention = self.midlayer.self_attn
        return self._rotate(self._heads(attention.k_proj(row)), positions), self._heads(attention.v_proj(row))

    def future_slot(
        self, future: Float[Tensor, "B R D4"], states: Float[Tensor, "B R D"], anchors: Int[Tensor, "B R"]
    ) -> tuple[Float[Tensor, "B G R head"], Float[Tensor, "B G R head"]]:
        """Keys and values that f adds, at the position one past its anchor. ``row``: experts routed by g of the anchor
        token (``states``) and W_fc f, through the layer's projections; ``kv``: projected from f."""
        assert self.contemplation is not None
        if self.config.future_is("kv"):
            keys, values = self._heads(self.contemplation.future_kv(future[..., self.config.hidden_size :])).chunk(2, 1)
            return self._rotate(keys, anchors + 1), values
        row = self.row(
            self.contemplation.future(states).to(states.dtype), self.fuse(future[..., : -self.config.hidden_size])
        )
        return self.keys_values(row, anchors + 1)

    def finish(self, hidden: Float[Tensor, "B R D"], attended: Float[Tensor, "B H R head"]) -> Float[Tensor, "B R D"]:
        """Rest of the layer after attention. The residual is the un-normed ``hidden``, unless the config says
        otherwise; the result is recycled as is."""
        layer = self.midlayer
        if self.config.norm_before_residual:
            hidden = layer.hidden_norm(hidden)
        hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def read(
        self, out: Float[Tensor, "B R D"], looked: Float[Tensor, "B Rf SD"] | None, steps: Int[Tensor, "B R"]
    ) -> Float[Tensor, "B R D"]:
        """What the head reads of the layer's output: norm(out), plus W_j f in form ``head``. ``steps`` is j: steps
        since the row, and rows since the anchor of its f; the last W serves all that lie further on."""
        normed = self.norm(out)
        if looked is None:
            return normed
        by_place = looked.unflatten(-1, (self.config.future_steps, -1)).expand(-1, out.shape[1], -1, -1)  # [B, R, S, D]
        index = steps.clamp(max=self.config.future_steps - 1)[..., None, None]
        return normed + by_place.gather(2, index.expand(-1, -1, 1, out.shape[2]))[:, :, 0]

    def set_vocabulary(self, token_ids: Int[Tensor, " U"]) -> None:
        """Take these target ids, sorted ascending, as the draft vocabulary."""
        self.d2t.copy_(token_ids - torch.arange(len(token_ids), device=token_ids.device))
        self.t2d.zero_()
        self.t2d[token_ids] = True

    def target_ids(self) -> Int[Tensor, " U"]:
        """The target id of every draft id."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def _rotate(self, x: Float[Tensor, "B heads R head"], positions: Int[Tensor, "B R"]) -> Tensor:
        cos, sin = self.rotary(x, positions)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        left, right = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)

    def save(self, folder: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write ``config.json`` and ``model.safetensors`` (floating-point weights in ``dtype``)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(to_json(self.config), encoding="utf-8")
        tensors = {
            name: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
            for name, value in self.state_dict().items()
        }
        path = folder / "model.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes it for the owner alone

    @classmethod
    def load(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> DraftModel:
        """Read a draft folder; every key must be there, with its shape, and finite.

        Raises ValueError with one sentence for a missing, corrupt, partial or foreign file.
        """
        folder = Path(folder)
        config = load_draft_config(folder)
        model = cls(config)
        path = folder / "model.safetensors"
        try:
            weights = load_file(path)
        except FileNotFoundError:
            raise ValueError(f"No model.safetensors in {folder}; give the folder of a trained draft.") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}); copy or train it again.") from None
        expected = model.state_dict()
        _check_keys(weights, expected, path)
        if any(not torch.isfinite(w).all() for w in weights.values() if w.is_floating_point()):
            raise ValueError(f"{path} holds NaN or infinite weights; copy or train it again.")
        model.load_state_dict(weights)
        ids = model.target_ids()
        if not is_vocabulary(ids, config.vocab_size):
            raise ValueError(
                f"{path}: d2t maps to no {len(ids)} different tokens of {config.vocab_size}; copy or train it again."
            )
        return model.to(device=device, dtype=dtype).eval()


def is_vocabulary(ids: Int[Tensor, " U"], vocab_size: int) -> bool:
    """Whether these are different tokens of a target."""
    return len(ids.unique()) == len(ids) and int(ids.min()) >= 0 and int(ids.max()) < vocab_size


def normed_states(future: Float[Tensor, "... D4"], eps: float) -> Float[Tensor, "... D3"]:
    """Mid, high and final state of f, each divided by its root mean square."""
    states = future.unflatten(-1, (4, -1))[..., 1:, :].float()
    states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)
    return states.flatten(-2).to(future.dtype)


def stored_dtype(folder: Path) -> torch.dtype:
    """Floating-point type of a draft's weights on disk."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.get_tensor("norm.weight").dtype


def load_draft_config(folder: str | Path) -> DraftConfig:
    """Read and check a draft's ``config.json``; ValueError with one sentence when it is missing or wrong."""
    return from_dict(DraftConfig, read_settings(folder), source=str(Path(folder) / "config.json"))


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What the ``config.json`` of a draft's folder holds, of whatever tool; ValueError when that is no JSON object."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"No config.json in {folder}; give the folder of a trained draft.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not a JSON object of settings.")
    return values


def _check_keys(weights: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not hold this draft: missing {missing or 'nothing'}, unknown {extra or 'nothing'}."
        )
    for name, value in expected.items():
        if weights[name].shape != value.shape:
            raise ValueError(
                f"{path}: {name} is {tuple(weights[name].shape)}, but config.json asks for {tuple(value.shape)}."
            )


def _rotary(config: DraftConfig) -> nn.Module:
    """The target family's own rotary embedding, so that scaled variants (llama3, yarn, linear) come for free."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
    )
