"""Where a run's draft comes from: a new EAGLE-3 draft, a trained one to go on from, or ConFu around a trained one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from confu.config import DraftConfig, TrainConfig
from confu.contemplate import Mixture
from confu.data.corpus import Corpus, check_vocabulary
from confu.draft import DraftModel
from confu.drafter import check_fit
from confu.models import draft_path
from confu.target import Target
from confu.training.evaluate import read_prompts
from confu.training.parallel import whole
from confu.training.track import import_tracker


def check_needs(config: TrainConfig) -> None:
    """Raises ValueError when the tracker's package or the evaluation's prompts are missing; takes no time."""
    if config.track is not None:
        import_tracker(config.track)
    if config.evaluate_every and config.eval_prompts is not None:
        read_prompts(Path(config.eval_prompts))


def start_draft(config: TrainConfig, target: Target, corpus: Corpus) -> DraftModel:
    """A new EAGLE-3 draft, a trained one to go on from, or ConFu weights around a trained EAGLE-3 draft."""
    target.check_head()
    if config.init is None:
        return new_eagle3(config, target, corpus)
    source = DraftModel.load(draft_path(config.init))
    check_fit(source.config, target)
    if not config.keep_vocabulary:
        check_vocabulary(source, corpus)
    if config.method == source.config.method:
        if source.contemplation is not None:  # l is how it is trained, not what it is
            source.config = dataclasses.replace(source.config, replication=config.replication)
        return source
    if config.method == "eagle3":
        raise ValueError(f"{config.init} is a {source.config.method} draft; an eagle3 run starts from an eagle3 draft.")
    return add_contemplation(source, config, target, corpus)


def overruled(config: TrainConfig, draft: DraftModel) -> list[str]:
    """A sentence when the draft that a run goes on from has other sizes than the recipe says: the draft's count."""
    if draft.contemplation is None:
        return []
    names = ("num_soft_prompts", "num_experts", "top_experts", "future_form", "router")
    differing = [name for name in names if getattr(config, name) != getattr(draft.config, name)]
    said = ", ".join(f"{name} {getattr(draft.config, name)} (not {getattr(config, name)})" for name in differing)
    return [f"The draft to go on from keeps its {said}."] if said else []


def new_eagle3(config: TrainConfig, target: Target, corpus: Corpus) -> DraftModel:
    """An untrained draft: vocabulary by frequency (ties by id), head and final norm from the target's."""
    config_of_draft = eagle3_config(config, target, corpus.fingerprint)
    counts = corpus.token_counts(target.vocab_size)
    order = torch.sort(counts, descending=True, stable=True).indices
    ids = order[: config_of_draft.draft_vocab_size].sort().values
    draft = DraftModel(config_of_draft)
    with torch.no_grad():
        draft.set_vocabulary(ids)
        draft.lm_head.weight.copy_(target.head_weight[ids])
    _start_from_last_layer(draft, target)
    return draft


def eagle3_config(config: TrainConfig, target: Target, fingerprint: str = "") -> DraftConfig:
    """Sizes of a new draft: the target's own, but for the vocabulary."""
    text_config: Any = target.model.config.get_text_config()
    return DraftConfig(
        method="eagle3",
        target=config.target,
        hidden_size=target.hidden_size,
        intermediate_size=text_config.intermediate_size,
        num_attention_heads=text_config.num_attention_heads,
        num_key_value_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(config.draft_vocab_size, target.vocab_size),
        num_target_layers=target.num_layers,
        feature_layers=target.feature_layers,
        max_position_embeddings=target.max_positions,
        rope_parameters=target.rope_parameters,
        rms_norm_eps=getattr(text_config, "rms_norm_eps", 1e-5),
        vocabulary_fingerprint=fingerprint,
    )


def confu_config(config: TrainConfig, source: DraftConfig) -> DraftConfig:
    """Sizes of ConFu around an EAGLE-3 draft."""
    return dataclasses.replace(
        source,
        method="confu",
        num_soft_prompts=config.num_soft_prompts,
        num_experts=config.num_experts,
        top_experts=config.top_experts,
        replication=config.replication,
        future_form=config.future_form,
        router=config.router,
        future_steps=config.ttt_steps if config.future_form == "head" else 0,
    )


