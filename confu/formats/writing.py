"""Write a draft's EAGLE-3 part for other tools and engines. Every flag is written out: their defaults differ.

Contemplation stays behind: no engine's EAGLE-3 runs contemplate rows in the target, so an exported ConFu draft is the
EAGLE-3 draft that remains when f is switched off.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from confu.config import DraftConfig
from confu.draft import DraftModel, stored_dtype
from confu.formats import FORMATS, LAYER, LAYER_IDS, OTHER_LAYER, WEIGHTS, refuse_filled
from confu.models import Progress, draft_path, load_target_config, load_target_model, target_path
from confu.target import default_feature_layers

CHAIN = 3
"""Tokens drafted ahead, in the command for an engine that drafts chains."""
EAGLE_TARGETS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM")
"""Targets that the official code has models for."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how to use it."""

    folder: Path
    command: str
    """Serves the target with the exported draft."""
    notes: tuple[str, ...]


def export_draft(draft: str, out: Path, *, to: str, progress: Progress | None = None) -> Exported:
    """Write the EAGLE-3 part of ``draft`` into the new folder ``out`` in the format ``to``, weights bit for bit.

    Raises ValueError for an unknown format, a folder that holds something, and what the format cannot say.
    """
    if to not in FORMATS:
        raise ValueError(f"format {to!r} is not known; give one of {', '.join(FORMATS)}.")
    refuse_filled(out)
    source = draft_path(draft)
    model = DraftModel.load(source)
    config = model.config
    dtype = stored_dtype(source)
    tensors = _tensors(model, dtype)
    if config.norm_before_residual and to not in ("speculators", "vllm"):
        raise ValueError(
            f"The draft's residual is the normed hidden state (norm_before_residual), which the format {to} has no "
            "setting for; export to speculators or vllm."
        )
    if to == "eagle":
        _refuse_for_eagle(config, load_target_config(config.target, progress=progress))
        if config.draft_vocab_size == config.vocab_size:  # its loader deletes the map then
            del tensors["d2t"], tensors["t2d"]
    settings = _llama_settings(config, dtype)
    if to == "speculators":
        target, _ = load_target_model(config.target, dtype=dtype, device="cpu", progress=progress)
        embedding: Any = target.get_input_embeddings()
        tensors = {name.replace(LAYER, OTHER_LAYER): tensor for name, tensor in tensors.items()}
        tensors["embed_tokens.weight"] = embedding.weight.detach().clone()
        architectures = list(target.config.architectures or [type(target).__name__])
        settings = _speculators_settings(config, settings, target_path(config.target), architectures)
    else:
        settings = _settings(config, settings, to)

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone
    notes = []
    if config.method == "confu":
        notes.append("This is the EAGLE-3 part of a ConFu draft: contemplation is off there.")
    command = _command(to, target_path(config.target, progress=progress), out)
    return Exported(out, command, tuple(notes))


def _tensors(model: DraftModel, dtype: torch.dtype) -> dict[str, Tensor]:
    state = model.state_dict()
    width = 2 * model.config.hidden_size
    found = {name: state[name].to(dtype) for name in WEIGHTS}
    for part in ("q_proj", "k_proj", "v_proj"):  # a third input, where f enters as one, stays behind
        name = f"{LAYER}self_attn.{part}.weight"
        found[name] = found[name][:, :width].contiguous()
    return found | {"d2t": state["d2t"], "t2d": state["t2d"]}


def _llama_settings(config: DraftConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The one decoder layer, in the words of transformers 4 and 5 at once."""
    rope = dict(config.rope_parameters)
    theta = rope.get("rope_theta", 10000.0)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    kind = scaling.get("rope_type", "default")
    return {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else scaling | {"type": kind},
        "rope_parameters": scaling | {"rope_type": kind, "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _settings(config: DraftConfig, llama: dict[str, Any], to: str) -> dict[str, Any]:
    architecture = "LlamaForCausalLM" if to == "eagle" else "LlamaForCausalLMEagle3"
    flags: dict[str, Any] = {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
    }
    if to == "vllm":
        flags |= {LAYER_IDS: list(config.feature_layers)}
    elif to != "eagle":
        outputs = [layer - 1 for layer in config.feature_layers]
        flags |= {"eagle_config": {LAYER_IDS: outputs, "use_aux_hidden_state": True}}
    return {"architectures": [architecture], **llama, **flags}


def _speculators_settings(
    config: DraftConfig, llama: dict[str, Any], target: str, architectures: list[str]
) -> dict[str, Any]:
    proposal = {"proposal_type": "greedy", "speculative_tokens": CHAIN, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": config.draft_vocab_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "target_hidden_size": None,  # the draft's own width
        LAYER_IDS: list(config.feature_layers),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": llama,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target, "architectures": architectures},
        },
    }


def _refuse_for_eagle(config: DraftConfig, target: Any) -> None:
    """What the official code fixes, it cannot be told otherwise."""
    architecture = (target.architectures or ["an unnamed one"])[0]
    if architecture not in EAGLE_TARGETS:
        raise ValueError(
            f"The official EAGLE code has no model for {architecture}, the target's architecture (it has "
            f"{', '.join(EAGLE_TARGETS)}); export to another format."
        )
    usual = default_feature_layers(config.num_target_layers)
    if config.feature_layers != usual:
        raise ValueError(
            f"The draft reads layers {config.feature_layers}, but the official EAGLE code always reads {usual}; "
            "export to another format."
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "dynamic"):
        raise ValueError(
            f"The draft scales rotary embeddings by {kind!r}, but the official EAGLE code knows only linear and "
            "dynamic scaling; export to another format."
        )


def _command(to: str, target: str, out: Path) -> str:
    place = str(out.resolve())
    if to == "vllm":
        speculation = {"method": "eagle3", "model": place, "num_speculative_tokens": CHAIN}
        words = ["vllm", "serve", target, "--speculative-config", json.dumps(speculation)]
    elif to == "speculators":
        words = ["vllm", "serve", place]
    elif to == "eagle":
        words = ["python", "-m", "eagle.application.webui", "--ea-model-path", place, "--base-model-path", target]
        words += ["--model-type", "llama-3-instruct"]
    else:
        words = ["python", "-m", "sglang.launch_server", "--model-path", target]
        words += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", place]
        words += ["--speculative-num-steps", "6", "--speculative-eagle-topk", "10"]
        words += ["--speculative-num-draft-tokens", "30"]
    return shlex.join(words)
