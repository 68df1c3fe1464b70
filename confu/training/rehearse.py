"""Training steps that are timed and leave nothing behind: `train --dry-run` on a recipe's own data, and `bench-train`
on synthetic conversations."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from confu.config import TrainConfig
from confu.data.corpus import Corpus, collate, recipe_corpus
from confu.data.documents import Document
from confu.draft import DraftModel, load_draft_config
from confu.memory import peak_bytes, reuse_freed_memory
from confu.models import draft_path, load_target_config
from confu.target import Target
from confu.training.cost import memory_estimate, parameters_by_group, step_flops
from confu.training.features import FeatureStore
from confu.training.optimise import Trainer
from confu.training.schedule import micro_batches_per_epoch, step_plan
from confu.training.start import add_contemplation, confu_config, eagle3_config, new_eagle3, start_draft

TIMED_STEPS = 3
BENCH_STEPS, YARDSTICK_SECONDS = 6, 0.5


@dataclass(frozen=True)
class Throughput:
    """What training on conversations of one length costs on this machine."""

    length: int
    conversations: int
    """In a step."""
    tokens_per_second: float
    supervised_per_second: float
    milliseconds_per_token: float
    gflops_per_token: float
    """Needed matrix products (`confu.cost`), in billions of operations."""
    share_of_matmul: float
    """Their rate over this process's rate in plain matrix products of the same type, taking turns with the steps."""
    peak_bytes: int
    """Most memory of this process so far; on a GPU, of the device since the last length."""


def plan_facts(config: TrainConfig) -> dict[str, Any]:
    """What a recipe's target and draft are like, from their configurations alone: no weights are read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_target_config(config.target))
    target = Target(model.to(getattr(torch, config.dtype)))
    sizes = load_draft_config(draft_path(config.init)) if config.init else eagle3_config(config, target)
    if config.method == "confu" and sizes.method == "eagle3":
        sizes = confu_config(config, sizes)
    with torch.device("meta"):
        draft = DraftModel(sizes)
    return {
        "target": {
            "name": config.target,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "num_layers": target.num_layers,
            "hidden_size": target.hidden_size,
            "vocabulary": target.vocab_size,
            "feature_layers": target.feature_layers,
        },
        "draft": {
            "method": sizes.method,
            "draft_vocabulary": sizes.draft_vocab_size,
            **{f"num_parameters, {name}": count for name, count in parameters_by_group(draft, config).items()},
        },
        "estimated_memory": memory_estimate(target, draft, config),
    }


def measured_facts(
    config: TrainConfig,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Callable[[str, float | None], None] = lambda stage, fraction: None,
) -> dict[str, Any]:
    """The data, and the time of the whole run by that of a few of its steps."""
    reuse_freed_memory()
    torch.manual_seed(config.seed)
    corpus = recipe_corpus(config, tokenizer, progress)
    draft = start_draft(config, target, corpus).to(target.device).train()
    trainer = Trainer(config, target, draft, corpus.documents)
    shape = {"batch_tokens": config.batch_tokens, "seed": config.seed}
    plan = step_plan(corpus.documents, accumulate=config.accumulate, **shape)
    steps = [next(plan) for _ in range(TIMED_STEPS)]
    progress("timing steps", None)
    trainer.step(0, steps[0])  # allocations and kernels are chosen here
    timed = [_timed(trainer, number, members) for number, members in enumerate(steps)]
    seconds = statistics.mean(seconds for seconds, _ in timed)
    steps_per_epoch = micro_batches_per_epoch(corpus.documents, **shape) / config.accumulate
    total, facts = config.steps * seconds, {}
    if config.features == "cache":
        folder = config.feature_store or ""
        store = FeatureStore(folder, corpus, target, name=config.target, max_length=config.max_length)
        facts = {"feature_cache_bytes": store.num_bytes}
        total -= max(0.0, config.steps - steps_per_epoch) * _target_seconds(trainer, steps)
    return {
        "num_documents": len(corpus.documents),
        "skipped": dict(corpus.skipped),
        "num_epochs": round(config.steps / steps_per_epoch, 2),
        **facts,
        "seconds_per_step": round(seconds, 3),
        "supervised_tokens_per_second": round(sum(tokens for _, tokens in timed) / sum(t for t, _ in timed), 1),
        "peak_bytes": peak_bytes(target.device),
        "estimated_hours": round(total / 3600, 2),
    }


def weights_at_hand(target: str) -> bool:
    """Whether a target can be loaded without fetching it."""
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "model.safetensors.index.json")
    return Path(target).is_dir() or any(isinstance(try_to_load_from_cache(target, file), str) for file in files)


def _target_seconds(trainer: Trainer, steps: list[list[list[int]]]) -> float:
    """What the target's forward takes of a step, which a filled cache saves."""
    began = time.perf_counter()
    for members in steps:
        for part in members:
            batch = collate([trainer.documents[i] for i in part]).to(trainer.target.device)
            trainer.target.teach(batch.tokens, None)
    return (time.perf_counter() - began) / len(steps)


