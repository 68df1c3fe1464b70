"""The training loop: EAGLE-3 from scratch, ConFu from a trained EAGLE-3 draft (METHOD 4).

A run folder holds config.json, metrics.jsonl, checkpoint.pt (weights, optimiser, step) and, at the end, final/ (the
draft) with provenance.json. Data order and anchors depend on seed and step alone, so a resumed run is the same run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from confu.config import DraftConfig, TrainConfig, to_json
from confu.contemplate import Mixture
from confu.data import Corpus, batches, read_corpus
from confu.draft import DraftModel
from confu.drafter import check_fit
from confu.models import draft_path
from confu.objective import Losses, losses
from confu.target import Target

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Report:
    """One logged interval of a run."""

    step: int
    loss: float
    kl: list[float]
    accuracy: list[float]
    tokens_per_second: float
    """Supervised tokens per second of wall time."""
    tokens_seen: int


def train(
    config: TrainConfig,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    *,
    resume: bool = False,
    on_report: Callable[[Report], None] = lambda report: None,
    progress: Progress = lambda stage, fraction: None,
) -> Path:
    """Run a recipe to its end; returns the folder of the trained draft.

    Raises ValueError for unusable data or settings, RuntimeError naming step and batch when the loss is not finite.
    """
    out = Path(config.out)
    state = _resume_state(out, config, resume)
    _reuse_freed_memory()
    torch.manual_seed(config.seed)

    # 1. data
    corpus = read_corpus(
        config.data,
        tokenizer,
        max_length=config.max_length,
        progress=lambda fraction: progress("tokenising", fraction),
    )
    # 2. draft
    draft = _start_draft(config, target, corpus).to(target.device)
    optimizer = torch.optim.AdamW(_parameter_groups(draft, config), betas=(0.9, 0.95), weight_decay=0.0)
    done, tokens_seen = 0, 0
    window: list[Losses] = []  # since the last report
    if state is not None:
        draft.load_state_dict(state["draft"])
        optimizer.load_state_dict(state["optimizer"])
        done, tokens_seen = state["step"], state["tokens_seen"]
        window = [Losses(*values) for values in state["window"]]
    origin = provenance(config, corpus)  # now: the checkout may change while the run goes on
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(to_json(config), encoding="utf-8")
    metrics = _open_metrics(out / "metrics.jsonl", done)

    # 3. loop
    started = time.perf_counter()
    data = batches(corpus.documents, batch_tokens=config.batch_tokens, seed=config.seed, start=done)
    draft.train()
    try:
        for step in range(done, config.steps):
            _set_learning_rates(optimizer, config, step)
            with _Uninterrupted():
                window.append(_step(draft, target, optimizer, config, step, next(data)))
                tokens_seen += window[-1].num_supervised
                done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                seconds = time.perf_counter() - started
                report = _summary(window, done, tokens_seen, seconds)
                window, started = [], time.perf_counter()
                metrics.write(json.dumps(dataclasses.asdict(report)) + "\n")
                metrics.flush()
                on_report(report)
            if done % config.checkpoint_every == 0 and done < config.steps:
                _checkpoint(out, draft, optimizer, done, tokens_seen, window)
    except KeyboardInterrupt:
        _checkpoint(out, draft, optimizer, done, tokens_seen, window)
        raise
    finally:
        metrics.close()

    # 4. the draft
    final = out / "final"
    draft.eval().save(final)
    (final / "provenance.json").write_text(
        json.dumps(origin | {"supervised_tokens_seen": tokens_seen}, indent=2) + "\n", encoding="utf-8"
    )
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return final


def _step(
    draft: DraftModel, target: Target, optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, batch: Any
) -> Losses:
    autocast = torch.autocast(target.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    with autocast:
        result = losses(
            draft,
            target,
            batch.to(target.device),
            ttt_steps=config.ttt_steps,
            step_decay=config.step_decay,
            max_router_lag=config.max_router_lag,
            generator=torch.Generator().manual_seed(config.seed * 1_000_003 + step),
        )
    if not torch.isfinite(result.total):
        raise RuntimeError(
            f"The loss is {result.total.item()} at step {step} (batch of {len(batch.lengths)} conversations, lengths "
            f"{min(batch.lengths)} to {max(batch.lengths)}); lower the learning rates or look at that data."
        )
    optimizer.zero_grad(set_to_none=True)
    result.total.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], config.clip)
    optimizer.step()
    return dataclasses.replace(result, total=result.total.detach())


def _start_draft(config: TrainConfig, target: Target, corpus: Corpus) -> DraftModel:
    """A new EAGLE-3 draft, a trained one to go on from, or ConFu weights around a trained EAGLE-3 draft."""
    target.check_head()
    if config.init is None:
        return new_eagle3(config, target, corpus)
    source = DraftModel.load(draft_path(config.init))
    check_fit(source.config, target)
    if config.method == source.config.method:
        return source
    if config.method == "eagle3":
        raise ValueError(f"{config.init} is a {source.config.method} draft; an eagle3 run starts from an eagle3 draft.")
    return add_contemplation(source, config, target, corpus)


def new_eagle3(config: TrainConfig, target: Target, corpus: Corpus) -> DraftModel:
    """An untrained draft: vocabulary by frequency (ties by id), head and final norm from the target's."""
    text_config: Any = target.model.config.get_text_config()
    counts = corpus.token_counts(target.vocab_size)
    size = min(config.draft_vocab_size, target.vocab_size)
    order = torch.sort(counts, descending=True, stable=True).indices
    ids = order[:size].sort().values
    draft = DraftModel(
        DraftConfig(
            method="eagle3",
            target=config.target,
            hidden_size=target.hidden_size,
            intermediate_size=text_config.intermediate_size,
            num_attention_heads=text_config.num_attention_heads,
            num_key_value_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            vocab_size=target.vocab_size,
            draft_vocab_size=size,
            num_target_layers=target.num_layers,
            feature_layers=target.feature_layers,
            max_position_embeddings=target.max_positions,
            rope_parameters=target.rope_parameters,
            rms_norm_eps=getattr(text_config, "rms_norm_eps", 1e-5),
            vocabulary_fingerprint=corpus.fingerprint,
        )
    )
    with torch.no_grad():
        draft.set_vocabulary(ids)
        draft.lm_head.weight.copy_(target.head_weight[ids])
    _start_from_last_layer(draft, target)
    return draft


