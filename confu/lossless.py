"""Is the output the target's? Two checks against the plain model, run through Hugging Face's own code.

The plain model is a second copy, since a decoder's own target may have given its weights up to a faster forward.
Greedy answers must be the same token for token; sampled ones must follow the target's distribution, which is
enumerated exactly for a few tokens and compared by a chi-square test.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from confu.bench.equality import ROUNDING_GAP, SMALLEST_P
from confu.config import SamplingConfig
from confu.generate import Decoder
from confu.linear import pack_linears
from confu.load import encode_prompt, encode_raw
from confu.models import Progress, load_target_model
from confu.stats import Stats
from confu.terminal.view import first_difference


def _silent(stage: str, fraction: float | None) -> None: ...


PROMPTS = Path(__file__).parent / "prompts.jsonl"
SAMPLED_PROMPT = "Once there was a"
TOP_K, SAMPLED_TOKENS = 3, 3
COPIES = 64  # of the prompt in one batch
MOST_SAMPLING = {"nodes": 6, "depth": 2, "topk": 3}  # of their trees


@dataclass(frozen=True)
class GreedyCheck:
    """One prompt, greedy, engine against plain model."""

    name: str
    num_tokens: int
    mean_acceptance_length: float
    first_difference: int | None
    """Position of the first token that differs."""
    logit_gap: float | None
    """There, by how much the plain model prefers its best token to the second."""

    @property
    def result(self) -> str:
        if self.first_difference is None:
            return "identical"
        return "rounding tie" if self.logit_gap is not None and self.logit_gap <= ROUNDING_GAP else "different"


@dataclass(frozen=True)
class SamplingCheck:
    """Chi-square test of sampled continuations against the enumerated distribution."""

    samples: int
    cells: int
    """Continuations compared; those expected fewer than 5 times are pooled into one."""
    strays: int
    """Samples that the target could not have drawn."""
    chi_square: float
    p_value: float

    @property
    def result(self) -> str:
        return "same distribution" if self.strays == 0 and self.p_value >= SMALLEST_P else "different"


@dataclass(frozen=True)
class Report:
    greedy: list[GreedyCheck]
    sampling: SamplingCheck

    @property
    def lossless(self) -> bool:
        return self.sampling.result != "different" and all(check.result != "different" for check in self.greedy)

    def as_dict(self) -> dict[str, Any]:
        return {
            "lossless": self.lossless,
            "greedy": [dataclasses.asdict(check) | {"result": check.result} for check in self.greedy],
            "sampling": dataclasses.asdict(self.sampling) | {"result": self.sampling.result},
        }


def load_oracle(decoder: Decoder, target: str, quantization: str | None, progress: Progress) -> PreTrainedModel:
    """The target once more, as transformers runs it; quantised, its linear layers alone are exchanged."""
    model, _ = load_target_model(
        target, dtype=decoder.target.dtype, device=str(decoder.target.device), progress=progress
    )
    if quantization is not None:
        pack_linears(model, quantization)
    return model


def verify_lossless(
    decoder: Decoder, model: PreTrainedModel, *, max_new_tokens: int, samples: int, progress: Progress = _silent
) -> Report:
    """Both checks on the built-in prompts against ``model``; the decoder should compute in float32."""
    assert decoder.tokenizer is not None
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    texts = {row["name"]: row["prompt"] for row in rows}
    prompts = {name: encode_prompt(decoder.tokenizer, text) for name, text in texts.items()}
    progress("greedy: the plain model", None)
    plain = _plain_greedy(model, decoder, list(prompts.values()), max_new_tokens)
    checks = []
    for (name, prompt), theirs in zip(prompts.items(), plain, strict=True):
        progress(f"greedy: {name}", len(checks) / len(prompts))
        checks.append(check_greedy(decoder, model, name, prompt, theirs, max_new_tokens))
    prompt = encode_raw(decoder.tokenizer, SAMPLED_PROMPT)
    return Report(checks, check_sampling(decoder, model, prompt, samples, progress))


def check_greedy(
    decoder: Decoder, model: PreTrainedModel, name: str, prompt: list[int], theirs: list[int], max_new_tokens: int
) -> GreedyCheck:
    """Compare with ``theirs``, the plain model's answer out of a padded batch. Where that differs, the plain model
    answers once more, alone: padding moves its float32 sums a little."""
    stats = Stats()
    ours = decoder.generate([prompt], SamplingConfig(max_new_tokens=max_new_tokens), stats=stats)[0].token_ids
    if first_difference(ours, theirs) is not None:
        theirs = _plain_greedy(model, decoder, [prompt], max_new_tokens)[0]
    at, gap = first_difference(ours, theirs), None
    if at is not None:
        best, second = _plain_logits(model, [[*prompt, *theirs[:at]]])[0].topk(2).values.tolist()
        gap = best - second
    return GreedyCheck(name, len(ours), stats.mean_acceptance_length, at, gap)


def check_sampling(
    decoder: Decoder, model: PreTrainedModel, prompt: list[int], samples: int, progress: Progress = _silent
) -> SamplingCheck:
    """Many copies of one prompt, each with its own seed, through the batched engine, by the decoder's tree or a smaller
    one. (Sized by costs, trees of so large a batch would be none.)"""
    small = {name: min(getattr(decoder.tree, name), most) for name, most in MOST_SAMPLING.items()}
    tree = dataclasses.replace(decoder.tree, **small)
    engine = Decoder(decoder.target, decoder.drafter, decoder.tokenizer, tree)
    observed: Counter[tuple[int, ...]] = Counter()
    for first in range(0, samples, COPIES):
        progress("sampling", first / samples)
        sampling = SamplingConfig(
            max_new_tokens=SAMPLED_TOKENS, temperature=1.0, top_k=TOP_K, seed=first, ignore_eos=True
        )
        results = engine.generate([prompt] * min(COPIES, samples - first), sampling)
        observed.update(tuple(result.token_ids) for result in results)
    expected = {cell: p * samples for cell, p in enumerate_cells(model, prompt).items()}
    strays = sum(count for cell, count in observed.items() if cell not in expected)
    num_cells, chi_square, p_value = chi_square_test(observed, expected)
    return SamplingCheck(samples, num_cells, strays, chi_square, p_value)


def enumerate_cells(model: PreTrainedModel, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Probability of every continuation under temperature 1 and top-k, as a product over plain forwards."""
    cells: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(SAMPLED_TOKENS):
        best = _plain_logits(model, [[*prompt, *cell] for cell in cells]).double().topk(TOP_K)
        probs = best.values.softmax(dim=-1).tolist()
        cells = {
            (*cell, token): p * q
            for (cell, p), tokens, row in zip(cells.items(), best.indices.tolist(), probs, strict=True)
            for token, q in zip(tokens, row, strict=True)
        }
    return cells


