"""The feature cache: what the frozen target computed for each document, kept on disk for the later epochs.

The first epoch fills it as it goes; afterwards an eagle3 run never runs the target again. Values are stored in the
target's own dtype, so nothing is rounded. A final state is stored only where it teaches a step (METHOD 4, training).

A folder holds index.json (what the states belong to), features.bin, final.bin and done.bin (one byte a document, set
once its states are on the disk: a killed fill goes on where it stopped).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from confu.data.corpus import Batch, Corpus, collate
from confu.target import Target
from confu.training.objective import supervised_steps


@dataclass(frozen=True)
class StoreKey:
    """What stored states depend on; a store with another key is refused."""

    data_sha256: str
    num_documents: int
    num_tokens: int
    num_taught: int
    max_length: int
    target: str
    dtype: str
    hidden_size: int
    feature_layers: tuple[int, int, int]


class FeatureStore:
    """Features and final states of a corpus, memory-mapped. Raises ValueError for a folder that holds others, and
    when the disk has no room.

    Several processes of one machine may fill one store.
    """

    def __init__(self, folder: str | Path, corpus: Corpus, target: Target, *, name: str, max_length: int) -> None:
        self.folder = Path(folder)
        self.target = target
        self.documents = corpus.documents
        self._taught = [taught_tokens(document.spans) for document in self.documents]
        self._first_token = _offsets([len(taught) for taught in self._taught])
        self._first_taught = _offsets([int(taught.sum()) for taught in self._taught])
        self.num_tokens, num_taught = self._first_token[-1], self._first_taught[-1]
        dtype = str(target.dtype).removeprefix("torch.")
        self.key = StoreKey(
            corpus.fingerprint,
            len(self.documents),
            self.num_tokens,
            num_taught,
            max_length,
            name,
            dtype,
            target.hidden_size,
            target.feature_layers,
        )
        width, itemsize = target.hidden_size, target.dtype.itemsize
        self._shapes = {"features": (self.num_tokens, 3 * width), "final": (num_taught, width)}
        self.num_bytes = sum(rows * columns for rows, columns in self._shapes.values()) * itemsize + len(self.documents)
        self._fresh: set[int] = set()  # stored by this process, but not yet known to be on the disk

    def describe(self) -> str:
        """The estimate, for people."""
        return (
            f"The feature cache takes {self.num_bytes / 1e9:.2f} GB in {self.folder} ({self.key.num_documents:,} "
            f"documents, {self.num_tokens:,} tokens, {self.num_bytes / self.num_tokens:,.0f} bytes a token)."
        )

    def open(self) -> None:
        """Reserve the space, or map what is there."""
        index = self.folder / "index.json"
        if index.exists():
            self._check(json.loads(index.read_text(encoding="utf-8")))
        else:
            self._refuse_full_disk()
            self.folder.mkdir(parents=True, exist_ok=True)
        self._features = self._map("features", self.target.dtype)
        self._final = self._map("final", self.target.dtype)
        self._done = _map(self.folder / "done.bin", (self.key.num_documents,), torch.uint8)
        if index.exists():
            self._refuse_other_weights()
        else:  # last: all is reserved
            index.write_text(json.dumps(asdict(self.key), indent=2) + "\n", encoding="utf-8")

    def teach(self, batch: Batch, members: list[int]) -> tuple[Float[Tensor, "B T D3"], Float[Tensor, "B T D"]]:
        """`Target.teach` of a batch of these documents, from the disk where it is there; computed and kept otherwise.

        From the disk, final states that teach no step are zero, and so is all padding.
        """
        missing = [
            place for place, number in enumerate(members) if number not in self._fresh and not self._done[number]
        ]
        if not missing:
            return self._read(batch, members)
        features, final = self.target.teach(batch.tokens, None)
        assert features.dtype == self.target.dtype, features.dtype
        for place in missing:
            number, length = members[place], batch.lengths[place]
            self._features[self._tokens_of(number)] = features[place, :length].to("cpu")
            self._final[self._taught_of(number)] = final[place, :length].to("cpu")[self._taught[number]]
            self._fresh.add(number)
        return features, final

    def flush(self) -> None:
        """Bring what is new to the disk, then mark it as there."""
        for name in ("features", "final"):
            with (self.folder / f"{name}.bin").open("rb+") as file:
                os.fsync(file.fileno())
        self._done[sorted(self._fresh)] = 1
        self._fresh.clear()

    def _read(self, batch: Batch, members: list[int]) -> tuple[Tensor, Tensor]:
        shape = (*batch.tokens.shape, self.target.hidden_size)
        features = torch.zeros(*shape[:2], 3 * shape[2], dtype=self.target.dtype)
        final = torch.zeros(shape, dtype=self.target.dtype)
        for place, number in enumerate(members):
            length = batch.lengths[place]
            features[place, :length] = self._features[self._tokens_of(number)]
            final[place, :length][self._taught[number]] = self._final[self._taught_of(number)]
        return features.to(self.target.device), final.to(self.target.device)

    def _tokens_of(self, number: int) -> slice:
        return slice(self._first_token[number], self._first_token[number + 1])

    def _taught_of(self, number: int) -> slice:
        return slice(self._first_taught[number], self._first_taught[number + 1])

    def _map(self, name: str, dtype: torch.dtype) -> Tensor:
        return _map(self.folder / f"{name}.bin", self._shapes[name], dtype)

    def _check(self, theirs: dict[str, Any]) -> None:
        ours = json.loads(json.dumps(asdict(self.key)))
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"The feature cache {self.folder} was made with {name} {theirs.get(name)}, but this run has "
                    f"{value}; delete it or name another folder with feature_store."
                )

    def _refuse_other_weights(self) -> None:
        """A folder's name says nothing of the weights in it: compute one stored document again."""
        number = int(self._done.argmax())
        if not self._done[number]:
            return
        batch = collate([self.documents[number]])
        stored, ours = self._read(batch, [number])[1], self.target.teach(batch.tokens.to(self.target.device), None)[1]
        taught = self._taught[number].to(ours.device)
        stored, ours = stored[0, taught].float(), ours[0, taught].float()
        error = ((stored - ours).norm() / ours.norm()).item()
        if not error < 0.05:  # rounding in bfloat16 makes a tenth of that
            raise ValueError(
                f"The feature cache {self.folder} holds states that this target does not compute (they differ by "
                f"{error:.0%}); delete it or name another folder with feature_store."
            )

    def _refuse_full_disk(self) -> None:
        there = next(parent for parent in (self.folder.absolute(), *self.folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(there).free
        if free < 1.1 * self.num_bytes:
            raise ValueError(
                f"The feature cache needs {1.1 * self.num_bytes / 1e9:.2f} GB in {self.folder}, 10 % to spare "
                f"included, but {free / 1e9:.2f} GB are free; make room, name another disk with feature_store, or "
                "train with features = 'online'."
            )


def taught_tokens(spans: Int[Tensor, " T"]) -> Bool[Tensor, " T"]:
    """Tokens whose final state teaches: the token that row i reads at step 0, i+1, where that step is supervised.
    Later steps are taught by tokens of this same set."""
    return supervised_steps(spans[None], 1)[0, 0].roll(1)  # no row begins at the last token: nothing wraps around


def _offsets(counts: list[int]) -> list[int]:
    return list(accumulate(counts, initial=0))


def _map(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A file as a tensor, shared with the disk; made, full of zeros, where it is missing or short."""
    count = 1
    for size in shape:
        count *= size
    num_bytes = count * dtype.itemsize
    with path.open("ab") as file:
        if file.tell() != num_bytes:
            file.truncate(num_bytes)
            if hasattr(os, "posix_fallocate"):  # else a disk that fills up later kills the run, without a word
                os.posix_fallocate(file.fileno(), 0, num_bytes)
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
