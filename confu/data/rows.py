"""Rows of chat data: JSONL files line by line or Hub data sets, what they hold, and the hash of what was read."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from confu.models import first_line

Message = dict[str, Any]
Progress = Callable[[float | None], None]
"""Told the share of the data that was read, or None where that is unknown."""

LONE_SURROGATE = "a lone surrogate, which is no Unicode text"

HUB = re.compile(r"hub:(?P<path>[\w.-]+/[\w.-]+)(/(?P<name>[^:@]+))?(:(?P<split>[^@]+))?(@(?P<revision>.+))?", re.ASCII)


class Rows:
    """Rows of JSONL files and Hub data sets (``hub:OWNER/NAME[/SUBSET][:SPLIT][@REVISION]``), streamed in order.

    Raises ValueError for a file that is missing, before the first row, and for one that is not JSONL, on the way.
    """

    def __init__(self, sources: tuple[str, ...], progress: Progress = lambda fraction: None) -> None:
        self.sources, self.progress = sources, progress
        self._digest = hashlib.sha256()
        self._done = 0  # bytes of files
        self._sizes = [_size(Path(source)) for source in sources if not is_hub(source)]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what was read so far: the files' bytes; of a Hub data set, its rows as lines of sorted JSON.

        It stands for the data alone. What becomes of it also depends on the tokenizer and on ``max_length``.
        """
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Each row and its place (``FILE:LINE``)."""
        for source in self.sources:
            yield from self._hub_rows(source) if is_hub(source) else self._lines(source)

    def _lines(self, source: str) -> Iterator[tuple[str, Any]]:
        with Path(source).open("rb") as file:  # bytes: only \n ends a line, as JSON strings may hold U+2028 and such
            for number, line in enumerate(file, start=1):
                self._digest.update(line)
                self._done += len(line)
                if number % 200 == 1:
                    whole = len(self._sizes) == len(self.sources)
                    self.progress(min(self._done / (sum(self._sizes) or 1), 1.0) if whole else None)
                if line.strip():
                    yield f"{source}:{number}", _parse(line, source, number)

    def _hub_rows(self, source: str) -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(_stream_from_hub(source), start=1):
            line = json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)
            self._digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
            if number % 200 == 1:
                self.progress(None)
            yield f"{source}:{number}", row


def is_hub(source: str) -> bool:
    return source.startswith("hub:")


def has_lone_surrogate(value: Any) -> bool:
    """Whether a row holds half of a surrogate pair, which JSON can escape but no tokenizer or UTF-8 file takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def messages_of(row: Any) -> list[Message] | None:
    """The conversation of a row (``prompt`` and ``response``, with ``system`` or not, or ``messages``), or None where
    it holds none."""
    if not isinstance(row, dict):
        return None
    messages = row.get("messages")
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        said = {"system": row.get("system") or None, "user": row["prompt"], "assistant": row["response"]}
        messages = [{"role": role, "content": text} for role, text in said.items() if text is not None]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        return None
    return messages


def _size(path: Path) -> int:
    try:
        with path.open("rb"):
            return path.stat().st_size
    except OSError as error:
        raise ValueError(f"No data file at {path} ({error.strerror}); give the path of a JSONL file.") from None


def _parse(line: bytes, source: str, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{source}, line {number} is not UTF-8 text; give a JSONL file in UTF-8.") from None
    except json.JSONDecodeError as error:
        why = f"is not JSON: {error.msg} (column {error.pos + 1})"
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        why = f"cannot be read: {first_line(error)}"
    raise ValueError(f"{source}, line {number} {why}; mend or remove that line.")


def _stream_from_hub(source: str) -> Iterator[Any]:
    """Rows of a data set, fetched as they are read, so that nothing of it is kept here."""
    match = HUB.fullmatch(source)
    if match is None:
        raise ValueError(f"{source} names no Hub data set; write hub:OWNER/NAME[/SUBSET][:SPLIT][@REVISION].")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise ValueError(
            f"{source} needs the datasets package; run `pip install 'confu-decoding[data]'`, or give a JSONL file."
        ) from None
    wanted = match.groupdict() | {"split": match["split"] or "train"}
    try:
        yield from datasets.load_dataset(**wanted, streaming=True)
    except Exception as error:  # of the network, the Hub, the file formats: each library has its own classes
        raise ValueError(
            f"{source} cannot be read from the Hub ({first_line(error)}); check the spelling, the split, the network "
            "and, for a gated data set, `hf auth login`."
        ) from error
