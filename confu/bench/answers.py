"""One method's answers and what each cost: the measured side of a benchmark, the same for every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from confu.config import SamplingConfig
from confu.generate import Decoder, Result
from confu.memory import forget_peak, peak_bytes
from confu.stats import Stats
from confu.verify import Sampler

AT_ONCE = 32  # positions whose distributions over the vocabulary are held in float64 together


@dataclass(frozen=True)
class Answer:
    """One answer. In a batch, seconds are the batch's divided by its answers, so that sums are right."""

    token_ids: list[int]
    wall_seconds: float
    """From the prompt's token ids to the last token: prefill, drafts and verification included, tokenizing not."""
    prefill_seconds: float = 0.0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    round_lengths: list[int] = field(default_factory=list)
    """Tokens that each round added; empty where an engine does not tell."""
    round_accepted: list[int] = field(default_factory=list)
    """Drafted tokens among them."""
    peak_bytes: int | None = None
    """Most memory while it ran: of the device, or of the whole process on a CPU. None where a peer does not tell."""
    pieces: list[dict[str, Any]] = field(default_factory=list)
    """Text of every token, whether it was drafted, and what was drafted in its place."""


@runtime_checkable
class Engine(Protocol):
    """Whoever answers: this package's decoder, or a peer in a process of its own."""

    def answer(self, prompts: Sequence[list[int]], sampling: SamplingConfig) -> list[Answer]:
        """Answers to prompts (token ids) decoded as one batch."""


class DecoderEngine:
    """This package's decoder. Every call reads its whole prompt, as every peer does."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def answer(self, prompts: Sequence[list[int]], sampling: SamplingConfig) -> list[Answer]:
        stats, device = Stats(), self.decoder.target.device
        forget_peak(device)
        results = self.decoder.generate(prompts, sampling, stats=stats)
        peak, size = peak_bytes(device), len(results)
        return [
            Answer(
                result.token_ids,
                wall_seconds=stats.wall_seconds / size,
                prefill_seconds=stats.prefill_seconds / size,
                target_seconds=stats.target_seconds / size,
                draft_seconds=stats.draft_seconds / size,
                round_lengths=stats.round_lengths[row],
                round_accepted=stats.round_accepted[row],
                peak_bytes=peak,
                pieces=self._pieces(result),
            )
            for row, result in enumerate(results)
        ]

    def _pieces(self, result: Result) -> list[dict[str, Any]]:
        tokenizer = self.decoder.tokenizer
        assert tokenizer is not None
        return [
            {"text": token.text, "drafted": token.from_draft, "rejected": str(tokenizer.decode(list(token.rejected)))}
            for token in result.tokens
        ]

    @torch.inference_mode()
    def top2_gaps(self, prompt: list[int], answer: list[int]) -> list[float]:
        """By how much the plain target prefers its best token to the second, at every position of an answer."""
        return _rounded(self.decoder.target.top2_gaps(prompt + answer[:-1], len(answer)))

    @torch.inference_mode()
    def margins(self, prompt: list[int], answer: list[int], sampling: SamplingConfig) -> list[float]:
        """How surely the plain target drew every token of an answer to this one prompt (`Sampler.margins`)."""
        target, sampler = self.decoder.target, Sampler(sampling, num_sequences=1)
        logits = target.logits(torch.tensor([prompt + answer[:-1]], device=target.device), len(answer))
        drawn = torch.tensor([answer], device=target.device)
        pieces = zip(logits.split(AT_ONCE, dim=1), drawn.split(AT_ONCE, dim=1), strict=True)
        return _rounded([margin for piece in pieces for margin in sampler.margins(*piece)])


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [float(f"{number:.4g}") for number in numbers]
