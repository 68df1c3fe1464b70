"""The files of a benchmark run: results.jsonl, one row for each answer, and run.json, how and on what it was measured.

results.jsonl only grows. An interrupted run goes on where it was, a row that a kill left half written is dropped, and
the last of several rows for one answer counts. Prompts are not in it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from confu.bench.questions import Question

SCHEMA_VERSION = 1
PLAIN = "plain"  # the method that all others are held against
OURS = "confu"  # the engine, beside those of peers
REFERENCE = "eagle3-reference"  # the peer that says nothing about speed
GROWING = ("methods", "num_questions", "repeats", "commits", "costs", "begun", "date")
"""What a later call may add to in run.json; all else must stay as it was begun."""
SETTINGS = (
    dict.fromkeys(("suite", "target", "dtype", "device", "date"), str)
    | dict.fromkeys(("max_new_tokens", "batch_size", "seed", "num_questions", "repeats"), int)
    | {"temperature": int | float, "methods": dict, "machine": dict, "commits": list}
)
"""What run.json always holds."""
ASKED = {"question": str, "task": str, "turn": int, "method": str, "repeat": int, "error": str | None}
"""What a row always holds."""
MEASURED = (
    {"prompt_tokens": int, "num_tokens": int, "text": str, "peak_bytes": int | None}
    | dict.fromkeys(("token_ids", "round_lengths", "round_accepted"), list)
    | dict.fromkeys(("wall_seconds", "prefill_seconds", "target_seconds", "draft_seconds"), int | float)
)
"""What a row holds beside that, if it has an answer. Its lists are of whole numbers."""

Row = dict[str, Any]
Key = tuple[str, int, str, int]


@dataclass(frozen=True)
class Results:
    """A finished, or interrupted, run."""

    run: dict[str, Any]
    rows: list[Row]
    """One for each question, turn, method and repeat; ``error`` says why one has no answer."""


def key(row: Row) -> Key:
    return row["question"], row["turn"], row["method"], row["repeat"]


def answered(rows: Sequence[Row], method: str) -> list[Row]:
    """A method's rows that hold an answer."""
    return [row for row in rows if row["method"] == method and row["error"] is None]


def read_results(path: Path) -> Results:
    """A results.jsonl (or .jsonl.gz) with the run.json beside it. Raises ValueError for a file that is no such."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        run = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path} and the run.json beside it cannot be read ({reason}); give the results.jsonl of `confu bench`."
        ) from None
    _check_run(path.parent / "run.json", run)
    rows, _ = _parse(path, data)
    if not rows:
        raise ValueError(f"{path} holds no row yet; the first comes with the first answer.")
    if unknown := next((row["method"] for row in rows if row["method"] not in run["methods"]), None):
        raise ValueError(f"{path} has rows of {unknown}, which run.json beside it does not; give the two of one run.")
    return Results(run, rows)


def unfinished(results: Results) -> str:
    """What an interrupted run still lacks; nothing of a whole one."""
    num_turns: dict[str, int] = {}
    found: dict[tuple[str, str, int], int] = {}  # turns of a method's conversation
    for row in results.rows:
        num_turns[row["question"]] = max(num_turns.get(row["question"], 0), row["turn"] + 1)
        conversation = row["method"], row["question"], row["repeat"]
        found[conversation] = found.get(conversation, 0) + 1
    whole = dict.fromkeys(results.run["methods"], 0)
    for (method, question, _), count in found.items():
        whole[method] += count == num_turns[question]
    asked = results.run["num_questions"] * results.run["repeats"]
    lacking = ", ".join(f"{name} {count}" for name, count in whole.items() if count < asked)
    return f"Not finished: questions answered, of {asked} (repeats counted): {lacking}." if lacking else ""


def make_folder(out: Path) -> None:
    """Raises ValueError where nothing can be written into ``out``."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise cannot_write(out, error) from None


