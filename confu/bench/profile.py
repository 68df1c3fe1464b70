"""Where a round's time goes: every part of a decoding round, timed from outside, and a trace of a few rounds.

The decode loop knows nothing of it. `wrapped` puts a clock, or a named range of `torch.profiler`, around the functions
that a round calls, for as long as it is open. A call's time is its own, without that of the wrapped calls inside it,
so the parts of a round add up to the round. What the clock costs is measured, too: every question is also answered
without it.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from confu import drafter, generate, linear
from confu.attention import Attention
from confu.bench.answers import DecoderEngine
from confu.bench.methods import Method
from confu.bench.questions import Suite
from confu.bench.run import prompt_ids
from confu.bench.tables import Table, counted
from confu.cache import KVCache
from confu.config import BenchConfig, SamplingConfig
from confu.costs import Budget
from confu.draft_native import NativeDraft
from confu.drafter import Drafting
from confu.generate import Decoder
from confu.host import wait
from confu.layers import Layers
from confu.models import Progress
from confu.pages.page import NONE, number
from confu.rows import rows
from confu.stats import Stats
from confu.target import Target
from confu.verify import Sampler

TRACED = 5  # rounds
DECISIONS = ("deeper", "nodes", "rests", "chain_nodes", "note", "note_chains", "resize")
"""Of `Budget`: tree, chain or rest, how large, and what it learns."""

LAYERS, PRODUCTS, ATTENTION, ROWS = "layers at once", "products", "attention", "rows"
WRITES, LOGITS, CHOICE = "keys and values", "logits", "choice"
TARGET, DRAW, KEEP, COMMIT, LOOK, GROW, HOST = (
    "target",
    "draw and walk",
    "cache keep",
    "draft commit",
    "draft lookup",
    "draft grow",
    "bookkeeping",
)
REST, LOOP = "rest", "loop"
INSIDE = {
    TARGET: (LAYERS, PRODUCTS, ATTENTION, ROWS, WRITES, LOGITS, REST),
    LOOK: (CHOICE, REST),
    GROW: (LAYERS, PRODUCTS, CHOICE, REST),
}
PARTS = [
    f"{step}: {part}" if part else step
    for step in (TARGET, DRAW, KEEP, COMMIT, CHOICE, LOOK, GROW, HOST, LOOP)
    for part in INSIDE.get(step, ("",))
]
"""In the order of a round. What a step does beside its named parts is its rest; what lies between the steps, the
loop's."""