@torch.no_grad()
def _start_from_last_layer(draft: DraftModel, target: Target) -> None:
    """Start as the target's last layer reading the high feature: the same loss in half the steps (docs/log.md).

    Weights that the family names or shapes otherwise keep their random start.
    """
    decoder: Any = target.model.get_decoder()
    width = target.hidden_size
    draft.fc.weight.mul_(0.1)
    draft.fc.weight[:, 2 * width :] += torch.eye(width)
    theirs: dict[str, Tensor] = dict(decoder.layers[-1].named_parameters())
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
    weight: Any = norm.weight
    signs = torch.ones_like(weight)
    signs[1::2] = -1  # of mean 0 and mean square 1
    return weight + (norm(signs) * signs - weight).mean().round()


def add_contemplation(source: DraftModel, config: TrainConfig, target: Target, corpus: Corpus) -> DraftModel:
    """ConFu around a trained EAGLE-3 draft: soft prompts start as the target's keys and values of real tokens, experts
    as embeddings of real tokens plus small noise (METHOD 4)."""
    draft = DraftModel(
        dataclasses.replace(
            source.config,
            method="confu",
            num_soft_prompts=config.num_soft_prompts,
            num_experts=config.num_experts,
            top_experts=config.top_experts,
            replication=config.replication,
            future_form=config.future_form,
            future_steps=config.ttt_steps if config.future_form == "head" else 0,
        )
    )
    _copy_eagle3(source, draft)  # the new weights are set below
    generator = torch.Generator().manual_seed(config.seed)
    frequent = corpus.token_counts(target.vocab_size).argsort(descending=True, stable=True)[:1000]
    assert draft.contemplation is not None
    with torch.no_grad():
        cache = target.new_cache(1, config.num_soft_prompts)
        answer = corpus.documents[0]
        tokens = answer.tokens[answer.spans > 0].repeat(config.num_soft_prompts)[: config.num_soft_prompts]
        target.prefill(cache, tokens[None].to(target.device), [config.num_soft_prompts])
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


