"""Rows whose prompts the target is to answer anew: what is said before each answer, and the row that comes of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from confu.config import RegenerateConfig
from confu.data.rows import LONE_SURROGATE, Message, Rows, has_lone_surrogate, messages_of

ROLES = {"system", "user", "assistant"}


@dataclass(frozen=True)
class Conversation:
    """A row to be answered."""

    id: str
    row: dict[str, Any]
    turns: list[list[Message]]
    """What is said before each answer."""
    temperature: float

    @property
    def num_characters(self) -> int:
        return sum(len(message["content"]) for turn in self.turns for message in turn)


@dataclass(frozen=True)
class Answer:
    """The target's answer to one turn."""

    text: str
    finish_reason: str
    """How it ended: "stop" (by itself) or "length"."""
    num_tokens: int
    seed: int


Outcome = list[Answer] | str
"""A conversation's answers, or the reason why there are none."""


def read_conversations(rows: Rows, config: RegenerateConfig) -> tuple[list[Conversation], dict[str, str]]:
    """All rows as conversations to be answered, and by id or place why others cannot be."""
    conversations: dict[str, Conversation] = {}
    refused: dict[str, str] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            refused[place] = "no messages, nor prompt"
            continue
        if has_lone_surrogate(row):
            refused[place] = LONE_SURROGATE
            continue
        name = str(row["id"]) if row.get("id") is not None else place
        turns = turns_of(row)
        if isinstance(turns, str):
            refused[name] = turns
        elif name in conversations:
            refused[place] = f"its id {name} is that of an earlier row"
        else:
            conversations[name] = Conversation(name, row, turns, _temperature(name, config))
    if not conversations:
        why = dict(Counter(refused.values())) or "it holds no row"
        raise ValueError(
            f"No row of {', '.join(rows.sources)} can be answered: {why}; give rows with prompt or messages."
        )
    return list(conversations.values()), refused


def turns_of(row: dict[str, Any]) -> list[list[Message]] | str:
    """What is said before each answer of a row, or why it cannot be answered.

    An answer is due wherever the others have spoken: the row's own answers only say where. One before any user turn
    answers nothing and is left out.
    """
    messages = messages_of(row)
    if messages is None:
        messages = messages_of(row | {"response": ""})
    if messages is None:
        return "no messages, nor prompt"
    if not {message["role"] for message in messages} <= ROLES:
        return "roles other than system, user and assistant"
    turns: list[list[Message]] = [[]]
    for message in messages:
        if message["role"] != "assistant":
            turns[-1].append({"role": message["role"], "content": message["content"]})
        elif _has_user(turns[-1]):
            turns.append([])
    turns = [turn for turn in turns if _has_user(turn)]
    return turns or "no user turn"


def _has_user(turn: list[Message]) -> bool:
    return any(message["role"] == "user" for message in turn)


def context(conversation: Conversation, answers: Sequence[Answer]) -> list[Message]:
    """The messages that the next answer is given to."""
    return [*_answered(conversation, answers), *conversation.turns[len(answers)]]


def as_row(conversation: Conversation, answers: list[Answer]) -> dict[str, Any]:
    """The row with the target's answers in its own form, and what `data.py` and a reader need to know of them."""
    row = {"id": conversation.id} | conversation.row
    if isinstance(row.get("prompt"), str) and (messages_of(row) is None or isinstance(row.get("response"), str)):
        row["response"] = answers[0].text
    else:
        row["messages"] = _answered(conversation, answers)
    row |= {"finish_reason": answers[-1].finish_reason, "temperature": conversation.temperature}
    if conversation.temperature > 0:
        row["seeds"] = [answer.seed for answer in answers]
    return row | {"id": conversation.id}


def is_open(conversation: Conversation, answers: Sequence[Answer]) -> bool:
    """Whether an answer is still due. Nothing follows a cut-off answer: nobody would have said it to that."""
    return len(answers) < len(conversation.turns) and all(answer.finish_reason == "stop" for answer in answers)


def _answered(conversation: Conversation, answers: Sequence[Answer]) -> list[Message]:
    said = zip(conversation.turns, answers, strict=False)
    return [message for turn, answer in said for message in (*turn, {"role": "assistant", "content": answer.text})]


def failure(error: Exception) -> str:
    """Why there is no answer, as rows say it."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def draw_seed(seed: int, name: str, turn: int) -> int:
    """A seed of 31 bits, all that every server takes."""
    return _hash(f"{seed}/{name}/{turn}") >> 33


def _temperature(name: str, config: RegenerateConfig) -> float:
    return 0.0 if _hash(f"{config.seed}/{name}") < config.greedy_share * 2**64 else config.temperature


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
