"""Training data on the target's own policy: every prompt answered anew by the target, as rows that `data.py` reads.

A draft learns the target's distribution, so it should see the target's text. In a conversation of several turns each
assistant turn becomes the target's own answer to what went before; the user's turns stay.

Beside OUT.jsonl, which only ever grows, stand OUT.settings.json (what makes the answers, so that a file is never
continued by other settings) and OUT.errors.jsonl (rows that failed in the latest run; the next one tries them again).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from confu.config import RegenerateConfig, SamplingConfig
from confu.data.conversations import (
    Answer,
    Conversation,
    Outcome,
    as_row,
    context,
    draw_seed,
    failure,
    is_open,
    read_conversations,
)
from confu.data.rows import Rows
from confu.generate import Decoder
from confu.load import encode_chat

WINDOW = 16  # batches whose rows are sorted by length together
FEW_FAILURES = 20  # before these, a share says nothing

Write = Callable[[Conversation, Outcome], None]


@runtime_checkable
class Engine(Protocol):
    """Who answers: `DecoderEngine`, or `remote.ServerEngine`."""

    def run(self, conversations: Sequence[Conversation], is_done: Callable[[str], bool], write: Write) -> None:
        """Hand every conversation whose id is not done to ``write``, with its outcome; others may be, too."""


@dataclass
class Summary:
    """What a run did."""

    num_rows: int = 0
    num_done_before: int = 0
    num_answered: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)
    """Rows without an answer, counted by reason."""


def regenerate(
    sources: tuple[str, ...],
    out: Path,
    engine: Engine,
    config: RegenerateConfig,
    *,
    answered_by: dict[str, Any],
    progress: Callable[[str, float | None], None] = lambda stage, fraction: None,
) -> Summary:
    """Answer all rows of the JSONL files or Hub data sets into ``out``, going on where an earlier run ended.

    ``answered_by`` is what decides the answers beside ``config`` (target, draft, dtype ...). Raises ValueError for bad
    data and for an ``out`` that was begun with other data or settings, RuntimeError when too many rows fail.
    """
    if out.suffix != ".jsonl":
        raise ValueError(f"{out} is to hold JSONL; give --out a name that ends in .jsonl.")
    rows = Rows(sources, lambda fraction: progress("reading", fraction))
    conversations, refused = read_conversations(rows, config)
    decisive = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("batch_size", "max_failed")}
    with _Output(out, answered_by | decisive | {"data": rows.fingerprint}, config.max_failed) as output:
        summary = output.summary
        summary.num_rows = len(conversations) + len(refused)
        summary.num_done_before = len(output.done)
        for name, reason in refused.items():
            output.fail(name, reason)
        output.check(len(refused), summary.num_rows)
        began = time.perf_counter()

        def write(conversation: Conversation, outcome: Outcome) -> None:
            output.write(conversation, outcome)
            summary.seconds = time.perf_counter() - began
            progress("answering", (len(output.done) + summary.failed.total()) / summary.num_rows)

        engine.run(conversations, output.done.__contains__, write)
        if not output.done:
            raise RuntimeError(output.complaint(summary.failed.total(), summary.num_rows))
    return summary


class DecoderEngine:
    """This package's own decoder, with or without a draft.

    The batches depend on the rows alone, never on what is done already, so that a resumed run draws, and rounds, as
    an uninterrupted one: a batch is decoded whole or not at all.
    """

    def __init__(self, decoder: Decoder, config: RegenerateConfig) -> None:
        self.decoder, self.config = decoder, config

    def run(self, conversations: Sequence[Conversation], is_done: Callable[[str], bool], write: Write) -> None:
        for batch in self._batches(conversations):
            if all(is_done(conversation.id) for conversation in batch):
                continue
            prompts = {conversation.id: self._prompt(conversation, []) for conversation in batch}
            outcomes: dict[str, Outcome] = {name: reason for name, reason in prompts.items() if isinstance(reason, str)}
            able = [conversation for conversation in batch if conversation.id not in outcomes]
            if not all(is_done(conversation.id) for conversation in able):
                outcomes |= self._answer(able)
            for conversation in batch:
                if conversation.id in outcomes:
                    write(conversation, outcomes[conversation.id])

    def _batches(self, conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
        """Rows of one temperature and similar length, near each other in the file."""
        size = self.config.batch_size
        for first in range(0, len(conversations), WINDOW * size):
            window = sorted(conversations[first : first + WINDOW * size], key=lambda c: c.num_characters)
            for temperature in sorted({c.temperature for c in window}):
                alike = [c for c in window if c.temperature == temperature]
                for start in range(0, len(alike), size):
                    yield alike[start : start + size]

    def _answer(self, batch: list[Conversation]) -> dict[str, Outcome]:
        """All answers of a batch; where it fails (memory, say), its rows one by one."""
        try:
            return {c.id: answers for c, answers in zip(batch, self._converse(batch), strict=True)}
        except Exception as error:
            if len(batch) == 1:
                return {batch[0].id: failure(error)}
        return {name: outcome for c in batch for name, outcome in self._answer([c]).items()}

    def _converse(self, batch: list[Conversation]) -> list[list[Answer]]:
        """Turn by turn, all conversations that still have one."""
        answers: list[list[Answer]] = [[] for _ in batch]
        for turn in range(max(len(c.turns) for c in batch)):
            prompts = {i: self._prompt(c, answers[i]) for i, c in enumerate(batch) if is_open(c, answers[i])}
            # A conversation that outgrows the context ends before that turn.
            fitting = {i: prompt for i, prompt in prompts.items() if not isinstance(prompt, str)}
            if not fitting:
                break
            sampling = SamplingConfig(
                max_new_tokens=self.config.max_new_tokens,
                temperature=batch[0].temperature,
                seed=draw_seed(self.config.seed, batch[0].id, turn),
            )
            results = self.decoder.generate(list(fitting.values()), sampling)
            for row, (i, result) in enumerate(zip(fitting, results, strict=True)):
                seed = sampling.seed + row  # as the decoder has it
                answers[i].append(Answer(result.text, result.finish_reason, len(result.token_ids), seed))
        return answers

    def _prompt(self, conversation: Conversation, answers: list[Answer]) -> list[int] | str:
        """Token ids up to the next answer, or why they cannot be had."""
        assert self.decoder.tokenizer is not None
        try:
            ids = encode_chat(self.decoder.tokenizer, context(conversation, answers))
        except ValueError as error:
            return str(error)
        if len(ids) >= self.decoder.target.max_positions:
            return f"longer than the target's context of {self.decoder.target.max_positions} tokens"
        return ids


class _Output:
    """The growing file, with the settings it was begun with and the rows that failed."""

    def __init__(self, path: Path, settings: dict[str, Any], max_failed: float) -> None:
        self.path, self.max_failed = path, max_failed
        self.errors_path = path.with_suffix(".errors.jsonl")
        self.summary = Summary()
        self._num_failed = 0
        _same_settings(path, settings)
        self.done = _drop_half_line(path)
        self._file, self._errors = path.open("a", encoding="utf-8"), self.errors_path.open("w", encoding="utf-8")

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._errors.close()

    def write(self, conversation: Conversation, outcome: Outcome) -> None:
        """Keep what is new. Raises RuntimeError when too many rows have failed."""
        if conversation.id in self.done:
            return
        if isinstance(outcome, str):
            self.fail(conversation.id, outcome)
            self._num_failed += 1
            self.check(self._num_failed, self._num_failed + len(self.done))
            return
        _append(self._file, as_row(conversation, outcome))
        self.done.add(conversation.id)
        self.summary.num_answered += 1
        self.summary.num_tokens += sum(answer.num_tokens for answer in outcome)

    def fail(self, name: str, reason: str) -> None:
        _append(self._errors, {"id": name, "reason": reason})
        self.summary.failed[reason] += 1

    def check(self, num_failed: int, num_rows: int) -> None:
        """Raises RuntimeError when too large a share of these rows failed."""
        if num_failed >= FEW_FAILURES and num_failed > self.max_failed * num_rows:
            raise RuntimeError(self.complaint(num_failed, num_rows))

    def complaint(self, num_failed: int, num_rows: int) -> str:
        reason, _ = self.summary.failed.most_common(1)[0]
        return (
            f"{num_failed} of {num_rows} rows failed, most of them so: {reason.rstrip('.')}; see {self.errors_path}, "
            "mend the cause and run the same command again, or raise --max-failed."
        )


def _append(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def _same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write down what ``out`` is made with, or raise ValueError where it was begun with something else."""
    path = out.with_suffix(".settings.json")
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        if out.exists():
            raise ValueError(f"{out} exists and is not the work of this command; give another --out.")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        return
    try:
        begun = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged, so nobody knows how {out} was begun; give another --out.") from None
    other = next((name for name in begun | settings if begun.get(name) != settings.get(name)), None)
    if other == "data":
        raise ValueError(f"{out} was begun with other data than these files hold now; give another --out.")
    if other is not None:
        raise ValueError(
            f"{out} was begun with {other} {begun.get(other)!r}, not {settings.get(other)!r}; give what it was begun "
            "with, or another --out."
        )


def _drop_half_line(path: Path) -> set[str]:
    """Ids of the finished rows, after cutting off a last line that a kill left half written."""
    done: set[str] = set()
    if not path.exists():
        return done
    with path.open("r+b") as file:
        whole = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number} is no answered row; give another --out.") from None
            whole += len(line)
        file.truncate(whole)
    return done
