"""What the commands share at the terminal: the two streams, progress, prompts. Nothing heavy is imported."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from confu.training.evaluate import Evaluation
    from confu.training.train import Report

SCHEMA_VERSION = 1


class Terminal:
    """Data goes to stdout, text for people to stderr; with ``json`` stdout carries one document and nothing else."""

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self.json, self.quiet = json, quiet
        self.out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.err = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)
        self.interactive = sys.stdin.isatty()

    @property
    def colour(self) -> bool:
        return self.out.is_terminal and self.out.color_system is not None and not self.out.no_color

    def write(self, text: str) -> None:
        """A piece of an answer, at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def say(self, text: Any, style: str = "") -> None:
        """A line for people."""
        if not self.quiet:
            self.err.print(text, style=style)

    def complain(self, sentence: str) -> None:
        self.err.print(f"confu: {sentence}")

    def document(self, **values: Any) -> None:
        self.write(json.dumps({"schema_version": SCHEMA_VERSION, **values}, ensure_ascii=False) + "\n")


class Stages:
    """A progress callback: a bar on stderr where that is a terminal, else one line for each stage."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self._stage: str | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, stage: str, fraction: float | None) -> None:
        if self.terminal.quiet:
            return
        if not self.terminal.err.is_terminal:
            if stage != self._stage:
                self.terminal.say(stage)
        elif self._bar is None or self._task is None:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=self.terminal.err,
                transient=True,
            )
            self._task = self._bar.add_task(stage, total=None)
            self._bar.start()
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, description=stage, total=None if fraction is None else 1.0, completed=fraction or 0.0
            )
        self._stage = stage

    def wait(self, stage: str, fraction: float | None = None) -> None:
        """Only where somebody watches: a stage not worth a line in a log."""
        if self.terminal.err.is_terminal:
            self(stage, fraction)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = self._stage = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class TrainingBoard:
    """A run's live numbers: a bar on stderr where that is a terminal, else one line for each report."""

    def __init__(self, terminal: Terminal, steps: int, before: Stages) -> None:
        self.terminal, self.steps, self.before = terminal, steps, before
        self.last: Report | None = None
        self.tau: Evaluation | None = None
        self._at = time.perf_counter()
        self._bar: Progress | None = None

    def show(self, report: Report) -> None:
        now, done = time.perf_counter(), report.step - self.last.step if self.last is not None else 0
        numbers = f"loss {report.loss:.3f}, accuracy {report.accuracy[0]:.3f}, {report.tokens_per_second:.0f} tok/s"
        if done:  # how long a step takes shows from the second report on
            numbers += f", {_clock((self.steps - report.step) * (now - self._at) / done)} left"
        if self.tau is not None:
            numbers += f", tau {self.tau.tau:.3f}"
        self.last, self._at = report, now
        self.before.close()
        if self.terminal.quiet:
            return
        if not self.terminal.err.is_terminal:
            self.terminal.say(f"step {report.step}/{self.steps}, {numbers}")
            return
        if self._bar is None:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self.terminal.err)
            self._bar.add_task("", total=self.steps)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=report.step, description=numbers)

    def show_tau(self, evaluation: Evaluation) -> None:
        self.tau = evaluation
        self._at += evaluation.seconds  # no part of the steps' time
        depths = " ".join(f"{rate:.2f}" for rate in evaluation.acceptance)
        self.terminal.say(
            f"step {evaluation.step}/{self.steps}, tau {evaluation.tau:.3f}, of chains {evaluation.chain_tau:.3f}, "
            f"accepted by depth {depths} ({evaluation.num_prompts} prompts, {evaluation.seconds:.0f} s)"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def as_dict(self) -> dict[str, Any]:
        last, tau = (asdict(shown) if shown is not None else None for shown in (self.last, self.tau))
        return {"last_report": last, "last_evaluation": tau}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt given as text, by ``-`` or a pipe on stdin, or in a file. Raises ValueError when there is none."""
    if prompt is not None and file is not None:
        raise ValueError("--prompt and --file are both given; leave out one.")
    if file is not None:
        try:
            text = decode_utf8(file.read_bytes(), str(file))
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror}); give the path of a text file.") from None
    elif prompt is None and sys.stdin.isatty():
        raise ValueError("No prompt was given; add --prompt TEXT, or --file PATH, or `--prompt -` for stdin.")
    elif prompt in (None, "-"):
        text = decode_utf8(sys.stdin.buffer.read(), "stdin")
    else:
        text = prompt or ""
    if not text.strip():
        raise ValueError("The prompt is empty; give at least one word.")
    return text


def decode_utf8(data: bytes, where: str) -> str:
    """Text of a file or a pipe, without the line end that closes it."""
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start}); convert it first.") from None
