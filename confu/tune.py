"""Measures what rounds cost on this machine and which trees pay here, and keeps the findings beside the draft.

`tuned.json`, for a shipped draft in the user's cache, holds one entry for each machine, number of threads, precision
and form of the target's weights: the cost model by which `Budget` sizes every tree, its limits, and the measurements
they were chosen by.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import json
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import Any

import torch

from confu import __version__
from confu.config import SamplingConfig, TreeConfig, from_dict
from confu.costs import Costs
from confu.drafter import Accepted, TreeDrafter
from confu.generate import Decoder
from confu.host import wait
from confu.info import checkout, device_name
from confu.models import SHIPPED_DRAFTS, Progress, cache_dir
from confu.stats import Stats
from confu.tree import chain
from confu.verify import Sampler, walk

logger = logging.getLogger(__name__)

FILE = "tuned.json"
PROMPTS = Path(__file__).parent / "tune_prompts.jsonl"
"""Read beside those of `lossless.py`: some with longer texts to answer by."""
SCHEMA_VERSION = 1
ROWS = (1, 2, 4, 8, 12, 16, 17, 24, 32, 33, 48, 49, 64, 96, 128, 256)  # kernels take rows by sixteen
BATCHES = (1, 2, 4, 8, 16)
USUAL_ROWS = 16  # of a verification that precedes a draft
PREFIX = 256  # tokens in the cache
ACCEPTED = 3  # tokens that a round's commit reads
LEVELS = (1, 5)
REPEATS = 7
SAME = 0.01  # of a speed-up, what two measurements of the same differ by
PASSES = 2  # of the prompts: texts differ more from each other than passes do
LOOKUP = 2  # tokens that stood before, for what followed them to be weighed against a tree
TREES = tuple(TreeConfig(nodes=64, depth=8, topk=topk, lookup=LOOKUP) for topk in (10, 6, 4, 3))
CONTEMPLATE = (None, 4, 2, 1, 0)
FEW = 1  # contemplate rows while limits are compared: with one behind every node only small trees pay
DAMAGED = "%s is damaged and is not read; run `confu tune` again"
ONLY_TRAINED = "Only a trained draft has trees to tune; name one (`confu info` lists them)."


@dataclass(frozen=True)
class Trial:
    """One way to decode the prompts."""

    name: str
    tree: TreeConfig | None
    """None is plain decoding."""
    adaptive: bool
    tokens_per_second: float
    """Prefill left out."""
    speedup: float
    """Over plain decoding of the same prompts."""
    mean_acceptance_length: float
    nodes_per_round: float
    conditional_acceptance: tuple[float, ...]
    """For each depth, the share of rounds that accepted it among those that accepted all depths before."""


@dataclass(frozen=True)
class Tuning:
    """What was found for one machine, precision and quantization."""

    tree: TreeConfig
    """Limits of the adaptive trees."""
    costs: Costs
    trials: tuple[Trial, ...]


def tune(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    progress: Progress = lambda stage, fraction: None,
) -> Tuning:
    """Measure costs, then adaptive trees of several limits beside plain decoding and the default tree, in turns, and
    with the fastest limits several numbers of contemplate rows, and no lookup; the fastest win, of as fast ones those
    with lookup, which long texts need most, and of these the fewest rows.
    Raises ValueError for a decoder whose draft scores no trees."""
    if not isinstance(decoder.drafter, TreeDrafter):
        raise ValueError(ONLY_TRAINED)
    progress("measuring costs", None)
    costs = measure(decoder, decoder.drafter, {tree.topk for tree in (*TREES, TreeConfig())})
    named = [("default tree", TreeConfig(), False)]
    contemplates = decoder.drafter.contemplation is not None
    for tree in TREES:
        tree = dataclasses.replace(tree, contemplate=FEW if contemplates else None)
        named.append((f"adaptive, top-k {tree.topk}", tree, True))
    trials = _trials(decoder, costs, named, prompts, max_new_tokens, progress)
    # Of as fast ones those that accept most: behind longer texts rounds cost more, and they need fewest.
    best, tree = _fastest(trials, lambda trial, _: trial.mean_acceptance_length)
    changes: list[tuple[str, dict[str, Any]]] = [("again", {}), ("no lookup", {"lookup": None})]
    if contemplates:
        changes[:1] = [(f"contemplate {'all' if n is None else n}", {"contemplate": n}) for n in CONTEMPLATE]
    named = [(f"{best.name}, {what}", dataclasses.replace(tree, **change), True) for what, change in changes]
    more = _trials(decoder, costs, named, prompts, max_new_tokens, progress)
    _, tree = _fastest(more, lambda _, tree: (tree.lookup is not None, -tree.num_con(tree.nodes)))
    trials += more[1:]  # plain decoding is there
    return Tuning(tree, costs[tree.topk], tuple(trials))


def _fastest(trials: list[Trial], prefer: Callable[[Trial, TreeConfig], Any]) -> tuple[Trial, TreeConfig]:
    """The adaptive trees of most speed over the plain decoding beside them, and their limits; where several are as fast
    as can be told apart, those to prefer."""
    found = [(trial, trial.tree) for trial in trials if trial.adaptive and trial.tree is not None]
    enough = (1 - SAME) * max(trial.speedup for trial, _ in found)
    return max((pair for pair in found if pair[0].speedup >= enough), key=lambda pair: prefer(*pair))


def _trials(
    decoder: Decoder,
    costs: Mapping[int, Costs],
    named: list[tuple[str, TreeConfig, bool]],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    progress: Progress,
) -> list[Trial]:
    """Plain decoding first, then each tree. All answer one prompt before the next, in another order each time, and of a
    prompt's passes the fastest counts, so that a drifting machine treats them alike."""
    target, tokenizer, count = decoder.target, decoder.tokenizer, len(prompts)
    decoders = [Decoder(target, None, tokenizer)]
    decoders += [
        Decoder(target, decoder.drafter, tokenizer, tree, costs[tree.topk] if adaptive else None)
        for _, tree, adaptive in named
    ]
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    found: list[list[Stats]] = [[] for _ in decoders]
    for engine in decoders:
        engine.generate([prompts[0]], SamplingConfig(max_new_tokens=4))
    for number in range(PASSES * count):
        progress("comparing trees", number / (PASSES * count))
        for place in range(len(decoders)):
            turn = (place + number) % len(decoders)
            found[turn].append(Stats())
            decoders[turn].generate([prompts[number % count]], sampling, stats=found[turn][-1])

    def speed(mine: list[Stats]) -> float:
        best = [
            min((s.wall_seconds - s.prefill_seconds) / s.num_tokens for s in mine[at::count]) for at in range(count)
        ]
        return count / sum(best)

    shapes: list[tuple[str, TreeConfig | None, bool]] = [("plain", None, False), *named]
    trials = []
    for (name, tree, adaptive), mine in zip(shapes, found, strict=True):
        whole = Stats(
            round_lengths=[lengths for s in mine for lengths in s.round_lengths],
            round_accepted=[accepted for s in mine for accepted in s.round_accepted],
        )
        nodes = 1 + sum(s.num_draft_tokens for s in mine) / max(1, whole.num_rounds)
        speedup, tau = speed(mine) / speed(found[0]), whole.mean_acceptance_length
        depths = tuple(whole.conditional_acceptance)
        trials.append(Trial(name, tree, adaptive, speed(mine), speedup, tau, nodes, depths))
    return trials