def chi_square_test(
    observed: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]
) -> tuple[int, float, float]:
    """Cells after pooling, the statistic and its p-value. Cells expected fewer than 5 times are pooled into one."""
    pairs = sorted(((mean, observed[cell]) for cell, mean in expected.items()), reverse=True)
    large = [pair for pair in pairs if pair[0] >= 5]
    rest = pairs[len(large) :]
    pooled = (sum(mean for mean, _ in rest), sum(count for _, count in rest))
    if rest and (pooled[0] >= 5 or not large):
        large.append(pooled)
    elif rest:
        large[-1] = (large[-1][0] + pooled[0], large[-1][1] + pooled[1])
    chi_square = sum((count - mean) ** 2 / mean for mean, count in large)
    freedom = torch.tensor((len(large) - 1) / 2, dtype=torch.float64)
    if freedom == 0:  # one certain continuation: nothing to test beyond strays
        return 1, chi_square, 1.0
    p_value = torch.special.gammaincc(freedom, torch.tensor(chi_square / 2, dtype=torch.float64)).item()
    return len(large), chi_square, p_value


@torch.inference_mode()
def _plain_greedy(
    model: PreTrainedModel, decoder: Decoder, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """The independent oracle: the model's own `generate`, without whatever sampling its folder asks for."""
    target = decoder.target
    width = max(map(len, prompts))
    eos_ids = sorted(target.eos_ids)
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, target.max_positions - width),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=eos_ids or None,
        pad_token_id=0,
    )
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=target.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=target.device)
    generate: Any = model.generate
    answers = generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    # What comes after a sequence's end is padding.
    ends = [next((i + 1 for i, token in enumerate(answer) if token in eos_ids), len(answer)) for answer in answers]
    return [answer[:end] for answer, end in zip(answers, ends, strict=True)]


@torch.inference_mode()
def _plain_logits(model: PreTrainedModel, sequences: list[list[int]]) -> torch.Tensor:
    """Next-token logits of equally long sequences, float32."""
    ids = torch.tensor(sequences, device=model.device)
    return torch.cat([model(chunk, logits_to_keep=1).logits[:, -1].float() for chunk in ids.split(COPIES)])