def cannot_write(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be written ({error.strerror}); give another folder with --out.")


class ResultsWriter:
    """Appends rows to OUT/results.jsonl, in a folder that is there; knows which were there before."""

    def __init__(self, out: Path, run: dict[str, Any]) -> None:
        """Raises ValueError where ``out`` cannot be written, or was begun with something else, or who knows what."""
        self.path = out / "results.jsonl"
        with _writing(self.path):
            if not (out / "run.json").exists() and self.path.exists() and self.path.stat().st_size:
                raise ValueError(f"{out} has results.jsonl, but no run.json that says of what; give another --out.")
            with ExitStack() as stack:
                self._file = stack.enter_context(self.path.open("a", encoding="utf-8"))
                _lock(self._file, out)
                self.run = _same_run(out / "run.json", run)
                before, num_whole_bytes = _parse(self.path, self.path.read_bytes())
                self._file.truncate(num_whole_bytes)
                _write(out / "run.json", self.run)
                stack.pop_all()  # all is well, and it stays open
        self._done = {key(row) for row in before if row["error"] is None}

    def __enter__(self) -> ResultsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with _writing(self.path):
            self._file.close()

    def is_done(self, question: Question, method: str, repeat: int) -> bool:
        return all((question.id, turn, method, repeat) in self._done for turn in range(len(question.turns)))

    def note_costs(self, costs: dict[str, Any]) -> None:
        """What rounds cost, into run.json."""
        self.run["costs"] = costs
        with _writing(self.path.parent / "run.json"):
            _write(self.path.parent / "run.json", self.run)

    def write(self, row: Row) -> None:
        with _writing(self.path):
            self._file.write(json.dumps({"schema_version": SCHEMA_VERSION, **row}, ensure_ascii=False) + "\n")
            self._file.flush()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


def _lock(file: IO[str], out: Path) -> None:
    """Two benchmarks at once would measure each other. (Where there are no such locks, nothing is refused.)"""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):  # this file system has none
                return
            raise ValueError(
                f"Another benchmark is measuring into {out}; wait for it, or give another --out."
            ) from None


def _same_run(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What run.json is to hold: ``run``, and the methods and commits that it has had before."""
    run = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **run}))
    if not path.exists():
        return run
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; give another folder with --out.") from None
    _check_run(path, begun)
    begun.setdefault("compile", False)  # from before there was a choice
    for name in run:
        if name not in GROWING and begun.get(name) != run[name]:
            raise ValueError(
                f"{path.parent} was begun with {_difference(name, begun.get(name), run[name])}; "
                "give what it was begun with, or another --out."
            )
    for name, facts in run["methods"].items():
        if name in begun["methods"] and begun["methods"][name] != facts:
            changed = _difference(name, begun["methods"][name], facts)
            raise ValueError(
                f"{path.parent} already measured {name} otherwise ({changed}); "
                "give what it was measured with, name another draft NAME=PATH, or give another --out."
            )
    run = {"costs": begun.get("costs")} | run
    run["methods"] = begun["methods"] | run["methods"]
    run["commits"] = [*begun["commits"], *(commit for commit in run["commits"] if commit not in begun["commits"])]
    run["begun"] = begun.get("begun", begun["date"])
    run["num_questions"] = max(begun["num_questions"], run["num_questions"])
    run["repeats"] = max(begun["repeats"], run["repeats"])
    return run


def _difference(name: str, before: Any, now: Any) -> str:
    """The first place where two settings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = next(part for part in before | now if before.get(part) != now.get(part))
        if inner == "costs":
            return f"{name}: `confu tune` has run since, or was undone"
        return _difference(f"{name}: {inner}", before.get(inner), now.get(inner))
    return f"{name} {before!r}, not {now!r}"


def _check_schema(what: str, run: Any) -> None:
    found = run.get("schema_version") if isinstance(run, dict) else None
    if found != SCHEMA_VERSION:
        raise ValueError(
            f"{what} has schema_version {found}, but this version reads {SCHEMA_VERSION}; measure again into another "
            "folder, or read it with the version that wrote it."
        )


def _check_run(path: Path, run: Any) -> None:
    _check_schema(str(path), run)
    if bad := [name for name, kind in SETTINGS.items() if not isinstance(run.get(name), kind)]:
        raise ValueError(f"{path} has no good {', '.join(bad)}; give a folder as `confu bench` left it.")
    if not all(isinstance(facts, dict) and "kind" in facts and "engine" in facts for facts in run["methods"].values()):
        raise ValueError(f"{path} has methods that it does not describe; give a folder as `confu bench` left it.")


def _parse(path: Path, data: bytes) -> tuple[list[Row], int]:
    """The rows, the last of each answer, and how many bytes are whole lines."""
    rows: dict[Key, Row] = {}
    num_whole_bytes = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            row = None
        if isinstance(row, dict):
            _check_schema(f"{path}, line {number}", row)
        if not (isinstance(row, dict) and _is_whole(row)):
            raise ValueError(f"{path}, line {number} is no row of a benchmark; remove that line.")
        rows[key(row)] = row
        num_whole_bytes += len(line)
    return list(rows.values()), num_whole_bytes


def _is_whole(row: Row) -> bool:
    """Whether the row holds what it has to, each of its kind."""
    kinds = ASKED | (MEASURED if row.get("error") is None else {})
    return "error" in row and all(
        isinstance(row.get(name), kind) and (kind is not list or all(isinstance(number, int) for number in row[name]))
        for name, kind in kinds.items()
    )


def _write(path: Path, run: dict[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
