"""Experiment trackers beside metrics.jsonl, which is always written. A tracker's package is imported when it is asked
for, and is no dependency of this one.

The trainer calls `open_tracker` once, before the first step, ``log`` with every row that it appends to metrics.jsonl,
and ``close`` at the end, also after an interrupt. A resumed run is a new run to trackio and wandb.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

TRACKERS = ("trackio", "wandb", "tensorboard")
PROJECT = "confu"


class Tracker:
    """Tracks nothing: metrics.jsonl is enough. The others override both methods."""

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Pass on a row of metrics.jsonl; what goes by depth becomes accuracy/1, accuracy/2 ..."""

    def close(self) -> None:
        """Send what is left."""


def open_tracker(name: str | None, folder: Path, config: dict[str, Any]) -> Tracker:
    """The tracker of the run in ``folder``, whose name it takes; None keeps to metrics.jsonl alone."""
    if name is None:
        return Tracker()
    module = import_tracker(name)
    if name == "tensorboard":
        return TensorBoard(folder, config)
    return Hosted(module, folder, config)


def import_tracker(name: str) -> Any:
    """Raises ValueError when the name is unknown or its package is not installed."""
    if name not in TRACKERS:
        raise ValueError(f"track is {name!r}; give {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}.")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # it is there, but something that it needs is not
        raise ValueError(f"Tracking with {name} needs its package; run `pip install {name}`.") from None


class Hosted(Tracker):
    """trackio or wandb: the same three calls. What they print goes to stderr, since stdout carries data."""

    def __init__(self, module: Any, folder: Path, config: dict[str, Any]) -> None:
        self.module = module
        with redirect_stdout(sys.stderr):
            module.init(project=PROJECT, name=folder.resolve().name, config=config)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        self.module.log(_scalars(row), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self.module.finish()


class TensorBoard(Tracker):
    """Event files in the run folder, under tensorboard/; `tensorboard --logdir` of a parent folder compares runs."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        for key, value in _scalars(row).items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name: lists are spread, what was not measured is left out, the step is said apart."""
    spread: dict[str, Any] = {}
    for key, value in row.items():
        several = isinstance(value, list)
        spread |= {f"{key}/{depth}": item for depth, item in enumerate(value, 1)} if several else {key: value}
    return {key: value for key, value in spread.items() if value is not None and key != "step"}
