"""Read an EAGLE-3 draft that another tool trained: official, SpecForge, speculators, ModelOpt, or made for an engine.

Whatever the layer of `confu.draft` cannot express, and whatever is missing, foreign or damaged, is refused with a
sentence; no key and no flag is dropped silently. Nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from confu.config import DraftConfig
from confu.draft import DraftModel, is_vocabulary, read_settings
from confu.formats import LAYER, LAYER_IDS, OTHER_LAYER, WEIGHTS, refuse_filled
from confu.models import Progress, draft_path, load_target_config, load_target_model
from confu.target import ROPE_TYPES, default_feature_layers, key_value_shape

LayerIds = Literal["inputs", "outputs"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYER_SETTINGS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
)
EXPRESSED = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}
"""Settings that change the arithmetic, at which it is that of METHOD 3; absent ones are."""
IDLE_KEYS = ("midlayer.self_attn.rotary_emb.inv_freq", "verifier_lm_head.weight", "verifier_norm.weight")
"""Tensors that some versions store and that follow from the settings or the target."""


@dataclass(frozen=True)
class Imported:
    """A draft read from another tool's files."""

    draft: DraftModel
    format: str
    """``eagle``, ``specforge``, ``speculators``, ``modelopt`` or ``vllm``."""
    dtype: torch.dtype
    """Type of the stored weights."""
    notes: tuple[str, ...]
    """What a reader of the files may not expect, a sentence each."""
    source: str

    def save(self, out: Path) -> None:
        """Write the draft into the new folder ``out``, weights bit for bit, and where it came from."""
        refuse_filled(out)
        self.draft.save(out, dtype=self.dtype)
        origin = {"imported_from": self.source, "format": self.format, "notes": list(self.notes)}
        (out / "provenance.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def import_draft(
    source: str, *, target: str, layer_ids: LayerIds | None = None, progress: Progress | None = None
) -> Imported:
    """The draft in ``source``, a folder or Hub id, for ``target``.

    ``layer_ids`` says how the file counts the target's layers where its format's own convention cannot be right. The
    target's weights are read only where the file leaves the head to them or brings an embedding to compare.

    Raises ValueError with one sentence for what cannot be read or expressed, ModelUnavailable for what cannot be had.
    """
    folder = draft_path(source)
    values = read_settings(folder)
    form = _format_of(values, folder)
    layer = values.get("transformer_layer_config", values)
    weights = _read_weights(folder)
    _refuse_variants(values, layer, weights, folder)
    theirs = load_target_config(target, progress=progress)
    notes: list[str] = []

    config = _draft_config(values, layer, theirs, target, form, layer_ids, notes, folder)
    target_ids = _vocabulary(weights, config, folder)
    kinds = {weight.dtype for weight in weights.values()}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    if "embed_tokens.weight" in weights or "lm_head.weight" not in weights:
        _settle_shared(weights, layer, target, target_ids, dtype, notes, folder, progress)
    elif layer.get("tie_word_embeddings"):
        notes.append("The settings tie the head to the embedding, but the file holds a head of its own, which is used.")

    draft = DraftModel(config)
    draft.set_vocabulary(target_ids)
    expected = draft.state_dict()
    _check_weights(weights, expected, folder)
    draft.load_state_dict({name: weights[name] if name in WEIGHTS else expected[name] for name in expected})
    return Imported(draft.eval(), form, dtype, tuple(notes), source)


# ---------------------------------------------------------------- files


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors by this package's names, safetensors before pickles."""
    paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        run = " (a SpecForge run: export it to safetensors first)" if (folder / "training_state.pt").exists() else ""
        raise ValueError(f"{folder} holds no model.safetensors and no pytorch_model.bin{run}; give a draft's folder.")
    weights: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in _read_file(path).items():
            name = name.removeprefix("model.")
            if name.startswith(OTHER_LAYER):
                name = LAYER + name.removeprefix(OTHER_LAYER)
            if name in weights:
                raise ValueError(f"{path} holds {name} twice, under different prefixes; copy or export it again.")
            if name not in IDLE_KEYS:
                weights[name] = tensor
    if odd := sorted({str(w.dtype) for w in weights.values() if w.is_floating_point()} - set(map(str, DTYPES))):
        kinds = ", ".join(odd).replace("torch.", "")
        raise ValueError(f"{folder} holds weights of type {kinds}; float32, bfloat16 and float16 can be imported.")
    broken = next((n for n, w in weights.items() if w.is_floating_point() and not torch.isfinite(w).all()), None)
    if broken:
        raise ValueError(f"{paths[0]}: {broken} holds NaN or infinite values; copy or export it again.")
    return weights


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is a pickle that holds more than tensors, or is damaged; opening it could run code, so it is not "
            "opened: ask for safetensors."
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason.rstrip('.')}); copy it again.") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} is not a dictionary of tensors; give a draft's weights.")
    return found