@torch.inference_mode()
def measure(decoder: Decoder, drafter: TreeDrafter, topks: Collection[int]) -> dict[int, Costs]:
    """The cost model of this machine for trees of each top-k: medians, all kinds and sizes in turns, so that a moment's
    disturbance hits all of them, and none much. Each is measured behind what precedes it in a round, the second time
    in turn, and so finds in the processor's caches what it finds there."""
    target = decoder.target
    prefix = min(PREFIX, target.max_positions - 1)
    tokens = (torch.arange(prefix, device=target.device) % target.vocab_size)[None]
    cache = target.new_cache(1, prefix + max(ROWS))
    target.prefill(cache, tokens, [prefix])
    sampler = Sampler(SamplingConfig(), 1)

    def verify(rows: int) -> None:
        drafted = tokens[:, :1].expand(-1, rows - 1)
        tree = chain(tokens[:, 0], drafted, torch.tensor([rows - 1], device=target.device))
        step = walk(tree, sampler.draw(target.verify(cache, tree).logits, tree))
        cache.keep(step.path, step.counts)
        cache.truncate([prefix])

    states = {batch: _committed(drafter, batch) for batch in BATCHES}

    def draft(batch: int, topk: int, depth: int) -> None:
        state, accepted = states[batch]
        drafter.commit(state, accepted)
        drafter.grow(state, TreeConfig(nodes=64, depth=depth, topk=topk))
        state.truncate([length - ACCEPTED for length in state.lengths])

    first, last = LEVELS
    drafted = partial(draft, 1, max(topks), last)
    runs: dict[Any, tuple[Callable[[], None], Callable[[], None]]] = {
        ("verify", rows): (drafted, partial(verify, rows)) for rows in ROWS
    }
    for batch, topk, depth in itertools.product(BATCHES, topks, LEVELS):
        runs["draft", batch, topk, depth] = partial(verify, max(batch, USUAL_ROWS)), partial(draft, batch, topk, depth)
    took = _medians(runs, target.device)

    def of(topk: int) -> Costs:
        shallow, deep = ([took["draft", batch, topk, depth] for batch in BATCHES] for depth in LEVELS)
        level = [max(0.0, b - a) / (last - first) for a, b in zip(shallow, deep, strict=True)]
        verify = tuple((rows, took["verify", rows]) for rows in ROWS)
        return Costs(verify, tuple(zip(BATCHES, level, strict=True)), tuple(zip(BATCHES, shallow, strict=True)))

    return {topk: of(topk) for topk in topks}


