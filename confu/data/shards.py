"""Prepared data: a folder of memory-mapped token shards that training reads without tokenising again.

``index.json`` says what the folder holds and for whom it was made. A shard is a safetensors file: ``tokens`` int32 of
all its documents one after another, ``offsets`` int64 where each begins and the last ends, ``spans`` int32 the
[begin, end) of each assistant span within its document, ``span_offsets`` int64 where each document's spans begin.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from confu.config import from_dict, to_json
from confu.data.documents import Document, read_documents, tokenizer_fingerprint
from confu.data.rows import Progress, Rows

SCHEMA_VERSION = 1
SHARD_TOKENS = 8_000_000  # 32 MB; preparing holds one shard in memory
COUNTS = "token_counts.safetensors"


@dataclass(frozen=True)
class Index:
    """What a prepared folder holds, and what it was made with; saved as ``index.json``."""

    schema_version: int
    """Version of the folder's format."""
    sources: tuple[str, ...]
    """Files and Hub data sets that were read, in order."""
    fingerprint: str
    """SHA-256 of what was read (`Rows.fingerprint`)."""
    target: str
    """Target whose tokenizer and chat template were used."""
    tokenizer: str
    """Fingerprint of that tokenizer and template."""
    max_length: int
    """Longer conversations were cut here."""
    num_documents: int
    """Conversations kept."""
    num_tokens: int
    """Tokens of all conversations."""
    num_supervised: int
    """Tokens of assistant spans among them."""
    skipped: dict[str, Any]
    """Conversations left out, counted by reason."""
    shards: dict[str, Any]
    """Files, in order, with the number of documents of each."""


