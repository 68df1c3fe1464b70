"""Which questions a benchmark asks, and in which order.

Spec-Bench (Xia et al., arXiv 2401.07851) is the field's common set: 480 questions, six tasks of 80. Its file is fetched
once, checked against a pinned digest and kept in the user's cache; it is no part of this package.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from confu.data.rows import LONE_SURROGATE, Rows, has_lone_surrogate
from confu.models import cache_dir

SPEC_BENCH = "spec-bench"
SPEC_BENCH_URL = (
    "https://raw.githubusercontent.com/hemingkx/Spec-Bench/fd2c1cd7d2201ef71db4c5f4e455008f017967bf/"
    "data/spec_bench/question.jsonl"
)
SPEC_BENCH_SHA256 = "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04"
CONVERSATION = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
TASKS = dict.fromkeys(CONVERSATION, "conversation") | {
    "translation": "translation",
    "summarization": "summarization",
    "qa": "question answering",
    "math_reasoning": "mathematics",
    "rag": "retrieval",
}
"""The six tasks by the file's categories."""


@dataclass(frozen=True)
class Question:
    id: str
    task: str
    turns: tuple[str, ...]
    """What the user says, turn by turn; the answers between are the method's own."""


@dataclass(frozen=True)
class Suite:
    name: str
    questions: list[Question]
    sha256: str
    """Of the file."""


def load_suite(name: str, file: Path | None = None, limit: int | None = None) -> Suite:
    """``spec-bench`` (read from ``file`` where one is given) or a JSONL file, its tasks taking turns.

    A line holds ``turns`` (a list) or ``prompt``, and may hold ``question_id`` or ``id``, and ``category``. Raises
    ValueError for another name, and for a file that is missing, empty or malformed (with the line).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; give 1 or more questions.")
    if name == SPEC_BENCH:
        path, tasks = file or _fetch_spec_bench(), TASKS
    elif name.endswith(".jsonl"):
        if file is not None:
            raise ValueError(f"--questions is the file of --suite {SPEC_BENCH}; leave it out beside --suite {name}.")
        path, tasks = Path(name), {}
    else:
        raise ValueError(f"--suite is {name!r}; give {SPEC_BENCH} or a file whose name ends in .jsonl.")
    rows = Rows((str(path),))
    questions: list[Question] = []
    places: dict[str, str] = {}
    for place, row in rows:
        questions.append(_question(row, place, tasks))
        line = place.rpartition(":")[2]
        if (known := places.setdefault(questions[-1].id, line)) != line:
            raise ValueError(f"{path}, lines {known} and {line} have one id, {questions[-1].id}; give each its own.")
    if not questions:
        raise ValueError(f"{path} holds no question; give lines with `turns` or `prompt`.")
    label = SPEC_BENCH if rows.fingerprint == SPEC_BENCH_SHA256 else path.name
    return Suite(label, in_turn(questions)[:limit], rows.fingerprint)


def in_turn(questions: list[Question]) -> list[Question]:
    """One question of each task after another, each task's spread over its part of the file.

    So any beginning of the list is balanced, and a larger limit only adds questions: an earlier run can be extended.
    """
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question)
    spread = [[mine[i] for i in _halving(len(mine))] for mine in by_task.values()]
    return [question for turn in zip_longest(*spread) for question in turn if question is not None]


def _halving(count: int) -> list[int]:
    """0, then the middle, then the middles of the halves, ...: numbers in the order of their reversed binary digits."""
    return sorted(range(count), key=lambda number: f"{number:b}".zfill(count.bit_length())[::-1])


def _question(row: Any, place: str, tasks: dict[str, str]) -> Question:
    turns = row.get("turns", row.get("prompt")) if isinstance(row, dict) else None
    turns = [turns] if isinstance(turns, str) else turns
    file, line = place.rsplit(":", 1)
    if has_lone_surrogate(row):
        raise ValueError(f"{file}, line {line} holds {LONE_SURROGATE}; mend it or leave it out.")
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise ValueError(f"{file}, line {line} is no question: it needs `turns`, a list of texts, or `prompt`, a text.")
    category, name = row.get("category", "all"), row.get("question_id", row.get("id", line))
    if not all(isinstance(value, str | int) for value in (category, name)):
        raise ValueError(f"{file}, line {line} is no question: its category and its id are to be texts or numbers.")
    return Question(str(name), tasks.get(str(category), str(category)), tuple(turns))


def _fetch_spec_bench() -> Path:
    import httpx2

    path = cache_dir() / SPEC_BENCH / "question.jsonl"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SPEC_BENCH_SHA256:
        return path
    try:
        answer = httpx2.get(SPEC_BENCH_URL, timeout=30, follow_redirects=True)
        answer.raise_for_status()
        if hashlib.sha256(answer.content).hexdigest() != SPEC_BENCH_SHA256:
            raise OSError("what arrived is another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(answer.content)
    except (httpx2.HTTPError, OSError) as error:
        raise ValueError(
            f"Spec-Bench's questions could not be fetched ({error}); get {SPEC_BENCH_URL} and name it with --questions."
        ) from None
    return path
