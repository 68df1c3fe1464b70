"""The measuring loop: every method answers every question, in one process, taking turns; one row an answer.

Their order is shuffled anew for every question, so that a machine that drifts treats all alike. In a conversation the
later turns follow the method's own answers. What the rows mean is in docs/benchmark.md.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from confu.bench.answers import Answer, DecoderEngine
from confu.bench.methods import Method
from confu.bench.questions import Question, Suite
from confu.bench.results import OURS, PLAIN, ResultsWriter, Row
from confu.bench.round_costs import SAMPLES, RoundCosts
from confu.config import BenchConfig, SamplingConfig
from confu.data.conversations import draw_seed, failure
from confu.info import checkout, environment
from confu.load import encode_chat, encode_raw
from confu.models import Progress

SHOWN = 3  # questions whose answers are kept token by token, for the report
WARM_UP = 4  # tokens


def run_bench(
    suite: Suite,
    methods: Sequence[Method],
    config: BenchConfig,
    out: Path,
    run: dict[str, Any],
    *,
    repeats: int = 1,
    costs: bool = False,
    progress: Progress = lambda stage, fraction: None,
) -> Path:
    """Measure what ``out`` has no row of yet; returns its results.jsonl. ``methods`` begin with the plain target. With
    ``costs`` what rounds cost is sampled between the questions that are measured."""
    plain = methods[0].engine
    assert isinstance(plain, DecoderEngine)
    bench = _Bench(plain, config, shown=[question.id for question in suite.questions[:SHOWN]])
    size, total = config.batch_size, repeats * len(suite.questions)
    batches = [suite.questions[first : first + size] for first in range(0, len(suite.questions), size)]
    with ResultsWriter(out, run) as results:
        progress("warming up", None)
        for method in methods:
            bench.warm_up(method, suite.questions[0])
        meter = RoundCosts(methods, results.run.get("costs")) if costs else None
        between, num_measured = max(1, repeats * len(batches) // SAMPLES), 0
        for repeat in range(repeats):
            for number, batch in enumerate(batches):
                progress("measuring", (repeat * len(suite.questions) + number * size) / total)
                missing = [
                    method
                    for method in shuffled(methods, config.seed, batch[0], repeat)
                    if not all(results.is_done(question, method.name, repeat) for question in batch)
                ]
                for method in missing:
                    for row in bench.converse(method, batch, repeat):
                        results.write(row)
                if meter is not None and missing and num_measured % between == 0:
                    meter.sample()
                    results.note_costs(meter.found())
                num_measured += bool(missing)
        return results.path


def describe(suite: Suite, methods: Sequence[Method], config: BenchConfig, target: str, repeats: int) -> dict[str, Any]:
    """What run.json says: all that decides the answers, and what they were measured on."""
    plain = methods[0].engine
    assert isinstance(plain, DecoderEngine)
    machine, (commit, modified) = environment(), checkout(".")
    for of_no_matter in ("cache", "default_target", "shipped_drafts"):
        machine.pop(of_no_matter)
    return {
        "suite": suite.name,
        "questions_sha256": suite.sha256,
        "num_questions": len(suite.questions),
        "repeats": repeats,
        "target": Path(target).name if Path(target).is_absolute() else target,
        "dtype": str(plain.decoder.target.dtype).removeprefix("torch."),
        "quantization": plain.decoder.target.quantization,
        "compile": plain.decoder.target.compiled,
        "device": str(plain.decoder.target.device),
        **dataclasses.asdict(config),
        "methods": {method.name: method.facts for method in methods},
        "machine": machine | {"threads": torch.get_num_threads()},
        "commits": [{"commit": commit, "modified": modified}],
        "date": time.strftime("%Y-%m-%d"),
    }


def shuffled(methods: Sequence[Method], seed: int, question: Question, repeat: int) -> list[Method]:
    """The order in which methods answer a question, the same after an interruption. Tasks take turns, so methods that
    took turns as well could meet always the same task, or follow always the same method."""
    order = list(methods)
    random.Random(f"{seed}/{question.id}/{repeat}").shuffle(order)
    return order


def cut(token_ids: Sequence[int], eos_ids: frozenset[int], limit: int) -> list[int]:
    """An answer up to its first end-of-sequence token, which counts, and at most ``limit`` tokens of it."""
    ids = list(token_ids[:limit])
    return ids[: next((at + 1 for at, token in enumerate(ids) if token in eos_ids), len(ids))]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: Question, answers: Sequence[str]) -> list[int]:
    """Token ids up to the next answer; a tokenizer without chat template reads the turns as they are."""
    messages = []
    for turn, text in enumerate(question.turns[: len(answers) + 1]):
        messages.append({"role": "user", "content": text})
        messages += [{"role": "assistant", "content": answer} for answer in answers[turn : turn + 1]]
    if tokenizer.chat_template:
        return encode_chat(tokenizer, messages)
    return encode_raw(tokenizer, "\n".join(message["content"] for message in messages))


class _Bench:
    def __init__(self, plain: DecoderEngine, config: BenchConfig, shown: Sequence[str]) -> None:
        self.plain, self.config, self.shown = plain, config, shown
        assert plain.decoder.tokenizer is not None
        self.tokenizer: PreTrainedTokenizerBase = plain.decoder.tokenizer
        self.eos_ids = plain.decoder.target.eos_ids

    def warm_up(self, method: Method, question: Question) -> None:
        """First calls prepare kernels; no question should pay for that. What fails here fails with a row later."""
        sampling = SamplingConfig(max_new_tokens=WARM_UP, temperature=self.config.temperature)
        try:
            method.engine.answer([prompt_ids(self.tokenizer, question, [])], sampling)
        except Exception:
            return

    def converse(self, method: Method, batch: Sequence[Question], repeat: int) -> Iterator[Row]:
        """Rows of one method's answers to a batch of questions, turn by turn. What fails is a row, too."""
        said: dict[str, list[str]] = {question.id: [] for question in batch}
        failed: dict[str, str] = {}
        for turn in range(max(len(question.turns) for question in batch)):
            asked = [question for question in batch if turn < len(question.turns)]
            prompts: dict[str, list[int]] = {}
            for question in asked:
                if question.id not in failed:
                    try:
                        prompts[question.id] = self._prompt(question, said[question.id])
                    except Exception as error:  # of the tokenizer's template, the context's length
                        failed[question.id] = failure(error)
            able = [question for question in asked if question.id in prompts]
            measured: dict[str, Row] = {}
            try:
                sampling = self._sampling(method, batch[0], repeat, turn)
                answers = method.engine.answer(list(prompts.values()), sampling) if able else []
                for place, (question, answer) in enumerate(zip(able, answers, strict=True)):
                    alone = dataclasses.replace(sampling, seed=sampling.seed + place)
                    prompt = prompts[question.id]
                    measured[question.id] = self._measured(question, method, repeat, alone, prompt, answer)
            except Exception as error:  # of memory, a peer ...
                failed |= {question.id: failure(error) for question in able}
            for question in asked:
                row: Row = {"question": question.id, "task": question.task, "turn": turn, "method": method.name}
                row |= {"repeat": repeat, "error": failed.get(question.id)}
                if question.id not in failed:
                    row |= measured[question.id]
                    said[question.id].append(measured[question.id]["text"])
                yield row

    def _prompt(self, question: Question, answers: Sequence[str]) -> list[int]:
        """Raises ValueError for one that is too long, before it can fail the batch that it would be answered in."""
        prompt, most = prompt_ids(self.tokenizer, question, answers), self.plain.decoder.target.max_positions
        if len(prompt) >= most:
            raise ValueError(f"the prompt has {len(prompt)} tokens, but the target's context is {most}")
        return prompt

    def _measured(
        self,
        question: Question,
        method: Method,
        repeat: int,
        sampling: SamplingConfig,
        prompt: list[int],
        answer: Answer,
    ) -> Row:
        """``sampling`` is that of this answer alone."""
        ids = cut(answer.token_ids, self.eos_ids, self.config.max_new_tokens)
        values = {
            "prompt_tokens": len(prompt),
            "num_tokens": len(ids),
            "token_ids": ids,
            "text": str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)),
            **{name: getattr(answer, name) for name in ("round_lengths", "round_accepted", "peak_bytes")},
        }
        seconds = ("wall_seconds", "prefill_seconds", "target_seconds", "draft_seconds")
        values |= {name: round(getattr(answer, name), 6) for name in seconds}
        if self.config.temperature > 0 and method.facts["engine"] == OURS:
            values["seed"] = sampling.seed
            if method.name == PLAIN:
                values["margins"] = self.plain.margins(prompt, ids, sampling)
        elif self.config.temperature == 0 and method.name == PLAIN and repeat == 0:
            values["top2_gaps"] = self.plain.top2_gaps(prompt, ids)
        if question.id in self.shown and repeat == 0 and method.name != PLAIN:
            values["pieces"] = answer.pieces
        return values

    def _sampling(self, method: Method, first: Question, repeat: int, turn: int) -> SamplingConfig:
        """Of a batch that begins with ``first``. Our methods draw with the same numbers, so that all write one text;
        other engines' samples are independent of ours."""
        engine = method.facts["engine"]
        drawn_by = engine if engine == OURS else method.name
        return SamplingConfig(
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed=draw_seed(self.config.seed, f"{drawn_by}/{first.id}/{repeat}", turn),
        )