class Shards(Sequence[Document]):
    """The documents of a prepared folder, read from disk one by one as they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a folder that is damaged or that `confu data prepare` did not write."""
        self.folder = folder
        self.header = _read_index(folder)
        try:
            self.token_counts: Int[Tensor, " V"] = _map(folder / COUNTS)["counts"]
            self._shards = [_map(folder / name) for name in self.header.shards]
            begins = [shard["offsets"] for shard in self._shards]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{folder} is damaged ({error}); run `confu data prepare` again.") from None
        self.lengths: list[int] = [n for offsets in begins for n in offsets.diff().tolist()]
        self._ends = list(accumulate(len(offsets) - 1 for offsets in begins))
        if (len(self.lengths), sum(self.lengths)) != (self.header.num_documents, self.header.num_tokens):
            raise ValueError(f"{folder} is damaged (its shards are not its index's); run `confu data prepare` again.")

    def check(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        """Raises ValueError unless the folder was prepared with this tokenizer and ``max_length``."""
        if self.header.tokenizer != tokenizer_fingerprint(tokenizer):
            raise ValueError(
                f"{self.folder} was prepared for target {self.header.target!r}, whose tokenizer or chat template is "
                f"not that of {tokenizer.name_or_path!r}; prepare the data again for this target."
            )
        if self.header.max_length != max_length:
            raise ValueError(
                f"{self.folder} was prepared with max_length {self.header.max_length}, not {max_length}; set "
                f"max_length = {self.header.max_length}, or prepare the data again."
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Document:  # type: ignore[bad-override] (whole numbers are enough)
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        where = bisect_right(self._ends, number)
        shard = self._shards[where]
        local = number - (self._ends[where - 1] if where else 0)
        begin, end = shard["offsets"][local : local + 2].tolist()
        first, last = shard["span_offsets"][local : local + 2].tolist()
        spans = torch.zeros(end - begin, dtype=torch.int64)
        for span, (start, stop) in enumerate(shard["spans"][first:last].tolist(), start=1):
            spans[start:stop] = span
        return Document(shard["tokens"][begin:end].long(), spans)


def sample(shards: Shards, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of the first document, run by run, and whether each run is supervised: what the eye should check."""
    document = shards[0]
    runs = groupby(zip(document.tokens.tolist(), (document.spans > 0).tolist(), strict=True), key=lambda pair: pair[1])
    return [(str(tokenizer.decode([token for token, _ in run])), supervised) for supervised, run in runs]


def coverage(counts: Int[Tensor, " V"]) -> dict[int, float]:
    """Share of the supervised tokens that the most frequent 2,048, 4,096 ... of the distinct ones make up."""
    ordered = counts.sort(descending=True).values.cumsum(0).double() / counts.sum()
    distinct = int((counts > 0).sum())
    sizes = [size for size in (2048, 4096, 8192, 16384, 32768) if size < distinct]
    return {size: round(float(ordered[size - 1]), 4) for size in (*sizes, distinct)}


def prepare(
    sources: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    target: str,
    max_length: int,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress = lambda fraction: None,
) -> Shards:
    """Tokenise JSONL files and Hub data sets into the new folder ``out``, which appears only when it is complete.

    Rows are streamed: memory holds one shard of ``shard_tokens`` tokens. Raises ValueError as `read_corpus` does, and
    when ``out`` exists.
    """
    if out.exists():
        raise ValueError(f"{out} already exists; give a new folder, or remove it first.")
    rows = Rows(sources, progress)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        skipped, counts, shards = Counter(), torch.zeros(0, dtype=torch.int64), {}
        num_tokens = 0
        documents = read_documents(rows, tokenizer, max_length=max_length, skipped=skipped)
        for number, shard in enumerate(_cut(documents, shard_tokens)):
            name = f"{number:05}.safetensors"
            save_file(_pack(shard), partial / name)
            shards[name] = len(shard)
            num_tokens += sum(len(d.tokens) for d in shard)
            counts = _add_counts(counts, shard)
        save_file({"counts": counts}, partial / COUNTS)
        index = Index(
            schema_version=SCHEMA_VERSION,
            sources=sources,
            fingerprint=rows.fingerprint,
            target=target,
            tokenizer=tokenizer_fingerprint(tokenizer),
            max_length=max_length,
            num_documents=sum(shards.values()),
            num_tokens=num_tokens,
            num_supervised=int(counts.sum()),
            skipped=dict(skipped),
            shards=shards,
        )
        (partial / "index.json").write_text(to_json(index), encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Shards(out)


def _cut(documents: Iterator[Document], shard_tokens: int) -> Iterator[list[Document]]:
    shard: list[Document] = []
    size = 0
    for document in documents:
        if shard and size + len(document.tokens) > shard_tokens:
            yield shard
            shard, size = [], 0
        shard.append(document)
        size += len(document.tokens)
    if shard:
        yield shard


def _pack(documents: list[Document]) -> dict[str, Tensor]:
    spans = [_span_bounds(document) for document in documents]
    return {
        "tokens": torch.cat([d.tokens for d in documents]).int(),
        "offsets": torch.tensor([0, *accumulate(len(d.tokens) for d in documents)]),
        "spans": torch.tensor([bounds for found in spans for bounds in found], dtype=torch.int32).view(-1, 2),
        "span_offsets": torch.tensor([0, *accumulate(map(len, spans))]),
    }


def _span_bounds(document: Document) -> list[tuple[int, int]]:
    """[begin, end) of each assistant span, in order; spans are numbered from 1 without a gap."""
    bounds, at = [], 0
    for number, run in groupby(document.spans.tolist()):
        length = sum(1 for _ in run)
        if number:
            bounds.append((at, at + length))
        at += length
    return bounds


def _add_counts(counts: Int[Tensor, " V1"], documents: list[Document]) -> Int[Tensor, " V2"]:
    found = torch.bincount(torch.cat([d.tokens[d.spans > 0] for d in documents]), minlength=len(counts))
    found[: len(counts)] += counts
    return found


def _read_index(folder: Path) -> Index:
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no index.json; give a folder from `confu data prepare`, or chat JSONL files.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["schema_version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not the index of prepared data; run `confu data prepare` again.") from None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {version}, this is {SCHEMA_VERSION}; prepare the data again.")
    return from_dict(Index, values, source=str(path))


def _map(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped: only what is read is loaded."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