Wrap = Callable[[str, Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Profile:
    """One method's rounds."""

    seconds: dict[str, float]
    """Of all rounds, by part; with what the clock itself takes."""
    num_rounds: int
    num_tokens: int
    """That the rounds added."""
    bare_seconds: float
    """Of the same rounds without the clock."""
    trace: Path

    @property
    def overhead(self) -> float:
        """Speed under the clock over speed without it."""
        return self.bare_seconds / sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        total = sum(self.seconds.values())
        return {
            "parts": {
                part: {"milliseconds": 1000 * seconds / self.num_rounds, "share": seconds / total}
                for part, seconds in self.seconds.items()
            },
            "round_milliseconds": 1000 * total / self.num_rounds,
            "num_rounds": self.num_rounds,
            "tokens_per_round": self.num_tokens / self.num_rounds,
            "tokens_per_second": self.num_tokens / self.bare_seconds,
            "tokens_per_second_profiled": self.num_tokens / total,
            "overhead": self.overhead,
            "trace": str(self.trace),
        }


def profile_methods(
    suite: Suite,
    methods: Sequence[Method],
    config: BenchConfig,
    out: Path,
    *,
    progress: Progress = lambda stage, fraction: None,
) -> dict[str, Profile]:
    """Every method's rounds over the questions' first turns, and trace-METHOD.json in ``out``.

    Raises ValueError for a method whose answers took no round.
    """
    sampling = SamplingConfig(config.max_new_tokens, config.temperature, seed=config.seed)
    profiles = {}
    for place, method in enumerate(methods):
        assert isinstance(method.engine, DecoderEngine)
        decoder, size = method.engine.decoder, config.batch_size
        assert decoder.tokenizer is not None
        prompts = [prompt_ids(decoder.tokenizer, question, []) for question in suite.questions]
        batches = [prompts[first : first + size] for first in range(0, len(prompts), size)]
        decoder.generate(batches[0], sampling)  # trees of all sizes prepare what they need, before either is timed
        bare, clocked, clock = _Rounds(), _Rounds(), Clock(decoder.target.device)
        for number_done, batch in enumerate(batches):
            progress(f"profiling {method.name}", (place + number_done / len(batches)) / len(methods))
            for rounds in (bare, clocked) if number_done % 2 == 0 else (clocked, bare):
                with wrapped(decoder, clock.wrap) if rounds is clocked else nullcontext():
                    rounds.add(decoder, batch, sampling, clock)
        if clocked.num_rounds == 0:
            raise ValueError(
                f"No answer of {method.name} took a round; give more --max-new-tokens, or other questions."
            )
        trace = out / f"trace-{re.sub('[^A-Za-z0-9_.=-]+', '-', method.name)}.json"
        record(decoder, batches[0], sampling, trace)
        found = clocked.by_part()
        profiles[method.name] = Profile(found, clocked.num_rounds, clocked.num_tokens, bare.total_seconds, trace)
    return profiles


def profile_table(found: dict[str, dict[str, Any]]) -> Table:
    """`Profile.as_dict` of each method: parts down, methods across; parts that no method has are left out."""

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *map(cell, found.values())]

    def timed(milliseconds: float, share: float) -> str:
        return f"{number(milliseconds, 2)} {number(100 * share, 1).rjust(5)}" if milliseconds else NONE

    nothing = {"milliseconds": 0.0, "share": 0.0}
    lines = [
        row(part, lambda values, part=part: timed(*values["parts"].get(part, nothing).values()))
        for part in PARTS
        if any(values["parts"].get(part, nothing)["milliseconds"] for values in found.values())
    ]
    lines += [
        row("a round", lambda values: timed(values["round_milliseconds"], 1.0)),
        row("tokens a round", lambda values: number(values["tokens_per_round"], 2)),
        row("tokens/s", lambda values: number(values["tokens_per_second"], 1)),
        row("under the clock", lambda values: number(values["tokens_per_second_profiled"], 1)),
        row("ratio", lambda values: number(values["overhead"], 3)),
    ]
    return Table("Where a round's time goes", ["ms, %", *found], lines)


def profile_conditions(run: dict[str, Any]) -> str:
    """On what it was measured, by what `describe` says of the run."""
    return (
        f"{counted(run['num_questions'], 'question')} of {run['suite']}, {run['target']} in {run['dtype']} on "
        f"{run['device']}, {counted(run['machine']['threads'], 'thread')}, batch {run['batch_size']}; prefill left "
        "out; the clock's own time is in the parts, mostly in each rest."
    )


class Clock:
    """Seconds by step of the round and by part of it, of the functions that `wrap` was given."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._device = device
        self._open: list[str] = []
        self._inside = [0.0]  # seconds of the wrapped calls inside each open one

    def now(self) -> float:
        wait(self._device)
        return time.perf_counter()

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        now, names, inside, seconds = self.now, self._open, self._inside, self.seconds

        def call(*args: Any, **options: Any) -> Any:
            began = now()
            names.append(part)
            inside.append(0.0)
            try:
                return function(*args, **options)
            finally:
                took = now() - began
                seconds[names[0], part] += took - inside.pop()
                inside[-1] += took
                names.pop()

        return call


@contextmanager
def wrapped(decoder: Decoder, wrap: Wrap) -> Iterator[None]:
    """``wrap`` every function of the parts of a round, and put back what was there before."""
    head = getattr(decoder.target.forward_rows, "head", decoder.target.model.get_output_embeddings())
    kinds = (linear.Product, linear.PackedProduct, linear.Int8Product, linear.RoughProduct, linear.TileProduct)
    products = {kind: (wrap(PRODUCTS, kind.__call__), wrap(LOGITS, kind.__call__)) for kind in kinds}
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (kind, "__call__", lambda module, x, calls=calls: calls[module is head](module, x))
        for kind, calls in products.items()
    ]
    named: list[tuple[str, Any, tuple[str, ...]]] = [
        (TARGET, Target, ("verify",)),
        (LAYERS, Layers, ("__call__",)),
        (LAYERS, NativeDraft, ("layer", "grow")),
        (ATTENTION, Attention, ("__call__",)),
        (ATTENTION, torch.nn.functional, ("scaled_dot_product_attention",)),  # of transformers' models
        (ROWS, type(rows()), ("add_norm", "rotate", "gate")),
        (WRITES, KVCache, ("update",)),
        (DRAW, Sampler, ("draw",)),
        (DRAW, generate, ("walk",)),
        (KEEP, KVCache, ("keep",)),
        (HOST, generate._Running, ("emit", "note_cached", "drop_finished")),
    ]
    if decoder.drafter is not None:
        named += [(COMMIT, type(decoder.drafter), ("commit",)), (GROW, type(decoder.drafter), ("grow",))]
        named += [(LOOK, Drafting, ("_repeats",)), (LOOK, drafter, ("chains",)), (CHOICE, Budget, DECISIONS)]
    places += [(owner, name, wrap(part, getattr(owner, name))) for part, owner, names in named for name in names]
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    try:
        for owner, name, function in places:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in before:
            if function is None:  # it was inherited
                delattr(owner, name)
            else:
                setattr(owner, name, function)


def record(decoder: Decoder, prompts: Sequence[list[int]], sampling: SamplingConfig, path: Path) -> None:
    """A Chrome trace of the first rounds, in which every part is a named range around torch's own operations."""

    def ranged(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with record_function(part):
                return function(*args, **options)

        return call

    activities = [ProfilerActivity.CPU]
    if decoder.target.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it logs its beginning and end to stderr
    stats = Stats()
    with wrapped(decoder, ranged):
        stream = decoder.stream(prompts, sampling, stats=stats)
        next(stream)  # the prefill is no round
        with torch.profiler.profile(activities=activities) as trace:
            for _ in stream:
                if _num_rounds(stats) >= TRACED:
                    break
    trace.export_chrome_trace(str(path))


@dataclass
class _Rounds:
    """What the rounds of some answers took in all."""

    num_rounds: int = 0
    num_tokens: int = 0
    total_seconds: float = 0.0
    seconds: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    def add(self, decoder: Decoder, prompts: Sequence[list[int]], sampling: SamplingConfig, clock: Clock) -> None:
        """Answer a batch; the rounds begin behind the first token, which the prefill gives."""
        stats = Stats()
        stream = decoder.stream(prompts, sampling, stats=stats)
        next(stream)
        clock.seconds.clear()
        began = clock.now()
        for _ in stream:
            pass
        self.total_seconds += clock.now() - began
        self.num_rounds += _num_rounds(stats)
        self.num_tokens += stats.num_tokens - len(prompts)
        for key, seconds in clock.seconds.items():
            self.seconds[key] += seconds

    def by_part(self) -> dict[str, float]:
        found = dict.fromkeys(PARTS, 0.0)
        for (step, part), seconds in self.seconds.items():
            if step in INSIDE:
                found[f"{step}: {part if part in INSIDE[step] else REST}"] += seconds
            elif step in found:
                found[step] += seconds
        found[LOOP] = self.total_seconds - sum(found.values())
        return found


def _num_rounds(stats: Stats) -> int:
    """A round of a batch counts once."""
    return max(map(len, stats.round_lengths))