@torch.no_grad()
def _start_from_last_layer(draft: DraftModel, target: Target) -> None:
    """Start as the target's last layer reading the high feature: the same loss in half the steps (docs/log.md).

    Weights that the family names or shapes otherwise keep their random start.
    """
    decoder: Any = target.model.get_decoder()
    width = target.hidden_size
    draft.fc.weight.mul_(0.1)
    draft.fc.weight[:, 2 * width :] += torch.eye(width)
    theirs = {name: whole(weight) for name, weight in decoder.layers[-1].named_parameters()}
    for name, module in decoder.layers[-1].named_modules():
        if name.endswith("norm"):
            theirs[f"{name}.weight"] = _factor(module)
    if "pre_feedforward_layernorm.weight" in theirs:  # Gemma norms on both sides; this one stands before the MLP
        theirs["post_attention_layernorm.weight"] = theirs["pre_feedforward_layernorm.weight"]
    theirs["hidden_norm.weight"] = theirs.pop("input_layernorm.weight", torch.empty(0))
    for name, weight in draft.midlayer.named_parameters():
        part = weight[:, width:] if name.split(".")[1] in ("q_proj", "k_proj", "v_proj") else weight
        if name in theirs and theirs[name].shape == part.shape:
            part.copy_(theirs[name])
    if getattr(decoder, "norm", None) is not None and decoder.norm.weight.shape == draft.norm.weight.shape:
        draft.norm.weight.copy_(_factor(decoder.norm))


def _factor(norm: torch.nn.Module) -> Tensor:
    """What a norm multiplies by; some families (Gemma) store it less one."""
    weight = whole(norm.get_parameter("weight"))
    signs = torch.ones_like(weight)
    signs[1::2] = -1  # of mean 0 and mean square 1
    result = torch.func.functional_call(norm, {"weight": weight}, (signs,))
    return weight + (result * signs - weight).mean().round()


def add_contemplation(source: DraftModel, config: TrainConfig, target: Target, corpus: Corpus) -> DraftModel:
    """ConFu around a trained EAGLE-3 draft: soft prompts start as the target's keys and values of real tokens, experts
    as embeddings of real tokens plus small noise (METHOD 4)."""
    draft = DraftModel(confu_config(config, source.config))
    _copy_eagle3(source, draft)  # the new weights are set below
    generator = torch.Generator().manual_seed(config.seed)
    frequent = corpus.token_counts(target.vocab_size).argsort(descending=True, stable=True)[:1000]
    assert draft.contemplation is not None
    with torch.no_grad():
        if count := config.num_soft_prompts:
            cache, answer = target.new_cache(1, count), corpus.documents[0]
            tokens = answer.tokens[answer.spans > 0].repeat(count)[:count]
            target.prefill(cache, tokens[None].to(target.device), [count])
            draft.contemplation.soft_keys.copy_(cache.keys[:, 0])
            draft.contemplation.soft_values.copy_(cache.values[:, 0])
        for mixture in (m for m in draft.contemplation.modules() if isinstance(m, Mixture)):
            picked = frequent[torch.randperm(len(frequent), generator=generator)[: config.num_experts]]
            experts = target.embed(picked.to(target.device)).float().cpu()
            noise = torch.randn(experts.shape, generator=generator) * 0.1 * experts.std()
            mixture.experts.copy_(experts + noise)
        if config.future_form == "head":  # the first step's head begins by adding a little of the final state
            width = target.hidden_size
            draft.contemplation.future_heads[0, :, 2 * width :] = 0.3 * torch.eye(width)
    return draft


@torch.no_grad()
def _copy_eagle3(source: DraftModel, draft: DraftModel) -> None:
    """Every EAGLE-3 weight; columns that read the third input start at zero."""
    ours = draft.state_dict()
    for name, weight in source.state_dict().items():
        if ours[name].shape == weight.shape:
            ours[name].copy_(weight)
        else:
            ours[name].zero_()[:, : weight.shape[1]] = weight