# ---------------------------------------------------------------- settings


def _format_of(values: dict[str, Any], folder: Path) -> str:
    """Which tool wrote the settings."""
    if "method" in values and "feature_layers" in values:
        raise ValueError(f"{folder} is a draft of this package already; use it as it is.")
    if "transformer_layer_config" in values:
        kind = values.get("speculators_model_type")
        if kind != "eagle3":
            raise ValueError(f"{folder} is a speculator of type {kind!r}; only eagle3 can be imported.")
        return "speculators"
    if "hidden_size" not in values or "vocab_size" not in values:
        raise ValueError(f"{folder}/config.json has no hidden_size and vocab_size; give an EAGLE-3 draft's folder.")
    if LAYER_IDS in values:
        return "vllm"
    inner = values.get("eagle_config") or {}
    if "use_last_layernorm" in inner:
        return "modelopt"
    named = " ".join(values.get("architectures") or ())
    return "specforge" if inner or "Eagle3" in named else "eagle"


def _refuse_variants(values: dict[str, Any], layer: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> None:
    """Refuse flags that our layer has no arithmetic for, then tensors that it has no place for."""
    if values is not layer and "norm_before_residual" not in values:
        raise ValueError(
            f"{folder}/config.json does not say norm_before_residual, whose default differs between tools; add it."
        )
    flags = _flags(values, layer)
    for name, ours in EXPRESSED.items():
        if flags.get(name) not in (None, ours):
            raise ValueError(
                f"{folder} has {name} = {flags[name]!r}, which this package's EAGLE-3 layer cannot express (it "
                f"computes {name} = {ours!r}); train a draft instead."
            )
    known = {*WEIGHTS, "d2t", "t2d", "embed_tokens.weight"}
    if foreign := sorted(weights.keys() - known):
        raise ValueError(
            f"{folder} holds {', '.join(foreign[:3])}{' ...' if len(foreign) > 3 else ''}, which an EAGLE-3 draft of "
            "one Llama layer has no place for; train a draft instead."
        )


def _flags(values: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """Settings wherever a tool may have put them: the layer's, the top level, ``eagle_config``; the last one wins."""
    return layer | values | (values.get("eagle_config") or {})


def _draft_config(
    values: dict[str, Any],
    layer: dict[str, Any],
    theirs: Any,
    target: str,
    form: str,
    layer_ids: LayerIds | None,
    notes: list[str],
    folder: Path,
) -> DraftConfig:
    from transformers import LlamaConfig

    # Every tool reads the settings by this class: what they leave out is its default, never the target's value.
    ours: Any = LlamaConfig(**{name: layer[name] for name in LAYER_SETTINGS if name in layer})
    text: Any = theirs.get_text_config()
    for what, draft_has, target_has in (
        ("hidden width", ours.hidden_size, text.hidden_size),
        ("target width", values.get("target_hidden_size") or text.hidden_size, text.hidden_size),
        ("vocabulary", ours.vocab_size, text.vocab_size),
    ):
        if draft_has != target_has:
            raise ValueError(
                f"{folder} has {what} {draft_has}, but target {target} has {target_has}; name the draft's own target."
            )
    rope = {key: value for key, value in sorted(ours.rope_parameters.items()) if key != "type"}
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"{folder} scales rotary embeddings by {rope['rope_type']!r}; this package knows {', '.join(ROPE_TYPES)}."
        )
    if not {"rope_theta", "rope_parameters"} & layer.keys():
        notes.append(f"The settings give no rope_theta: {rope['rope_theta']:g}, as their tools take it.")
    if layer.get("sliding_window") and layer.get("use_sliding_window", True):
        notes.append(
            f"The draft was made for a sliding window of {layer['sliding_window']} tokens; here it sees the whole "
            "context."
        )
    heads, width = key_value_shape(text)
    return DraftConfig(
        method="eagle3",
        target=target,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        head_dim=ours.head_dim,
        target_key_value_heads=heads if heads != ours.num_key_value_heads else None,
        target_head_dim=width if width != ours.head_dim else None,
        vocab_size=ours.vocab_size,
        draft_vocab_size=values.get("draft_vocab_size") or ours.vocab_size,
        num_target_layers=text.num_hidden_layers,
        feature_layers=_feature_layers(values, form, text.num_hidden_layers, layer_ids, folder),
        # Only dynamic scaling depends on it. Elsewhere a published 2048 would wrongly read as the context.
        max_position_embeddings=(
            ours.max_position_embeddings if rope["rope_type"] == "dynamic" else text.max_position_embeddings
        ),
        rope_parameters=rope,
        rms_norm_eps=ours.rms_norm_eps,
        norm_before_residual=bool(_flags(values, layer).get("norm_before_residual")),
    )


def _feature_layers(
    values: dict[str, Any], form: str, num_layers: int, layer_ids: LayerIds | None, folder: Path
) -> tuple[int, int, int]:
    """The captured layers, counted by their inputs."""
    inner = (values.get("eagle_config") or {}).get(LAYER_IDS)
    stored = values.get(LAYER_IDS) or inner
    if stored is None:
        if layer_ids:
            raise ValueError(f"{folder}/config.json names no layers of the target; leave out layer_ids.")
        return default_feature_layers(num_layers)
    if len(stored) != 3:
        raise ValueError(f"{folder} reads {len(stored)} layers of the target ({stored}); EAGLE-3 reads three.")
    convention = layer_ids or ("inputs" if form in ("vllm", "speculators") else "outputs")
    inputs = [i + (convention == "outputs") for i in stored]
    usual = default_feature_layers(num_layers) if num_layers >= 6 else None
    slip = 1 if convention == "outputs" else -1
    if layer_ids is None and usual == tuple(i - slip for i in inputs):
        raise ValueError(
            f"{folder} names the target's layers {stored}, which are EAGLE-3's own when counted by their "
            f"{'inputs' if convention == 'outputs' else 'outputs'}, but its format counts {convention}; say which is "
            "right with layer_ids."
        )
    if not all(0 <= i < num_layers for i in inputs):
        raise ValueError(f"{folder} reads layers {stored} by their {convention}, but the target has {num_layers}.")
    return inputs[0], inputs[1], inputs[2]


# ---------------------------------------------------------------- weights


def _vocabulary(weights: dict[str, Tensor], config: DraftConfig, folder: Path) -> Int[Tensor, " U"]:
    """Target ids of the draft vocabulary, from ``d2t`` (offsets), checked against ``t2d`` where there is one."""
    offsets, mask = weights.pop("d2t", None), weights.pop("t2d", None)
    ids = torch.arange(config.draft_vocab_size)
    if offsets is None:
        if config.draft_vocab_size != config.vocab_size:
            raise ValueError(
                f"{folder} drafts {config.draft_vocab_size} of {config.vocab_size} tokens, but holds no d2t that says "
                "which; copy or export it again."
            )
    elif offsets.shape != ids.shape or offsets.is_floating_point():
        raise ValueError(f"{folder}: d2t is {offsets.dtype} {tuple(offsets.shape)}, not {len(ids)} whole numbers.")
    else:
        ids = ids + offsets.long()
    if not is_vocabulary(ids, config.vocab_size):
        raise ValueError(
            f"{folder}: d2t is no map of offsets into {config.vocab_size} tokens (target id = draft id + offset)."
        )
    if mask is not None and mask.bool().nonzero()[:, 0].tolist() != ids.sort().values.tolist():
        raise ValueError(f"{folder}: t2d marks other tokens than d2t maps to; copy or export it again.")
    return ids


def _settle_shared(
    weights: dict[str, Tensor],
    layer: dict[str, Any],
    target: str,
    target_ids: Int[Tensor, " U"],
    dtype: torch.dtype,
    notes: list[str],
    folder: Path,
    progress: Progress | None,
) -> None:
    """Compare an embedding with the target's, which drafts share, and take an absent head from the target."""
    model, _ = load_target_model(target, dtype=dtype, device="cpu", progress=progress)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    own = weights.pop("embed_tokens.weight", None)
    if own is not None and not _agree(own, embedding.weight):
        raise ValueError(
            f"{folder} holds an embedding that is not that of target {target}; a draft of this package shares its "
            "target's: name the draft's own target, or train a draft."
        )
    if "lm_head.weight" not in weights:
        tied = layer.get("tie_word_embeddings", False)
        weights["lm_head.weight"] = (embedding if tied else head).weight[target_ids].clone()
        notes.append(f"The file holds no head: it is the target's {'embedding' if tied else 'head'}.")


def _agree(a: Tensor, b: Tensor) -> bool:
    """Equal but for one rounding to bfloat16."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-6)


def _check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    if missing := [name for name in WEIGHTS if name not in weights]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; copy or export it again.")
    for name in WEIGHTS:
        if weights[name].shape != expected[name].shape:
            raise ValueError(
                f"{folder}: {name} is {tuple(weights[name].shape)}, but config.json asks for "
                f"{tuple(expected[name].shape)}."
            )