def _parameter_groups(draft: DraftModel, config: TrainConfig) -> list[dict[str, Any]]:
    prompts, experts, rest = [], [], []
    for name, parameter in draft.named_parameters():
        if name.startswith("contemplation.soft"):
            prompts.append(parameter)
        elif name.startswith(("contemplation.con", "contemplation.future.")):
            experts.append(parameter)
        else:
            rest.append(parameter)
    groups = [(rest, config.lr), (prompts, config.lr_prompts), (experts, config.lr_experts)]
    return [{"params": params, "lr": lr, "peak": lr} for params, lr in groups if params]


def _set_learning_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """Linear warm-up, then a cosine from the peak to a tenth of it."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        scale = (step + 1) / warmup
    else:
        done = (step - warmup) / max(1, config.steps - warmup)
        scale = 0.1 + 0.45 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def _reuse_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning them to the kernel: page faults took half of a step."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        import ctypes

        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX: never mmap; M_TRIM_THRESHOLD: never trim
            libc.mallopt(option, value)


def _summary(window: list[Losses], step: int, tokens_seen: int, seconds: float) -> Report:
    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean(0)

    return Report(
        step,
        mean([w.total for w in window]).item(),
        [round(x, 4) for x in mean([w.kl for w in window]).tolist()],
        [round(x, 4) for x in mean([w.accuracy for w in window]).tolist()],
        sum(w.num_supervised for w in window) / seconds,
        tokens_seen,
    )


class _Uninterrupted:
    """Ctrl-C waits for the end of the step, so that a checkpoint never holds half an update."""

    def __enter__(self) -> None:
        self.requested = False
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.previous = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *error: object) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.previous)
        if self.requested:
            raise KeyboardInterrupt

    def _note(self, *_: object) -> None:
        self.requested = True


def _checkpoint(
    out: Path,
    draft: DraftModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    tokens_seen: int,
    window: list[Losses],
) -> None:
    state = {
        "draft": draft.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "tokens_seen": tokens_seen,
        "window": [(w.total, w.kl, w.accuracy, w.num_supervised) for w in window],
    }
    partial = out / "checkpoint.tmp"
    torch.save(state, partial)
    partial.replace(out / "checkpoint.pt")


def _resume_state(out: Path, config: TrainConfig, resume: bool) -> dict[str, Any] | None:
    path = out / "checkpoint.pt"
    if not resume:
        # A run that ended before its first checkpoint left nothing to go on from, nor to lose.
        if path.exists() or (out / "final").exists():
            raise ValueError(f"{out} already holds a run; go on with --resume, or choose another out folder.")
        return None
    if not path.exists():
        raise ValueError(f"No checkpoint.pt in {out}; there is nothing to resume.")
    if (out / "config.json").read_text(encoding="utf-8") != to_json(config):
        raise ValueError(f"The recipe differs from {out}/config.json; resume with the recipe the run began with.")
    return torch.load(path, weights_only=True)


def _open_metrics(path: Path, first_step: int) -> Any:
    """Append, after dropping the lines of steps that will be done again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # A line cut short by a kill does not end in a brace.
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first_step]
    file = path.open("w", encoding="utf-8")
    file.writelines(line + "\n" for line in kept)
    return file


def provenance(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """What makes a draft: recipe, commit, versions, data hash, seed, amount of data."""
    import transformers

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "data_sha256": corpus.fingerprint,
        "num_documents": len(corpus.documents),
        "skipped": dict(corpus.skipped),
        "recipe": dataclasses.asdict(config),
    }