def bench(config: TrainConfig, target: Target, lengths: list[int]) -> list[Throughput]:
    """Time steps of ``config.batch_tokens`` tokens in conversations of each length, a quarter of each the prompt."""
    for length in lengths:
        if not 8 <= length <= target.max_positions:
            raise ValueError(f"length {length} is not from 8 to the target's context of {target.max_positions}.")
    reuse_freed_memory()
    found = []
    for length in sorted(lengths):
        torch.manual_seed(config.seed)
        count = max(1, config.batch_tokens // length)
        spans = torch.ones(length, dtype=torch.int64)
        spans[: length // 4] = 0
        documents = [Document(torch.randint(target.vocab_size, (length,)), spans) for _ in range(count)]
        corpus = Corpus(documents, Counter(), "")
        draft = new_eagle3(config, target, corpus)
        if config.method == "confu":
            draft = add_contemplation(draft, config, target, corpus)
        trainer = Trainer(config, target, draft.to(target.device).train(), documents)
        members = [list(range(count))]
        if target.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(target.device)
        trainer.step(0, members)  # allocations and kernels are chosen here
        # What is measured takes turns, and all of it counts: a machine may change its pace within a step.
        seconds = supervised = 0.0
        yardstick = [matmul_seconds(target.dtype, target.device)]
        for number in range(1, BENCH_STEPS + 1):
            took, rows = _timed(trainer, number, members)
            seconds, supervised = seconds + took, supervised + rows
            yardstick.append(matmul_seconds(target.dtype, target.device))
        rate = sum(done for done, _ in yardstick) / sum(took for _, took in yardstick)
        operations = BENCH_STEPS * count * step_flops(target, draft.config, spans, config.ttt_steps).total
        tokens = BENCH_STEPS * count * length
        found.append(
            Throughput(
                length,
                count,
                tokens / seconds,
                supervised / seconds,
                1000 * seconds / tokens,
                operations / tokens / 1e9,
                operations / seconds / rate,
                peak_bytes(target.device),
            )
        )
    return found


def _timed(trainer: Trainer, number: int, members: list[list[int]]) -> tuple[float, int]:
    """Seconds of one step, and its supervised tokens."""
    began = time.perf_counter()
    result = trainer.step(number, members)
    if trainer.target.device.type == "cuda":
        torch.cuda.synchronize(trainer.target.device)
    return time.perf_counter() - began, result.num_supervised


def matmul_seconds(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Operations of plain square matrix products, and the seconds they took, as a yardstick."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    (left @ right)[0, 0].item()  # its kernel is chosen here
    count, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < YARDSTICK_SECONDS:
        (left @ right)[0, 0].item()
        count += 1
    return 2.0 * size**3 * count, took