def _committed(drafter: TreeDrafter, batch: int) -> tuple[Any, Accepted]:
    """A draft state that holds a prompt, and what a round would add to it."""
    target = drafter.target
    prefix = min(PREFIX, target.max_positions - 2 * ACCEPTED)
    state = drafter.new_state(batch, prefix + 64)
    width = target.hidden_size

    def accepted(count: int, *, contemplated: bool) -> Accepted:
        zeros = torch.zeros(batch, count, dtype=torch.int64, device=target.device)
        features = torch.ones(batch, count, 3 * width, dtype=target.dtype, device=target.device)
        future = features.new_ones(batch, count, 4 * width) if contemplated else None
        return Accepted(zeros, [count] * batch, zeros[:, 0], features, future, zeros if contemplated else None)

    drafter.commit(state, accepted(prefix, contemplated=False))
    return state, accepted(ACCEPTED, contemplated=drafter.contemplation is not None)


def _medians(runs: dict[Any, tuple[Callable[[], None], Callable[[], None]]], device: torch.device) -> dict[Any, float]:
    """Milliseconds of each second function, called behind its first, as in a second round: the median of several runs,
    all in turns, each time in another order."""
    found: dict[Any, list[float]] = {key: [] for key in runs}
    order, generator = list(runs), random.Random(0)
    for _ in range(REPEATS + 1):
        generator.shuffle(order)
        for key in order:
            before, run = runs[key]
            before()
            run()
            before()
            wait(device)
            began = time.perf_counter()
            run()
            wait(device)
            found[key].append((time.perf_counter() - began) * 1e3)
    return {key: median(values[1:]) for key, values in found.items()}  # the first one warms up


def machine_key(decoder: Decoder) -> str:
    """What a tuning holds for."""
    target = decoder.target
    parts = [device_name(str(target.device)), str(target.dtype).removeprefix("torch.")]
    if target.device.type == "cpu":
        parts.insert(1, f"{torch.get_num_threads()} threads")
    if target.quantization:
        parts.append(target.quantization)
    elif getattr(target.forward_rows, "in_blocks", False):
        parts.append("GGUF blocks")
    return ", ".join([*parts, *(["compiled"] if target.compiled else [])])


def write(folder: Path, decoder: Decoder, tuning: Tuning) -> Path:
    """Keep the tuning where `read` looks: the first place that can be written to."""
    entry = dataclasses.asdict(tuning) | {
        "draft": _digest(folder),
        "confu": __version__,
        "torch": torch.__version__,
        "commit": checkout()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(),
    }

    def put(path: Path) -> None:
        document = {"schema_version": SCHEMA_VERSION, "machines": _machines(path) | {machine_key(decoder): entry}}
        partial = path.with_suffix(".tmp")  # other machines' entries outlive an interrupt
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    return _first_writable(folder, put)


def check_place(folder: Path) -> None:
    """Raises ValueError where `write` could not keep a tuning."""

    def put(path: Path) -> None:
        _machines(path)
        TemporaryFile(dir=path.parent).close()

    _first_writable(folder, put)


def _first_writable(folder: Path, put: Callable[[Path], None]) -> Path:
    """The first place of a tuning at which this succeeds."""
    for path in _places(folder):
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path)
            return path
    raise ValueError(f"Neither {folder} nor {cache_dir()} can be written to; name another folder in CONFU_CACHE.")


def read(folder: Path, decoder: Decoder) -> tuple[TreeConfig, Costs] | None:
    """Limits and costs found last for this draft on this machine; None where it was not tuned."""
    found: list[tuple[str, TreeConfig, Costs]] = []
    unused: list[tuple[str, Any]] = []  # reasons
    for path in _places(folder):
        try:
            entry = _machines(path).get(machine_key(decoder))
            if entry is None:
                continue
            if entry["draft"] == _digest(folder):
                tree = from_dict(TreeConfig, entry["tree"], source=str(path))
                found.append((str(entry["date"]), tree, from_dict(Costs, entry["costs"], source=str(path))))
            else:
                unused.append(("%s is of other weights of this draft and is not used; run `confu tune` again", path))
        except OSError as error:
            unused.append((f"%s cannot be read ({error.strerror}) and is not used", path))
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning(DAMAGED, path)
    if found:
        _, tree, costs = max(found, key=lambda one: one[0])
        return tree, costs
    for reason, path in unused:
        logger.warning(reason, path)
    return None


def _digest(folder: Path) -> str:
    """Tells a draft from another that was trained into the same folder, or shipped by the same name."""
    with suppress(OSError), (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return ""


def _places(folder: Path) -> list[Path]:
    """Beside the draft, then in the user's cache. A shipped draft's folder belongs to the installation; its name stands
    for it in every one."""
    kept = cache_dir() / "tuned"
    if folder.parent == SHIPPED_DRAFTS:
        return [kept / f"{folder.name}.json"]
    return [folder / FILE, kept / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"]


def _machines(path: Path) -> dict[str, Any]:
    """What the file holds; nothing of one that is not there or damaged. Raises OSError where it cannot be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema_version"] == SCHEMA_VERSION:
            return {**document["machines"]}
        logger.warning("%s is of another version and is not read; run `confu tune` again", path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (ValueError, KeyError, TypeError):
        logger.warning(DAMAGED, path)
    return {}
