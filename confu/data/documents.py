"""Conversations as token ids with the assistant's spans.

Spans are found by rendering prefixes of the conversation with the tokenizer's own chat template, never by searching
for header strings. A conversation that cannot be rendered so is skipped and counted by reason.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from confu.data.rows import LONE_SURROGATE, Message, Rows, has_lone_surrogate, messages_of


@dataclass(frozen=True)
class Document:
    """One conversation: token ids and, for each token, the number of its assistant span (0: not supervised)."""

    tokens: Int[Tensor, " T"]
    spans: Int[Tensor, " T"]


def read_documents(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, skipped: Counter[str]
) -> Iterator[Document]:
    """Tokenise rows one by one; what cannot be used is counted in ``skipped``.

    At the end, raises ValueError when nothing, or every token, was supervised.
    """
    if not tokenizer.chat_template:
        raise ValueError("The target's tokenizer has no chat template; training data needs a target that has one.")
    num_tokens = num_supervised = 0
    for _, row in rows:
        document = tokenize_row(row, tokenizer, max_length=max_length)
        if isinstance(document, str):
            skipped[document] += 1
            continue
        num_tokens += len(document.tokens)
        num_supervised += int((document.spans > 0).sum())
        yield document
    names = ", ".join(rows.sources)
    if num_supervised == 0:
        why = dict(skipped) or "it holds no row"
        raise ValueError(
            f"No conversation of {names} could be used: {why}; give rows whose answers the target's chat "
            "template renders as they are."
        )
    if num_supervised == num_tokens:
        raise ValueError(
            f"All {num_tokens} tokens of {names} are supervised: the prompts are empty (a file of completions?), "
            "or the target's chat template leaves them out; give whole conversations, or a chat model's target."
        )


def tokenize_row(row: Any, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Document | str:
    """Tokens and spans of one row (``messages``, or ``prompt`` and ``response``), or the reason to skip it.

    An answer cut off by a length limit (``finish_reason`` "length") is supervised up to its last token, since the
    end-of-turn token after it is the template's and not the target's.
    """
    messages = messages_of(row)
    if messages is None:
        return "no messages, or prompt and response"
    if has_lone_surrogate(row):
        return LONE_SURROGATE
    try:
        return _tokenize(row, messages, tokenizer, max_length=max_length)
    except TemplateError:
        return "chat template refuses it"


def _tokenize(
    row: dict[str, Any], messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Document | str:
    tokens: list[int] = []
    spans: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            return "answer before any prompt"
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


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, generation: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    return tokenizer.encode(str(text), add_special_tokens=False)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that turns a conversation into ids: vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for passing in ("padding", "truncation"):  # left by the last call
        rules.pop(passing, None)
    said = [rules, tokenizer.chat_template, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
