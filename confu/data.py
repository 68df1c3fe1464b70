"""Training conversations: chat JSONL to token ids with the assistant's spans, and batches of similar length.

Spans are found by rendering prefixes of the conversation with the tokenizer's own chat template, never by searching
for header strings. A conversation that cannot be rendered so is skipped and counted by reason.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Document:
    """One conversation: token ids and, for each token, the number of its assistant span (0: not supervised)."""

    tokens: Int[Tensor, " T"]
    spans: Int[Tensor, " T"]


@dataclass(frozen=True)
class Corpus:
    """Tokenised conversations of the given files, with what was skipped and why."""

    documents: list[Document]
    skipped: Counter[str]
    fingerprint: str
    """SHA-256 of the files' bytes."""

    def token_counts(self, vocab_size: int) -> Int[Tensor, " V"]:
        """How often each token is supervised."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for document in self.documents:
            counts += torch.bincount(document.tokens[document.spans > 0], minlength=vocab_size)
        return counts


@dataclass(frozen=True)
class Batch:
    """Documents padded at the right to the longest; padding has span 0."""

    tokens: Int[Tensor, "B T"]
    spans: Int[Tensor, "B T"]
    lengths: list[int]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), self.spans.to(device), self.lengths)


def read_corpus(
    files: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Corpus:
    """Tokenise chat JSONL files. Raises ValueError for a file that is missing or not JSONL, or when nothing is left."""
    documents, skipped, digest = [], Counter(), hashlib.sha256()
    for done, name in enumerate(files):
        content = _read(Path(name))
        digest.update(content.encode())
        lines = content.split("\n")  # not splitlines(): JSON strings may hold other line separators
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            if number % 200 == 0:
                progress((done + number / len(lines)) / len(files))
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}, line {number + 1} is not JSON: {error}.") from None
            document = tokenize_row(row, tokenizer, max_length=max_length)
            if isinstance(document, str):
                skipped[document] += 1
            else:
                documents.append(document)
    if not documents:
        raise ValueError(f"No conversation of {', '.join(files)} could be used: {dict(skipped)}.")
    return Corpus(documents, skipped, digest.hexdigest())


def tokenize_row(row: Any, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Document | str:
    """Tokens and spans of one row (``messages``, or ``prompt`` and ``response``), or the reason to skip it.

    An answer cut off by a length limit (``finish_reason`` "length") is supervised up to its last token, since the
    end-of-turn token after it is the template's and not the target's.
    """
    messages = _messages(row)
    if messages is None:
        return "no messages, or prompt and response"
    try:
        return _tokenize(row, messages, tokenizer, max_length=max_length)
    except TemplateError:
        return "chat template refuses it"


def _tokenize(
    row: dict[str, Any], messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Document | str:
    tokens: list[int] = []
    spans: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:turn], generation=True)
        whole = _render(tokenizer, messages[: turn + 1], generation=False)
        if prompt[: len(tokens)] != tokens or whole[: len(prompt)] != prompt:
            return "template does not extend its own prefix"
        answer = tokenizer.encode(message["content"], add_special_tokens=False)
        end = len(prompt) + len(answer)
        if whole[len(prompt) : end] != answer:
            return "answer is tokenised differently inside the template"
        cut_off = turn == len(messages) - 1 and row.get("finish_reason") == "length"
        if not cut_off and end < len(whole):
            end += 1  # the end-of-turn token is the target's own
        number = max(spans, default=0) + 1
        spans += [0] * (len(prompt) - len(spans)) + [number] * (end - len(prompt))
        tokens = whole[:end]
    tokens, spans = tokens[:max_length], spans[:max_length]
    if not any(a == b > 0 for a, b in pairwise(spans)):
        return "no assistant tokens within max_length"
    return Document(torch.tensor(tokens), torch.tensor(spans))


def batches(documents: list[Document], *, batch_tokens: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Endless batches of at most ``batch_tokens`` padded tokens, a new order every epoch, from batch ``start`` on.

    A document longer than ``batch_tokens`` is a batch of its own.

    The order depends on ``seed`` alone, so a resumed run sees the batches it would have seen.
    """
    epoch, seen = 0, 0
    while True:
        plan = _epoch_plan(documents, batch_tokens, torch.Generator().manual_seed(seed * 100_003 + epoch))
        for members in plan[max(0, start - seen) :]:
            yield collate([documents[i] for i in members])
        seen += len(plan)
        epoch += 1


def collate(documents: list[Document]) -> Batch:
    lengths = [len(d.tokens) for d in documents]
    tokens = torch.zeros(len(documents), max(lengths), dtype=torch.int64)
    spans = torch.zeros_like(tokens)
    for i, (document, length) in enumerate(zip(documents, lengths, strict=True)):
        tokens[i, :length], spans[i, :length] = document.tokens, document.spans
    return Batch(tokens, spans, lengths)


def _epoch_plan(documents: list[Document], batch_tokens: int, generator: torch.Generator) -> list[list[int]]:
    """Shuffle, sort windows of the shuffled order by length, cut them into batches, shuffle the batches."""
    order = torch.randperm(len(documents), generator=generator).tolist()
    plan: list[list[int]] = []
    for first in range(0, len(order), 256):
        window = sorted(order[first : first + 256], key=lambda i: len(documents[i].tokens))
        batch: list[int] = []
        for i in window:  # lengths ascend, so document i decides the padded width
            if batch and len(documents[i].tokens) * (len(batch) + 1) > batch_tokens:
                plan.append(batch)
                batch = []
            batch.append(i)
        plan.append(batch)
    return [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"No data file at {path} ({error.strerror}); give the path of a chat JSONL file.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; give a chat JSONL file in UTF-8.") from None


def _messages(row: Any) -> list[dict[str, str]] | None:
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        return None
    return messages


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, generation: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    return tokenizer.encode(str(text), add_special_tokens=False)
