"""The folder of a run: config.json, metrics.jsonl, checkpoint.pt (weights, optimiser, position) while it goes on, best/
where drafts are selected by tau, and in the end final/ with provenance.json."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from confu.config import TrainConfig, to_json
from confu.data.corpus import Corpus
from confu.draft import DraftModel
from confu.info import checkout, read_provenance
from confu.models import draft_path
from confu.training.card import write_card
from confu.training.objective import Losses
from confu.training.optimise import Trainer
from confu.training.parallel import World
from confu.training.track import open_tracker


@dataclass
class Position:
    """How far a run has come."""

    step: int = 0
    tokens_seen: int = 0
    """Supervised tokens."""
    window: list[Losses] = field(default_factory=list)
    """Steps since the last report."""
    seconds: float = 0.0
    """Time that these took."""

    def advance(self, result: Losses, seconds: float) -> None:
        self.step += 1
        self.tokens_seen += result.num_supervised
        self.window.append(result)
        self.seconds += seconds

    def begin_window(self) -> None:
        self.window, self.seconds = [], 0.0


class Run:
    """Writes a run's files; with ``writes=False`` (all processes but the first) it only reads them.

    Raises ValueError when the folder does not suit ``resume``.
    """

    def __init__(self, config: TrainConfig, *, resume: bool, writes: bool = True) -> None:
        self.config, self.writes, self.folder = config, writes, Path(config.out)
        final = self.folder / "final"
        if final.exists() and not self._checkpoint_file.exists():
            raise ValueError(f"{self.folder} holds a finished run, whose draft is {final}; choose another out folder.")
        self.best: dict[str, Any] | None = None
        """The row of metrics.jsonl with the highest tau."""
        self._state = self._read_state() if resume else None
        self._metrics: IO[str] | None = None
        # A run that ended before its first checkpoint left nothing to go on from, nor to lose.
        if not resume and self._checkpoint_file.exists():
            raise ValueError(f"{self.folder} already holds a run; go on with --resume, or choose another out folder.")

    @property
    def _checkpoint_file(self) -> Path:
        return self.folder / "checkpoint.pt"

    def check_data(self, corpus: Corpus) -> None:
        """Raises ValueError when a resumed run began with other data."""
        if self._state is not None and self._state.get("data_sha256", corpus.fingerprint) != corpus.fingerprint:
            raise ValueError(
                f"{', '.join(self.config.data)} holds other data than the run in {self.folder} began with; resume with "
                "that data, or choose another out folder."
            )

    def begin(self, trainer: Trainer, corpus: Corpus) -> Position:
        """Restore what the checkpoint holds, and open the files."""
        at = Position()
        if self._state is not None:
            trainer.draft.load_state_dict(self._state["draft"])
            trainer.optimizer.load_state_dict(self._state["optimizer"])
            position = self._state["position"]
            at = Position(**position | {"window": [Losses(**values) for values in position["window"]]})
        self._origin = provenance(self.config, corpus)  # now: the checkout may change while the run goes on
        rows = self._rows(at.step)
        self.best = max((row for row in rows if "tau" in row), key=lambda row: row["tau"], default=None)
        self._last_tau = max((row["step"] for row in rows if "tau" in row), default=0)
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._state is None:
                (self.folder / "config.json").write_text(to_json(self.config), encoding="utf-8")
            self._metrics = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")
            self._metrics.writelines(json.dumps(row) + "\n" for row in rows)
            self._metrics.flush()
            self._tracker = open_tracker(self.config.track, self.folder, dataclasses.asdict(self.config))
        self._state = None  # its memory is needed
        return at

    def log(self, row: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()
            self._tracker.log(row["step"], row)

    def wants_tau(self, step: int) -> bool:
        due = step > 0 and (step % self.config.evaluate_every == 0 or step == self.config.steps)
        return due and step != self._last_tau

    def log_tau(self, row: dict[str, Any], draft: DraftModel) -> None:
        """Keep the draft when it is the best yet, then log its row."""
        self._last_tau = row["step"]
        if self.best is None or row["tau"] > self.best["tau"]:
            self.best = row
            if self.writes:
                draft.save(self.folder / "best")
        self.log(row)

    def checkpoint(self, trainer: Trainer, at: Position) -> None:
        if trainer.store is not None:
            trainer.store.flush()
        if not self.writes:
            return
        state = {
            "draft": trainer.draft.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "position": dataclasses.asdict(at),
            "data_sha256": self._origin["data_sha256"],
        }
        partial = self.folder / "checkpoint.tmp"
        torch.save(state, partial)
        partial.replace(self._checkpoint_file)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._tracker.close()

    def finish(self, draft: DraftModel, at: Position) -> Path:
        """Write the run's draft: the best by tau where that was measured, else the last. Returns its folder."""
        final = self.folder / "final"
        if self.writes:
            facts: dict[str, Any] = {"supervised_tokens_seen": at.tokens_seen}
            if self.best is None:
                draft.save(final)
            else:
                shutil.copytree(self.folder / "best", final, dirs_exist_ok=True)
                facts = {"supervised_tokens_seen": self.best["tokens_seen"]}
                facts |= {"selected_by": "tau", "selected_step": self.best["step"], "tau": self.best["tau"]}
            text = json.dumps(self._origin | facts, indent=2) + "\n"
            (final / "provenance.json").write_text(text, encoding="utf-8")
            write_card(final, run=self.folder)
            self._checkpoint_file.unlink(missing_ok=True)
        return final

    def _read_state(self) -> dict[str, Any]:
        if not self._checkpoint_file.exists():
            raise ValueError(f"No checkpoint.pt in {self.folder}; there is nothing to resume.")
        path = self.folder / "config.json"
        begun, now = (json.loads(text) for text in (path.read_text(encoding="utf-8"), to_json(self.config)))
        # The folder is the run's own, however it is spelt.
        if differing := [name for name in begun | now if name != "out" and begun.get(name) != now.get(name)]:
            raise ValueError(
                f"The recipe differs from {path} in {', '.join(differing)}; resume with the recipe the run began with."
            )
        return torch.load(self._checkpoint_file, weights_only=True)

    def _rows(self, last_step: int) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, but for steps that will be done again."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # A line cut short by a kill does not end in a brace.
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row for row in rows if row["step"] <= last_step]


class Interrupts:
    """Ctrl-C waits for the end of a step, so that a checkpoint never holds half an update; processes that train
    together stop after the same step."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.requested = self.busy = False
        self.main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interrupts:
        if self.main:
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.previous)

    @contextmanager
    def postponed(self) -> Iterator[None]:
        self.busy = True
        yield
        self.busy = False
        if self.world.any(self.requested):
            raise KeyboardInterrupt

    def _note(self, *_: object) -> None:
        self.requested = True
        if not self.busy and self.world.size == 1:
            raise KeyboardInterrupt


def provenance(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """What makes a draft: recipe, commit, versions, data hash, seed, amount of data. So, too, of the draft before."""
    import transformers

    commit, dirty = checkout()
    before = read_provenance(draft_path(config.init)) if config.init else None
    return {
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "data_sha256": corpus.fingerprint,
        "num_documents": len(corpus.documents),
        "skipped": dict(corpus.skipped),
        "recipe": dataclasses.asdict(config),
        **({"started_from": before} if before is not None else {}),
    }
