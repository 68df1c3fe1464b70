"""Training data as batches of similar length, from chat JSONL or from a folder that `confu data prepare` wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from confu.config import TrainConfig
from confu.data.documents import Document, read_documents
from confu.data.rows import Progress, Rows
from confu.data.shards import Shards
from confu.draft import DraftModel


@dataclass(frozen=True)
class Corpus:
    """Tokenised conversations, with what was skipped and why."""

    documents: Sequence[Document]
    """In memory, or memory-mapped from a prepared folder."""
    skipped: Counter[str]
    fingerprint: str
    """SHA-256 of the data that was read (`Rows.fingerprint`), the same whether it was prepared or not."""

    def token_counts(self, vocab_size: int) -> Int[Tensor, " V"]:
        """How often each token is supervised."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        if isinstance(self.documents, Shards):
            counted = self.documents.token_counts
            counts[: len(counted)] = counted
            return counts
        for document in self.documents:
            counts += torch.bincount(document.tokens[document.spans > 0], minlength=vocab_size)
        return counts


def read_corpus(
    files: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    progress: Progress = lambda fraction: None,
) -> Corpus:
    """Tokenise chat JSONL files in memory, or open one prepared folder.

    Raises ValueError for files that are missing or not JSONL, when nothing or every token is supervised, and for a
    folder that is damaged or was prepared for another tokenizer or ``max_length``.
    """
    folder = next((name for name in files if Path(name).is_dir()), None)
    if folder is not None:
        if len(files) > 1:
            raise ValueError(f"{folder} is a folder; give one prepared folder alone, or chat JSONL files.")
        shards = Shards(Path(folder))
        shards.check(tokenizer, max_length=max_length)
        return Corpus(shards, Counter(shards.header.skipped), shards.header.fingerprint)
    rows, skipped = Rows(files, progress), Counter()
    documents = list(read_documents(rows, tokenizer, max_length=max_length, skipped=skipped))
    return Corpus(documents, skipped, rows.fingerprint)


def recipe_corpus(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, progress: Callable[[str, float | None], None]
) -> Corpus:
    """The data that a recipe names."""
    return read_corpus(
        config.data,
        tokenizer,
        max_length=config.max_length,
        progress=lambda fraction: progress("tokenising", fraction),
    )


def check_vocabulary(draft: DraftModel, corpus: Corpus) -> None:
    """Raises ValueError when the draft's vocabulary was counted on other data than this corpus.

    A draft can only propose tokens of its vocabulary, so training goes on silently worse with a stale one.
    """
    counted_on = draft.config.vocabulary_fingerprint
    if counted_on == corpus.fingerprint:
        return
    counts = corpus.token_counts(draft.config.vocab_size)
    size = draft.config.draft_vocab_size
    covered = counts[draft.t2d.cpu()].sum() / counts.sum()
    fresh = counts.sort(descending=True).values[:size].sum() / counts.sum()
    raise ValueError(
        f"The draft's vocabulary was counted on {f'data {counted_on[:12]}' if counted_on else 'unknown data'}, this is "
        f"data {corpus.fingerprint[:12]}: its {size} tokens cover {covered:.1%} of the answers here, freshly counted "
        f"ones {fresh:.1%}; set keep_vocabulary = true to train with them nevertheless, or start a new draft."
    )


@dataclass(frozen=True)
class Batch:
    """Documents padded at the right to the longest; padding has span 0."""

    tokens: Int[Tensor, "B T"]
    spans: Int[Tensor, "B T"]
    lengths: list[int]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), self.spans.to(device), self.lengths)


def collate(documents: list[Document]) -> Batch:
    lengths = [len(d.tokens) for d in documents]
    tokens = torch.zeros(len(documents), max(lengths), dtype=torch.int64)
    spans = torch.zeros_like(tokens)
    for i, (document, length) in enumerate(zip(documents, lengths, strict=True)):
        tokens[i, :length], spans[i, :length] = document.tokens, document.spans
    return Batch(tokens, spans, lengths)


def epoch_plan(documents: Sequence[Document], batch_tokens: int, generator: torch.Generator) -> list[list[int]]:
    """Document numbers of one epoch's batches: shuffle, sort windows of the shuffled order by length, cut them into
    batches of at most ``batch_tokens`` padded tokens (or one longer document), shuffle the batches. Larger batches need
    larger windows, so that conversations of one batch are alike in length."""
    lengths = documents.lengths if isinstance(documents, Shards) else [len(d.tokens) for d in documents]
    order = torch.randperm(len(lengths), generator=generator).tolist()
    plan: list[list[int]] = []
    size = max(256, batch_tokens // 8)
    for first in range(0, len(order), size):
        window = sorted(order[first : first + size], key=lengths.__getitem__)
        batch: list[int] = []
        for i in window:  # lengths ascend, so document i decides the padded width
            if batch and lengths[i] * (len(batch) + 1) > batch_tokens:
                plan.append(batch)
                batch = []
            batch.append(i)
        plan.append(batch)
    return [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]
